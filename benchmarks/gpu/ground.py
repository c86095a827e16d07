"""What every measurement stands on: the GPU, how its time is taken, and how fast it copies and reads memory.

A call's time is that of its kernels from the first to the last, by CUDA events: the GPU sleeps while the host issues
the call, so that Python's time is not in it. What the host takes is told beside it (`issue_us`).
"""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import NamedTuple, Protocol

import torch
import triton

from benchmarks.gpu import probes

LARGE = 4
"""Times L2: K and V of that size are read from memory, and held against the copy bandwidth. Smaller ones are told in
microseconds."""

WARM_UP_ROUNDS, MOST_ROUNDS = 2, 50
_SLEEP_CYCLES, _MOST_SLEEP_CYCLES = 400_000, 100_000_000  # some 0.2 and 50 ms
_READ_BLOCK = 4096
_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu"

Call = Callable[[int], object]
"""A contestant: it attends in the turn of this number, at a place that follows from it."""


class Sample(NamedTuple):
    """One call: microseconds on the device, microseconds of the host to issue it. waited: the device waited for the
    host, so that us is too long."""

    us: float
    issue_us: float
    waited: bool = False


class Times(NamedTuple):
    """Of a contestant: the median, the 10th and the 90th percentile in microseconds. waited: in every call the device
    waited for the host."""

    us: float
    low_us: float
    high_us: float
    issue_us: float
    num: int
    waited: bool

    @property
    def spread(self) -> float:
        """Between those percentiles, over the median."""
        return (self.high_us - self.low_us) / self.us


class Timer(Protocol):
    """How long calls take, each called once."""

    def round(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Sample]:
        """A sample of each, one behind the other."""
        ...


class CudaTimer:
    """By events. Before each call the GPU sleeps until the host has issued the call; a contestant that took longer
    than that gets more sleep the next time."""

    def __init__(self) -> None:
        self._cycles: dict[str, int] = {}

    def round(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Sample]:
        """See `Timer`."""
        issued = {name: self._issue(name, call) for name, call in calls.items()}
        torch.cuda.synchronize()
        return {
            name: Sample(1e3 * begin.elapsed_time(end), issue_us, waited)
            for name, (begin, end, issue_us, waited) in issued.items()
        }

    def _issue(self, name: str, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event, float, bool]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = self._cycles.setdefault(name, _SLEEP_CYCLES)
        torch.cuda._sleep(cycles)
        began = time.perf_counter()
        begin.record()
        call()
        end.record()
        issue_us = 1e6 * (time.perf_counter() - began)
        waited = begin.query()  # the sleep before it is over
        if waited:
            self._cycles[name] = min(2 * cycles, _MOST_SLEEP_CYCLES)
        return begin, end, issue_us, waited


@dataclass(frozen=True)
class Facts:
    """Of a GPU and its software. l2_bytes, total_bytes: of its cache and memory."""

    name: str
    capability: int
    num_processors: int
    l2_bytes: int
    total_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)


def slug(name: str) -> str:
    """Of a GPU, for a folder."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


class Speeds(NamedTuple):
    """Of memory, bytes read and written counted: a copy, and reading alone."""

    copy: Times
    read: Times
    num_bytes: int

    @property
    def copy_gbps(self) -> float:
        """What calls are held against."""
        return 2 * self.num_bytes / self.copy.us / 1e3

    @property
    def read_gbps(self) -> float:
        """Of a kernel that loads and does nothing else."""
        return self.num_bytes / self.read.us / 1e3


class Ground:
    """A device, its timer, and what was measured of it. Contestants take turns."""

    def __init__(self, device: torch.device, facts: Facts, timer: Timer, probe_bytes: int) -> None:
        self.device, self.facts = device, facts
        self._timer, self._turns = timer, count()
        self._probe_bytes = probe_bytes // (4 * _READ_BLOCK) * 4 * _READ_BLOCK
        self.speeds = self.measure()

    def in_turn(self, contestants: Mapping[str, Call], seconds: float, least: int = 5) -> dict[str, Times]:
        """Each contestant's times, of rounds in which each is called once: at least `least` after warming up, then as
        many as fit. Turns count on over all contestants, so that none reads where the one before it read."""
        samples: dict[str, list[Sample]] = {name: [] for name in contestants}
        began = time.perf_counter()
        for num in range(WARM_UP_ROUNDS + MOST_ROUNDS):
            if num >= WARM_UP_ROUNDS + least and time.perf_counter() - began >= seconds:
                break
            calls = {name: partial(call, next(self._turns)) for name, call in contestants.items()}
            for name, sample in self._timer.round(calls).items():
                if num >= WARM_UP_ROUNDS:
                    samples[name].append(sample)
        return {name: times_of(found) for name, found in samples.items()}

    def measure(self) -> Speeds:
        """Copy and read bandwidth, over memory much larger than L2."""
        numbers = -(1 << 31), (1 << 31) - 1
        source = torch.randint(*numbers, (self._probe_bytes // 4,), dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        sums = torch.empty(8 * self.facts.num_processors, dtype=torch.int32, device=self.device)

        def read(_: int) -> None:
            blocks = source.numel() // _READ_BLOCK
            probes.read_all[(sums.numel(),)](source, sums, blocks, block=_READ_BLOCK, num_warps=8)

        found = self.in_turn({"copy": lambda _: target.copy_(source), "read": read}, 0.5, least=3)
        return Speeds(found["copy"], found["read"], source.nbytes)

    def is_large(self, num_bytes: int) -> bool:
        """Whether so much K and V is held against the copy bandwidth."""
        return num_bytes >= LARGE * self.facts.l2_bytes

    def share(self, num_bytes: int, us: float) -> float:
        """Of the copy bandwidth."""
        return num_bytes / us / 1e3 / self.speeds.copy_gbps


def times_of(samples: Sequence[Sample]) -> Times:
    """Of samples in which the device did not wait for the host, where there are any."""
    waited = all(sample.waited for sample in samples)
    good = sorted(sample.us for sample in samples if waited or not sample.waited)
    low, high = good[len(good) // 10], good[-1 - len(good) // 10]
    issue_us = statistics.median(sample.issue_us for sample in samples)
    return Times(statistics.median(good), low, high, issue_us, len(good), waited)


def cuda_ground() -> Ground:
    """Of the first CUDA device."""
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    return Ground(device, cuda_facts(), CudaTimer(), min(2 << 30, free // 4))


def cuda_facts() -> Facts:
    """Of the first CUDA device."""
    found = torch.cuda.get_device_properties(0)
    versions = {
        "driver": smi().get("driver_version", "unknown"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }
    capability = 10 * found.major + found.minor
    return Facts(found.name, capability, found.multi_processor_count, found.L2_cache_size, found.total_memory, versions)


def smi() -> dict[str, str]:
    """Driver, clocks in MHz, power and temperature as nvidia-smi tells them now; `error` where it does not."""
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi: {error}", file=sys.stderr)
        return {"error": str(error)}
    return dict(zip(_SMI.split(","), (value.strip() for value in done.stdout.split(",")), strict=False))
