"""The paper's table on this GPU (asynchronous KV prefetch to L2, 2504.06319): its baseline design and our kernel, each
without and with pieces asked for ahead. Batch 64, float16, contexts 512 + its output lengths, and 528, where by the
bytes of its own numbers (553 MB of Llama-2-7B) its profile was taken.

What is foreseen, before anything is measured (`Foreseen`). The paper's H20 has 78 multiprocessors; at 528 tokens its
kernel took `PAPER_US` before and after. Each query head reads its KV head's K and V, so a kernel asks for

    asked = 2 * batch * num_q_heads * context * head_dim * 2 bytes

and a multiprocessor of the paper got asked / (78 * us) bytes a microsecond before and after, by latency, whatever the
memory. With P multiprocessors of the same latency that takes asked / (P * rate); memory takes no less than K and V
once at the copy bandwidth. Foreseen is the longer of both, before and after, and as gain their ratio. On an H100
(132 multiprocessors, 3.0 TB/s) that says: with multi-head attention nothing is gained, as 132 multiprocessors of 24
GB/s reach what memory gives without asking ahead; with grouped queries 1.9 to 2.2, from L2 and not from memory.

Beside what was measured stands the ceiling: K and V once at the copy bandwidth over the baseline's time without
prefetch is its share of copy, and nothing that reads every byte from memory gains more than 1 / share.

The paper's rule of capacity: what all warps ask for ahead has to fit L2,
`M_block * warps * num_q_heads * batch * distance <= L2`, M_block = 4 KiB (16 tokens of 128 in float16), 4 warps. Ours
counts the tiles of all its programs so, and by itself asks for nothing where they do not fit. Here both designs ask all
the same (`Config.guarded` is False), and `fits_l2` says what the rule says. Foreseen of rows beyond it: the rule counts
programs that have not begun; what those that run at once ask for is at most P * programs of a multiprocessor * distance
* tile. Where that fits, as within the rule; where not, what is evicted before it is read is read twice, and prefetch
takes up to twice the time.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import sweep
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import MODELS, Case, Form, Pool, Problem
from benchmarks.gpu.ground import Facts, Times
from benchmarks.gpu.peers import told, why_wrong
from benchmarks.gpu.pictures import draw_paper
from benchmarks.gpu.section import Bench, Found, Row, Section
from benchmarks.gpu.sweep import chosen
from tandemkv.kernels.gpu import Config, l2

BATCH, BLOCK_TOKENS, NUM_WARPS = 64, 16, 4
CONTEXTS = (528, 512 + 4096, 512 + 8192, 512 + 2048, 512 + 1024, 512 + 512)
QUICK = ((MODELS[0],), CONTEXTS[:1])
PAPER_CONTEXT, PAPER_PROCESSORS = 528, 78
PAPER_US: Mapping[str, tuple[float, float]] = {
    "Llama-2-7B": (293.47, 159.14),
    "Llama-3-8B": (226.53, 119.90),
    "Qwen2.5-7B": (232.03, 107.71),
    "Qwen2.5-14B": (272.19, 143.94),
}
DISTANCES = (1, 2, 4)
CASE_S = 0.8


class Foreseen(NamedTuple):
    """Microseconds of the paper's design on this GPU, without and with prefetch; by the formula above."""

    before_us: float
    after_us: float

    @property
    def gain(self) -> float:
        """Times as fast."""
        return self.before_us / self.after_us


def foreseen(case: Case, num_processors: int, copy_gbps: float) -> Foreseen:
    """For a GPU of so many multiprocessors and such a copy bandwidth."""
    at_paper = case._replace(context=PAPER_CONTEXT, batch=BATCH)
    memory_us = case.kv_bytes / copy_gbps / 1e3
    before, after = (
        max(asked_bytes(case) / (num_processors * asked_bytes(at_paper) / (PAPER_PROCESSORS * us)), memory_us)
        for us in PAPER_US[case.model.name]
    )
    return Foreseen(before, after)


def asked_bytes(case: Case) -> int:
    """Of K and V by a design in which each query head reads its KV head's."""
    return case.kv_bytes * case.group_size


def fits_l2(case: Case, distance: int, l2_bytes: int) -> bool:
    """The paper's rule."""
    block_bytes = BLOCK_TOKENS * case.model.head_dim * case.dtype.itemsize
    return l2.fits_l2(block_bytes, distance, NUM_WARPS * case.model.num_q_heads * case.batch, l2_bytes)


