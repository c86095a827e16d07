"""What contestants have in common: a rig, layers that no cache holds, and what both processors do without lanes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import common
from tandemkv import kernels
from tandemkv.lanes import Crew, Rig
from tandemkv.lanes.crew import work_of
from tandemkv.schedule import Machine, Plan, Scheduler, Speed, solve
from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule

HEAD_DIM, PAGE, NEAR_TOKENS, LATENCY_US = 128, 64, 256, 10.0
ROTATED_BYTES = 1 << 30
MAX_ERROR = 0.01  # of out, relative, bf16 K and V
RULE = ScoreRule(HEAD_DIM**-0.5)


class Layers:
    """K and V of layers that take turns, so many that none is read from cache; far tokens and near ones."""

    def __init__(self, num_q_heads: int, num_kv_heads: int, context: int) -> None:
        far_pages, near_pages = (context - NEAR_TOKENS) // PAGE, NEAR_TOKENS // PAGE
        layout = PageLayout(torch.bfloat16, PAGE, "panels")
        page_bytes = layout.page_bytes(num_kv_heads, HEAD_DIM, HEAD_DIM)
        num_layers = max(1, -(-ROTATED_BYTES // (page_bytes * (far_pages + near_pages))))
        self.arena = Arena.allocate(layout, num_layers * (far_pages + near_pages), num_kv_heads, HEAD_DIM)
        self._fill()
        self.q = torch.randn((1, num_q_heads, 1, HEAD_DIM)).bfloat16()
        self.far, self.near = [], []
        for layer in range(num_layers):
            begin = layer * (far_pages + near_pages)
            self.far.append(run_of(self.arena, begin, far_pages))
            self.near.append(run_of(self.arena, begin + far_pages, near_pages))
        self.far_bytes = self.far[0].num_bytes
        self._turn = 0

    def _fill(self) -> None:
        """64 pages of random numbers, over and over: content does not change how long reading takes."""
        rows = Arena.allocate(PageLayout(torch.bfloat16, PAGE, "rows"), 64, self.arena.num_kv_heads, HEAD_DIM)
        rows.k.normal_()
        rows.v.normal_()
        for begin in range(0, self.arena.num_slots, 64):
            slots = list(range(begin, min(begin + 64, self.arena.num_slots)))
            kernels.move_pages(rows, self.arena, list(range(len(slots))), slots)

    def next(self) -> tuple[PagedKV, PagedKV]:
        """Near and far tokens of the next layer."""
        self._turn = (self._turn + 1) % len(self.far)
        return self.near[self._turn], self.far[self._turn]


def run_of(arena: Arena, begin: int, num_pages: int) -> PagedKV:
    """Pages of an arena in their order, for one sequence."""
    table = torch.arange(begin, begin + num_pages, dtype=torch.int32).expand(1, arena.num_kv_heads, num_pages)
    return PagedKV(arena, table, torch.zeros(1, dtype=torch.int64), torch.full((1,), num_pages * PAGE))


class Contestant(NamedTuple):
    """A crew and its layers."""

    crew: Crew
    layers: Layers

    def step(self) -> Partial:
        """One step of the next layer."""
        near, far = self.layers.next()
        return self.crew.attend(self.layers.q, near, (far,), RULE)


def check(contestants: Sequence[Contestant]) -> None:
    """All of them give what one call over near and far tokens gives, which the tests hold against float64."""
    for crew, layers in contestants:
        near, far = layers.next()
        expected = kernels.attend(layers.q, far, near, rule=RULE).out
        error = float((crew.attend(layers.q, near, (far,), RULE).out - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            raise common.WrongResultError(f"{crew.scheduler.lanes}: off by {error:.3g}, at most {MAX_ERROR} expected")


class Raw:
    """Half of the far tokens attended to by the host and the other half by the device, at once, without links or lanes:
    what both processors can do of memory that they share."""

    def __init__(self, layers: Layers, rig: Rig) -> None:
        self._layers, self._rig = layers, rig
        self.gbps: list[tuple[float, float]] = []  # of the host and the device, in every step

    def step(self) -> None:
        """Of the next layer."""
        _, far = self._layers.next()
        num_pages, q = far.page_table.shape[2], self._layers.q
        halves = far.part(0, num_pages // 2), far.part(num_pages // 2, num_pages)
        of_host = self._rig.host.call("raw", kernels.prepare_attend(q, halves[0], rule=RULE, pool=self._rig.host.pool))
        call = self._rig.prepare_attend(q, halves[-1], RULE)
        begin = time.perf_counter()
        call.make()
        device_s = time.perf_counter() - begin
        of_host.wait(60)
        (span,) = self._rig.trace.take()
        self.gbps.append((halves[0].num_bytes / (span.end - span.begin) / 1e9, halves[-1].num_bytes / device_s / 1e9))

    def take(self) -> tuple[float, float]:
        """Medians of the steps since the last time."""
        host, device = zip(*self.gbps, strict=True)
        self.gbps = []
        return median(host), median(device)


class Ground(NamedTuple):
    """What contestants have in common."""

    rig: Rig
    speeds: Machine
    layers: Layers

    def crew(self, lanes: tuple[str, ...], plan: Plan | None = None) -> Contestant:
        """One more contestant, with a scheduler of its own."""
        return Contestant(Crew(self.rig, Scheduler(self.speeds, lanes, plan)), self.layers)

    def frozen(self, share: float) -> Contestant:
        """With such a share streamed, and stages as the solver would have them."""
        near, far = self.layers.next()
        stage = solve(work_of(self.layers.q, near, (far,)), self.speeds, ("attend", "stream")).plan.stage_tokens
        return self.crew(
            ("attend", "stream"), Plan({"attend": round(1000 * (1 - share)), "stream": round(1000 * share)}, stage)
        )


@contextmanager
def rig_with(speed: Speed) -> Iterator[Rig]:
    """A rig, on which this thread is the device."""
    rig = Rig(speed, speed)
    try:
        with rig.claimed():
            yield rig
    finally:
        rig.close()


def median_s(call: Callable[[], object], seconds: float) -> float:
    """Of calls that take so long together, three at least."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)
