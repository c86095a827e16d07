"""The stream lane (FlexGen, 2303.06865): pages come over the link into staging slots, and the device attends there."""

from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.lanes.rig import Rig
from tandemkv.lanes.shares import Weighed, joined, room_like
from tandemkv.lanes.tickets import Ticket
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.types import PagedKV


def stream(task: Task, share: PagedKV) -> DeviceWork:
    """See `Lane`. A slot is filled while the device reads the other: double-buffered."""
    rig, stages = task.rig, share.cut(task.stage_tokens)
    assert isinstance(rig, Rig), "pages of a CUDA device are not staged yet"
    landings = [rig.landing(stage, task.first_slot + i % NUM_SLOTS) for i, stage in enumerate(stages)]

    def send(i: int) -> Ticket[PagedKV]:
        return rig.send_pages("stream", stages[i], landings[i])

    tickets = [*task.sent, *(send(i) for i in range(len(task.sent), min(NUM_SLOTS, len(stages))))]
    # All calls at once, while the first stage is on its way: one by one, between stages, each took four times as long,
    # because attention to a stage leaves nothing of Python in the caches.
    masses = [room_like(task.mass, task.q, landing) for landing in landings]
    calls = [rig.prepare_attend(task.q, landings[i], task.rule, masses[i]) for i in range(len(stages))]
    parts = []
    try:
        for i, call in enumerate(calls):
            yield tickets[i]
            tickets[i].result()  # raises what a copy raised; a small one is made here
            parts.append(Weighed(call.make(), masses[i]))
            if i + NUM_SLOTS < len(stages):  # the slot that was read is free
                tickets.append(send(i + NUM_SLOTS))
    finally:
        for ticket in tickets:
            ticket.cancel()
    return joined(parts, task.mass)
