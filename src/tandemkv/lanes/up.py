"""Pages of host memory on their way up to a device: packed as they are, on a stream of their own, rows when there."""

from collections import deque
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.kernels import devices
from tandemkv.types import AnyArena, Arena, PageLayout

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


def bring_up(
    arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: "WorkerPool | None" = None
) -> None:
    """`kernels.gather` from pages in host memory, which heads share, into k and v on a device.

    Copies run beside what the current stream is at, which waits for them; the caller does not. Pages of several
    packings, and those of a device without our kernels, are unpacked on the host, and waited for.
    """
    is_plain = isinstance(arena, Arena) and devices.has("unpack", k.device)
    rows = _rows_up(arena.parts[0], page_table[:, 0], k.device) if is_plain else None
    if rows is None:
        host_k, host_v = torch.empty_like(k, device="cpu"), torch.empty_like(v, device="cpu")
        kernels.gather(arena, page_table, begin, host_k, host_v, pool)
        k.copy_(host_k)
        v.copy_(host_v)
        return
    for to, pages in ((k, rows.k), (v, rows.v)):
        tokens = pages.unflatten(0, page_table[:, 0].shape).transpose(1, 2).flatten(2, 3)
        to.copy_(tokens[:, :, begin : begin + to.shape[2]])
    if k.device.type == "cuda":
        _under_way(k.device).append(torch.cuda.current_stream(k.device).record_event())


def _rows_up(arena: Arena, slots: Tensor, device: torch.device) -> Arena | None:
    """These pages as rows that the current stream may read, in the order of slots `[num_seqs, num_pages]`."""
    if device.type != "cuda":
        return _rows(arena, slots, device)
    under_way = _under_way(device)
    if len(under_way) == 2:  # or a host that is ahead would fill the device with pages
        under_way.popleft().synchronize()
    current, side = torch.cuda.current_stream(device), _up_stream(device)
    with torch.cuda.stream(side):
        rows = _rows(arena, slots, device)
    current.wait_stream(side)
    if rows is not None:
        for x in (rows.k, rows.v):
            x.record_stream(current)
    return rows


def _rows(arena: Arena, slots: Tensor, device: torch.device) -> Arena | None:
    """The same on the current stream; None where the device cannot unpack them."""
    flat, layout = slots.flatten(), arena.layout
    dims = arena.head_dim, arena.v_head_dim
    up = [_pinned(x, flat).to(device, non_blocking=True) for x in (arena.k, arena.v)]
    plain, num_heads = PageLayout(layout.dtype, layout.page_size), arena.num_kv_heads
    rows = Arena.allocate(plain, flat.shape[0], num_heads, dims[0], device, v_head_dim=dims[1])
    every = torch.arange(flat.shape[0], dtype=torch.int32, device=device)
    return rows if devices.unpack(Arena(up[0], up[1], layout, *dims), rows, every, every) else None


def _pinned(x: Tensor, slots: Tensor) -> Tensor:
    """Pages of x one behind the other, in memory that the link reads while the host goes on."""
    pages = torch.empty(
        (slots.shape[0], *x.shape[1:]), dtype=x.dtype, device="cpu", pin_memory=torch.cuda.is_available()
    )
    return torch.index_select(x, 0, slots, out=pages)


@cache
def _under_way(device: torch.device) -> "deque[torch.cuda.Event]":
    """Done when the device has what came up last, and the time before."""
    return deque()


@cache
def _up_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
