"""Prefetch across kernels: while a layer's MLP computes, the near pages that the next attention reads are pulled into
L2 by a small kernel on a side stream, at most a share of L2. Gain or loss, beside the same without pulling.

The MLP is Llama-3-8B's, one token for each sequence; its weights are those of several layers in turn, and come from
memory. The pull is issued when the MLP begins, or when its down projection does. Attention follows at once: the
projections and norms between them in a model are left out. Larger shares of L2 than K and V fill are left out too.

What is foreseen, before anything is measured, from the times alone and the copy bandwidth:

    idle  = left * max(0, MLP - weights / copy)      time of the MLP in which memory has nothing to do
    late  = max(0, asked / copy - idle)              what pulling takes from the weights
    best  = MLP and attend without - asked / copy + late         all that was asked for is read from L2
    worst = MLP and attend without + late                        all of it is evicted before it is read

left: 1 from the MLP's begin, 1/3 from its down projection: the share of the weights that are still to come. So pulling
saves no more than min(asked / copy, idle): bytes that memory has no idle time for are moved, not saved. And where L2
gave up first what came first, all would be evicted wherever asked + left * weights > L2: 352 MB and 117 MB pass
through 50 MB, so the worst is foreseen, unless L2 keeps pages from weights, which are read once. Where attention is
small, its time is latency rather than bytes, and pulling may save more than this formula knows.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import MODELS, Case, Form, Problem, places_for
from benchmarks.gpu.ground import Times
from benchmarks.gpu.peers import why_wrong
from benchmarks.gpu.section import Bench, Found, Row, Section
from tandemkv.lanes import pull_into_l2
from tandemkv.types import ScoreRule

MODEL, INTERMEDIATE = MODELS[1], 14_336
CASES = tuple(Case(MODEL, context, batch) for context in (4096, 8192, 1024) for batch in (4, 16, 1))
SHARES = (0.125, 0.25, 0.5, 0.75)
LEFT: Mapping[str, float] = {"MLP": 1.0, "down": 1 / 3}
"""Of the weights, still to come when the pull is issued before the whole MLP, or before its down projection."""
CASE_S = 0.8


class Variant(NamedTuple):
    """share: of L2 that may be pulled. before: a key of `LEFT`."""

    share: float
    before: str

    def __str__(self) -> str:
        return f"{self.share:g} of L2 before {self.before}"


class Foreseen(NamedTuple):
    """Microseconds of MLP and attention with a pull, by the formula above."""

    best_us: float
    worst_us: float


def foreseen(without_us: float, asked_us: float, idle_us: float) -> Foreseen:
    """asked_us: of what is pulled, at the copy bandwidth. idle_us: of memory, once the pull is issued."""
    late_us = max(0.0, asked_us - idle_us)
    return Foreseen(without_us - asked_us + late_us, without_us + late_us)


class Mlp:
    """Gate, up and down of several layers, `[intermediate, hidden]` and `[hidden, intermediate]`: so many that L2 holds
    nothing of a layer when it is its turn again, whoever else has his turn between."""

    def __init__(self, case: Case, device: torch.device, l2_bytes: int) -> None:
        hidden = case.model.num_q_heads * case.model.head_dim
        self.num_bytes = 3 * hidden * INTERMEDIATE * case.dtype.itemsize
        shapes = (INTERMEDIATE, hidden), (INTERMEDIATE, hidden), (hidden, INTERMEDIATE)
        self._layers = [
            [torch.empty(shape, dtype=case.dtype, device=device).normal_(std=0.02) for shape in shapes]
            for _ in range(1 + places_for(self.num_bytes, l2_bytes))
        ]

    def __call__(self, x: Tensor, turn: int, asides: Mapping[str, Callable[[], object]]) -> Tensor:
        """x: `[batch, hidden]`. asides: called before the whole, or before the down projection; keys of `LEFT`."""
        gate, up, down = self._layers[turn % len(self._layers)]
        _call(asides, "MLP")
        y = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        _call(asides, "down")
        return functional.linear(y, down)


def _call(asides: Mapping[str, Callable[[], object]], when: str) -> None:
    if when in asides:
        asides[when]()


class Layer:
    """A case's MLP, then its attention, and what is pulled between them."""

    def __init__(self, problem: Problem, mlp: Mlp) -> None:
        self.problem, self.mlp = problem, mlp
        self._rule, self.attend = ScoreRule(problem.case.scale), problem.ours()
        self._x = problem.q.view(problem.case.batch, -1) / 2

    def mlp_alone(self, turn: int) -> Tensor:
        """Nothing is attended."""
        return self.mlp(self._x, turn, {})

    def pull(self, variant: Variant, turn: int) -> int:
        """The bytes asked for, of the place that this turn attends to."""
        runs = self.problem.runs
        return pull_into_l2(self.problem.q, runs[turn % len(runs)], self._rule, variant.share)

    def form(self, variant: Variant | None = None) -> Form:
        """Both, without a pull where there is no variant."""

        def call(turn: int) -> object:
            asides: dict[str, Callable[[], object]] = {}
            if variant is not None:
                asides[variant.before] = partial(self.pull, variant, turn)
            self.mlp(self._x, turn, asides)
            return self.attend.call(turn)

        return self.attend._replace(call=call)


