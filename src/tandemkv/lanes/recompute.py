"""The recompute lane (KVPR, 2411.17089): K and V of the first tokens are made again, on the device, from what entered
their layer. It lies near (the paper's row schedule), or comes up before anything else (its column schedule)."""

from itertools import pairwise

from torch import Tensor

from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.lanes.rig import Rig
from tandemkv.lanes.shares import Weighed, joined, room_like
from tandemkv.lanes.tickets import Ticket
from tandemkv.types import PagedKV


def recompute(task: Task, share: PagedKV) -> DeviceWork:
    """See `Lane`. Piece by piece: between two of them the device does what others have waiting."""
    rig, inputs = task.rig, task.inputs
    assert isinstance(rig, Rig), "a CUDA device rebuilds nothing yet"
    assert inputs is not None, "a plan rebuilds no more than what inputs are kept of"
    pieces, ends = share.cut(task.piece_tokens), [0]
    for piece in pieces:
        ends.append(ends[-1] + piece.page_table.shape[2] * piece.entry_tokens)
    xs = [inputs.x(begin, end) for begin, end in pairwise(ends)]
    sent = [rig.done if inputs.are_near else _send(rig, x) for x in xs]
    parts = []
    try:
        for piece, x, ticket, (begin, end) in zip(pieces, xs, sent, pairwise(ends), strict=True):
            yield ticket
            k, v = inputs.kv(begin, end, x)
            mass = room_like(task.mass, task.q, piece)
            parts.append(Weighed(rig.attend_rows(task.q, (k, v), piece, task.rule, mass), mass))
    finally:
        for ticket in sent:
            ticket.cancel()
    return joined(parts, task.mass)


def _send(rig: Rig, x: Tensor) -> Ticket[None]:
    """It may wait beside the device, whatever is rebuilt then: a link that streams has slots to fill."""
    return rig.send_up("recompute", x.nbytes, lambda: None, Ticket(rig.bell, is_patient=True))
