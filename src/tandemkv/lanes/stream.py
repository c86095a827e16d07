"""The stream lane (FlexGen, 2303.06865): pages come over the link into staging slots, and the device attends there."""

from tandemkv import kernels
from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.lanes.rig import Rig
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.types import PagedKV


def stream(task: Task, share: PagedKV) -> DeviceWork:
    """See `Lane`. A slot is filled while the device reads the other: double-buffered."""
    rig, stages = task.rig, share.cut(task.stage_tokens)
    assert isinstance(rig, Rig), "pages of a CUDA device are not staged yet"
    tickets = [rig.send_pages("stream", stage) for stage in stages[:NUM_SLOTS]]
    parts, begin = [], 0
    try:
        while begin < len(stages):
            yield tickets[begin]
            end = begin + 1
            while end < len(tickets) and tickets[end].is_done:  # what has come meanwhile goes along
                end += 1
            parts.append(rig.attend(task.q, [ticket.result() for ticket in tickets[begin:end]], task.rule))
            begin = end
            for stage in stages[len(tickets) : begin + NUM_SLOTS]:  # the slots that were read are free
                tickets.append(rig.send_pages("stream", stage))
    finally:
        for ticket in tickets:
            ticket.cancel()
    return kernels.merge(parts)
