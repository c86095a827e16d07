"""What kernels are told of pages: tuples of constants, whose places have names."""

import torch
import triton.language as tl

from tandemkv.types import AnyArena, Arena, PageLayout

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Format = tuple[str | int, ...]
"""Of K or V: packing; stored channels or dims, and those padded to a power of 2; numbers of a head's slice of a page,
of a token in it; channels or tokens that a word has; of codes where scales and zeros are. Then of V how many groups of
dims have scales; of K where exact channels are and how many, where kept ones are named, or -1, and where exact ones."""

PACKING, STORED, PAD, SLICE, TOKEN, PER_WORD, SCALES, ZEROS = (tl.constexpr(place) for place in range(8))
NUM_GROUPS: tl.constexpr = tl.constexpr(8)
EXACT, NUM_EXACT, KEPT, EXACT_INDEX = (tl.constexpr(place) for place in range(8, 12))


def k_format(arena: Arena) -> Format:
    """Of an arena's K."""
    layout, dim = arena.layout, arena.head_dim
    if not layout.is_quantised:
        return (*_of_numbers(layout, dim), 0, 0, 0, 0, -1, 0)
    k = layout.slice_of_k(dim)
    kept = -1 if layout.num_channels is None else k.kept
    codes = _of_codes(layout, k.num_channels, k.num_bytes)
    return (*codes, k.scales, k.zeros, k.exact, k.num_exact, kept, k.exact_index)


def v_format(arena: Arena) -> Format:
    """Of an arena's V."""
    layout, dim = arena.layout, arena.v_head_dim
    if not layout.is_quantised:
        return (*_of_numbers(layout, dim), 0, 0, 1)
    v = layout.slice_of_v(dim)
    return (*_of_codes(layout, v.num_dims, v.num_bytes), v.scales, v.zeros, v.num_groups)


def _of_numbers(layout: PageLayout, dim: int) -> Format:
    stored = layout.stored_dim(dim)
    per_word = layout.pair if layout.packing == "panels" else 1
    return layout.packing, stored, padded(stored), layout.page_size * stored, stored, per_word


def _of_codes(layout: PageLayout, stored: int, num_bytes: int) -> Format:
    per_word = 8 if layout.packing == "int4" else 4
    return layout.packing, stored, padded(stored), num_bytes, stored * 4 // per_word, per_word


def tile_token_bytes(arena: AnyArena) -> float:
    """What a token of one head takes in a tile, K and V, padded as products want them."""
    layout, num_bits = arena.layout, {"int8": 8, "int4": 4}.get(arena.layout.packing, 8 * arena.layout.dtype.itemsize)
    num_channels = padded(layout.num_channels or layout.stored_dim(arena.head_dim))
    return (num_channels + padded(layout.stored_dim(arena.v_head_dim))) * num_bits / 8


def padded(dim: int) -> int:
    """A power of 2, at least 16: tensor cores multiply 16 at a time."""
    return max(16, 1 << (dim - 1).bit_length())
