"""The stream lane (FlexGen, 2303.06865): pages come over the link into staging slots, and the device attends there."""

from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.lanes.rig import Rig
from tandemkv.lanes.shares import Weighed, joined, room_like
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.types import PagedKV


def stream(task: Task, share: PagedKV) -> DeviceWork:
    """See `Lane`. A slot is filled while the device reads the other: double-buffered."""
    rig, stages = task.rig, share.cut(task.stage_tokens)
    assert isinstance(rig, Rig), "pages of a CUDA device are not staged yet"
    tickets = [*task.sent, *(rig.send_pages("stream", stage) for stage in stages[len(task.sent) : NUM_SLOTS])]
    parts = []
    try:
        for i in range(len(stages)):
            yield tickets[i]
            stage = tickets[i].result()
            mass = room_like(task.mass, task.q, stage)
            parts.append(Weighed(rig.attend(task.q, stage, task.rule, mass), mass))
            if i + NUM_SLOTS < len(stages):  # the slot that was read is free
                tickets.append(rig.send_pages("stream", stages[i + NUM_SLOTS]))
    finally:
        for ticket in tickets:
            ticket.cancel()
    return joined(parts, task.mass)
