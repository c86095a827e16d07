"""Steps of one layer, run on this machine: pages of random keys and values, a rig, and what each step took."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.cache import CacheSpec
from tandemkv.errors import CapacityError
from tandemkv.lanes import Crew, Inputs
from tandemkv.lanes.crew import Step
from tandemkv.lanes.timeline import Recorder
from tandemkv.profiling import random_arena
from tandemkv.schedule import Machine, Plan, Work
from tandemkv.schedule.costs import RESOURCES
from tandemkv.schedule.feedback import WINDOW
from tandemkv.schedule.scheduler import SECONDS_TO_CORRECT, STEPS_TO_CORRECT
from tandemkv.types import PagedKV, PageLayout, ScoreRule, format_bytes

COLD_BYTES = 512 << 20
"""Steps take turns over so many bytes: what one read, the next one does not find in a cache."""

_SETTLING_ROUNDS = 4
"""At most, each of a plan and as many steps as feedback takes to believe in; none where the plan stays."""


class _Turn(NamedTuple):
    """What a step attends to."""

    near: PagedKV
    far: tuple[PagedKV, ...]
    inputs: Inputs | None


@dataclass(frozen=True)
class Measured:
    """What the steps of a group took, medians, and the machine that their plan was solved for: corrected by feedback.

    seconds: of a step, from its call to its end. middle_half: of these. resources: seconds in which a resource is at
    work. busy: seconds by lane and resource.
    """

    plan: Plan
    decided_on: Machine
    seconds: float
    middle_half: tuple[float, float]
    resources: Mapping[str, float]
    busy: Mapping[str, Mapping[str, float]]
    steps: list[Step]
    median_step: Step

    @property
    def busiest(self) -> str:
        """The resource that was at work longest."""
        return max(self.resources, key=lambda name: self.resources[name])


class Layer:
    """A layer of random keys, values and inputs, several times over."""

    def __init__(self, work: Work, spec: CacheSpec, window: int | None) -> None:
        """CapacityError, with the arithmetic, where that is more than this machine has left."""
        self.work, self.rule = work, ScoreRule(work.head_dim**-0.5, window=window)
        self._dtype = spec.dtype
        near_pages, far_pages = -(-work.near_tokens // work.page_size), work.far_tokens // work.page_size
        near, far = spec.near_layout, spec.far_layouts[-1]
        num_turns = self._num_turns(near_pages, far_pages, near, far)
        near_runs = self._runs(near, near_pages, work.near_tokens, num_turns)
        far_runs = self._runs(far, far_pages, work.far_tokens, num_turns) if far_pages else []
        inputs = self._inputs(num_turns)
        self._turns = [
            _Turn(near_runs[i], tuple(far_runs[i : i + 1]), inputs[i] if inputs else None) for i in range(num_turns)
        ]
        self._q = torch.randn((work.num_seqs, work.num_q_heads, 1, work.head_dim)).to(self._dtype)
        self._num_steps = 0

    def step(self, crew: Crew) -> None:
        """One step, over the pages whose turn it is."""
        near, far, inputs = self._turns[self._num_steps % len(self._turns)]
        self._num_steps += 1
        crew.attend(self._q, near, far, self.rule, inputs)

    def _num_turns(self, near_pages: int, far_pages: int, near: PageLayout, far: PageLayout) -> int:
        work = self.work
        dims = work.num_kv_heads, work.head_dim, work.v_head_dim
        kv_bytes = work.num_seqs * (near_pages * near.page_bytes(*dims) + far_pages * far.page_bytes(*dims))
        input_bytes = work.num_seqs * work.num_inputs * work.input_bytes
        num_turns = -(-COLD_BYTES // (kv_bytes + input_bytes))
        needed, available = num_turns * (kv_bytes + input_bytes), machine.available_bytes()
        if needed > available.num_bytes:
            inputs = f" and {format_bytes(input_bytes)} of layer inputs" if input_bytes else ""
            raise CapacityError(
                f"steps of one layer take {num_turns} times {format_bytes(kv_bytes)} of keys and values{inputs}, "
                f"{format_bytes(available.num_bytes)} are left ({available.limit}): lower --context or --batch, or "
                "predict alone with --no-run"
            )
        return num_turns

    def _runs(self, layout: PageLayout, num_pages: int, num_tokens: int, num_turns: int) -> list[PagedKV]:
        num_seqs, num_heads = self.work.num_seqs, self.work.num_kv_heads
        arena = random_arena(
            layout, num_turns * num_seqs * num_pages, num_heads, self.work.head_dim, self.work.v_head_dim
        )
        slots = torch.arange(arena.num_slots, dtype=torch.int32, device="cpu").view(num_turns, num_seqs, 1, num_pages)
        start, end = torch.zeros(num_seqs, dtype=torch.int64), torch.full((num_seqs,), num_tokens)
        return [PagedKV(arena, table.expand(-1, num_heads, -1), start, end) for table in slots]

    def _inputs(self, num_turns: int) -> list[Inputs]:
        """Random inputs and weights of the keys and values: products alone, without norm and RoPE."""
        work = self.work
        if not work.num_inputs:
            return []
        made = torch.randn((work.num_seqs, 64, work.hidden)).to(self._dtype)
        x = made.repeat(1, -(-num_turns * work.num_inputs // 64), 1)
        widths = work.head_dim, work.v_head_dim
        weights = [
            (torch.randn((work.num_kv_heads * width, work.hidden)) * work.hidden**-0.5).to(self._dtype)
            for width in widths
        ]

        def kv(begin: int, end: int, x: Tensor) -> tuple[Tensor, Tensor]:
            k, v = (torch.nn.functional.linear(x, weight) for weight in weights)
            k, v = (y.unflatten(2, (work.num_kv_heads, -1)).transpose(1, 2) for y in (k, v))
            return k, v

        def inputs(first: int) -> Inputs:
            return Inputs(
                work.num_inputs,
                work.inputs_are_near,
                work.hidden,
                lambda begin, end: x[:, first + begin : first + end],
                kv,
            )

        return [inputs(i * work.num_inputs) for i in range(num_turns)]


def _settle(layer: Layer, crew: Crew) -> None:
    """Until speeds were corrected by steps of this plan alone."""
    began, first = time.perf_counter(), crew.scheduler.num_observed
    while (num := crew.scheduler.num_observed - first) < STEPS_TO_CORRECT + WINDOW:
        layer.step(crew)
        if num > WINDOW and time.perf_counter() - began > WINDOW * SECONDS_TO_CORRECT:
            break


def run_steps(layer: Layer, crew: Crew, num_steps: int) -> Measured:
    """What so many steps took, all with the plan that feedback has led to by then."""
    for _ in range(_SETTLING_ROUNDS):
        before = crew.plan
        crew.scheduler.forget_plans()
        _settle(layer, crew)
        if crew.plan == before:
            break
    decided_on = crew.scheduler.machine
    crew.scheduler.forget_plans()
    layer.step(crew)
    assert crew.plan is not None
    crew.scheduler.hold(crew.plan)
    crew.on_step = recorder = Recorder(num_steps)
    try:
        for _ in range(num_steps):
            layer.step(crew)
    finally:
        crew.on_step = None
    return measured_of(recorder.steps, decided_on)


def measured_of(steps: list[Step], decided_on: Machine) -> Measured:
    """Medians over steps with one plan."""
    by_length = sorted(steps, key=lambda step: step.end - step.begin)
    seconds = [step.end - step.begin for step in by_length]
    worked, busies = [worked_of(step) for step in steps], [busy_of(step) for step in steps]
    lanes: dict[str, dict[str, float]] = {}
    for lane, resource in sorted({pair for busy in busies for pair in busy}):
        lanes.setdefault(lane, {})[resource] = median(busy.get((lane, resource), 0.0) for busy in busies)
    names = [name for name in RESOURCES if any(name in each for each in worked)]
    return Measured(
        plan=steps[0].solution.plan,
        decided_on=decided_on,
        seconds=median(seconds),
        middle_half=(seconds[len(seconds) // 4], seconds[-1 - len(seconds) // 4]),
        resources={name: median(each.get(name, 0.0) for each in worked) for name in names},
        busy=lanes,
        steps=steps,
        median_step=by_length[(len(steps) - 1) // 2],
    )


def busy_of(step: Step) -> dict[tuple[str, str], float]:
    """Seconds of a step by lane and resource."""
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row, name, begin, end in step.spans:
        found[name, row] += end - begin
    return dict(found)


def worked_of(step: Step) -> dict[str, float]:
    """Seconds of a step in which each resource was at work; what overlaps on a link counts once."""
    found: dict[str, float] = {}
    ends: dict[str, float] = {}
    for row, _, begin, end in sorted(step.spans, key=lambda span: span.begin):
        since = max(begin, ends.get(row, begin))
        found[row] = found.get(row, 0.0) + max(0.0, end - since)
        ends[row] = max(end, since)
    return found
