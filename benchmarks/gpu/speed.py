"""Our decode kernel over models, contexts and batches, beside its peers and the copy bandwidth."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import median

from benchmarks.gpu.budget import Allowance, Budget
from benchmarks.gpu.cases import MODELS, Case, Pool, Problem
from benchmarks.gpu.ground import Times
from benchmarks.gpu.peers import PEERS, Entrants, Peer, admit, presence
from benchmarks.gpu.pictures import draw_speed
from benchmarks.gpu.section import Bench, Found, Row, Section

CASES = tuple(
    Case(model, context, batch)
    for context, batch, model in product((8192, 32_768, 131_072, 2048), (16, 1, 64, 4), MODELS)
)
"""What tells most comes first: time may end before the cases do."""
QUICK = tuple(Case(model, 8192, 16) for model in MODELS[:2])
BAR = 0.9
"""Of the copy bandwidth, where K and V are large."""
ROW_S = 0.4
SLOW_SHARE = 0.4
"""Of the section's time, for peers that are compiled for every shape."""


def measure(bench: Bench, budget: Budget, found: Found, peers: Mapping[str, Peer] = PEERS) -> None:
    """A row for each case."""
    found.notes += [f"{name}: {what}" for name, what in presence().items()]
    pool = bench.pools.of(CASES[0].dtype, 0.7)
    slow = Allowance(0.0 if bench.quick else SLOW_SHARE * budget.left_s)
    for case in QUICK if bench.quick else CASES:
        if not pool.fits(case):
            found.missed.append(f"{case}: {case.kv_bytes / 1e9:.0f} GB of K and V do not fit")
        elif not budget.has(2 * ROW_S):
            found.missed.append(f"{case}: no time was left")
        else:
            found.rows.append(_row(bench, case, pool, (peers, slow)))
            bench.tell(_line(found.rows[-1]))


def _row(bench: Bench, case: Case, pool: Pool, others: tuple[Mapping[str, Peer], Allowance]) -> Row:
    problem = Problem(case, pool, bench.ground.facts.l2_bytes)
    ours = problem.ours()
    error, wrong = problem.check(ours)
    entrants = admit(problem, bench.ground, *others)
    forms = {name: form.call for name, form in entrants.forms.items()}
    times = bench.ground.in_turn(forms if wrong else {"ours": ours.call, **forms}, ROW_S) if forms or not wrong else {}
    return row_of(bench, case, times, entrants) | {"error": error, "wrong": wrong}


def row_of(bench: Bench, case: Case, times: Mapping[str, Times], entrants: Entrants) -> Row:
    """Ours, and each peer's microseconds, form, and reason not to be here; no ours where it is wrong."""
    ours = times.get("ours")
    peers_us = {name: times[name].us for name in PEERS if name in times}
    best = min(peers_us, key=peers_us.__getitem__, default=None)
    row = case.to_row() | {"is_large": bench.ground.is_large(case.kv_bytes)} | times_row(bench, case, ours)
    row |= {f"{name}_us": peers_us.get(name) for name in PEERS}
    row |= {"best_peer": best, "times_best_peer": None if best is None or ours is None else peers_us[best] / ours.us}
    return row | {
        "forms": " ".join(f"{name}:{form.replace(' ', '-')}" for name, form in entrants.names.items()),
        "missing": "; ".join(f"{name}: {why}" for name, why in entrants.missing.items()),
        "waited": " ".join(name for name, found in times.items() if found.waited),
    }


def times_row(bench: Bench, case: Case, times: Times | None) -> Row:
    """Of ours: microseconds and their spread, GB/s, and the share of the copy bandwidth where K and V are large."""
    if times is None:
        return dict.fromkeys(("us", "low_us", "high_us", "issue_us", "num", "gbps", "share_of_copy"))
    share = bench.ground.share(case.kv_bytes, times.us) if bench.ground.is_large(case.kv_bytes) else None
    numbers = {"us": times.us, "low_us": times.low_us, "high_us": times.high_us, "issue_us": times.issue_us}
    return {**numbers, "num": times.num, "gbps": case.kv_bytes / times.us / 1e3, "share_of_copy": share}


def _line(row: Row) -> str:
    name = f"{row['model']} {row['num_q_heads']}:{row['num_kv_heads']}, {row['context']:,} x {row['batch']}"
    if row["us"] is None:
        return f"{name}: {row['wrong']}"
    share = "small" if row["share_of_copy"] is None else f"{row['share_of_copy']:.1%} of copy"
    peers = ", ".join(f"{peer} {row[f'{peer}_us']:.1f}" for peer in PEERS if row[f"{peer}_us"] is not None)
    return f"{name}: {row['us']:.1f} us, {row['gbps']:.0f} GB/s, {share}; peers {peers or 'none'}"


def summary(found: Found) -> Iterator[tuple[str, str]]:
    """By model: how many large cases reach the bar, the worst of them, and ours beside the best peer."""
    for model in dict.fromkeys(row["model"] for row in found.rows):
        rows = [row for row in found.rows if row["model"] == model and row["us"] is not None]
        large = [row for row in rows if row["share_of_copy"] is not None]
        if large:
            yield f"{model}, share of copy", _shares(large)
        beside = [row["times_best_peer"] for row in large if row["times_best_peer"] is not None]
        if beside:
            reached = sum(ratio >= 1 for ratio in beside)
            yield (
                f"{model}, times the best peer",
                f"{reached} of {len(beside)} at least 1; least {min(beside):.2f}, median {median(beside):.2f}",
            )
        small = [row["us"] for row in rows if row["share_of_copy"] is None]
        if small:
            yield f"{model}, small cases", f"{min(small):.1f} to {max(small):.1f} us"


def _shares(rows: Sequence[Row]) -> str:
    worst = min(rows, key=lambda row: row["share_of_copy"])
    reached = sum(row["share_of_copy"] >= BAR for row in rows)
    where = f"{worst['context']:,} x {worst['batch']}"
    middle = median(row["share_of_copy"] for row in rows)
    least = f"least {worst['share_of_copy']:.1%} ({where})"
    return f"{reached} of {len(rows)} at least {BAR:.0%}; {least}, median {middle:.1%}"


SECTION = Section(measure, 7, summary, draw=draw_speed)
