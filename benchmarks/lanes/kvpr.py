"""KVPR's recomputation beside streaming everything, at links for which a share of the tokens is worth it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import common
from benchmarks.lanes.ground import HEAD_DIM, MAX_ERROR, PAGE, RULE, median_s, rig_with, run_of
from tandemkv import kernels
from tandemkv.lanes import Crew, Inputs, Rig
from tandemkv.schedule import Machine, Plan, Products, Profile, Scheduler, Speed
from tandemkv.types import Arena, PagedKV, PageLayout, Partial

KVPR_TOKENS, KVPR_HEADS, KVPR_SHARES = 4096, 8, (0.3, 0.5, 0.7)
LEARNING_STEPS = 20


@dataclass(frozen=True)
class KvprRow:
    """Recomputation beside streaming everything. rebuild_gflops: of the whole lane alone, attention included.

    gain and what follows are medians over rounds; error is the prediction's.
    """

    schedule: str
    f: float
    link_gbps: float
    rebuild_gflops: float
    stream_ms: float
    kvpr_ms: float
    error: float
    rebuilt_tokens: int
    gain: float
    ideal: float
    share_of_ideal: float


class Rebuilt(NamedTuple):
    """A multi-head layer whose K and V are x @ W: what KVPR rebuilds."""

    q: Tensor
    near: PagedKV
    far: PagedKV
    x: Tensor
    weights: tuple[Tensor, Tensor]

    @staticmethod
    def make(num_tokens: int) -> "Rebuilt":
        """Random numbers, in bf16; near is a page."""
        hidden = KVPR_HEADS * HEAD_DIM
        x = torch.randn((1, num_tokens, hidden)).bfloat16()
        weights = tuple((torch.randn((hidden, hidden)) * hidden**-0.5).bfloat16() for _ in range(2))
        pages = num_tokens // PAGE
        arena = Arena.allocate(PageLayout(torch.bfloat16, PAGE, "panels"), pages + 1, KVPR_HEADS, HEAD_DIM)
        made = Rebuilt(
            torch.randn((1, KVPR_HEADS, 1, HEAD_DIM)).bfloat16(),
            run_of(arena, pages, 1),
            run_of(arena, 0, pages),
            x,
            (weights[0], weights[1]),
        )
        kernels.append(arena, made.far.page_table, 0, *made.kv(0, num_tokens, x))
        k, v = made.kv(0, PAGE, x[:, :PAGE])
        kernels.append(arena, made.near.page_table, 0, k, v)
        return made

    def kv(self, begin: int, end: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of these inputs."""
        k, v = (linear(x, weight).unflatten(2, (KVPR_HEADS, HEAD_DIM)).transpose(1, 2) for weight in self.weights)
        return k, v

    def inputs(self, are_near: bool) -> Inputs:
        """As a layer keeps them."""
        return Inputs(self.x.shape[1], are_near, self.x.shape[2], lambda a, b: self.x[:, a:b], self.kv)

    def step(self, crew: Crew, inputs: Inputs | None = None) -> Partial:
        """One step."""
        return crew.attend(self.q, self.near, (self.far,), RULE, inputs)


def measure(profile: Profile, budget_s: float) -> Iterator[KvprRow]:
    """Both schedules at every share."""
    layer = Rebuilt.make(KVPR_TOKENS)
    hidden = layer.x.shape[2]
    with rig_with(Speed(0, 1e6)) as rig:
        alone = _rebuilding(rig, profile.machine("bfloat16", hidden, (rig.up.speed, rig.up.speed)))
        gflops = _gflops(layer, median_s(partial(layer.step, alone, layer.inputs(True)), budget_s / 8))
    for f in KVPR_SHARES:
        link = Speed(0, 2 * gflops * (1 - f) / (2 * hidden * f))
        for schedule in ("row", "column"):
            speeds = profile.machine("bfloat16", hidden, (link, link))
            known = replace(speeds, products=Products(((1, gflops),)))
            with rig_with(link) as rig:
                yield _kvpr_row(rig, known, layer, schedule, budget_s)


def share_to_rebuild(v_gpu_gflops: float, v_com_gbps: float, hidden: int) -> float:
    """KVPR's l*/s' of a multi-head layer in bf16 (2411.17089, Eq. 10)."""
    return 2 * v_gpu_gflops / (2 * v_gpu_gflops + 2 * hidden * v_com_gbps)


def ideal_gain(schedule: str, f: float) -> float:
    """Over streaming everything. Inputs that come up are half as large as K and V, and come before them."""
    return 1 / (1 - f) if schedule == "row" else 1 / (1 - f / 2)


def _rebuilding(rig: Rig, speeds: Machine) -> Crew:
    return Crew(rig, Scheduler(speeds, ("recompute",), Plan({"recompute": KVPR_TOKENS})))


def _gflops(layer: Rebuilt, seconds: float) -> float:
    return KVPR_TOKENS * 4.0 * layer.x.shape[2] ** 2 / seconds / 1e9


def _kvpr_row(rig: Rig, speeds: Machine, layer: Rebuilt, schedule: str, budget_s: float) -> KvprRow:
    """f and what is ideal follow from how fast rebuilding was in the same round."""
    inputs, hidden, gbps = layer.inputs(schedule == "row"), layer.x.shape[2], rig.up.speed.gbps
    stream = Crew(rig, Scheduler(speeds, ("stream",)))
    kvpr = Crew(rig, Scheduler(speeds, ("recompute", "stream")))
    expected = kernels.attend(layer.q, layer.far, layer.near, rule=RULE).out
    for _ in range(LEARNING_STEPS):
        error = float((layer.step(kvpr, inputs).out - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            raise common.WrongResultError(f"KVPR: off by {error:.3g}, at most {MAX_ERROR} expected")
    steps = {
        "stream": partial(layer.step, stream),
        "kvpr": partial(layer.step, kvpr, inputs),
        "alone": partial(layer.step, _rebuilding(rig, speeds), layer.inputs(True)),
    }
    errors: list[float] = []
    kvpr.on_step = lambda step: errors.append(step.solution.prediction.seconds / (step.end - step.begin) - 1)
    rounds = common.rounds_in_turn({name: common.in_ms(step) for name, step in steps.items()}, budget_s)
    ms = [{name: median(scores[name]) for name in steps} for scores in rounds]

    def f(each: Mapping[str, float]) -> float:
        return share_to_rebuild(_gflops(layer, each["alone"] / 1e3), gbps, hidden)

    def ideal(each: Mapping[str, float]) -> float:
        return ideal_gain(schedule, f(each))

    def of(ratio: Callable[[Mapping[str, float]], float]) -> float:
        return median(map(ratio, ms))

    return KvprRow(
        schedule=schedule,
        f=of(f),
        link_gbps=gbps,
        rebuild_gflops=of(lambda each: _gflops(layer, each["alone"] / 1e3)),
        stream_ms=of(lambda each: each["stream"]),
        kvpr_ms=of(lambda each: each["kvpr"]),
        error=median(errors),
        rebuilt_tokens=0 if kvpr.plan is None else kvpr.plan.tokens.get("recompute", 0),
        gain=of(lambda each: each["stream"] / each["kvpr"]),
        ideal=of(ideal),
        share_of_ideal=of(lambda each: each["stream"] / each["kvpr"] / ideal(each)),
    )
