"""How the decode kernel's configuration changes its speed, for a few shapes: what `config_for` is to be chosen from.

One axis after the other, each with the best of those before: tiles, warps and stages; parts of a sequence; tiles asked
for in L2 ahead, also where the rule of capacity says that they do not fit (`fits_l2`). All configurations of a step
take turns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

import torch

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import MODELS, PAGE, Case, Form, Problem
from benchmarks.gpu.peers import told
from benchmarks.gpu.section import Bench, Found, Row, Section
from benchmarks.gpu.speed import times_row
from tandemkv.kernels.gpu import Config, config_for, l2
from tandemkv.kernels.gpu.config import MAX_SPLITS, fitted
from tandemkv.kernels.gpu.formats import padded
from tandemkv.kernels.gpu.placed import shared_bytes

LLAMA_2, LLAMA_3, QWEN_7B, QWEN_14B = MODELS
CASES = (
    Case(LLAMA_3, 32_768, 16),
    Case(LLAMA_3, 131_072, 1),
    Case(LLAMA_2, 8192, 16),
    Case(QWEN_7B, 8192, 64),
    Case(QWEN_14B, 32_768, 4),
)
BLOCK_N, NUM_WARPS, NUM_STAGES = (64, 32, 128), (4, 8), (3, 2, 4)
SPLITS, DISTANCES = (2, 4), (1, 2, 4)
STEP_S = 0.5
COMPILING_S = 3.0
"""Of a configuration, at most, as far as is known before."""


def measure(bench: Bench, budget: Budget, found: Found) -> None:
    """Every configuration of every case, with its step."""
    pool = bench.pools.of(CASES[0].dtype, 0.5)
    fitting = [case for case in CASES if pool.fits(case)]
    found.missed += [f"{case}: K and V do not fit" for case in CASES if case not in fitting]
    first = [(case, each) for case in fitting for each in tiles(chosen(case, bench.ground.facts.num_processors))]
    bench.compilers.compile(first, budget.left_s / 2)
    for i, case in enumerate(fitting):
        part = budget.part(1 / (len(fitting) - i))
        problem = Problem(case, pool, bench.ground.facts.l2_bytes)
        best = chosen(case, bench.ground.facts.num_processors)
        for step, others in STEPS.items():
            best = _step(bench, part, found, (problem, step), [best, *others(best)])
        bench.tell(f"sweep {case}: {best}")


def chosen(case: Case, num_processors: int) -> Config:
    """What the kernel takes by itself."""
    config = config_for(case.batch, case.model.num_kv_heads, case.group_size, PAGE * case.num_pages, num_processors)
    token_bytes = 2 * padded(case.model.head_dim) * case.dtype.itemsize
    return fitted(config, token_bytes, shared_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")), 2)


def fits_l2(case: Case, config: Config, l2_bytes: int) -> bool:
    """Whether what all programs ask for ahead fits L2 at once. Where it does not, a guarded kernel asks for nothing."""
    tile_bytes = 2 * config.block_n * case.model.head_dim * case.dtype.itemsize
    row_blocks = -(-case.group_size // config.block_m)
    num_programs = config.num_splits * case.model.num_kv_heads * row_blocks * case.batch
    return l2.fits_l2(tile_bytes, config.distance, num_programs, l2_bytes)


def tiles(config: Config) -> list[Config]:
    """Every other combination of tokens of a tile, warps and stages."""
    found = (
        replace(config, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        for num_stages, num_warps, block_n in product(NUM_STAGES, NUM_WARPS, BLOCK_N)
    )
    return [each for each in found if each != config]


def splits(config: Config) -> list[Config]:
    """More parts of a sequence."""
    return [replace(config, num_splits=min(MAX_SPLITS, times * config.num_splits)) for times in SPLITS]


def ahead(config: Config) -> list[Config]:
    """Tiles asked for in L2, whether they fit or not."""
    return [replace(config, distance=distance, guarded=False) for distance in DISTANCES]


STEPS: Mapping[str, Callable[[Config], list[Config]]] = {"tiles": tiles, "splits": splits, "ahead": ahead}


def _step(bench: Bench, budget: Budget, found: Found, what: tuple[Problem, str], configs: Sequence[Config]) -> Config:
    """The best of these; the first, which the step before chose, where nothing else is right."""
    problem, step = what
    bench.compilers.compile(((problem.case, config) for config in configs), budget.left_s / 2)
    forms: dict[Config, Form] = {}
    for config in dict.fromkeys(configs):
        row = _columns(bench, what, config)
        if not budget.has(COMPILING_S) and forms:
            found.missed.append(f"{problem.case}, {step}, {short(config)}: no time was left")
            continue
        form = problem.ours(config)
        try:
            _, why = problem.check(form)
        except Exception as error:  # noqa: BLE001  a tile too large for shared memory is a row that says so
            found.rows.append(row | times_row(bench, problem.case, None) | {"best": False, "failed": told(error)})
            continue
        if why:
            row["wrong"] = why
            found.rows.append(row | times_row(bench, problem.case, None) | {"best": False, "failed": why})
        else:
            forms[config] = form
    if not forms:
        return configs[0]
    times = bench.ground.in_turn({short(config): form.call for config, form in forms.items()}, STEP_S)
    best = min(forms, key=lambda config: times[short(config)].us)
    for config in forms:
        row = _columns(bench, what, config)
        row |= times_row(bench, problem.case, times[short(config)])
        found.rows.append(row | {"best": config == best, "failed": ""})
    return best


def _columns(bench: Bench, what: tuple[Problem, str], config: Config) -> Row:
    """fits_l2: by the rule, what is asked for ahead."""
    problem, step = what
    fits = fits_l2(problem.case, config, bench.ground.facts.l2_bytes)
    return problem.case.to_row() | {"step": step, "config": short(config), "fits_l2": fits, "wrong": ""}


def short(config: Config) -> str:
    """For a column."""
    return (
        f"n{config.block_n} m{config.block_m} w{config.num_warps} s{config.num_stages} "
        f"splits{config.num_splits} ahead{config.distance}"
    )


def summary(found: Found) -> Iterator[tuple[str, str]]:
    """The best of each case beside what was chosen without measuring."""
    for key in dict.fromkeys((row["model"], row["context"], row["batch"]) for row in found.rows):
        rows = [row for row in found.rows if (row["model"], row["context"], row["batch"]) == key and row["us"]]
        if rows:
            last = [row for row in rows if row["step"] == rows[-1]["step"]]
            best = min(last, key=lambda row: float(row["us"]))
            yield f"sweep {key[0]} {key[1]:,} x {key[2]}", f"{_speed(best)}: {best['config']}; chosen {_speed(rows[0])}"


def _speed(row: Row) -> str:
    share = "" if row["share_of_copy"] is None else f", {row['share_of_copy']:.1%}"
    return f"{row['us']:.1f} us{share}"


SECTION = Section(measure, 3, summary, in_quick=False)
