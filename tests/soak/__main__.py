"""Random operations of many sequences on several tiny models, for minutes; everything is compared with stock.

what happens:
  Up to eight sequences live at a time, on llama, gemma2, gpt_oss, opt and two hybrids (lfm2, qwen3_next), each in a
  cache of random sizes, some with hardly any far memory, some left-padded. They generate (greedy, sampled, with beams,
  by prompt lookup, with a draft model, the prompt in pieces) and are fed, forked, cropped, reordered, cut off by Ctrl-C
  at a random line or by their streamer, reset, closed and dropped.
what is checked, after every operation:
  check() of every cache; tokens, and logits where they show, equal stock's (a token may differ where stock's own logits
  are as near as rounding); a refusal has changed nothing; the memory of pages goes with the last cache that uses it.
  Memory: ten times all caches are closed; what is resident then grows by less than 24 MiB from the second time on.
  Asked of runs of a minute and more that came to the third time.
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
import sys
import time
import traceback
from collections.abc import Sequence

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.processes import resident_bytes
from tests.soak.operations import Garden

NUM_CLEARINGS = 10
MAX_GROWTH = 24 << 20
"""Bytes of resident memory, while no cache lives and malloc has given back what it can (before that, it may keep 200
MiB of stock's forward passes, and of pages). Seen are 16 MiB in five minutes; stock alone: 24 in 2.5. Pages that leak
are told by their arenas (`Garden.check_arenas`); this is for all else. Five minutes are some ten thousand operations:
what each leaves behind shows from 3 KiB on."""
MIN_MEMORY_SECONDS = 60
"""Shorter runs are all warm-up: torch and malloc still take what they will keep."""


class MemoryGrewError(AssertionError):
    """Resident memory is not flat."""


Memory = list[int]


def run(garden: Garden, memory: Memory, seconds: float, num_operations: int | None, console: Console) -> float:
    """Operations until the time or their number is over; returns seconds.

    Ten times everything is closed or dropped, and the bytes that are still resident are noted.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    begin, elapsed = time.monotonic(), 0.0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("soak", total=seconds)
        while elapsed < seconds and len(garden.journal) != num_operations:
            garden.step()
            elapsed = time.monotonic() - begin
            if elapsed >= seconds * (len(memory) + 1) / NUM_CLEARINGS:
                clear(garden)
                memory.append(held_bytes())
            text = f"{len(garden.journal)} operations, {resident_bytes() >> 20} MiB resident"
            progress.update(task, completed=elapsed, description=text)
    clear(garden)
    return elapsed


def clear(garden: Garden) -> None:
    """Close every cache; with the last of a family its pages go."""
    while garden.sequences:
        garden.sequences.pop().cache.close()
        garden.check_arenas()


def held_bytes() -> int:
    """Resident memory without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def growth_of(memory: Memory) -> int | None:
    """Bytes that came to be held from a fifth of the time on; None where there was one look at them, or none."""
    later = memory[1:]
    return max(later) - later[0] if len(later) > 1 else None


def assert_flat(memory: Memory) -> None:
    growth = growth_of(memory)
    if growth is not None and growth > MAX_GROWTH:
        raise MemoryGrewError(f"resident memory grew by {growth >> 20} MiB: {[held >> 20 for held in memory]}")


def report(garden: Garden, memory: Memory, seconds: float, error: BaseException | None) -> dict[str, object]:
    return {
        "ok": error is None,
        "seed": garden.seed,
        "seconds": round(seconds, 1),
        "operations": len(garden.journal),
        "sequences": garden.num_started,
        "tokens": garden.num_tokens,
        "far_bytes_moved": garden.far_bytes,
        "resident_bytes": memory,
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
        f"{found['tokens']} tokens generated, {found['far_bytes_moved']:,} bytes moved far; resident MiB while no "
        f"cache lived: {' '.join(str(held >> 20) for held in memory) or 'never looked at'}"
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
    console = Console(stderr=options.json)
    transformers.logging.set_verbosity_error()
    garden, memory, error = Garden(options.seed), Memory(), None
    begin = time.monotonic()
    try:
        seconds = run(garden, memory, 60 * options.minutes, options.operations, console)
        if seconds >= MIN_MEMORY_SECONDS:
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
