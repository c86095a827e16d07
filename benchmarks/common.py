"""What the benchmarks share: where and what ran, medians of contestants that take turns, arguments, CSV and JSON."""

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandemkv import machine
from tandemkv.types import format_bytes

RESULTS = Path(__file__).parent / "results"
TURN_S = 0.02
"""A turn lasts at least this long: threads that slept through the other turns wake in its first call."""


class WrongResultError(Exception):
    """Our output is not what float64 says: there is no speed to talk about."""


@dataclass(frozen=True)
class Run:
    """What a number needs beside it to be repeated."""

    machine: str
    commit: str
    command: str

    def __str__(self) -> str:
        return f"machine: {self.machine}\ncommit:  {self.commit}\ncommand: {self.command}"


def this_run(module: str, arguments: Sequence[str]) -> Run:
    """This machine, the commit of this file's repository, and the command that repeats the run."""
    memory = format_bytes(machine.memory().total_bytes)
    here = f"{machine.processor().name}, {machine.default_threads()} cores, {memory}"
    return Run(here, commit(), shlex.join(["python", "-m", module, *arguments]))


def commit() -> str:
    """The short commit, with '+' where tracked or new files differ from it (results aside); 'unknown' without git."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        dirty = _git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if dirty else "")


def argument_parser(module: str, teaching: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every benchmark; the first paragraph of `teaching` stands above them."""
    description, _, epilog = teaching.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one small case, under 45 seconds; saved only with --save")
    parser.add_argument("--json", action="store_true", help="end with one line that is a JSON object of everything")
    parser.add_argument("--save", action="store_true", help="save rows of a run that is not full, too")
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def in_ms(call: Callable[[], object]) -> Callable[[], float]:
    """A contestant whose score is the milliseconds that a call takes."""

    def score() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    return score


def medians_in_turn(
    contestants: Mapping[str, Callable[[], float]], budget_s: float, min_rounds: int = 3
) -> dict[str, float]:
    """Each contestant's median score over all rounds of `rounds_in_turn`."""
    rounds = rounds_in_turn(contestants, budget_s, min_rounds)
    return {name: statistics.median(score for each in rounds for score in each[name]) for name in contestants}


def rounds_in_turn(
    contestants: Mapping[str, Callable[[], float]], budget_s: float, min_rounds: int = 3
) -> list[dict[str, list[float]]]:
    """Scores of contestants that take turns, round after round, so that noise hits all of them alike.

    A contestant returns its own score (`in_ms`, or GB/s) and is called for at least TURN_S in its turn. Rounds go on
    until `budget_s` is spent, but at least `min_rounds`.
    """
    rounds: list[dict[str, list[float]]] = []
    start = time.perf_counter()
    while len(rounds) < min_rounds or time.perf_counter() - start < budget_s:
        rounds.append({name: _turn(score) for name, score in contestants.items()})
    return rounds


def _turn(score: Callable[[], float]) -> list[float]:
    scores: list[float] = []
    begin = time.perf_counter()
    while not scores or time.perf_counter() - begin < TURN_S:
        scores.append(score())
    return scores


def append_rows(path: Path, rows: Sequence[Mapping[str, object]], run: Run) -> None:
    """Append rows to a CSV, each with its date, machine, commit and command.

    Raises ValueError where the file has other columns: rows of two kinds in one file could not be compared.
    """
    date = time.strftime("%Y-%m-%d", time.gmtime())
    full = [{"date": date, **row, "machine": run.machine, "commit": run.commit, "command": run.command} for row in rows]
    columns = list(full[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, columns):
            raise ValueError(f"{path} has the columns {header}, these rows have {columns}: move the old file away")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerows(full)


def print_json(result: Mapping[str, object]) -> None:
    """One object on one line, flushed: the last that a benchmark prints."""
    print(json.dumps(result, allow_nan=False), flush=True)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
