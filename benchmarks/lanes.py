"""Far tokens over every lane, on a device and a host that are two processors of this machine: what splitting gains."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import common, plot
from tandemkv import machine

machine.set_passive_spin()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from tandemkv import kernels  # noqa: E402
from tandemkv.kernels.cpu import WorkerPool  # noqa: E402
from tandemkv.lanes import Crew, Inputs, Rig  # noqa: E402
from tandemkv.lanes.crew import work_of  # noqa: E402
from tandemkv.profiling import measure as measure_machine  # noqa: E402
from tandemkv.schedule import Machine, Plan, Products, Profile, Scheduler, Speed, solve  # noqa: E402
from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule  # noqa: E402

MODULE = "benchmarks.lanes"
HEAD_DIM, PAGE, NEAR_TOKENS, LATENCY_US = 128, 64, 256, 10.0
HEADS = ((32, 8), (32, 32))
CONTEXTS = (4096, 16_384, 65_536, 131_072)
RATIOS = (0.25, 1.0, 4.0)
ROTATED_BYTES = 1 << 30
SPLITS = tuple(i / 10 for i in range(1, 10))
LANES = ("attend", "logits", "stream")
KVPR_TOKENS, KVPR_HEADS, KVPR_SHARES = 4096, 8, (0.3, 0.5, 0.7)
MAX_ERROR = 0.01  # of out, relative, bf16 K and V
HELP = """One decode step of one layer, its far tokens over every lane: the host attends, or computes logits; or K and V
come up the link and the device attends. Device and host are two processors of this machine, links have 1/4, 1 and 4
times the speed at which the host attends. K and V come from memory, not from cache: layers of 1 GiB take turns.

a, b: what the host and the stream reach of K and V with both processors busy at once; (a + b) / max(a, b) is the most
that both together can gain over one. tandem splits as it measures; `swept` is the best of nine frozen splits. Then
KVPR's recomputation on a multi-head layer of hidden 1024, with the link set so that the share f of its tokens is worth
rebuilding: ideal gains are 1 / (1 - f) with layer inputs near (row) and 1 / (1 - f / 2) where they are sent (column).

