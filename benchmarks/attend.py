"""Decode attention over a long KV on this machine's CPU: ours beside its peers and beside the speed of memory.

how to read it:
  read      the limit: GB/s of plain loads over 1 GiB of the memory that ours attends, the best of 1 and 2 threads.
            K and V have to be read once, so GB/s over that limit is the share of what is possible. A share above 1
            means that the probe was disturbed, never that attention is faster than memory.
  limit     the slower of two: reading K and V once, and the multiply-adds of ours at the speed at which the same
            instruction runs from registers alone, on as many threads (vdpbf16ps, bfdot, or float32 multiply-adds; not
            counted where AMX tiles do them). A query head takes one for each number of K and one for each of V; with
            dot products of bf16 two for each of V, because a probability is a high and a low bf16 part. Softmax is not
            in it.
  torch_sdpa, torch_matmul, flex_attention
            torch at its best: dense K and V, contiguous per head, the queries of a group as rows
  transformers
            the function that `generate` calls as shipped (attn_implementation="sdpa"), without a mask
  llama.cpp its flash attention in f16 or bf16, whichever is faster, where llama-cpp-python is installed
  onnxruntime
            GroupQueryAttention in float32 (faster there than float16), where onnxruntime and onnx are installed

KV is bf16 with one query token per sequence. Every output is compared with float64 before anything is timed. All take
turns in one run, so that noise hits all of them, over copies in rotation, so that nothing comes from a cache. Numbers
are medians. All of them, the probe too, read memory in huge pages where the machine allows them, as pools have it
(`tandemkv doctor`). torch's threads sleep between ops (GOMP_SPINCOUNT=0), for ours and for peers; as torch's default is
to spin, the peers are timed once more that way, at 32:8x128 and 32K, in a process of their own.

A full run takes some ten minutes and 5 GiB (more with the extra peers), appends to benchmarks/results/attend.csv and
draws attend.png beside it; --quick and --groups append too, but only with --save. --quick leaves out flex_attention.

examples:
  python -m benchmarks.attend --quick           32 query heads on 8 KV heads of 128, 32K tokens: under 45 seconds
  python -m benchmarks.attend --quick --json    the same for a script: the last line is one JSON object
  python -m benchmarks.attend --groups          8 KV heads of 128 at 32K, 1 to 16 query heads each: ours and its limits
  python -m benchmarks.attend                   32:8, 28:4, 32:32, 16:16 heads of 64 and 128 at 4K, 32K and 128K
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import plot
from benchmarks.common import RESULTS, WrongResultError, append_rows, argument_parser, print_json, this_run
from benchmarks.contest import Row, Rules, Shape, prepare
from benchmarks.peers import PEERS, Call, PeerUnavailableError, Problem
from tandemkv import machine
from tandemkv.kernels import cpu

HEADLINE, HEADLINE_THREADS = Shape(32, 8, 128, 32768), 2
QUICK = {HEADLINE: (1, 2)}
FULL = {
    Shape(*heads, head_dim, kv_len): (1, 2)
    for heads in ((32, 8), (28, 4), (32, 32), (16, 16))
    for head_dim in (64, 128)
    for kv_len in (4096, 32768, 131072)
}
GROUPS = {Shape(8 * group_size, 8, 128, 32768): (2,) for group_size in range(1, 17)}
FULL_RULES, GROUPS_RULES = Rules(budget_s=3.0), Rules(budget_s=2.0, peers={})
LIBGOMP_SPINCOUNT = "300000"
"""What libgomp does where nothing is set: about 3 ms of spinning."""


def _left_out(_: Problem) -> Call:
    raise PeerUnavailableError("--quick leaves it out: compiling it took half of the run, and it was not the fastest")


QUICK_RULES = Rules(budget_s=2.0, peers=PEERS | {"flex_attention": _left_out})


def main(arguments: Sequence[str]) -> int:
    """Measure, print, save; the exit status."""
    parser = argument_parser("benchmarks.attend", __doc__ or "")
    parser.add_argument("--peers-only", action="store_true", help="the peers' milliseconds at 32:8x128 and 32K as JSON")
    parser.add_argument("--groups", action="store_true", help="every group size, without peers; --save appends")
    options = parser.parse_args(arguments)
    cases, rules = _cases(options.quick, options.groups)
    try:
        if options.peers_only:
            print_json(prepare(HEADLINE, rules).peers_ms(HEADLINE_THREADS))
            return 0
        rows = list(measure(cases, rules))
    except WrongResultError as error:
        print(f"our result is wrong, so nothing is timed: {error}", file=sys.stderr)
        return 1
    headline = next(row for row in rows if (row.shape, row.num_threads) == (HEADLINE, HEADLINE_THREADS))
    spinning_ms = spinning_peers_ms(options.quick) if rules.peers else {}
    run = this_run("benchmarks.attend", arguments)
    print(run)
    show(rows, headline, spinning_ms)
    full = cases is FULL
    if options.save or full:
        append_rows(RESULTS / "attend.csv", [*csv_rows(rows), *csv_spinning(headline, spinning_ms)], run)
    if full:
        print(plot.draw(rows, run, RESULTS / "attend.png"))
    if options.json:
        print_json(asdict(run) | summary(rows, headline, spinning_ms))
    return 0


def _cases(quick: bool, groups: bool) -> tuple[Mapping[Shape, Sequence[int]], Rules]:
    if groups:
        return GROUPS, GROUPS_RULES
    return (QUICK, QUICK_RULES) if quick else (FULL, FULL_RULES)


def measure(cases: Mapping[Shape, Sequence[int]], rules: Rules) -> Iterator[Row]:
    """A row for each shape and number of threads, with a line of progress on stderr."""
    for shape, threads in cases.items():
        contest = prepare(shape, rules)
        for num_threads in threads:
            row = contest.row(num_threads)
            print(f"{shape}, threads {num_threads}: {row.ours_ms:.2f} ms", file=sys.stderr)
            yield row


def spinning_peers_ms(quick: bool) -> dict[str, float]:
    """The peers at the headline with torch's default setting, which libgomp reads once per process."""
    command = [sys.executable, "-m", "benchmarks.attend", "--peers-only", *(["--quick"] if quick else [])]
    environment = os.environ | {"GOMP_SPINCOUNT": LIBGOMP_SPINCOUNT}
    root = Path(__file__).parents[1]
    child = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    times: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return times


