"""Attention of a few queries over pages, in Triton: each program attends a part of a sequence's tokens for the queries
of a KV head, and says the natural log-sum-exp beside it, so that any merge fits (FlashDecoding, Dao et al. 2023).

Query heads of a group are rows of one product: K and V are read once for all of them (GQA). Tokens outside
`[kv_start, kv_len)` are never read, nor is a slot that is none.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

NAN_IN_Q: tl.constexpr = tl.constexpr(1)
SLOT_OUT_OF_RANGE: tl.constexpr = tl.constexpr(2)


@triton.jit
def decode_rows(
    q,
    k,
    v,
    table,
    starts,
    lens,
    out,
    lse,
    block_lse,
    flags,
    scale,
    softcap,
    window,
    num_q_heads,
    num_slots,
    num_entries,
    lens_seq_stride,
    lens_head_stride,
    num_blocks,
    block_lse_stride,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    OF_BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WITH_MASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    ASK_K: tl.constexpr,
    ASK_V: tl.constexpr,
    DISTANCE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Grid: (splits, KV heads x row blocks, sequences).

    q `[num_seqs, num_q_heads, Q_LEN, HEAD_DIM]`; k, v `[num_slots, NUM_KV_HEADS, PAGE, dim]`; out float32
    `[splits, num_seqs, num_q_heads, Q_LEN, V_DIM]`, lse the same without dims; block_lse float32
    `[num_seqs, num_q_heads, Q_LEN, num_blocks]`, its rows so many apart, -inf before, base 2, or nothing. flags: int32
    `[1]`, of which bits are set. table int32 `[num_seqs, NUM_KV_HEADS, num_entries]`; starts, lens int64.
    ASK_K, ASK_V: the assembly that asks for a piece of a tile to be in L2 (l2.py); DISTANCE: tiles ahead, 0 for none.
    """
    split, num_splits, seq = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    num_row_blocks: tl.constexpr = (GROUP * Q_LEN + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(1) // num_row_blocks
    rows = tl.program_id(1) % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < GROUP * Q_LEN
    query = rows % Q_LEN
    row = (seq * num_q_heads + head * GROUP).to(tl.int64) * Q_LEN + rows  # of q, a KV head's are behind each other
    dims, v_dims = tl.arange(0, D_PAD), tl.arange(0, V_PAD)
    queries = tl.load(q + row[:, None] * HEAD_DIM + dims, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if split == 0:
        num_nan = tl.sum(tl.sum(_is_nan(queries.to(tl.float32)).to(tl.int32), 1), 0)
        tl.atomic_or(flags, NAN_IN_Q, mask=num_nan > 0)

    at = seq * lens_seq_stride + head * lens_head_stride
    start, end = tl.load(starts + at).to(tl.int32), tl.load(lens + at).to(tl.int32)
    last = end - Q_LEN + 1 + query if CAUSAL else tl.zeros_like(query) + end  # a query sees what is before
    if HAS_WINDOW:
        start = tl.maximum(start, end - Q_LEN + 1 - window)
    first_tile = start // BLOCK_N
    num_tiles = tl.cdiv(tl.cdiv(end, BLOCK_N) - first_tile, num_splits)
    begin = (first_tile + split * num_tiles) * BLOCK_N
    stop = tl.minimum(begin + num_tiles * BLOCK_N, end)
    shape: tl.constexpr = (HEAD_DIM, V_DIM, NUM_KV_HEADS, PAGE, OF_BLOCKS, BLOCK_N)
    entries = table + (seq.to(tl.int64) * NUM_KV_HEADS + head) * num_entries

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, V_PAD), tl.float32)
    num_wild = 0
    pages = (k, v, entries, head, num_slots)
    for i in tl.static_range(DISTANCE):
        _ask_for_tile(pages, begin + i * BLOCK_N, stop, shape, ASK_K, ASK_V)
    for tile in range(begin, stop, BLOCK_N):
        if DISTANCE > 0:
            _ask_for_tile(pages, tile + DISTANCE * BLOCK_N, stop, shape, ASK_K, ASK_V)
        tokens = tile + tl.arange(0, BLOCK_N)
        in_run = (tokens >= start) & (tokens < end)
        place, exists = _places(entries, tokens, in_run, head, num_slots, NUM_KV_HEADS, PAGE, OF_BLOCKS)
        num_wild += tl.sum((in_run & ~exists).to(tl.int32), 0)
        keys = tl.load(
            k + place[None, :] * HEAD_DIM + dims[:, None], mask=exists[None, :] & (dims < HEAD_DIM)[:, None], other=0.0
        )
        scores = _dot(queries, keys, WIDEN) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = _seen(tokens, exists, last, window, CAUSAL, HAS_WINDOW)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        if WITH_MASS:
            blocks = tile // 16 + tl.arange(0, BLOCK_N // 16)
            tl.store(
                block_lse + row[:, None] * block_lse_stride + blocks,
                _log2_sums(scores, BLOCK_M, BLOCK_N),
                mask=is_row[:, None] & (blocks < num_blocks)[None, :],
            )
        highest = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        values = tl.load(
            v + place[:, None] * V_DIM + v_dims, mask=exists[:, None] & (v_dims < V_DIM)[None, :], other=0.0
        )
        acc = acc * shrink[:, None] + _weighed(weights, values, WIDEN)
        total = total * shrink + tl.sum(weights, 1)
        best = highest

    tl.atomic_or(flags, SLOT_OUT_OF_RANGE, mask=num_wild > 0)
    is_empty = total == 0.0
    where = split.to(tl.int64) * tl.num_programs(2) * num_q_heads * Q_LEN + row
    tl.store(lse + where, _log2(best, total) * LN2, mask=is_row)
    tl.store(
        out + where[:, None] * V_DIM + v_dims,
        acc / tl.where(is_empty, 1.0, total)[:, None],
        mask=is_row[:, None] & (v_dims < V_DIM)[None, :],
    )


