"""Random operations of many sequences on several tiny models, for minutes; everything is compared with stock.

what happens:
  Up to eight sequences live at a time, on llama, gemma2, gpt_oss, opt and two hybrids (lfm2, qwen3_next), each in a
  cache of random sizes, some with hardly any far memory, some left-padded. They generate (greedy, sampled, with beams,
  by prompt lookup, with a draft model, the prompt in pieces) and are fed, forked, cropped, reordered, cut off by Ctrl-C
  at a random line or by their streamer, reset, closed and dropped.
what is checked, after every operation:
  check() of every cache; tokens, and logits where they show, equal stock's (a token may differ where stock's own logits
  are as near as rounding); a refusal has changed nothing; the memory of pages goes with the last cache that uses it.
  Memory: ten times all caches are closed; what malloc has handed out then grows by less than 8 MiB from the first
  minute on.
exit status:
  1 at the first failure, with the seed and the operations that led to it; --operations N stops behind the Nth.

examples:
  python -m tests.soak                               five minutes with seed 0 (`make soak`)
  python -m tests.soak --minutes 0.5 --seed 7        half a minute, another way
  python -m tests.soak --minutes 1 --json            for a script: the last line is one JSON object
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.processes import resident_bytes
from tests.soak.operations import Garden

NUM_CLEARINGS = 10
MAX_GROWTH = 8 << 20
"""Bytes that malloc has handed out while no cache lives: to tensors and native code, not to Python's small objects.
Pages that leak are told by their arenas (`Garden.check_arenas`); this is for all else. Five minutes are some ten
thousand operations: what each leaves behind shows from 1 KiB on. Seen are 0.2 MiB, and once 3.7 at one blow, as much as
a table of 2^18 names that doubles. (What is resident grows by 17 MiB of holes, and says less.)"""
WARM_UP_SECONDS = 60
"""So long torch still takes what it will keep."""

NOTHING_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
"""Else torch's products keep what they prepared for each of the last 1024 shapes, 20 MiB. Read by the first product."""


class MemoryGrewError(AssertionError):
    """Memory is not flat."""


class Held(NamedTuple):
    """Bytes that were in use so many seconds after the start, while no cache lived."""

    seconds: float
    num_bytes: int


Memory = list[Held]


def run(garden: Garden, memory: Memory, seconds: float, num_operations: int | None, console: Console) -> None:
    """Operations until the time or their number is over. Ten times all caches are closed, and memory is looked at."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    begin, elapsed = time.monotonic(), 0.0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("soak", total=seconds)
        while elapsed < seconds and len(garden.journal) != num_operations:
            garden.step()
            elapsed = time.monotonic() - begin
            if elapsed >= seconds * (len(memory) + 1) / NUM_CLEARINGS:
                clear(garden)
                memory.append(Held(elapsed, held_bytes()))
            text = f"{len(garden.journal)} operations, {resident_bytes() >> 20} MiB resident"
            progress.update(task, completed=elapsed, description=text)
    clear(garden)


def clear(garden: Garden) -> None:
    """Close every cache; with the last of a family its pages go."""
    while garden.sequences:
        garden.sequences.pop().cache.close()
        garden.check_arenas()


MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class MallInfo(ctypes.Structure):
    """glibc's `mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


def held_bytes() -> int:
    """What malloc has handed out, as parts of its heaps and as mappings."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def growth_of(memory: Memory) -> int | None:
    """Bytes that came to be held once torch was warm; None where there was one look at them since, or none."""
    later = [held.num_bytes for held in memory if held.seconds >= WARM_UP_SECONDS]
    return max(later) - later[0] if len(later) > 1 else None


def assert_flat(memory: Memory) -> None:
    growth = growth_of(memory)
    if growth is not None and growth > MAX_GROWTH:
        held = [each.num_bytes >> 20 for each in memory]
        raise MemoryGrewError(f"memory grew by {growth >> 20} MiB: {held}")


def report(garden: Garden, memory: Memory, seconds: float, error: BaseException | None) -> dict[str, object]:
    return {
        "ok": error is None,
        "seed": garden.seed,
        "seconds": round(seconds, 1),
        "operations": len(garden.journal),
        "sequences": garden.num_started,
        "tokens": garden.num_tokens,
        "far_bytes_moved": garden.far_bytes,
        "held_bytes": [held.num_bytes for held in memory],
        "grown_bytes": growth_of(memory),
        "counts": garden.counts,
    }


def show(console: Console, found: dict[str, object], garden: Garden, memory: Memory) -> None:
    table = Table("operation", "times", "how it ended", title=f"soak, seed {garden.seed}")
    for name, outcomes in sorted(garden.counts.items()):
        ended = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        table.add_row(name, str(sum(outcomes.values())), ended)
    console.print(table)
    console.print(
        f"{found['operations']} operations on {found['sequences']} sequences in {found['seconds']} s: "
        f"{found['tokens']} tokens generated, {found['far_bytes_moved']:,} bytes moved far; MiB in use while no "
        f"cache lived: {' '.join(str(held.num_bytes >> 20) for held in memory) or 'never looked at'}"
    )


def main(arguments: Sequence[str]) -> int:
    teaching, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tests.soak",
        description=teaching,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same operations (default: 0)")
    parser.add_argument("--operations", type=int, help="stop behind so many, however long it takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    os.environ |= NOTHING_KEPT
    console = Console(stderr=options.json)
    transformers.logging.set_verbosity_error()
    garden, memory, error = Garden(options.seed), Memory(), None
    begin = time.monotonic()
    try:
        run(garden, memory, 60 * options.minutes, options.operations, console)
        assert_flat(memory)
    except Exception as caught:  # noqa: BLE001  whatever it was, the way to it is told
        error = caught
        console.print("\n".join(garden.journal), highlight=False, markup=False)
        console.print("".join(traceback.format_exception(caught)), highlight=False, markup=False)
        console.print(f"failed: seed {options.seed}, {len(garden.journal)} operations", style="bold red")
    found = report(garden, memory, time.monotonic() - begin, error)
    show(console, found, garden, memory)
    if options.json:
        print(json.dumps(found))
    return int(error is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
