"""K and V of a tile of tokens, as products want them, whatever packing they lie in (csrc/attend.h); in Triton.

A format is a tuple of constants, `formats.py`. Rows are looked up token by token; of other packings a tile lies in one
page. What comes back is in the pages' dtype: of codes what they stand for, rounded as `gather` rounds it.
"""

import triton
import triton.language as tl

from tandemkv.kernels.gpu import formats as f

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter has no product of bfloat16, and cuts where it should round to it."""


@triton.jit
def places(entries, tokens, exists, head, num_slots, PAGES: tl.constexpr):
    """Which head's slice of the arena holds each token, in int64, its place in the page, and whether there is one.
    Where not, the place can be read.

    PAGES: (KV heads of a page, tokens of a page, whether entries are blocks of 16 tokens).
    """
    NUM_KV_HEADS: tl.constexpr = PAGES[0]
    PAGE: tl.constexpr = PAGES[1]
    OF_BLOCKS: tl.constexpr = PAGES[2]
    if OF_BLOCKS:
        entry = tl.load(entries + tokens // 16, mask=exists, other=0)
        exists = exists & (entry >= 0)  # quotients of negative numbers are cut towards 0
        blocks_of_slot: tl.constexpr = NUM_KV_HEADS * (PAGE // 16)
        slot, offset = entry // blocks_of_slot, entry % blocks_of_slot * 16 + tokens % 16
    else:
        slot, offset = tl.load(entries + tokens // PAGE, mask=exists, other=0), tokens % PAGE
    exists = exists & (slot >= 0) & (slot < num_slots) & (offset < PAGE)
    slot, offset = tl.where(exists, slot, 0), tl.where(exists, offset, 0)
    return slot.to(tl.int64) * NUM_KV_HEADS + head, offset, exists


@triton.jit
def keys_of(k, piece, offset, exists, PAGE: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """`[channels, tokens]`, zeros where there is none. piece, offset: as `places` says them, of a tile's tokens in rows
    and of its first token in other packings. exists: `[tokens]`."""
    STORED: tl.constexpr = K[f.STORED]
    PAD: tl.constexpr = K[f.PAD]
    at = k + piece * K[f.SLICE] + offset * K[f.TOKEN]
    if K[f.PACKING] == "rows":
        channels = tl.arange(0, PAD)
        inside = exists[None, :] & (channels < STORED)[:, None]
        return tl.load(at[None, :] + channels[:, None], mask=inside, other=0.0)
    else:  # noqa: RET505  Triton compiles what follows a return, too
        PER_WORD: tl.constexpr = K[f.PER_WORD]
        WORD: tl.constexpr = DTYPE if PER_WORD == 1 else tl.int32
        tokens, rows = tl.arange(0, exists.shape[0]), tl.arange(0, PAD // PER_WORD)
        is_any = tl.max(exists.to(tl.int32), 0) > 0
        block = tokens // 16 * (16 * STORED // PER_WORD)
        words = tl.load(
            at.to(tl.pointer_type(WORD)) + rows[:, None] * 16 + (block + tokens % 16)[None, :],
            mask=is_any & (rows < STORED // PER_WORD)[:, None],
            other=0,
        )
        if PER_WORD == 1:
            keys = words
        elif K[f.PACKING] == "panels":
            keys = _halves(words)
        else:
            keys = _keys_of_codes(k + piece * K[f.SLICE], offset, words, exists, PAGE, K, DTYPE)
        return keys


@triton.jit
def values_of(v, piece, offset, exists, PAGE: tl.constexpr, V: tl.constexpr, DTYPE: tl.constexpr):
    """`[tokens, dims]`, as `keys_of`."""
    STORED: tl.constexpr = V[f.STORED]
    PAD: tl.constexpr = V[f.PAD]
    dims = tl.arange(0, PAD)
    inside = dims < STORED
    at = v + piece * V[f.SLICE] + offset * V[f.TOKEN]
    if V[f.PACKING] == "rows":
        return tl.load(at[:, None] + dims, mask=exists[:, None] & inside[None, :], other=0.0)
    else:  # noqa: RET505  as above
        PER_WORD: tl.constexpr = V[f.PER_WORD]
        WORD: tl.constexpr = DTYPE if PER_WORD == 1 else tl.int32
        rows = tl.arange(0, exists.shape[0] // PER_WORD)
        is_any = tl.max(exists.to(tl.int32), 0) > 0
        words = tl.load(
            at.to(tl.pointer_type(WORD)) + rows[:, None] * STORED + dims, mask=is_any & inside[None, :], other=0
        )
        if PER_WORD == 1:
            values = words
        elif V[f.PACKING] == "panels":
            values = _halves(words)
        else:
            values = rounded(_values_of_codes(v + piece * V[f.SLICE], offset, words, PAGE, V), DTYPE)
        return tl.where(exists[:, None], values, tl.zeros_like(values))  # a word has tokens that are none


@triton.jit
def kept_channels(slice_of_k, K: tl.constexpr):
    """Which dim of a key each stored channel of a page is; of padding any."""
    STORED: tl.constexpr = K[f.STORED]
    PAD: tl.constexpr = K[f.PAD]
    channels = tl.arange(0, PAD)
    if K[f.KEPT] >= 0:
        channels = tl.load(slice_of_k + K[f.KEPT] + channels, mask=channels < STORED, other=0).to(tl.int32)
    return channels


@triton.jit
def _keys_of_codes(slice_of_k, offset, words, exists, PAGE: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """slice_of_k: where a head's slice of a page begins."""
    PAD: tl.constexpr = K[f.PAD]
    NUM_EXACT: tl.constexpr = K[f.NUM_EXACT]
    is_stored = tl.arange(0, PAD) < K[f.STORED]
    scale = _bf16s(slice_of_k + K[f.SCALES], tl.arange(0, PAD), is_stored)
    codes = _codes(words, K[f.PACKING] == "int4")
    if K[f.PACKING] == "int8":
        keys = rounded((codes - 128).to(tl.float32) * scale[:, None], DTYPE)
    else:
        zero = _bf16s(slice_of_k + K[f.ZEROS], tl.arange(0, PAD), is_stored)
        keys = rounded(codes.to(tl.float32) * scale[:, None] + zero[:, None], DTYPE)
        names, tokens = kept_channels(slice_of_k, K), tl.arange(0, exists.shape[0])
        for i in tl.static_range(NUM_EXACT):
            name = tl.load(slice_of_k + K[f.EXACT_INDEX] + i).to(tl.int32)
            numbers = (slice_of_k + K[f.EXACT]).to(tl.pointer_type(DTYPE)) + i * PAGE + offset
            exact = tl.load(numbers + tokens, mask=exists, other=0.0)
            keys = tl.where((is_stored & (names == name))[:, None], exact[None, :], keys)
    return keys


