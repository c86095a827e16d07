"""The attend lane (HGCA, 2507.03153): the CPU attends where the pages lie; q goes down, out and lse come up."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from tandemkv import kernels
from tandemkv.types import PagedKV, Partial

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


def start(q: Tensor, far: PagedKV, *, scale: float, workers: "WorkerPool") -> Future[Partial]:
    """See `Lane`. On a CPU device the work is done before this returns: another thread would fight for the cores."""
    if q.device.type != "cpu":
        return _dispatcher().submit(_attend_from_device, q, far, scale, workers)
    done: Future[Partial] = Future()
    done.set_result(kernels.attend(q, far, scale=scale, pool=workers))
    return done


def _attend_from_device(q: Tensor, far: PagedKV, scale: float, workers: "WorkerPool") -> Partial:
    part = kernels.attend(q.cpu(), far, scale=scale, pool=workers)
    return Partial(part.out.to(q.device), part.lse.to(q.device))


@cache
def _dispatcher() -> ThreadPoolExecutor:
    """One thread that waits for q and drives the workers while the caller feeds the device."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="tandemkv-attend")
