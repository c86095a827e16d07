"""What a run leaves: one JSON with everything, CSVs, pictures, the tests' log, and a short table."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import Run, append_rows
from benchmarks.gpu.ground import Ground, Speeds
from benchmarks.gpu.section import Found, Section
from benchmarks.gpu.suite import Outcome

MOST_FILES = 8
JSON, LOG = "kernels.json", "tests.log"


@dataclass
class Report:
    """Everything of a run. tested: None where the tests were left out. smi: what nvidia-smi told before and after."""

    run: Run
    native: str
    tested: Outcome | None
    ground: Ground
    found: dict[str, Found] = field(default_factory=dict)
    smi: dict[str, dict[str, str]] = field(default_factory=dict)
    copy_after: Speeds | None = None

    @property
    def failed(self) -> bool:
        """Whether a test failed, a result of ours is wrong, or a section ended early."""
        in_sections = any(found.error or found.wrong for found in self.found.values())
        return in_sections or (self.tested is not None and not self.tested.passed)

    def to_json(self) -> dict[str, Any]:
        """One object of numbers, texts and lists; what is not finite is None."""
        tested = None if self.tested is None else self.tested._asdict()
        speeds = {"before": self.ground.speeds, "after": self.copy_after}
        everything = {
            **asdict(self.run),
            "native": self.native,
            "tests": tested,
            "gpu": asdict(self.ground.facts),
            "bandwidth": {when: _bandwidth(found) for when, found in speeds.items() if found is not None},
            "smi": self.smi,
            "sections": {name: asdict(found) for name, found in self.found.items()},
            "failed": self.failed,
        }
        finite: dict[str, Any] = _finite(everything)
        return finite

    def save_json(self, folder: Path) -> str:
        """Everything so far."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON).write_text(json.dumps(self.to_json(), allow_nan=False, indent=1) + "\n")
        return f"everything: {folder / JSON}"

    def save(self, folder: Path, sections: Mapping[str, Section]) -> list[str]:
        """What was written, the JSON first: it has everything."""
        written = [self.save_json(folder)]
        for name, found in self.found.items():
            if not found.rows:
                continue
            if sections[name].has_csv:
                path = folder / f"{name}.csv"
                path.unlink(missing_ok=True)
                append_rows(path, [_csv_row(row) for row in found.rows], self.run)
            draw = sections[name].draw
            if draw is not None:
                written.append(draw(found.rows, self.run, folder / f"{name}.png"))
        return written

    def show(self, console: Console, sections: Mapping[str, Section]) -> None:
        """The short table, and what was missed."""
        facts, speeds = self.ground.facts, self.ground.speeds
        table = Table(
            title=f"{facts.name}, driver {facts.versions.get('driver', '?')}; {self.run.commit}", box=box.SIMPLE
        )
        table.add_column("what")
        table.add_column("found")
        tests = (
            "left out" if self.tested is None else f"{'passed' if self.tested.passed else 'FAILED'}: {self.tested.told}"
        )
        table.add_row("tests", tests)
        after = "" if self.copy_after is None else f" (after: {self.copy_after.copy_gbps:,.0f})"
        l2 = f"{facts.l2_bytes / 1e6:.0f} MB of L2, {facts.num_processors} multiprocessors"
        table.add_row("copy, read", f"{speeds.copy_gbps:,.0f}{after}, {speeds.read_gbps:,.0f} GB/s; {l2}")
        for name, found in self.found.items():
            for what, much in sections[name].summary(found):
                table.add_row(what, much)
            table.add_row(name, _told(found))
        console.print(table)
        for note in dict.fromkeys(note for found in self.found.values() for note in found.notes):
            console.print(note, markup=False, highlight=False)


def _told(found: Found) -> str:
    told = f"{len(found.rows)} rows in {found.seconds:.0f} s"
    if found.missed:
        told += f"; {len(found.missed)} not measured, first {found.missed[0]}"
    if found.wrong:
        told += f"; {len(found.wrong)} WRONG"
    return f"{told}; ENDED EARLY: {found.error}" if found.error else told


def _bandwidth(speeds: Speeds) -> dict[str, Any]:
    times = {"copy_us": speeds.copy._asdict(), "read_us": speeds.read._asdict()}
    return {"copy_gbps": speeds.copy_gbps, "read_gbps": speeds.read_gbps, "num_bytes": speeds.num_bytes, **times}


def _csv_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