def measure(bench: Bench, budget: Budget, found: Found) -> None:
    """A row for each variant of each case."""
    cases, device, l2_bytes = CASES[:1] if bench.quick else CASES, bench.ground.device, bench.ground.facts.l2_bytes
    pool = bench.pools.of(cases[0].dtype, 0.25)
    mlp = Mlp(cases[0], device, l2_bytes)
    for case in cases:
        if not pool.fits(case):
            found.missed.append(f"ahead, {case}: K and V do not fit")
        elif not budget.has(2 * CASE_S):
            found.missed.append(f"ahead, {case}: no time was left")
        else:
            _measure(bench, Layer(Problem(case, pool, l2_bytes), mlp), found)


def _measure(bench: Bench, layer: Layer, found: Found) -> None:
    case = layer.problem.case
    variants = variants_of(case, bench.ground.facts.l2_bytes)
    forms = {"without": layer.form(), **{str(variant): layer.form(variant) for variant in variants}}
    wrong = {name: why_wrong(layer.problem, form) for name, form in forms.items()}
    wrong |= {str(each): _if_idle(layer, each) for each in variants if not wrong[str(each)]}
    right = {name: form.call for name, form in forms.items() if not wrong[name]}
    alone = {"MLP": layer.mlp_alone, "attend": layer.attend.call} if "without" in right else {}
    times = bench.ground.in_turn({**alone, **right}, CASE_S) if alone else {}
    rows = [row_of(bench, layer, each, times) | {"wrong": wrong["without"] or wrong[str(each)]} for each in variants]
    found.rows += rows
    bench.tell(f"ahead {_told(rows)}")


def _if_idle(layer: Layer, variant: Variant) -> str:
    return "" if layer.pull(variant, 0) else "wrong: nothing was asked for"


def variants_of(case: Case, l2_bytes: int) -> list[Variant]:
    """Every share up to the first that K and V do not fill."""
    useful = [share for i, share in enumerate(SHARES) if i == 0 or SHARES[i - 1] * l2_bytes < case.kv_bytes]
    return [Variant(share, before) for before in LEFT for share in useful]


def row_of(bench: Bench, layer: Layer, variant: Variant, times: Mapping[str, Times]) -> Row:
    """gain_percent: of the time without, below 0 for a loss. copy_us: of what is asked for, at the copy bandwidth.
    issue_us: of the host, which is in no other time."""
    row: Row = layer.problem.case.to_row() | {"l2_share": variant.share, "before": variant.before}
    row["weight_bytes"] = layer.mlp.num_bytes
    row |= {f"{name}_us": times[name].us if name in times else None for name in ("MLP", "attend", "without")}
    names = "without_low_us", "without_high_us", "without_issue_us", "us", "low_us", "high_us", "issue_us"
    row |= dict.fromkeys((*names, "asked_bytes", "copy_us", "gain_percent", "foreseen_best_us", "foreseen_worst_us"))
    row["waited"] = " ".join(name for name, found in times.items() if found.waited)
    own, without = times.get(str(variant)), times.get("without")
    if own is None or without is None:
        return row
    row |= {f"without_{name}": getattr(without, name) for name in ("low_us", "high_us", "issue_us")}
    row |= {name: getattr(own, name) for name in ("us", "low_us", "high_us", "issue_us")}
    row["gain_percent"] = 100 * (without.us - own.us) / without.us
    copy_bytes_per_us, row["asked_bytes"] = 1e3 * bench.ground.speeds.copy_gbps, layer.pull(variant, 0)
    row["copy_us"] = row["asked_bytes"] / copy_bytes_per_us
    idle_us = LEFT[variant.before] * max(0.0, times["MLP"].us - layer.mlp.num_bytes / copy_bytes_per_us)
    expected = foreseen(without.us, row["copy_us"], idle_us)
    return row | {"foreseen_best_us": expected.best_us, "foreseen_worst_us": expected.worst_us}


def _told(rows: list[Row]) -> str:
    """Of a case."""
    case = f"{rows[0]['context']:,} x {rows[0]['batch']}"
    timed = [row for row in rows if row["us"] is not None]
    if not timed:
        return f"{case}: {rows[0]['wrong']}"
    best, worst = (pick(timed, key=lambda row: float(row["gain_percent"])) for pick in (max, min))
    alone = f"MLP {best['MLP_us']:.1f} us, attend {best['attend_us']:.1f}, both {best['without_us']:.1f}"
    return f"{case}: {alone}; pulled {_gain(best)} to {_gain(worst)}"


def _gain(row: Row) -> str:
    return f"{row['gain_percent']:+.1f} % ({row['asked_bytes'] / 1e6:.1f} MB before {row['before']})"


def summary(found: Found) -> Iterator[tuple[str, str]]:
    """How often pulling gains, then the best and the worst of each case."""
    for before in LEFT:
        gains = [row["gain_percent"] for row in found.rows if row["before"] == before and row["us"] is not None]
        if gains:
            faster, spread = sum(gain > 0 for gain in gains), f"{min(gains):+.1f} to {max(gains):+.1f} %"
            yield f"ahead, pulled before {before}", f"faster in {faster} of {len(gains)}, {spread}"
    for key in dict.fromkeys((row["context"], row["batch"]) for row in found.rows):
        yield "ahead", _told([row for row in found.rows if (row["context"], row["batch"]) == key])


SECTION = Section(measure, 1, summary)
