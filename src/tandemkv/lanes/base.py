"""What every lane is: work of the device that goes on whenever something has come from elsewhere."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from tandemkv.errors import LaneError, TandemError
from tandemkv.lanes.rig import AnyRig
from tandemkv.lanes.tickets import LONGEST_WAIT_S, Ticket
from tandemkv.types import PagedKV, Partial, ScoreRule

DeviceWork = Generator[Ticket[Any], None, Partial]
"""What the device does for a lane. It yields a ticket where it can only go on when that is done: until then the device
works for others. Its value is the attention over the lane's tokens."""


class Inputs(NamedTuple):
    """What entered a layer with its first num_tokens tokens, kept near, or far, where it has to come up.

    x: of tokens [begin, end), `[num_seqs, tokens, hidden]`. kv: K and V of them, made of it again, as a layer reads
    them.
    """

    num_tokens: int
    are_near: bool
    hidden: int
    x: Callable[[int, int], Tensor]
    kv: Callable[[int, int, Tensor], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """A step of one layer, as lanes are told of it.

    q: `[num_seqs, num_q_heads, q_len, head_dim]` on the device. stage_tokens: that go over a link at once.
    piece_tokens: that are rebuilt at once. mass: what `kernels.block_mass` made for a lane's tokens, to be filled with
    their shares of its own result; None where nobody observes. It stays where it is made, beside what selects. sent:
    of the stages that are streamed, the first, which are on their way already. first_slot: of those that this lane may
    fill.
    """

    q: Tensor
    rule: ScoreRule
    rig: AnyRig
    stage_tokens: int = 1024
    piece_tokens: int = 256
    inputs: Inputs | None = None
    mass: Tensor | None = None
    sent: Sequence[Ticket[PagedKV]] = ()
    first_slot: int = 0


class Lane(Protocol):
    """Begins attention of a task's queries over these far tokens, and hands out what the device has to do for it."""

    def __call__(self, task: Task, share: PagedKV) -> DeviceWork:
        """The work's first step sends off what others do."""


class Outcome(NamedTuple):
    """What the device and the lanes came to: partial results, that of `near` among them, and why lanes gave none."""

    parts: dict[str, Partial]
    failed: dict[str, Exception]


class _Waiting(NamedTuple):
    work: DeviceWork
    ticket: Ticket[Any]
    since: float


def drive(
    near: Callable[[], Partial] | None, works: Mapping[str, DeviceWork], rig: AnyRig, deadline_s: float = math.inf
) -> Outcome:
    """Run the device's work on this thread: every lane's beginning, near tokens, then of the lanes that can go on the
    first, patient ones last, until all have come to their end.

    A lane whose ticket takes longer than deadline_s to come, or that raises anything but an error of ours, has failed:
    the others go on without it. Errors of ours, such as a NaN in q, are raised, as are those of `near`; nobody reads
    pages then any more but a link that really copies, which ends the stage it is at.
    """
    parts: dict[str, Partial] = {}
    failed: dict[str, Exception] = {}
    waiting: dict[str, _Waiting] = {}
    try:
        for name, work in works.items():
            _go_on(name, work, rig, waiting, parts, failed)
        if near is not None:
            begin = time.perf_counter()
            parts["near"] = near()
            rig.trace.add("device", "near", begin, time.perf_counter())
        while waiting:
            name = _next(waiting, rig, deadline_s)
            work, ticket, since = waiting.pop(name)
            if ticket.is_done:
                _go_on(name, work, rig, waiting, parts, failed)
                continue
            ticket.cancel()
            work.close()
            rig.clear()
            failed[name] = LaneError(f"nothing came within {time.perf_counter() - since:.3g} s")
    except BaseException:
        _abandon(waiting.values(), rig)
        raise
    rig.host.note_ended()
    return Outcome(parts, failed)


def _go_on(
    name: str,
    work: DeviceWork,
    rig: AnyRig,
    waiting: dict[str, _Waiting],
    parts: dict[str, Partial],
    failed: dict[str, Exception],
) -> None:
    """A lane's work up to the next ticket that it has to wait for."""
    begin = time.perf_counter()
    try:
        ticket = next(work)
        waiting[name] = _Waiting(work, ticket, time.perf_counter())
    except StopIteration as end:
        parts[name] = end.value
    except (TandemError, AssertionError):
        raise
    except Exception as error:  # noqa: BLE001  the caller is told
        failed[name] = error
    rig.trace.add("device", name, begin, time.perf_counter())


def _next(waiting: Mapping[str, _Waiting], rig: AnyRig, deadline_s: float) -> str:
    """The first that can go on, waiting for it; or the one that has waited for too long."""
    while True:
        num_rung = rig.bell.num_rung  # before they are asked: what comes meanwhile is not slept through
        ready = {name: each.ticket.ready_at for name, each in waiting.items()}
        now = time.perf_counter()
        if (next_at := min(ready.values())) <= now:
            there = (
                (waiting[name].ticket.is_patient, waiting[name].since, name) for name in ready if ready[name] <= now
            )
            return min(there)[2]
        since, oldest = min((each.since, name) for name, each in waiting.items())
        if now >= since + deadline_s:
            return oldest
        rig.bell.wait(num_rung, min(next_at, since + deadline_s, now + LONGEST_WAIT_S))


def _abandon(waiting: Iterable[_Waiting], rig: AnyRig) -> None:
    for work, ticket, _ in waiting:
        ticket.cancel()
        work.close()
    rig.clear()
    rig.host.settle()
