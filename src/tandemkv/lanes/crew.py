"""Who works on the steps of a cache: a rig, and the scheduler that splits a layer's far tokens over its lanes."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.errors import LaneError, LaneWarning
from tandemkv.lanes.base import DeviceWork, Inputs, Task, drive
from tandemkv.lanes.rig import Rig
from tandemkv.lanes.shares import Weighed, put_shares, room_like
from tandemkv.lanes.table import LANES
from tandemkv.lanes.tickets import Span, Ticket
from tandemkv.schedule import COSTS, Plan, Scheduler, Solution, Work
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.types import PagedKV, Partial, ScoreRule

_SHORTEST_DEADLINE_S = 1.0
_DEADLINE_STEPS = 20.0
"""A lane that takes so many times what a step is predicted to take has stalled."""


class Share(NamedTuple):
    """Far tokens that a lane attends to. first_slot: of the staging slots that are its own."""

    lane: str
    run: PagedKV
    first_slot: int


class Step(NamedTuple):
    """A step that is over: how it was planned, who was busy with what, from when to when (`time.perf_counter`)."""

    solution: Solution
    spans: list[Span]
    begin: float
    end: float


class Crew:
    """A rig and its scheduler. The thread that calls is the device."""

    def __init__(self, rig: Rig, scheduler: Scheduler, *, stages_heads: bool = False) -> None:
        """stages_heads: what a prompt needs of far tokens comes up one KV head after the other (HeadInfer)."""
        self.rig, self.scheduler, self.stages_heads = rig, scheduler, stages_heads
        self.plan: Plan | None = None  # of the last step
        self.on_step: Callable[[Step], None] | None = None  # told of every step when it is over
        self._sent: list[tuple[PagedKV, Ticket[PagedKV]]] = []  # ahead

    def close(self) -> None:
        """End the rig's threads; no step follows."""
        self.rig.close()

    def attend(
        self,
        q: Tensor,
        near: PagedKV,
        far: tuple[PagedKV, ...],
        rule: ScoreRule,
        inputs: Inputs | None = None,
        mass: Tensor | None = None,
    ) -> Partial:
        """Attention over near and far tokens; queries are the last of the near ones.

        far: the first run is split by the plan; others go whole to one lane. inputs: of the first tokens, where kept.
        mass: what `kernels.block_mass` made for far runs and near ones, to be filled.
        """
        begin = time.perf_counter()
        solution = self.scheduler.plan(work_of(q, near, far, inputs))
        plan = self.plan = solution.plan
        task = Task(q, rule, self.rig, plan.stage_tokens, plan.piece_tokens, inputs)
        shares = split(plan, self.scheduler.lanes, far)
        deadline_s = deadline_of(solution)
        rooms = {name: room_like(mass, q, run) for name, run in (*_runs(shares), ("near", near))}
        of_near = task._replace(mass=rooms["near"])
        try:
            works = _begun(task, shares, rooms, self._taken_up(shares))
            outcome = drive(lambda: self._attend_near(of_near, near), works, self.rig, deadline_s)
        except BaseException:
            self.rig.trace.take()  # it is no step's
            raise
        parts = outcome.parts | self._without(task, shares, outcome.failed, deadline_s, rooms)
        whole = kernels.merge([parts[name] for name in ("near", *shares)])
        if mass is not None:
            put_shares([Weighed(parts[name], rooms[name]) for name in (*shares, "near")], whole.lse, mass)
        self._tell(solution, begin, is_whole=not outcome.failed)
        return whole

    def _tell(self, solution: Solution, begin: float, *, is_whole: bool) -> None:
        """The scheduler, and whoever listens, of a step that is over; of one in which a lane failed not the former."""
        spans, end = self.rig.trace.take(), time.perf_counter()
        if is_whole:
            self.scheduler.observe(solution, _seconds(spans), end - begin)
        if self.on_step is not None:
            self.on_step(Step(solution, spans, begin, end))

    def send_ahead(self, far: tuple[PagedKV, ...]) -> None:
        """Let the first of what a layer will stream cross the link while the device is at something else, as far as
        there are slots. The layer takes it up if it streams just these pages, with the same plan."""
        self._cancel_sent()
        plan = self.plan
        if plan is None or not far or plan.num_tokens != far[0].page_table.shape[2] * far[0].entry_tokens:
            return
        if plan.tokens.get("recompute"):  # its inputs come before anything else
            return
        shares = split(plan, self.scheduler.lanes, far)
        for i, stage in enumerate(_stages(shares, plan)):
            landing = self.rig.landing(stage, shares["stream"].first_slot + i)
            self._sent.append((stage, self.rig.send_pages("stream", stage, landing)))

    def _taken_up(self, shares: Mapping[str, Share]) -> list[Ticket[PagedKV]]:
        """What was sent ahead, where these shares begin with it: all of it, or it is sent again."""
        assert self.plan is not None
        stages, sent = _stages(shares, self.plan), [stage for stage, _ in self._sent]
        if len(stages) != len(sent) or not all(_are_same(*pair) for pair in zip(stages, sent, strict=True)):
            self._cancel_sent()
        tickets, self._sent = [ticket for _, ticket in self._sent], []
        return tickets

    def _cancel_sent(self) -> None:
        if self._sent:  # nothing else is on its way between two layers
            self.rig.clear()
        for _, ticket in self._sent:
            ticket.cancel()
        self._sent = []

    def _attend_near(self, task: Task, near: PagedKV) -> Partial:
        pool = self.rig.device_pool
        return kernels.attend(task.q, near, rule=task.rule, causal=True, mass=task.mass, pool=pool)

    def _without(
        self,
        task: Task,
        shares: Mapping[str, Share],
        failed: Mapping[str, Exception],
        deadline_s: float,
        rooms: dict[str, Tensor | None],
    ) -> dict[str, Partial]:
        """The shares of lanes that failed, by others; LaneError where none is left. Their masses get new rooms: a lane
        that has stalled may still write into its own."""
        parts: dict[str, Partial] = {}
        for name, error in failed.items():
            lane, run, first_slot = shares[name]
            if lane in self.scheduler.lanes:
                warnings.warn(
                    f"the lane {lane!r} has failed ({error}): steps go on without it", LaneWarning, stacklevel=4
                )
                self.scheduler.drop(lane)
            others = {name: Share(_whole_lane(self.scheduler.lanes), run, first_slot)}
            rooms[name] = room_like(rooms[name], task.q, run)
            again = drive(None, _begun(task, others, rooms), self.rig, deadline_s)
            parts |= again.parts | self._without(task, others, again.failed, deadline_s, rooms)
        return parts