@triton.jit
def _seen(tokens, exists, last, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which query sees which token: those that exist, are before its `last`, and not `window` before that."""
    seen = exists[None, :]
    if CAUSAL:
        seen = seen & (tokens[None, :] < last[:, None])
    if HAS_WINDOW:
        seen = seen & (tokens[None, :] >= last[:, None] - window)
    return seen


@triton.jit
def _dot(x, y, WIDEN: tl.constexpr):
    """In float32. Where dtypes differ both become float32 first, and with WIDEN: the interpreter has no product of
    bfloat16."""
    if WIDEN or x.dtype != y.dtype:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _weighed(weights, values, WIDEN: tl.constexpr):
    """Sums of values. Weights are multiplied in two parts of the values' dtype, so that little is rounded away: 2^-17
    of a weight in bfloat16, 2^-22 in float16, whose parts are 2^15 times as large, or small ones would be denormal."""
    if values.dtype == tl.float32:
        return _dot(weights, values, WIDEN)
    larger: tl.constexpr = 32768.0 if values.dtype == tl.float16 else 1.0
    weights = weights * larger
    high = weights.to(values.dtype)
    low = (weights - high.to(tl.float32)).to(values.dtype)
    return (_dot(high, values, WIDEN) + _dot(low, values, WIDEN)) / larger


@triton.jit
def _is_nan(x):
    return x != x


@triton.jit
def _places(
    entries,
    tokens,
    exists,
    head,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    OF_BLOCKS: tl.constexpr,
):
    """Which row of the arena each token is, in int64, and whether it is one."""
    if OF_BLOCKS:
        entry = tl.load(entries + tokens // 16, mask=exists, other=0)
        blocks_of_slot: tl.constexpr = NUM_KV_HEADS * (PAGE // 16)
        slot, offset = entry // blocks_of_slot, entry % blocks_of_slot * 16 + tokens % 16
    else:
        slot, offset = tl.load(entries + tokens // PAGE, mask=exists, other=0), tokens % PAGE
    is_slot = (slot >= 0) & (slot < num_slots) & (offset < PAGE)
    return (slot.to(tl.int64) * NUM_KV_HEADS + head) * PAGE + offset, exists & is_slot


@triton.jit
def _ask_for_tile(pages, tile, stop, SHAPE: tl.constexpr, ASK_K: tl.constexpr, ASK_V: tl.constexpr):
    """For K and V of a tile to be in L2: nobody waits. What lies in one piece is asked for at once."""
    k, v, entries, head, num_slots = pages
    HEAD_DIM: tl.constexpr = SHAPE[0]
    V_DIM: tl.constexpr = SHAPE[1]
    NUM_KV_HEADS: tl.constexpr = SHAPE[2]
    PAGE: tl.constexpr = SHAPE[3]
    OF_BLOCKS: tl.constexpr = SHAPE[4]
    BLOCK_N: tl.constexpr = SHAPE[5]
    piece: tl.constexpr = min(BLOCK_N, 16 if OF_BLOCKS else PAGE)
    for i in tl.static_range(BLOCK_N // piece):
        token = tile + i * piece
        if token < stop:
            place, is_slot = _places(entries, token, True, head, num_slots, NUM_KV_HEADS, PAGE, OF_BLOCKS)
            if is_slot:
                tl.inline_asm_elementwise(ASK_K, "=r,l", [k + place * HEAD_DIM], tl.int32, False, 1)
                tl.inline_asm_elementwise(ASK_V, "=r,l", [v + place * V_DIM], tl.int32, False, 1)


@triton.jit
def _log2_sums(scores, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of each block of 16 tokens, base 2; -inf where nothing is seen."""
    parts = tl.reshape(scores, (BLOCK_M, BLOCK_N // 16, 16))
    highest = tl.max(parts, 2)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return _log2(base, tl.sum(tl.exp2(parts - base[:, :, None]), 2))


@triton.jit
def _log2(base, total):
    """Of sums that were taken relative to 2^base; -inf for none."""
    return tl.where(total == 0.0, float("-inf"), base + tl.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def merge_parts(
    outs,
    lses,
    sink,
    out,
    lse,
    num_parts,
    num_q_heads,
    q_len,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Grid: rows. outs, lses: addresses of float32 `[rows, V_DIM]` and `[rows]` of each part, int64 `[num_parts]`. In
    two passes: the highest log-sum-exp, then sums in the order of parts. An empty row stays empty."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, V_PAD)
    highest = -float("inf")
    for part in range(num_parts):
        highest = tl.maximum(highest, tl.load(tl.load(lses + part).to(tl.pointer_type(tl.float32)) + row))
    if HAS_SINK:
        sunk = tl.load(sink + row // q_len % num_q_heads)
        highest = tl.maximum(highest, sunk)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = 0.0
    if HAS_SINK:
        total += tl.exp(sunk - base)
    acc = tl.zeros((V_PAD,), tl.float32)
    for part in range(num_parts):
        weight = tl.exp(tl.load(tl.load(lses + part).to(tl.pointer_type(tl.float32)) + row) - base)
        total += weight
        values = tl.load(tl.load(outs + part).to(tl.pointer_type(tl.float32)) + row * V_DIM + dims, mask=dims < V_DIM)
        acc += weight * values
    is_empty = total == 0.0
    tl.store(out + row * V_DIM + dims, acc / tl.where(is_empty, 1.0, total), mask=dims < V_DIM)
    tl.store(lse + row, tl.where(is_empty, float("-inf"), base + tl.log(tl.where(is_empty, 1.0, total))))
