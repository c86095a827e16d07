"""Ways for far KV to take part in a step. A new one is a file here, a line in the table, and a cost in schedule."""

from tandemkv.lanes.base import Inputs, Lane, Task, drive
from tandemkv.lanes.crew import Crew
from tandemkv.lanes.flags import DeviceFlags
from tandemkv.lanes.hybrid import Ahead, FarQuestion, HybridCrew
from tandemkv.lanes.l2 import pull_into_l2
from tandemkv.lanes.rig import Rig, TorchRig
from tandemkv.lanes.staging import Staging
from tandemkv.lanes.table import LANES
from tandemkv.lanes.up import bring_up

__all__ = [
    "LANES",
    "Ahead",
    "Crew",
    "DeviceFlags",
    "FarQuestion",
    "HybridCrew",
    "Inputs",
    "Lane",
    "Rig",
    "Staging",
    "Task",
    "TorchRig",
    "bring_up",
    "drive",
    "pull_into_l2",
]