def deadline_of(solution: Solution) -> float:
    """Seconds after which a lane has stalled."""
    return max(_SHORTEST_DEADLINE_S, _DEADLINE_STEPS * solution.prediction.seconds)


def split(plan: Plan, lanes: Sequence[str], far: tuple[PagedKV, ...]) -> dict[str, Share]:
    """The far tokens of every lane, under a name: the oldest are those of the first one in the table of costs."""
    shares: dict[str, Share] = {}
    begin = 0
    for name in COSTS:
        if num_tokens := plan.tokens.get(name, 0):
            end = begin + num_tokens // far[0].entry_tokens
            shares[name] = Share(name, far[0].part(begin, end), NUM_SLOTS * len(shares))
            begin = end
    for i, run in enumerate(far[1:], 2):
        shares[f"run {i}"] = Share(_whole_lane(lanes), run, NUM_SLOTS * len(shares))
    return shares


def _whole_lane(lanes: Sequence[str]) -> str:
    """Of these the one that can take any tokens, whatever they stand for; LaneError where there is none, since only the
    first tokens can be rebuilt."""
    for name in ("attend", "stream", "logits"):
        if name in lanes:
            return name
    raise LaneError(f"of {', '.join(lanes)} no lane can take the tokens of another: allow attend, stream or logits")


def _stages(shares: Mapping[str, Share], plan: Plan) -> list[PagedKV]:
    """The first of what is streamed, as many as there are slots."""
    share = shares.get("stream")
    return [] if share is None else share.run.cut(plan.stage_tokens)[:NUM_SLOTS]


def _are_same(run: PagedKV, other: PagedKV) -> bool:
    """Whether both are the same pages; of blocks, those of every head."""
    return (
        run.arena is other.arena
        and run.of_blocks == other.of_blocks
        and torch.equal(run.page_table, other.page_table)
        and torch.equal(run.kv_len, other.kv_len)
    )


def _runs(shares: Mapping[str, Share]) -> Iterator[tuple[str, PagedKV]]:
    return ((name, share.run) for name, share in shares.items())


def _begun(
    task: Task,
    shares: Mapping[str, Share],
    rooms: Mapping[str, Tensor | None],
    sent: Sequence[Ticket[PagedKV]] = (),
) -> dict[str, DeviceWork]:
    """The lanes' work. sent: of what the plan streams, what is on its way."""
    works = {}
    for name, (lane, run, first_slot) in shares.items():
        its = task._replace(mass=rooms[name], sent=sent if name == "stream" else (), first_slot=first_slot)
        works[name] = LANES[lane](its, run)
    return works


def work_of(q: Tensor, near: PagedKV, far: tuple[PagedKV, ...], inputs: Inputs | None = None) -> Work:
    """What this step has to do, in numbers."""
    rebuilds = inputs is not None and far and not far[0].of_blocks  # of a choice of blocks, none is the first
    arena, page_size = near.arena, near.arena.layout.page_size
    far_tokens = far[0].page_table.shape[2] * far[0].entry_tokens if far else 0
    k_bytes, v_bytes = _token_bytes(far[0] if far else near)
    return Work(
        num_seqs=q.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=arena.num_kv_heads,
        head_dim=arena.head_dim,
        v_head_dim=arena.v_head_dim,
        near_tokens=near.page_table.shape[2] * page_size,  # whole pages, so that a plan is not asked for at every token
        far_tokens=far_tokens,
        k_bytes=k_bytes,
        v_bytes=v_bytes,
        near_bytes=sum(_token_bytes(near)),
        item_bytes=q.element_size(),
        page_size=far[0].entry_tokens if far else page_size,
        hidden=inputs.hidden if inputs is not None else 0,
        num_inputs=inputs.num_tokens if inputs is not None and rebuilds else 0,
        inputs_are_near=inputs is None or inputs.are_near,
    )


def _token_bytes(run: PagedKV) -> tuple[float, float]:
    """K and V of a token, all KV heads."""
    part = run.arena.parts[0]
    per_page = part.layout.page_size * part.num_slots
    return part.k.nbytes / per_page, part.v.nbytes / per_page


def _seconds(spans: list[Span]) -> dict[tuple[str, str], float]:
    """Of every lane on every resource."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for row, name, begin, end in spans:
        found[name, row] += end - begin
    return dict(found)
