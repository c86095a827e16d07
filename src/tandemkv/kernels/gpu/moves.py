"""Tokens and pages that move: into pages, out of packed ones, and into L2."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels.checks import check_tokens
from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.calls import check_run, config_of
from tandemkv.kernels.gpu.config import Config, block_n_for
from tandemkv.kernels.gpu.formats import DTYPES, k_format, padded, v_format
from tandemkv.kernels.gpu.l2 import asks_for_pieces, tile_bytes
from tandemkv.kernels.gpu.placed import l2_bytes, launching, placed
from tandemkv.types import Arena, PagedKV, ScoreRule


def append(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor) -> None:
    """`tandemkv.kernels.append` into an arena of rows on a device; the table may lie there or in host memory, which no
    call waits for. What a slot that is none would take is not written."""
    check_tokens(arena, page_table, begin, k, v, on_cpu=False)
    if not isinstance(arena, Arena) or arena.layout.packing != "rows":
        raise UnsupportedError(f"on a GPU tokens are appended to pages of rows, got {arena.layout.packing}")
    num_seqs, num_heads, num_new = k.shape[:3]
    if not num_seqs * num_new:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    block_n = 16
    with launching(arena.k):
        decode.append_rows[(triton.cdiv(num_new, block_n), num_heads, num_seqs)](
            arena.k,
            arena.v,
            placed(page_table, arena.k.device),
            k,
            v,
            *k.stride()[:3],
            *v.stride()[:3],
            begin,
            num_new,
            arena.num_slots,
            page_table.shape[2],
            PAGES=(arena.num_kv_heads, arena.layout.page_size, False),
            K=k_format(arena),
            V=v_format(arena),
            BLOCK_N=block_n,
        )


def unpack(source: Arena, target: Arena, source_slots: Tensor, target_slots: Tensor) -> None:
    """Pages of panels or codes -> pages of rows on the same device, rounded as `gather` does: what came up a link.

    source_slots, target_slots: int32 `[num_pages]`, there or in host memory; slots in range, targets named once.
    InputError for arenas whose pages are not of one shape, or lie on two devices.
    """
    shapes = [(a.layout.dtype, a.layout.page_size, a.num_kv_heads, a.head_dim, a.v_head_dim) for a in (source, target)]
    packings, where = (source.layout.packing, target.layout.packing), (source.k.device, target.k.device)
    if shapes[0] != shapes[1] or where[0] != where[1] or packings[0] == "rows" or packings[1] != "rows":
        got = f"got {shapes[0]} {packings[0]} on {where[0]} and {shapes[1]} {packings[1]} on {where[1]}"
        raise InputError(f"panels or codes become rows of the same shape on one device, {got}")
    slots, targets = (placed(x, source.k.device) for x in (source_slots, target_slots))
    if slots.dtype != torch.int32 or targets.dtype != torch.int32 or slots.dim() != 1 or slots.shape != targets.shape:
        got = f"{slots.dtype} {list(slots.shape)} and {targets.dtype} {list(targets.shape)}"
        raise InputError(f"slots must be int32 [num_pages], as many of both, got {got}")
    block_n = block_n_for(source.layout.page_size)
    if not slots.shape[0]:
        return
    with launching(source.k):
        decode.unpack_pages[(slots.shape[0], source.num_kv_heads, source.layout.page_size // block_n)](
            source.k,
            source.v,
            target.k,
            target.v,
            slots,
            targets,
            HEAD_DIM=source.head_dim,
            V_DIM=source.v_head_dim,
            PAGES=(source.num_kv_heads, source.layout.page_size, False),
            K=k_format(source),
            V=v_format(source),
            DTYPE=DTYPES[source.layout.dtype],
            BLOCK_N=block_n,
            D_PAD=padded(source.head_dim),
        )


class Pull(NamedTuple):
    """A kernel that asks for pages, ready to be enqueued behind whatever made `reads`. num_bytes: that it asks for, at
    most."""

    num_bytes: int
    reads: tuple[Tensor, ...]
    launch: Callable[[], None]


def prepare_pull(q: Tensor, kv: PagedKV, rule: ScoreRule, share: float) -> Pull | None:
    """Let pages that `attend` of such a q will read come to L2, up to this share of it: the first tiles of each of its
    programs, by a kernel that computes nothing and waits for nothing. None where nothing can be asked for, as in the
    interpreter."""
    check_run(q, kv)
    arena, config, device = kv.arena, config_of(q, kv, None), q.device
    assert isinstance(arena, Arena)
    ask_k, ask_v = asks_for_pieces(kv, config, device)
    num_programs = config.num_splits * arena.num_kv_heads * q.shape[0]
    max_tiles = int(share * l2_bytes(device)) // tile_bytes(kv, config)
    num_tiles = min(max_tiles, num_programs * _tiles_of_a_part(kv, config))
    if not ask_k or not num_tiles:
        return None
    reads = arena.k, arena.v, *(placed(x, device) for x in (kv.page_table, kv.kv_start, kv.kv_len))
    lens, window = reads[4], min(rule.window or 1 << 30, 1 << 30)
    strides = lens.stride(0), lens.stride(1) if lens.dim() == 2 else 0
    numbers = window, arena.num_slots, kv.page_table.shape[2], *strides, num_tiles, config.num_splits, q.shape[0]

    def launch() -> None:
        with launching(q):
            decode.pull_pages[(min(num_tiles, num_programs),)](
                *reads,
                *numbers,
                PAGES=(arena.num_kv_heads, arena.layout.page_size, kv.of_blocks),
                K=k_format(arena),
                V=v_format(arena),
                BLOCK_N=config.block_n,
                AHEAD=(0, ask_k, ask_v),
                num_warps=config.num_warps,
            )

    return Pull(num_tiles * tile_bytes(kv, config), reads, launch)


def _tiles_of_a_part(kv: PagedKV, config: Config) -> int:
    return -(-kv.page_table.shape[2] * kv.entry_tokens // (config.block_n * config.num_splits))
