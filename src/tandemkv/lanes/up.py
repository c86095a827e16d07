"""Pages of host memory on their way up to a device: packed as they are, on a stream of their own, rows when there."""

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
    unpack = devices.unpacker(k.device)
    if unpack is None or not isinstance(arena, Arena):
        host_k, host_v = torch.empty_like(k, device="cpu"), torch.empty_like(v, device="cpu")
        kernels.gather(arena, page_table, begin, host_k, host_v, pool)
        k.copy_(host_k)
        v.copy_(host_v)
        return
    slots = page_table[:, 0]
    if k.device.type != "cuda":
        rows = _rows(arena, slots, k.device)
    else:
        current, side = torch.cuda.current_stream(k.device), _up_stream(k.device)
        with torch.cuda.stream(side):
            rows = _rows(arena, slots, k.device)
        current.wait_stream(side)
        for x in (rows.k, rows.v):
            x.record_stream(current)
    for to, pages in ((k, rows.k), (v, rows.v)):
        tokens = pages.unflatten(0, slots.shape).transpose(1, 2).flatten(2, 3)
        to.copy_(tokens[:, :, begin : begin + to.shape[2]])


def _rows(arena: Arena, slots: Tensor, device: torch.device) -> Arena:
    """These pages as rows on the device, in the order of slots `[num_seqs, num_pages]`; on the current stream."""
    flat, layout = slots.flatten(), arena.layout
    up = [_pinned(x, flat).to(device, non_blocking=True) for x in (arena.k, arena.v)]
    packed = Arena(up[0], up[1], layout, arena.head_dim, arena.v_head_dim)
    rows = Arena.allocate(
        PageLayout(layout.dtype, layout.page_size),
        flat.shape[0],
        arena.num_kv_heads,
        arena.head_dim,
        device,
        v_head_dim=arena.v_head_dim,
    )
    every = torch.arange(flat.shape[0], dtype=torch.int32, device=device)
    unpack = devices.unpacker(device)
    assert unpack is not None
    unpack(packed, rows, every, every)
    return rows


def _pinned(x: Tensor, slots: Tensor) -> Tensor:
    """Pages of x one behind the other, in memory that the link reads while the host goes on."""
    pages = torch.empty(
        (slots.shape[0], *x.shape[1:]), dtype=x.dtype, device="cpu", pin_memory=torch.cuda.is_available()
    )
    return torch.index_select(x, 0, slots, out=pages)


@cache
def _up_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
