"""Hardware counters of the paper's design and of ours, by Nsight Compute where it runs: how much L2 gives, how busy
memory is, and how long warps wait for loads. One shape; this module is also the program that ncu watches.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from benchmarks.gpu.bootstrap import ROOT
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import MODELS, Case, Form, Pool, Problem
from benchmarks.gpu.ground import cuda_facts
from benchmarks.gpu.peers import told
from benchmarks.gpu.prefetch import BATCH, VARIANTS, Variant, forms_of
from benchmarks.gpu.section import Bench, Found, Row, Section

CASE = Case(MODELS[0], 1024, BATCH, torch.float16)
WATCHED = tuple(each for each in VARIANTS if each.distance in (0, 1))
METRICS = {
    "gpu__time_duration.sum": "time",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "dram_read",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "long_scoreboard",
}
SEPARATOR = "spin_kernel"
"""torch's sleeping kernel, between variants: a variant may be several kernels."""
TIMEOUT_S = 75.0
TOOLKIT = "/usr/local/cuda/bin"
_COLUMNS = ("ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value")


def measure(bench: Bench, budget: Budget, found: Found) -> None:
    """A row for each kernel of each variant; a note where ncu does not run."""
    bench.pools.release()
    ncu = shutil.which("ncu") or shutil.which("ncu", path=TOOLKIT)
    if ncu is None:
        found.notes.append(f"counters: ncu is neither in PATH nor in {TOOLKIT}")
        return
    if not budget.has(20):
        found.missed.append("counters: no time was left")
        return
    command = [ncu, "--csv", "--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all"]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.gpu.counters"]
    seconds = min(TIMEOUT_S, budget.left_s)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        found.notes.append(f"counters: ncu did not end within {seconds:.0f} s")
        return
    found.rows += rows_of(done.stdout.splitlines())
    if done.returncode or not found.rows:
        lines = (done.stdout + done.stderr).strip().splitlines()
        found.notes.append(f"counters: ncu ended with {done.returncode}: " + " | ".join(lines[-5:]))
    for line in done.stderr.splitlines():
        if line.startswith("left out: "):
            found.notes.append(f"counters, {line}")


def rows_of(lines: Sequence[str]) -> list[Row]:
    """Of ncu's CSV, in which each metric of each kernel is a line; other lines are ncu's own."""
    header = next((line for line in lines if line.startswith('"ID"')), None)
    if header is None:
        return []
    table = csv.DictReader([header, *(line for line in lines if line.startswith('"') and line != header)])
    kernels: dict[str, Row] = {}
    variant = -1
    for line in table:
        number, kernel, metric, unit, value = (line.get(column) or "" for column in _COLUMNS)
        if number not in kernels:
            variant += SEPARATOR in kernel
            kernels[number] = {"variant": variant, "kernel": kernel}
        if metric in METRICS:
            kernels[number] |= {METRICS[metric]: f"{value} {unit}".strip()}
    watched = list(kernels.values())
    rows = [row for row in watched if SEPARATOR not in row["kernel"]]
    return [{"case": str(CASE), **row, "variant": _name(row["variant"])} for row in rows]


def _name(number: int) -> str:
    return str(WATCHED[number]) if 0 <= number < len(WATCHED) else f"number {number}"


def summary(found: Found) -> Iterator[tuple[str, str]]:
    """Of the longest kernel of each variant."""
    for variant in dict.fromkeys(row["variant"] for row in found.rows):
        row = max(
            (row for row in found.rows if row["variant"] == variant), key=_us
        )  # flags are filled before, parts merged after
        numbers = (f"{name} {row[name]}" for name in METRICS.values() if name in row)
        yield f"counters, {variant}", ", ".join(numbers)


def _us(row: Row) -> float:
    """Of a time as ncu prints it; its older versions say `usecond`."""
    value, _, unit = str(row.get("time", "")).partition(" ")
    return float(value.replace(",", "") or 0) * {"n": 1e-3, "u": 1.0, "m": 1e3}.get(unit[:1], 1e6)


def watched() -> None:
    """What ncu runs: every variant once, warmed up, behind a separator each; those that cannot run leave a gap."""
    facts = cuda_facts()
    device = torch.device("cuda", 0)
    pool = Pool(device, CASE.dtype, 4 * CASE.kv_bytes)
    problem = Problem(CASE, pool, facts.l2_bytes)
    forms, reasons = forms_of(problem, facts.num_processors)
    for variant in WATCHED:
        _warmed_up(variant, forms, reasons)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for i, variant in enumerate(WATCHED):
        torch.cuda._sleep(1000)
        if variant in forms:
            forms[variant].call(i)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _warmed_up(variant: Variant, forms: dict[Variant, Form], reasons: dict[Variant, str]) -> None:
    try:
        forms[variant].call(0)
    except Exception as error:  # noqa: BLE001  told, and the others are watched
        forms.pop(variant, None)
        print(f"left out: {variant}: {reasons.get(variant) or told(error)}", file=sys.stderr)


SECTION = Section(measure, 2, summary, in_quick=False, has_csv=False)

if __name__ == "__main__":
    watched()