def summary(rows: Sequence[Row], headline: Row, spinning_ms: Mapping[str, float]) -> dict[str, object]:
    """The JSON object: the headline's row, its peers in torch's default setting, and all rows."""
    return headline.to_json() | {"spinning_peers_ms": dict(spinning_ms), "rows": [row.to_json() for row in rows]}


def show(rows: Sequence[Row], headline: Row, spinning_ms: Mapping[str, float]) -> None:
    """Every row in one table, the headline's contestants in another, and what has to be said about them."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(_table_of_rows(rows))
    console.print(_meaning_of_limit(headline), markup=False)
    console.print(_table_of_contestants(headline, spinning_ms))
    for name, why in sorted({item for row in rows for item in row.peers_missing.items()}):
        console.print(f"{name} did not take part: {why}", markup=False)
    for told in _disturbed(rows):
        console.print(f"{told}: repeat the run on a quiet machine", style="bold red")


def _disturbed(rows: Sequence[Row]) -> Iterator[str]:
    """What no row of a quiet machine says: that something is faster than memory, or registers slower than elsewhere."""
    fastest: dict[int, float] = {}
    for row in rows:
        fastest[row.num_threads] = max(row.dot_gops, fastest.get(row.num_threads, 0.0))
    for row in rows:
        where = f"{row.shape}, {row.num_threads} threads"
        if row.probe_at_fault:
            yield f"{where}: a share of read above 1 is a fault of the probe (nothing reads faster than memory)"
        if row.dot_gops < 0.9 * fastest[row.num_threads]:
            yield (
                f"{where}: multiply-adds from registers took part at {row.dot_gops:.0f} G/s, in another row at "
                f"{fastest[row.num_threads]:.0f}, so this arithmetic limit is none"
            )


def csv_rows(rows: Sequence[Row]) -> Iterator[dict[str, object]]:
    """A line for ours and for each peer, so that a new peer needs no new column."""
    for row in rows:
        contestants = {"tandemkv": (row.ours_ms, row.max_error)}
        contestants |= {name: (ms, row.peers_max_error[name]) for name, ms in row.peers_ms.items()}
        for name, (ms, max_error) in contestants.items():
            yield _csv_row(row, name, ms) | {
                "read_gbps": f"{row.read_gbps:.2f}",
                "share_of_read": f"{row.share_of_read(ms):.3f}",
                "arithmetic_limit_us": _number(row.arithmetic_limit_us if name == "tandemkv" else None, ".1f", ""),
                "share_of_limit": _number(row.share_of_limit if name == "tandemkv" else None, ".3f", ""),
                "max_error": f"{max_error:.1e}",
            }


def csv_spinning(headline: Row, spinning_ms: Mapping[str, float]) -> Iterator[dict[str, object]]:
    """The peers in torch's default setting; no probe and no share, which belong to another process."""
    for name, ms in spinning_ms.items():
        of_this_process = ("read_gbps", "share_of_read", "arithmetic_limit_us", "share_of_limit", "max_error")
        yield _csv_row(headline, f"{name} (spinning)", ms) | dict.fromkeys(of_this_process, "")


