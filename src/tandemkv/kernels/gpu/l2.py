"""What asks for pages to be in L2 before anybody reads them (asynchronous KV prefetch, 2504.06319): PTX, chosen by
architecture, and the paper's rule for how much there is room for."""

import torch

from tandemkv.kernels.gpu.config import Config
from tandemkv.kernels.gpu.placed import capability, l2_bytes
from tandemkv.types import AnyArena, PagedKV

Ahead = tuple[int, str, str]
"""Tiles asked for ahead, and the assembly that asks for a piece of K and of V."""

NOTHING_AHEAD: Ahead = (0, "", "")

BULK_CAPABILITY = 90
"""From sm_90 on one instruction of one thread asks for up to a whole piece: `cp.async.bulk.prefetch.L2` (PTX ISA 8.0).
Before, each thread asks for a line: `prefetch.global.L2` (PTX ISA 2.0)."""

_LINE_BYTES = 128


def asks(kv: PagedKV, config: Config, num_programs: int, device: torch.device) -> Ahead:
    """What a call of so many programs asks for; nothing where it would not fit L2 and is guarded, where tiles are no
    whole pieces, and in the interpreter."""
    fits = fits_l2(tile_bytes(kv, config), config.distance, num_programs, l2_bytes(device))
    if config.distance == 0 or (config.guarded and not fits):
        return NOTHING_AHEAD
    ask_k, ask_v = asks_for_pieces(kv, config, device)
    return (config.distance, ask_k, ask_v) if ask_k else NOTHING_AHEAD


def asks_for_pieces(kv: PagedKV, config: Config, device: torch.device) -> tuple[str, str]:
    """Assembly for a piece of K and for one of V, or none of both."""
    piece = min(config.block_n, kv.entry_tokens)
    if device.type != "cuda" or config.block_n % piece or kv.entry_tokens % piece:
        return "", ""
    sizes = (int(piece * size) for size in code_bytes(kv.arena))
    ask_k, ask_v = (prefetch_ptx(capability(device), size, 32 * config.num_warps) for size in sizes)
    return (ask_k, ask_v) if ask_k and ask_v else ("", "")


def tile_bytes(kv: PagedKV, config: Config) -> int:
    """Of a tile of one KV head, K and V, that are asked for."""
    return int(config.block_n * sum(code_bytes(kv.arena)))


def code_bytes(arena: AnyArena) -> tuple[float, float]:
    """Of a token of one head, K and V, as they lie in one piece: without scales, which a page has at its end."""
    layout, item_bytes = arena.layout, arena.layout.stored_dtype.itemsize
    if not layout.is_quantised:
        return layout.stored_dim(arena.head_dim) * item_bytes, layout.stored_dim(arena.v_head_dim) * item_bytes
    k, v = layout.slice_of_k(arena.head_dim), layout.slice_of_v(arena.v_head_dim)
    return k.scales / layout.page_size, v.scales / layout.page_size


def prefetch_ptx(capability: int, num_bytes: int, num_threads: int) -> str:
    """Inline assembly for `$1`, the address of so many bytes in a row; `$0` becomes 0. Nobody waits, and an address
    that is none of ours faults as a load would.

    capability: 80 for sm_80. num_threads: of the program, all of which run it.
    """
    whole = num_bytes // 16 * 16  # the bulk engine counts in units of 16
    if not whole:
        return ""
    if capability >= BULK_CAPABILITY:
        ask = f"setp.eq.u32 p, t, 0; @p cp.async.bulk.prefetch.L2.global [$1], {whole};"
        return f"{{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; {ask} mov.u32 $0, 0; }}"
    step = num_threads * _LINE_BYTES
    asks = " ".join(
        f"setp.lt.u64 p, a, {whole - begin}; add.u64 b, a, $1; @p prefetch.global.L2 [b+{begin}];"
        for begin in range(0, whole, step)
    )
    return (
        f"{{ .reg .pred p; .reg .u32 t; .reg .u64 a; .reg .u64 b; mov.u32 t, %tid.x; mul.wide.u32 a, t, {_LINE_BYTES}; "
        f"{asks} mov.u32 $0, 0; }}"
    )


def fits_l2(tile_bytes: int, distance: int, num_programs: int, l2_bytes: int) -> bool:
    """Whether what all programs ask for ahead fits L2 at once: the paper's M_total = M_block * warps * H * B <= L2,
    with a program's tiles of K and V in the place of a warp's block. Conservative: not all programs run at once."""
    return tile_bytes * distance * num_programs <= l2_bytes
