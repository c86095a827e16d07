"""Ways for far KV to take part in a step. A new one is a file here and a line in the table."""

from tandemkv.lanes import attend
from tandemkv.lanes.base import Lane, PendingPartial

LANES: dict[str, Lane] = {"attend": attend.start}

__all__ = ["LANES", "Lane", "PendingPartial"]
