"""Measure, print, save: `python -m benchmarks.lanes`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product

from rich.console import Console
from rich.table import Table

from benchmarks import common, plot
from benchmarks.lanes import kvpr, splits, systems
from benchmarks.lanes.kvpr import KvprRow
from benchmarks.lanes.splits import Row
from benchmarks.lanes.systems import SystemRow
from tandemkv.profiling import measure as measure_machine

MODULE = "benchmarks.lanes"
HEADS = ((32, 8), (32, 32))
CONTEXTS = (4096, 16_384, 65_536, 131_072)
FILES = {"lanes": "lanes", "kvpr": "kvpr", "systems": "lane-systems"}
PICTURES = {"lanes": plot.draw_lanes, "kvpr": plot.draw_kvpr}
HELP = """One decode step of one layer, its far tokens over every lane: the host attends, or computes logits; or K and V
come up the link and the device attends. Device and host are two processors of this machine, links have 1/4, 1 and 4
times the speed at which the host attends. K and V come from memory, not from cache: layers of 1 GiB take turns.

a, b: what the host and the stream reach of K and V with both processors busy at once; (a + b) / max(a, b) is the most
that both together can gain over one. tandem splits as it measures; `swept` is the best of nine frozen splits. Then
KVPR's recomputation on a multi-head layer of hidden 1024, with the link set so that the share f of its tokens is worth
rebuilding: ideal gains are 1 / (1 - f) with layer inputs near (row) and 1 / (1 - f / 2) where they are sent (column).
Last, systems of one way beside the limit of that way: none is a weak one to be compared with.

Example: python -m benchmarks.lanes --context 32768 --json
"""


@dataclass(frozen=True)
class Found:
    """Rows of every part."""

    lanes: list[Row]
    kvpr: list[KvprRow]
    systems: list[SystemRow]

    def print(self, console: Console) -> None:
        """The tables for people."""
        if self.lanes:
            console.print(_table_of_lanes(self.lanes))
        if self.kvpr:
            console.print(_table_of_kvpr(self.kvpr))
        if self.systems:
            console.print(_table_of_systems(self.systems))

    def save(self, run: common.Run, console: Console) -> None:
        """Rows and pictures."""
        for name, found in asdict(self).items():
            if found:
                common.append_rows(common.RESULTS / f"{FILES[name]}.csv", found, run)
            if found and name in PICTURES:
                console.print(PICTURES[name](found, run, common.RESULTS / f"{name}.png"), highlight=False)


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


def _table_of_kvpr(rows: Sequence[KvprRow]) -> Table:
    table = Table(title=f"KVPR, {kvpr.KVPR_HEADS}:{kvpr.KVPR_HEADS} heads, {kvpr.KVPR_TOKENS:,} tokens, ms")
    for heading in ("schedule", "f", "link GB/s", "stream", "kvpr", "error", "rebuilt", "gain", "ideal", "share"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row.stream_ms:.1f}", f"{row.kvpr_ms:.1f}", f"{row.error:+.0%}")
        last = (f"{row.gain:.2f}", f"{row.ideal:.2f}", f"{row.share_of_ideal:.0%}")
        table.add_row(row.schedule, f"{row.f:.2f}", f"{row.link_gbps:.3f}", *times, f"{row.rebuilt_tokens:,}", *last)
    return table


def _table_of_systems(rows: Sequence[SystemRow]) -> Table:
    table = Table(title=f"systems beside their limits, {systems.HEADS[0]}:{systems.HEADS[1]} heads, one layer")
    for heading in ("system", "what", "limit", "GB/s", "limit ms", "ms", "share"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (f"{row.gbps:.2f}", f"{row.limit_ms:.1f}", f"{row.ms:.1f}", f"{row.share:.0%}")
        table.add_row(row.system, row.what, row.limit, *numbers)
    return table


def main() -> None:
    """Run, print, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument("--context", type=common.positive, action="append", help="tokens; repeat it (default: all)")
    parser.add_argument("--part", choices=list(FILES), action="append", help="repeat it (default: all; --quick: lanes)")
    arguments = parser.parse_args()
    if arguments.quick and (arguments.part or ["lanes"]) != ["lanes"]:
        parser.error("--quick measures lanes alone: leave out --part, or --quick")
    console = Console(stderr=arguments.json, width=None if sys.stdout.isatty() else 180)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    parts = arguments.part or (["lanes"] if arguments.quick else list(FILES))
    contexts = arguments.context or ((8192,) if arguments.quick else CONTEXTS)
    heads, budget_s = (list(HEADS[:1]), 1.5) if arguments.quick else (list(HEADS), 20.0)
    profile = measure_machine(console)
    found = Found([], [], [])
    for each, context in product(heads, contexts) if "lanes" in parts else ():
        for row in splits.measure(profile, each, context, budget_s):
            found.lanes.append(row)
            console.print(f"{row.heads} {row.context:,} link {row.link_gbps:.1f}: {row.plan}", highlight=False)
    if "kvpr" in parts:
        found.kvpr.extend(kvpr.measure(profile, budget_s / 2))
    if "systems" in parts:
        found.systems.extend(systems.measure(profile, systems.CONTEXT, budget_s))
    found.print(console)
    if not arguments.quick or arguments.save:
        found.save(run, console)
    if arguments.json:
        last = [asdict(rows[-1]) for rows in (found.systems, found.kvpr, found.lanes) if rows]
        common.print_json({**(last[-1] if last else {}), **asdict(found), **asdict(run)})


if __name__ == "__main__":
    main()
