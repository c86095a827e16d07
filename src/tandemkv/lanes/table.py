"""The lanes by name; what each costs is in `schedule/costs.py`, by the same name."""

from tandemkv.lanes.attend import attend
from tandemkv.lanes.base import Lane
from tandemkv.lanes.logits import logits
from tandemkv.lanes.recompute import recompute
from tandemkv.lanes.stream import stream

LANES: dict[str, Lane] = {"recompute": recompute, "attend": attend, "logits": logits, "stream": stream}
