"""The GPU's tests, before anything is measured: pytest in a process of its own, its log kept."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.bootstrap import ROOT

TESTS = ("tests/gpu", "tests/integrations/test_cuda.py")
FALLBACK = "tandemkv.errors.BackendWarning"
"""Torch in our kernels' place would let every model pass."""
NEEDED = "pytest", "hypothesis", "transformers"
MOST_WORKERS = 8
"""Each compiles its own kernels and holds a CUDA context."""


class Outcome(NamedTuple):
    """told: pytest's last line, or what became of it."""

    passed: bool
    told: str


def run_tests(log: Path, limit_s: float) -> Outcome:
    """Whether they pass within so many seconds; what they print goes into the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        log.write_text(f"the tests need {', '.join(missing)}, not installed here\n")
        return Outcome(False, f"not run: {', '.join(missing)} not installed")
    with log.open("w") as file:
        process = subprocess.Popen(
            command(), cwd=ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            return Outcome(False, f"did not end within {limit_s:.0f} s: {_last_line(log)}")
    return Outcome(code == 0, f"{_last_line(log)} (exit code {code})")


def command() -> list[str]:
    """In several processes where pytest-xdist is installed. A library's warning is shown and fails nothing here: its
    version on this machine is not ours to choose."""
    has_xdist = find_spec("xdist") is not None
    workers = ["-p", "xdist", "-n", str(min(MOST_WORKERS, os.cpu_count() or 1))] if has_xdist else []
    return [
        sys.executable,
        "-m",
        "pytest",
        *TESTS,
        "-q",
        "-W",
        "default",
        "-W",
        f"error::{FALLBACK}",
        "-p",
        "no:cacheprovider",
        *workers,
    ]


def _environment() -> dict[str, str]:
    """Without other plugins of that machine, which bring warnings and options of their own."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    return kept | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _last_line(log: Path) -> str:
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
