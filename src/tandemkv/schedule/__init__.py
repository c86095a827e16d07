"""What takes part in a step where: speeds, cost of every lane, solver, feedback. Pure numbers, no tensors."""

from tandemkv.schedule.costs import COSTS, Prediction, predict
from tandemkv.schedule.profile import Kernels, Profile, Tier, Transfers
from tandemkv.schedule.scheduler import Scheduler
from tandemkv.schedule.solver import Solution, solve
from tandemkv.schedule.speeds import Machine, Products, Speed
from tandemkv.schedule.work import Plan, Work

__all__ = [
    "COSTS",
    "Kernels",
    "Machine",
    "Plan",
    "Prediction",
    "Products",
    "Profile",
    "Scheduler",
    "Solution",
    "Speed",
    "Tier",
    "Transfers",
    "Work",
    "predict",
    "solve",
]