class Variant(NamedTuple):
    """design: `baseline` is the paper's, with a block's loads in front of its arithmetic at every distance; `unordered`
    is the same as the compiler orders it, which differs by distance. prologue: of the baseline; ours always has one."""

    design: str
    distance: int
    prologue: bool = False

    def __str__(self) -> str:
        ahead = f" ahead {self.distance}" if self.distance else ""
        return f"{self.design}{ahead}{' + prologue' if self.prologue else ''}"


VARIANTS = (
    Variant("baseline", 0),
    *(Variant("baseline", distance, prologue) for distance in DISTANCES for prologue in (False, True)),
    Variant("unordered", 0),
    Variant("unordered", 1),
    Variant("ours", 0),
    *(Variant("ours", distance) for distance in DISTANCES),
)


def measure(bench: Bench, budget: Budget, found: Found) -> None:
    """A row for each variant of each case."""
    pool = bench.pools.of(torch.float16, 0.35)
    models, contexts = QUICK if bench.quick else (MODELS, CONTEXTS)
    cases = [Case(model, context, BATCH, torch.float16) for context in contexts for model in models]
    if not bench.quick:
        bench.compilers.compile(_jobs(cases, bench.ground.facts.num_processors), budget.left_s / 3)
    for case in cases:
        if not pool.fits(case):
            found.missed.append(f"paper, {case}: {case.kv_bytes / 1e9:.0f} GB of K and V do not fit")
        elif not budget.has(2 * CASE_S):
            found.missed.append(f"paper, {case}: no time was left")
        else:
            _measure(bench, case, pool, found)


def _jobs(cases: Sequence[Case], num_processors: int) -> Iterator[tuple[Case, Config]]:
    for case in cases:
        for distance in (0, *DISTANCES):
            yield case, replace(chosen(case, num_processors), num_splits=1, distance=distance, guarded=False)


def _measure(bench: Bench, case: Case, pool: Pool, found: Found) -> None:
    problem = Problem(case, pool, bench.ground.facts.l2_bytes)
    forms, reasons = forms_of(problem, bench.ground.facts.num_processors)
    for variant, form in list(forms.items()):
        if why := why_wrong(problem, form):
            reasons[variant] = why
            del forms[variant]
    calls = {str(variant): form.call for variant, form in forms.items()}
    times = bench.ground.in_turn(calls, CASE_S) if calls else {}
    rows = rows_of(bench, case, times, reasons)
    found.rows += rows
    found.notes += sorted({f"paper, {why}" for why in reasons.values()} - set(found.notes))
    bench.tell(f"paper {case}: " + ", ".join(f"{row['variant']} {row['us']:.1f}" for row in rows if row["us"]))
    del forms, calls, problem
    gc.collect()


def forms_of(problem: Problem, num_processors: int) -> tuple[dict[Variant, Form], dict[Variant, str]]:
    """Every variant that can be built, and why the others cannot."""
    forms: dict[Variant, Form] = {}
    reasons: dict[Variant, str] = {}
    config = chosen(problem.case, num_processors)
    try:
        baseline = baseline_of(problem)
    except Exception as error:  # noqa: BLE001  told with every row
        reasons = {each: f"the baseline: {told(error)}" for each in VARIANTS if each.design != "ours"}
    for variant in VARIANTS:
        if variant.design == "ours":
            forms[variant] = problem.ours(replace(config, distance=variant.distance, guarded=False))
        elif variant not in reasons:
            try:
                forms[variant] = baseline(variant)
            except Exception as error:  # noqa: BLE001  told with the row
                reasons[variant] = told(error)
    return forms, reasons


