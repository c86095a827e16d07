"""Far tokens over every lane, on a device and a host that are two processors of this machine: what splitting gains."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tandemkv.lanes import Crew, Inputs, Rig  # noqa: E402
from tandemkv.lanes.crew import Step, work_of  # noqa: E402
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
LEARNING_STEPS = 40  # until feedback believes what it has seen, of several plans
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
    """One shape and link. Times are medians in ms; speeds count K and V of far tokens. error: of the prediction.
    planning: the share of all tandem's steps that its scheduler takes.

    Of what follows, all are medians over rounds. gain: over the better one of attend and stream, of which `ideal`
    speaks. share_of_raw: what tandem reaches of a + b. share_of_swept, share_of_best: the time of the best frozen
    split, and of the best lane alone, logits among them, over tandem's.
    """

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
    error: float
    planning: float
    swept_ms: float
    swept_split: float
    plan: str
    gain: float
    ideal: float
    share_of_ideal: float
    share_of_raw: float
    share_of_swept: float
    share_of_best: float
    share_of_kernel: float
    share_of_link: float


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
        raw = Raw(layers, rig)
        _median_s(raw.step, budget_s / 8)
    a_gbps, _ = raw.take()
    for ratio in RATIOS:
        link = Speed(LATENCY_US, ratio * a_gbps)
        with rig_with(link) as rig:
            ground = Ground(rig, profile.machine("bfloat16", 0, (link, link)), layers)
            yield _row(ground, (heads, context, ratio), budget_s)


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


class Round(NamedTuple):
    """Medians of a round: ms by contestant, raw GB/s of the host and of the stream."""

    ms: dict[str, float]
    a: float
    b: float

    @property
    def gain(self) -> float:
        """Over the better one of the lanes alone of which `ideal` speaks."""
        return min(self.ms["attend"], self.ms["stream"]) / self.ms["tandem"]

    @property
    def ideal(self) -> float:
        """The most that both together can gain over one."""
        return (self.a + self.b) / max(self.a, self.b)


def _row(ground: Ground, case: tuple[tuple[int, int], int, float], budget_s: float) -> Row:
    """Everything in turn, and ratios within a round: memory that is shared with strangers is fast now and slow then."""
    (heads, context, ratio), link_gbps = case, ground.rig.up.speed.gbps
    crews = {name: ground.crew((name,)) for name in LANES} | {"tandem": ground.crew(LANES)}
    crews |= {f"{share}": ground.frozen(share) for share in SPLITS}
    check(list(crews.values()))
    tandem = crews["tandem"]
    for _ in range(LEARNING_STEPS):
        tandem.step()
    seen: list[Step] = []
    tandem.crew.on_step, planning_s = (
        lambda step: seen.append(step._replace(spans=[])),
        tandem.crew.scheduler.planning_s,
    )
    rounds = _rounds(ground, {name: common.in_ms(each.step) for name, each in crews.items()}, budget_s)
    ms = {name: median(each.ms[name] for each in rounds) for name in crews}
    steps_s = sum(step.end - step.begin for step in seen)
    swept, best = (min(names, key=ms.__getitem__) for names in (map(str, SPLITS), LANES))
    plan = tandem.crew.plan
    return Row(
        heads=f"{heads[0]}:{heads[1]}",
        context=context,
        link_ratio=ratio,
        link_gbps=link_gbps,
        attend_ms=ms["attend"],
        logits_ms=ms["logits"],
        stream_ms=ms["stream"],
        tandem_ms=ms["tandem"],
        error=median(step.solution.prediction.seconds / (step.end - step.begin) - 1 for step in seen),
        planning=(tandem.crew.scheduler.planning_s - planning_s) / steps_s,
        swept_ms=ms[swept],
        swept_split=float(swept),
        plan="" if plan is None else plan.summary,
        **_medians(rounds, ground.layers.far_bytes / 1e6, swept, best),
    )


def _medians(rounds: Sequence[Round], far_mb: float, swept: str, best: str) -> dict[str, float]:
    """Of what is told within a round; swept, best: the contestants of these names over all rounds."""

    def of(ratio: Callable[[Round], float]) -> float:
        return median(map(ratio, rounds))

    return {
        "a_gbps": of(lambda each: each.a),
        "b_gbps": of(lambda each: each.b),
        "gain": of(lambda each: each.gain),
        "ideal": of(lambda each: each.ideal),
        "share_of_ideal": of(lambda each: each.gain / each.ideal),
        "share_of_raw": of(lambda each: far_mb / each.ms["tandem"] / (each.a + each.b)),
        "share_of_swept": of(lambda each: each.ms[swept] / each.ms["tandem"]),
        "share_of_best": of(lambda each: each.ms[best] / each.ms["tandem"]),
        "share_of_kernel": of(lambda each: far_mb / each.ms["attend"] / each.a),
        "share_of_link": of(lambda each: far_mb / each.ms["stream"] / each.b),
    }


def _rounds(ground: Ground, steps: Mapping[str, Callable[[], float]], budget_s: float) -> list[Round]:
    raw, speeds = Raw(ground.layers, ground.rig), []

    def raw_step() -> float:
        raw.step()
        speeds.append(raw.take())
        return 0.0

    found = []
    for scores in common.rounds_in_turn({**steps, "raw": raw_step}, budget_s):
        taken, speeds = speeds[: len(scores["raw"])], speeds[len(scores["raw"]) :]
        a, b = (median(gbps) for gbps in zip(*taken, strict=True))
        found.append(Round({name: median(scores[name]) for name in steps}, a, min(b, ground.rig.up.speed.gbps)))
    return found


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
    hidden = layer.x.shape[2]
    with rig_with(Speed(0, 1e6)) as rig:
        alone = _rebuilding(rig, profile.machine("bfloat16", hidden, (rig.up.speed, rig.up.speed)))
        gflops = _gflops(layer, _median_s(partial(layer.step, alone, layer.inputs(True)), budget_s / 8))
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
    for _ in range(LEARNING_STEPS // 2):
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


def _median_s(call: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


def print_rows(rows: Sequence[Row], kvpr: Sequence[KvprRow], console: Console) -> None:
    """The tables for people."""
    console.print(_table_of_lanes(rows))
    table = Table(title=f"KVPR, {KVPR_HEADS}:{KVPR_HEADS} heads, {KVPR_TOKENS:,} tokens, ms")
    for heading in ("schedule", "f", "link GB/s", "stream", "kvpr", "error", "rebuilt", "gain", "ideal", "share"):
        table.add_column(heading, justify="right")
    for one in kvpr:
        times = (f"{one.stream_ms:.1f}", f"{one.kvpr_ms:.1f}", f"{one.error:+.0%}")
        last = (f"{one.gain:.2f}", f"{one.ideal:.2f}", f"{one.share_of_ideal:.0%}")
        table.add_row(one.schedule, f"{one.f:.2f}", f"{one.link_gbps:.3f}", *times, f"{one.rebuilt_tokens:,}", *last)
    console.print(table)


def _table_of_lanes(rows: Sequence[Row]) -> Table:
    table = Table(title="one step of one layer, ms")
    of_lanes = ("attend", "logits", "stream", "tandem", "error", "plans", "swept")
    shares_of = ("ideal", "raw", "swept", "best", "kernel", "link")
    shares = tuple(f"of {name}" for name in shares_of)
    for heading in ("heads", "context", "link", "a GB/s", "b", *of_lanes, "gain", "ideal", *shares):
        table.add_column(heading, justify="right")
    for row in rows:
        speeds = (f"{row.link_gbps:.1f}", f"{row.a_gbps:.1f}", f"{row.b_gbps:.1f}")
        times = (f"{ms:.2f}" for ms in (row.attend_ms, row.logits_ms, row.stream_ms, row.tandem_ms))
        foreseen = (f"{row.error:+.0%}", f"{row.planning:.1%}", f"{row.swept_ms:.2f}")
        gains = (f"{row.gain:.2f}", f"{row.ideal:.2f}")
        bars = (f"{getattr(row, f'share_of_{name}'):.0%}" for name in shares_of)
        table.add_row(row.heads, f"{row.context:,}", *speeds, *times, *foreseen, *gains, *bars)
    return table


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
