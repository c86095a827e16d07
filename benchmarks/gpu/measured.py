"""A run: tests, then sections, each with its share of the time, then the files."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import common
from benchmarks.gpu.bootstrap import elapsed_s
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import Pools
from benchmarks.gpu.compilers import Compilers
from benchmarks.gpu.ground import Facts, Ground, Speeds, slug, smi
from benchmarks.gpu.peers import told
from benchmarks.gpu.report import LOG, Report
from benchmarks.gpu.section import Bench, Found, Section
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.suite import Outcome, run_tests
from tandemkv.errors import InputError

MODULE = "benchmarks.gpu"
LIMIT_S, QUICK_S = 490.0, 25.0
"""Of a whole run with the native module's build and the tests; of the sections of a quick one. A section may end some
seconds late, and files come last."""
TESTS_S = 180.0


@dataclass(frozen=True)
class Options:
    """What was asked for. sections: () for all. commit: as told, of files without git; '' for none."""

    quick: bool
    json: bool
    with_tests: bool
    sections: Sequence[str]
    out: Path | None
    commit: str = ""

    @staticmethod
    def of(arguments: argparse.Namespace) -> "Options":
        """What is not full is saved where it is said to be, alone."""
        saves = arguments.out is not None or arguments.save or not (arguments.quick or arguments.section)
        out = arguments.out or (common.RESULTS / slug(torch.cuda.get_device_name()) if saves else None)
        with_tests = not (arguments.quick or arguments.no_tests)
        asked = arguments.quick, arguments.json, with_tests, arguments.section or ()
        return Options(*asked, out, arguments.commit or "")


def measure_and_report(options: Options, arguments: Sequence[str], native: str, ground_of: Callable[[], Ground]) -> int:
    """The exit code: 1 where a test failed, a result of ours is wrong, or a section ended early."""
    sections, commit = chosen(options), commit_of(options)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 160)
    tell = _teller(console)
    before, tested = smi(), _tested(options, tell)
    ground = ground_of()
    run = replace(run_of(ground.facts, arguments), commit=commit)
    report = Report(run, native, tested, ground, smi={"before": before})
    tell(f"{report.run}\nnative module: {native}; copy {ground.speeds.copy_gbps:,.0f} GB/s")
    budget = Budget(QUICK_S if options.quick else LIMIT_S - elapsed_s())
    pools, compilers = Pools(ground.device, lambda: _free_bytes(ground)), Compilers(ground.device)
    for name, found in measured(sections, Bench(ground, pools, compilers, options.quick, tell), budget):
        report.found[name] = found
        if options.out is not None:
            report.save_json(options.out)  # what is there stays when the run is cut off
    pools.release()
    compilers.close()
    report.copy_after, report.smi["after"] = _again(ground, tell), smi()
    for line in report.save(options.out, sections) if options.out is not None else ():
        tell(line)
    report.show(console, sections)
    if options.json:
        common.print_json(report.to_json())
    return int(report.failed)


def chosen(options: Options) -> Mapping[str, Section]:
    """Those that were asked for. InputError for a name that is none."""
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        raise InputError(f"--section must be one of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    names = options.sections or [name for name, section in SECTIONS.items() if section.in_quick or not options.quick]
    return {name: SECTIONS[name] for name in names}


def commit_of(options: Options) -> str:
    """Git's, or where git knows none what was told, noted as such. InputError where there are both."""
    known = common.commit()
    if options.commit and known != "unknown":
        raise InputError(f"--commit is for files without git, which here says {known}")
    return f"{options.commit} (as told)" if options.commit else known


def measured(sections: Mapping[str, Section], bench: Bench, budget: Budget) -> Iterator[tuple[str, Found]]:
    """What each section found in its share of the time that is left; one that fails says so, and the others go on."""
    left = dict(sections)
    for name, section in sections.items():
        found, began = Found(), time.monotonic()
        part = budget.part(section.weight / sum(each.weight for each in left.values()))
        del left[name]
        try:
            section.measure(bench, part, found)
        except Exception as error:  # noqa: BLE001  told in the table, and in the exit code
            found.error, found.traceback = told(error), traceback.format_exc()
            bench.tell(f"{name} ended early:\n{found.traceback}")
        found.seconds = time.monotonic() - began
        yield name, found


def run_of(facts: Facts, arguments: Sequence[str]) -> common.Run:
    """The GPU and its software stand before the host."""
    run = common.this_run(MODULE, arguments)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return replace(run, machine=f"{facts.name} ({versions}); {run.machine}")


def _tested(options: Options, tell: Callable[[str], None]) -> Outcome | None:
    if not options.with_tests:
        return None
    folder = options.out or Path.cwd()
    tell("the GPU's tests")
    tested = run_tests(folder / LOG, TESTS_S)
    tell(f"tests {'passed' if tested.passed else 'FAILED'}: {tested.told}")
    return tested


def _again(ground: Ground, tell: Callable[[str], None]) -> Speeds | None:
    """Bandwidth once more: a GPU that has become slower since is told."""
    try:
        return ground.measure()
    except RuntimeError as error:
        tell(f"bandwidth at the end: {told(error)}")
        return None


def _free_bytes(ground: Ground) -> int:
    if ground.device.type == "cuda":
        return torch.cuda.mem_get_info(ground.device)[0]
    return ground.facts.total_bytes


def _teller(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