def baseline_of(problem: Problem) -> Callable[[Variant], Form]:
    """What makes the paper's kernel over copies of K and V in its layout, one for each place where memory allows it,
    two at least that L2 cannot hold."""
    paper = import_module("benchmarks.gpu.paper")
    case, device = problem.case, problem.pool.device
    copies = [paper.paged(*dense, BLOCK_TOKENS) for dense in problem.dense[: _num_copies(problem)]]
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
    q = problem.q[:, :, 0].contiguous()

    def rows(place: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
        return problem.of_dense(place % len(copies), seq, head)

    def form(variant: Variant) -> Form:
        kernel = paper.PaperKernel(
            case.model.head_dim,
            case.dtype,
            BLOCK_TOKENS,
            distance=variant.distance,
            prologue=variant.prologue,
            loads_first=variant.design == "baseline",
        )

        def call(turn: int) -> Any:
            return kernel.attend(q, *copies[turn % len(copies)], lens, case.scale)

        return Form(call, lambda found: (found[0], found[1]), rows)

    return form


def _num_copies(problem: Problem) -> int:
    """As many as places, and as memory that is free holds beside what making one takes."""
    if problem.pool.device.type != "cuda":
        return len(problem.places)
    free, _ = torch.cuda.mem_get_info(problem.pool.device)
    return max(1, min(len(problem.places), free // problem.case.kv_bytes - 3))


def rows_of(bench: Bench, case: Case, times: Mapping[str, Times], reasons: Mapping[Variant, str]) -> list[Row]:
    """gain: over the same design without prefetch. ceiling: the most that it can be. foreseen_us and foreseen_gain
    are the formula's, of the baseline. fits_l2: by the rule of capacity; asked for is all the same."""
    facts, copy_gbps = bench.ground.facts, bench.ground.speeds.copy_gbps
    expected, rows = foreseen(case, facts.num_processors, copy_gbps), []
    for variant in VARIANTS:
        own, plain = times.get(str(variant)), times.get(variant.design)
        is_baseline = variant.design != "ours"
        us = expected.after_us if variant.distance else expected.before_us
        rows.append(
            case.to_row()
            | {"variant": str(variant), "distance": variant.distance, "is_large": bench.ground.is_large(case.kv_bytes)}
            | _speeds(bench, case, own)
            | {"gain": None if own is None or plain is None else plain.us / own.us}
            | {"ceiling": None if plain is None else 1 / bench.ground.share(case.kv_bytes, plain.us)}
            | {"foreseen_us": us if is_baseline else None}
            | {"foreseen_gain": expected.gain if is_baseline and variant.distance else None}
            | {"fits_l2": _fits(case, variant, facts)}
            | {"reason": reasons.get(variant, ""), "wrong": _if_wrong(variant, reasons)}
        )
    return rows


def _fits(case: Case, variant: Variant, facts: Facts) -> bool:
    if variant.design != "ours":
        return fits_l2(case, variant.distance, facts.l2_bytes)
    config = replace(chosen(case, facts.num_processors), distance=variant.distance)
    return sweep.fits_l2(case, config, facts.l2_bytes)


def _speeds(bench: Bench, case: Case, times: Times | None) -> Row:
    if times is None:
        return dict.fromkeys(("us", "low_us", "high_us", "gbps", "asked_gbps", "of_copy"))
    gbps = {"gbps": case.kv_bytes / times.us / 1e3, "asked_gbps": asked_bytes(case) / times.us / 1e3}
    of_copy = bench.ground.share(case.kv_bytes, times.us)
    return {"us": times.us, "low_us": times.low_us, "high_us": times.high_us, **gbps, "of_copy": of_copy}


def _if_wrong(variant: Variant, reasons: Mapping[Variant, str]) -> str:
    why = reasons.get(variant, "")
    return why if why.startswith("wrong") else ""


def summary(found: Found) -> Iterator[tuple[str, str]]:
    """A line for each model: by how much its best prefetch gains over the contexts, foreseen and measured."""
    for model in dict.fromkeys(row["model"] for row in found.rows):
        for design in ("baseline", "unordered", "ours"):
            rows = [r for r in found.rows if r["model"] == model and r["variant"].split()[0] == design and r["us"]]
            if rows:
                yield f"paper {model}, {design}", _gains(rows)


def _gains(rows: list[Row]) -> str:
    shares = [row["of_copy"] for row in rows if not row["distance"]]
    ahead = [row for row in rows if row["distance"] and row["gain"]]
    expected = [row["foreseen_gain"] for row in ahead if row["foreseen_gain"]]
    told = [f"{min(shares):.0%} to {max(shares):.0%} of copy"] if shares else []
    told += [f"foreseen {min(expected):.2f} to {max(expected):.2f}"] if expected else []
    if ahead:
        contexts = dict.fromkeys(row["context"] for row in ahead)
        best = [max(float(row["gain"]) for row in ahead if row["context"] == context) for context in contexts]
        hurts, least = sum(row["gain"] < 1 for row in ahead), min(float(row["gain"]) for row in ahead)
        told += [f"best prefetch {min(best):.2f} to {max(best):.2f} times as fast"]
        told += [f"slower in {hurts} of {len(ahead)}, least {least:.2f}"]
    beyond = [float(row["gain"]) for row in ahead if not row["fits_l2"]]
    if beyond:
        gains = f"{min(beyond):.2f} to {max(beyond):.2f}"
        told += [f"{len(beyond)} of {len(ahead)} asked for more than fits L2 by the rule: {gains}"]
    return "; ".join(told)


SECTION = Section(measure, 3, summary, draw=draw_paper)
