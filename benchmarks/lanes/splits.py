"""One decode step over every lane, over each alone, and over frozen splits, at a link of any speed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from benchmarks import common
from benchmarks.lanes.ground import LATENCY_US, Ground, Layers, Raw, check, median_s, rig_with
from tandemkv.lanes.crew import Step
from tandemkv.schedule import Profile, Speed

RATIOS = (0.25, 1.0, 4.0)
SPLITS = tuple(i / 10 for i in range(1, 10))
LANES = ("attend", "logits", "stream")
LEARNING_S = 2.0
"""Until feedback believes what it has seen, of several plans, and what these may cost before is spent."""


@dataclass(frozen=True)
class Row:
    """One shape and link. Times are medians in ms; speeds count K and V of far tokens. error: of the prediction.
    planning: the share of all tandem's steps that its scheduler takes.

    Of what follows, all are medians over rounds. gain: over the better one of attend and stream, of which `ideal`
    speaks. share_of_raw: what tandem reaches of a + b. share_of_swept, share_of_best: the time of the best frozen
    split, and of the best lane alone, logits among them, over tandem's; share_of_most: of `ideal`, what is gained over
    the best lane alone, logits among them.
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
    share_of_most: float
    share_of_kernel: float
    share_of_link: float


def measure(profile: Profile, heads: tuple[int, int], context: int, budget_s: float) -> Iterator[Row]:
    """A row for each link."""
    layers = Layers(*heads, context)
    with rig_with(Speed(LATENCY_US, 1e6)) as rig:
        raw = Raw(layers, rig)
        median_s(raw.step, budget_s / 8)
    a_gbps, _ = raw.take()
    for ratio in RATIOS:
        link = Speed(LATENCY_US, ratio * a_gbps)
        with rig_with(link) as rig:
            ground = Ground(rig, profile.machine("bfloat16", 0, (link, link)), layers)
            yield _row(ground, (heads, context, ratio), budget_s)


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
    median_s(tandem.step, min(LEARNING_S, budget_s))
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
        "share_of_most": of(lambda each: min(each.ms[name] for name in LANES) / each.ms["tandem"] / each.ideal),
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
