"""A section of the benchmark: what it finds, and what the command knows of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import Run
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import Pools
from benchmarks.gpu.compilers import Compilers
from benchmarks.gpu.ground import Ground

Row = dict[str, Any]
"""Columns of a CSV; a value of None where nothing was measured."""


@dataclass
class Found:
    """Filled as it is measured, so that what was found stays when a section is cut off. missed: cases that were not
    measured, and why. notes: what has to be told beside the numbers. error: what ended the section early, in a line;
    traceback: where."""

    rows: list[Row] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""

    @property
    def wrong(self) -> list[Row]:
        """Rows of ours that are not what float64 says."""
        return [row for row in self.rows if row.get("wrong")]


@dataclass(frozen=True)
class Bench:
    """What sections measure on. tell: a line of progress."""

    ground: Ground
    pools: Pools
    compilers: Compilers
    quick: bool
    tell: Callable[[str], None]


class Section(NamedTuple):
    """measure: within a budget. weight: of the time that is left. summary: lines for the table at the end, what and
    how much. draw: saves a picture and says so."""

    measure: Callable[[Bench, Budget, Found], None]
    weight: float
    summary: Callable[[Found], Iterator[tuple[str, str]]]
    in_quick: bool = True
    has_csv: bool = True
    draw: Callable[[Sequence[Row], Run, Path], str] | None = None
