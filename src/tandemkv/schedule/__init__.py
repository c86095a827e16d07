"""What takes part in a step where: speeds, cost of every lane, solver, feedback. Pure numbers, no tensors."""

from tandemkv.schedule.costs import COSTS, Prediction, predict
from tandemkv.schedule.scheduler import Scheduler
from tandemkv.schedule.solver import Solution, solve
from tandemkv.schedule.speeds import Machine, Products, Speed
from tandemkv.schedule.work import Plan, Work

__all__ = [
    "COSTS",
    "Machine",
    "Plan",
    "Prediction",
    "Products",
    "Scheduler",
    "Solution",
    "Speed",
    "Work",
    "predict",
    "solve",
]