def _csv_row(row: Row, contestant: str, ms: float) -> dict[str, object]:
    return {
        **asdict(row.shape),
        "num_threads": row.num_threads,
        "contestant": contestant,
        "ms": f"{ms:.4f}",
        "gbps": f"{row.gbps(ms):.2f}",
    }


def _meaning_of_limit(row: Row) -> str:
    isa = cpu.resolve_isa()
    if row.multiply_adds == 0:
        return f"limit: reading K and V once; the arithmetic is done by tiles ({isa}), whose speed is not measured"
    return (
        f"limit: the slower of reading K and V once and of the multiply-adds, {row.multiply_adds} for an element of K "
        f"and one of V at {row.shape}, at {row.dot_gops:.0f} G/s from registers on {row.num_threads} threads ({isa})"
    )


def _table_of_rows(rows: Sequence[Row]) -> Table:
    peers = list(dict.fromkeys(name for row in rows for name in row.peers_ms))
    between = "sleep" if machine.spin().passive else "spin"
    title = f"Decode attention, bf16, one query; medians; torch's threads {between} between ops"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("shape", no_wrap=True)
    limits = (
        "threads",
        "read\nGB/s",
        "ours\nGB/s",
        "share\nof read",
        "arithmetic\nlimit ms",
        "share\nof limit",
        "ours\nms",
    )
    for name in (*limits, *(name.replace("_", "\n") + "\nms" for name in peers)):
        table.add_column(name, justify="right")
    for name in ("times\nfastest peer", "times\ntransformers", "max error"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.shape),
            str(row.num_threads),
            f"{row.read_gbps:.1f}",
            f"{row.gbps(row.ours_ms):.1f}",
            f"{row.share_of_read(row.ours_ms):.2f}",
            _number(None if row.arithmetic_limit_us is None else row.arithmetic_limit_us / 1e3, ".2f"),
            f"{row.share_of_limit:.2f}",
            f"{row.ours_ms:.2f}",
            *(_number(row.peers_ms.get(name), ".2f") for name in peers),
            _number(row.ratio_to_fastest_peer, ".1f"),
            _number(row.ratio_to_transformers, ".1f"),
            f"{row.max_error:.0e}",
        )
    return table


def _table_of_contestants(row: Row, spinning_ms: Mapping[str, float]) -> Table:
    title = f"{row.shape}, {row.num_threads} threads; memory reads at {row.read_gbps:.1f} GB/s"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("contestant")
    for name in ("ms", "GB/s", "share of read", "ours is faster by", "max error", "ms, torch threads spinning"):
        table.add_column(name, justify="right")
    errors = {"tandemkv": row.max_error} | row.peers_max_error
    for name, ms in {"tandemkv": row.ours_ms, **row.peers_ms}.items():
        table.add_row(
            name,
            f"{ms:.2f}",
            f"{row.gbps(ms):.1f}",
            f"{row.share_of_read(ms):.2f}",
            f"{ms / row.ours_ms:.1f}",
            f"{errors[name]:.0e}",
            _number(spinning_ms.get(name), ".2f"),
        )
    return table


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
