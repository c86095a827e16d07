"""Processes that compile our kernels before they are measured. One after the other, a sweep's kernels would take all of
its time to compile; Triton keeps what these compile on disk, where the measuring process finds it."""

import os
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from benchmarks.gpu.cases import PAGE, Case, Pool, Problem
from tandemkv.kernels.gpu import Config

MOST_WORKERS = 12
"""Each holds a CUDA context of some 0.5 GB."""
ALIGNED = 16
"""Triton compiles once for whole numbers that are multiples of it, and once for others."""

Job = tuple[Case, Config]


class Compilers:
    """Started when first asked; none on a device that compiles nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ProcessPoolExecutor | None = None

    def compile(self, jobs: Iterable[Job], seconds: float) -> None:
        """The decode kernel over rows, by attending to `like` cases. See `each`."""
        self.each(compile_one, ((like(case), config) for case, config in jobs), seconds)

    def each(self, function: Callable[..., None], jobs: Iterable[tuple[Hashable, ...]], seconds: float) -> None:
        """Calls a module's function with the device's name and each job. Returns when all are compiled or the time is
        over. What does not compile says so when it is measured."""
        if self._device.type == "cuda":
            self._start()
            self._run(function, [(str(self._device), *job) for job in dict.fromkeys(jobs)], seconds)

    def _start(self) -> None:
        if self._pool is None:
            workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"))

    def _run(self, function: Callable[..., None], jobs: Sequence[tuple[Hashable, ...]], seconds: float) -> None:
        assert self._pool is not None
        try:
            submitted = [self._pool.submit(function, *job) for job in jobs]
        except BrokenExecutor as error:  # a process was killed: then kernels are compiled where they are measured
            print(f"compiling ahead: {error}", file=sys.stderr)
            return
        for late in wait(submitted, timeout=seconds).not_done:
            late.cancel()  # it would run while others are measured

    def close(self) -> None:
        """Nobody waits for what is still being compiled."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def like(case: Case) -> Case:
    """A small case whose kernels are compiled alike: its counts are multiples of 16 where those of `case` are."""
    return case._replace(context=PAGE * (case.num_pages % ALIGNED or ALIGNED), batch=min(case.batch, ALIGNED))


def compile_one(device: str, case: Case, config: Config) -> None:
    """By attending once; in a process of its own."""
    pool = Pool(torch.device(device), case.dtype, 2 * case.numbers * case.dtype.itemsize)
    Problem(case, pool, l2_bytes=0).ours(config).call(0)