@triton.jit
def _values_of_codes(slice_of_v, offset, words, PAGE: tl.constexpr, V: tl.constexpr):
    """float32."""
    PAD: tl.constexpr = V[f.PAD]
    NUM_GROUPS: tl.constexpr = V[f.NUM_GROUPS]
    codes = _codes(words, V[f.PACKING] == "int4")
    tokens = offset + tl.arange(0, codes.shape[0])
    scales = _bf16s(slice_of_v + V[f.SCALES], tokens, True)[:, None]
    if V[f.PACKING] == "int8":
        values = (codes - 128).to(tl.float32) * scales
    else:
        zeros = _bf16s(slice_of_v + V[f.ZEROS], tokens, True)[:, None]
        group = tl.arange(0, PAD) // 64
        for i in tl.static_range(1, NUM_GROUPS):
            is_here = (group == i)[None, :]
            scales = tl.where(is_here, _bf16s(slice_of_v + V[f.SCALES], i * PAGE + tokens, True)[:, None], scales)
            zeros = tl.where(is_here, _bf16s(slice_of_v + V[f.ZEROS], i * PAGE + tokens, True)[:, None], zeros)
        values = codes.to(tl.float32) * scales + zeros
    return values


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 to the nearest of another dtype."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _bf16s(numbers, places, mask):
    return tl.load(numbers.to(tl.pointer_type(tl.bfloat16)) + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _halves(words):
    """`[n, m]` words -> `[2 n, m]` bfloat16, low halves first."""
    low, high = (words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16)
    return _interleaved(low, high).to(tl.bfloat16, bitcast=True)


@triton.jit
def _codes(words, IS_INT4: tl.constexpr):
    """`[n, m]` words of 4 bytes -> `[4 n, m]` codes, or of 8 half bytes -> `[8 n, m]`: low halves are the first 4."""
    if IS_INT4:
        words = _interleaved(words & 0x0F0F0F0F, words >> 4 & 0x0F0F0F0F)
    even = _interleaved(words & 255, words >> 16 & 255)  # bytes 0 and 2
    odd = _interleaved(words >> 8 & 255, words >> 24 & 255)
    return _interleaved(even, odd)


@triton.jit
def _interleaved(x, y):
    """Rows of x and y by turns: `[n, m]` each -> `[2 n, m]`."""
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, (2 * x.shape[0], x.shape[1]))
