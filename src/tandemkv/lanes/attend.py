"""The attend lane (HGCA, 2507.03153): the CPU attends where the pages lie; q goes down, out and lse come up."""

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.lanes.base import PendingPartial
from tandemkv.types import PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


class _Pending:
    """The host attends on a thread of its own; the result goes up when it is asked for.

    Both copies are enqueued by the caller's thread, on the stream it computes on, so that they are ordered with the
    kernels that made q and with the merge; the other thread only waits until q is down.
    """

    def __init__(self, q: Tensor, far: PagedKV, rule: ScoreRule, workers: "WorkerPool") -> None:
        self._device = q.device
        is_cuda = q.device.type == "cuda"
        host_q = torch.empty(q.shape, dtype=q.dtype, device="cpu", pin_memory=is_cuda).copy_(q, non_blocking=is_cuda)
        is_down = torch.cuda.current_stream(q.device).record_event() if is_cuda else None

        def attend() -> Partial:
            if is_down is not None:
                is_down.synchronize()
            return kernels.attend(host_q, far, rule=rule, pool=workers)

        self._part: Future[Partial] = _dispatcher(os.getpid()).submit(attend)

    def result(self) -> Partial:
        out, lse = self._part.result()
        return Partial(out.to(self._device), lse.to(self._device))

    def wait(self) -> None:
        wait([self._part])


def start(q: Tensor, far: PagedKV, *, rule: ScoreRule, workers: "WorkerPool") -> PendingPartial:
    """See `Lane`."""
    return _Pending(q, far, rule, workers)


@cache
def _dispatcher(pid: int) -> ThreadPoolExecutor:
    """One thread that waits for q and drives the workers while the caller feeds the device; another after a fork."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="tandemkv-attend")