Example: python -m benchmarks.lanes --context 32768 --json
"""


@dataclass(frozen=True)
class Row:
    """One shape and link. Times are medians in ms; speeds count K and V of far tokens. error: of the prediction."""

    heads: str
    context: int
    link_ratio: float
    link_gbps: float
    a_gbps: float
    b_gbps: float
    attend_ms: float
    logits_ms: float
    stream_ms: float
    tandem_ms: float
    predicted_ms: float
    error: float
    swept_ms: float
    swept_split: float
    plan: str
    gain: float
    ideal: float
    share_of_ideal: float
    share_of_kernel: float
    share_of_link: float


@dataclass(frozen=True)
class KvprRow:
    """Recomputation beside streaming everything. rebuild_gflops: of the whole lane, attention included."""

    schedule: str
    f: float
    link_gbps: float
    rebuild_gflops: float
    stream_ms: float
    kvpr_ms: float
    predicted_ms: float
    rebuilt_tokens: int
    gain: float
    ideal: float
    share_of_ideal: float


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
            self.far.append(_run(self.arena, begin, far_pages))
            self.near.append(_run(self.arena, begin + far_pages, near_pages))
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


RULE = ScoreRule(HEAD_DIM**-0.5)


def _run(arena: Arena, begin: int, num_pages: int) -> PagedKV:
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

    def predicted_ms(self) -> float:
        """What the scheduler expects of a step now."""
        near, far = self.layers.next()
        return self.crew.scheduler.plan(work_of(self.layers.q, near, (far,))).prediction.seconds * 1e3


def check(contestants: Sequence[Contestant]) -> None:
    """All of them give what one call over near and far tokens gives, which the tests hold against float64."""
    for crew, layers in contestants:
        near, far = layers.next()
        expected = kernels.attend(layers.q, far, near, rule=RULE).out
        error = float((crew.attend(layers.q, near, (far,), RULE).out - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            raise common.WrongResultError(f"{crew.scheduler.lanes}: off by {error:.3g}, at most {MAX_ERROR} expected")


def raw_speeds(layers: Layers, rig: Rig, seconds: float) -> tuple[float, float]:
    """GB/s of K and V that the host and the device attend to, both at once, without links or lanes."""
    stop, host = threading.Event(), rig.host
    taken: list[float] = []
    halves = [far.cut(far.page_table.shape[2] * PAGE // 2) for far in layers.far]

    def attend(run: PagedKV, pool: WorkerPool) -> float:
        begin = time.perf_counter()
        kernels.attend(layers.q, run, rule=RULE, pool=pool)
        return run.num_bytes / (time.perf_counter() - begin) / 1e9

    def serve() -> None:
        i = 0
        while not stop.is_set():
            taken.append(attend(halves[i % len(halves)][0], host.pool))
            i += 1

    busy = host.submit("raw", serve)
    mine: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(mine) < 3:
        mine.append(attend(halves[len(mine) % len(halves)][-1], rig.device_pool))
    stop.set()
    busy.wait(60)
    return median(taken), median(mine)


@contextmanager
def rig_with(speed: Speed) -> Iterator[Rig]:
    """A rig, on which this thread is the device."""
    rig = Rig(speed, speed)
    try:
        with rig.claimed():
            yield rig
    finally:
        rig.close()


def measure(profile: Profile, heads: tuple[int, int], context: int, budget_s: float) -> Iterator[Row]:
    """A row for each link."""
    layers = Layers(*heads, context)
    with rig_with(Speed(LATENCY_US, 1e6)) as rig:
        a_gbps, device_gbps = raw_speeds(layers, rig, budget_s / 8)
    for ratio in RATIOS:
        link = Speed(LATENCY_US, ratio * a_gbps)
        speeds = profile.machine("bfloat16", 0, (link, link))
        with rig_with(link) as rig:
            yield _row(rig, speeds, layers, (heads, context, ratio, a_gbps, min(link.gbps, device_gbps)), budget_s)


def _row(
    rig: Rig,
    speeds: Machine,
    layers: Layers,
    case: tuple[tuple[int, int], int, float, float, float],
    budget_s: float,
) -> Row:
    heads, context, ratio, a_gbps, b_gbps = case
    near, far = layers.next()
    work = work_of(layers.q, near, (far,))

    def contestant(lanes: tuple[str, ...], plan: Plan | None = None) -> Contestant:
        return Contestant(Crew(rig, Scheduler(speeds, lanes, plan)), layers)

    all_of_it = {name: contestant((name,)) for name in LANES} | {"tandem": contestant(LANES)}
    for share in SPLITS:
        whole = solve(work, speeds, ("attend", "stream")).plan
        frozen = Plan({"attend": round(1000 * (1 - share)), "stream": round(1000 * share)}, whole.stage_tokens)
        all_of_it[f"{share}"] = contestant(("attend", "stream"), frozen)
    check(list(all_of_it.values()))
    for _ in range(10):  # until feedback believes what it has seen
        all_of_it["tandem"].step()
    ms = common.medians_in_turn({name: common.in_ms(each.step) for name, each in all_of_it.items()}, budget_s)
    swept = min(map(str, SPLITS), key=lambda name: ms[name])
    best, predicted = min(ms[name] for name in LANES), all_of_it["tandem"].predicted_ms()
    ideal, gain = (a_gbps + b_gbps) / max(a_gbps, b_gbps), best / ms["tandem"]
    plan, gb = all_of_it["tandem"].crew.plan, layers.far_bytes / 1e6
    return Row(
        heads=f"{heads[0]}:{heads[1]}",
        context=context,
        link_ratio=ratio,
        link_gbps=rig.up.speed.gbps,
        a_gbps=a_gbps,
        b_gbps=b_gbps,
        attend_ms=ms["attend"],
        logits_ms=ms["logits"],
        stream_ms=ms["stream"],
        tandem_ms=ms["tandem"],
        predicted_ms=predicted,
        error=predicted / ms["tandem"] - 1,
        swept_ms=ms[swept],
        swept_split=float(swept),
        plan="" if plan is None else plan.summary,
        gain=gain,
        ideal=ideal,
        share_of_ideal=gain / ideal,
        share_of_kernel=gb / ms["attend"] / a_gbps,
        share_of_link=gb / ms["stream"] / min(rig.up.speed.gbps, b_gbps),
    )


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
            _run(arena, pages, 1),
            _run(arena, 0, pages),
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


def measure_kvpr(profile: Profile, budget_s: float) -> Iterator[KvprRow]:
    """Both schedules at every share."""
    layer = Rebuilt.make(KVPR_TOKENS)
    hidden, flops = layer.x.shape[2], 4.0 * layer.x.shape[2] ** 2
    with rig_with(Speed(0, 1e6)) as rig:
        speeds = profile.machine("bfloat16", hidden, (rig.up.speed, rig.up.speed))
        alone = Crew(rig, Scheduler(speeds, ("recompute",), Plan({"recompute": KVPR_TOKENS})))
        rebuild_s = _median_s(partial(layer.step, alone, layer.inputs(True)), budget_s / 8)
    gflops = KVPR_TOKENS * flops / rebuild_s / 1e9
    for f in KVPR_SHARES:
        link = Speed(0, 2 * gflops * (1 - f) / (2 * hidden * f))
        for schedule in ("row", "column"):
            speeds = profile.machine("bfloat16", hidden, (link, link))
            known = replace(speeds, products=Products(((1, gflops),)))
            with rig_with(link) as rig:
                yield _kvpr_row(rig, known, layer, (schedule, f, gflops), budget_s)


def _kvpr_row(rig: Rig, speeds: Machine, layer: Rebuilt, case: tuple[str, float, float], budget_s: float) -> KvprRow:
    schedule, f, gflops = case
    inputs = layer.inputs(schedule == "row")
    stream = Crew(rig, Scheduler(speeds, ("stream",)))
    kvpr = Crew(rig, Scheduler(speeds, ("recompute", "stream")))
    expected = kernels.attend(layer.q, layer.far, layer.near, rule=RULE).out
    error = float((layer.step(kvpr, inputs).out - expected).norm() / expected.norm())
    if not error < MAX_ERROR:
        raise common.WrongResultError(f"KVPR: off by {error:.3g}, at most {MAX_ERROR} expected")
    steps = {"stream": partial(layer.step, stream), "kvpr": partial(layer.step, kvpr, inputs)}
    ms = common.medians_in_turn({name: common.in_ms(step) for name, step in steps.items()}, budget_s)
    solution = kvpr.scheduler.plan(work_of(layer.q, layer.near, (layer.far,), inputs))
    gain, ideal = ms["stream"] / ms["kvpr"], 1 / (1 - f) if schedule == "row" else 1 / (1 - f / 2)
    return KvprRow(
        schedule=schedule,
        f=f,
        link_gbps=rig.up.speed.gbps,
        rebuild_gflops=gflops,
        stream_ms=ms["stream"],
        kvpr_ms=ms["kvpr"],
        predicted_ms=solution.prediction.seconds * 1e3,
        rebuilt_tokens=solution.plan.tokens.get("recompute", 0),
        gain=gain,
        ideal=ideal,
        share_of_ideal=gain / ideal,
    )


def _median_s(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


def print_rows(rows: Sequence[Row], kvpr: Sequence[KvprRow], console: Console) -> None:
    """The tables for people."""
    table = Table(title="one step of one layer, ms")
    headings = ("heads", "context", "link", "a GB/s", "b", "attend", "logits", "stream", "tandem", "predicted", "swept")
    for heading in (*headings, "gain", "ideal", "share", "of kernel", "of link"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (row.attend_ms, row.logits_ms, row.stream_ms, row.tandem_ms, row.predicted_ms, row.swept_ms)
        shares = (f"{share:.0%}" for share in (row.share_of_ideal, row.share_of_kernel, row.share_of_link))
        speeds = (f"{row.link_gbps:.1f}", f"{row.a_gbps:.1f}", f"{row.b_gbps:.1f}")
        gains = (f"{row.gain:.2f}", f"{row.ideal:.2f}")
        table.add_row(row.heads, f"{row.context:,}", *speeds, *(f"{ms:.2f}" for ms in times), *gains, *shares)
    console.print(table)
    table = Table(title=f"KVPR, {KVPR_HEADS}:{KVPR_HEADS} heads, {KVPR_TOKENS:,} tokens, ms")
    for heading in ("schedule", "f", "link GB/s", "stream", "kvpr", "predicted", "rebuilt", "gain", "ideal", "share"):
        table.add_column(heading, justify="right")
    for one in kvpr:
        three = (one.stream_ms, one.kvpr_ms, one.predicted_ms)
        last = (f"{one.gain:.2f}", f"{one.ideal:.2f}", f"{one.share_of_ideal:.0%}")
        numbers = (f"{one.f}", f"{one.link_gbps:.3f}", *(f"{ms:.1f}" for ms in three), f"{one.rebuilt_tokens:,}")
        table.add_row(one.schedule, *numbers, *last)
    console.print(table)


def _save(rows: list[dict[str, Any]], kvpr: list[dict[str, Any]], run: common.Run, console: Console) -> None:
    """Rows and pictures."""
    for name, found, draw in (("lanes", rows, plot.draw_lanes), ("kvpr", kvpr, plot.draw_kvpr)):
        if found:
            common.append_rows(common.RESULTS / f"{name}.csv", found, run)
            console.print(draw(found, run, common.RESULTS / f"{name}.png"), highlight=False)


def main() -> None:
    """Run, print, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument("--context", type=common.positive, action="append", help="tokens; repeat it (default: all)")
    parser.add_argument("--no-kvpr", action="store_true", help="without recomputation")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else 180)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    contexts = arguments.context or ((8192,) if arguments.quick else CONTEXTS)
    heads, budget_s = (list(HEADS[:1]), 1.5) if arguments.quick else (list(HEADS), 20.0)
    profile = measure_machine(console)
    rows, kvpr = [], []
    for each in heads:
        for context in contexts:
            for row in measure(profile, each, context, budget_s):
                rows.append(row)
                console.print(f"{row.heads} {row.context:,} link {row.link_gbps:.1f}: {row.plan}", highlight=False)
    if not arguments.no_kvpr and not arguments.quick:
        kvpr = list(measure_kvpr(profile, budget_s / 2))
    print_rows(rows, kvpr, console)
    if not arguments.quick or arguments.save:
        _save([asdict(row) for row in rows], [asdict(row) for row in kvpr], run, console)
    if arguments.json:
        result = {**asdict(rows[-1]), "rows": [asdict(row) for row in rows], "kvpr": [asdict(row) for row in kvpr]}
        common.print_json({**result, **asdict(run)})
    if not all(math.isfinite(row.tandem_ms) for row in rows):
        raise common.WrongResultError("a time is no number")


if __name__ == "__main__":
    main()
