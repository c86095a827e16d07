"""Attention of a few queries over pages, in Triton: each program attends a part of a sequence's tokens for the queries
of a KV head, and says the natural log-sum-exp beside it, so that any merge fits (FlashDecoding, Dao et al. 2023).

Query heads of a group are rows of one product: K and V are read once for all of them (GQA). Tokens outside
`[kv_start, kv_len)` never count, nor is a slot read that is none.
"""

import triton
import triton.language as tl

from tandemkv.kernels import checks
from tandemkv.kernels.gpu import formats as f
from tandemkv.kernels.gpu.tiles import INTERPRETED, kept_channels, keys_of, places, rounded, values_of

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

NAN_IN_Q: tl.constexpr = tl.constexpr(checks.NAN_IN_Q)
SLOT_OUT_OF_RANGE: tl.constexpr = tl.constexpr(checks.SLOT_OUT_OF_RANGE)
OUTSIDE_TABLE: tl.constexpr = tl.constexpr(checks.OUTSIDE_TABLE)

kernel = triton.jit(
    do_not_specialize=[
        *("table", "starts", "lens", "flags", "out", "lse", "block_lse", "sink", "slots", "targets", "window"),
        *(
            "num_q_heads",
            "q_len",
            "num_slots",
            "num_entries",
            "num_blocks",
            "num_parts",
            "num_rows",
            "num_tiles",
            "num_splits",
        ),
        *("num_seqs",),
        *("lens_seq_stride", "lens_head_stride", "block_lse_stride", "begin", "num_new"),
        *("k_seq_stride", "k_head_stride", "k_token_stride", "v_seq_stride", "v_head_stride", "v_token_stride"),
    ]
)
"""One kernel for all values of these: a context that grows would else compile another one whenever a number becomes a
multiple of 16, in the middle of a text."""


@kernel
def decode_pages(
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
    PAGES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    Q_PAD: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Grid: (splits, KV heads x row blocks, sequences).

    q `[num_seqs, num_q_heads, Q_LEN, HEAD_DIM]`; k, v arenas in the formats K and V, of pages as PAGES says (tiles.py);
    out float32 `[splits, num_seqs, num_q_heads, Q_LEN, V_DIM]`, lse the same without dims; block_lse float32
    `[num_seqs, num_q_heads, Q_LEN, num_blocks]`, its rows so many apart, -inf before, base 2, or nothing. flags: int32
    `[1]`, of which bits are set. table int32 `[num_seqs, KV heads, num_entries]`; starts, lens int64.
    DTYPE: of the rows that pages stand for. Q_PAD: dims of q as read, K[f.PAD] unless K names channels.
    RULE: (causal, has a soft cap, has a window, wants masses).
    AHEAD: (tiles asked for in L2 ahead, 0 for none, and the assembly that asks for K of a tile's piece, and for V).
    """
    CAUSAL: tl.constexpr = RULE[0]
    HAS_SOFTCAP: tl.constexpr = RULE[1]
    HAS_WINDOW: tl.constexpr = RULE[2]
    WITH_MASS: tl.constexpr = RULE[3]
    DISTANCE: tl.constexpr = AHEAD[0]
    K_PAD: tl.constexpr = K[f.PAD]
    V_PAD: tl.constexpr = V[f.PAD]
    PAGE: tl.constexpr = PAGES[1]
    GATHERS_Q: tl.constexpr = K[f.KEPT] >= 0
    split, num_splits, seq = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    num_row_blocks: tl.constexpr = (GROUP * Q_LEN + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(1) // num_row_blocks
    rows = tl.program_id(1) % num_row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < GROUP * Q_LEN
    query = rows % Q_LEN
    row = (seq * num_q_heads + head * GROUP).to(tl.int64) * Q_LEN + rows  # of q, a KV head's are behind each other
    v_dims = tl.arange(0, V_PAD)
    queries = _queries_of(q, row, is_row, tl.arange(0, Q_PAD), HEAD_DIM)
    if split == 0:
        num_nan = tl.sum(tl.sum(_is_nan(queries.to(tl.float32)).to(tl.int32), 1), 0)
        tl.atomic_or(flags, NAN_IN_Q, mask=num_nan > 0)

    start, end, is_outside = _length(starts, lens, seq * lens_seq_stride + head * lens_head_stride, num_entries, PAGES)
    tl.atomic_or(flags, OUTSIDE_TABLE, mask=is_outside)
    last = end - Q_LEN + 1 + query if CAUSAL else tl.zeros_like(query) + end  # a query sees what is before
    if HAS_WINDOW:
        start = tl.maximum(start, end - Q_LEN + 1 - window)
    begin, stop = _part(start, end, split, num_splits, BLOCK_N)
    entries = table + (seq.to(tl.int64) * PAGES[0] + head) * num_entries

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, V_PAD), tl.float32)
    num_wild = 0
    arena = (k, v, entries, head, num_slots)
    for i in tl.static_range(DISTANCE):
        _ask_for_tile(arena, begin + i * BLOCK_N, stop, PAGES, K, V, BLOCK_N, AHEAD)
    # Where a tile lies is looked up one tile early: loads that wait for another load are not pipelined.
    piece, offset, exists = _places_of_tile(arena, begin, start, end, PAGES, K, BLOCK_N)
    for tile in range(begin, stop, BLOCK_N):
        if DISTANCE > 0:
            _ask_for_tile(arena, tile + DISTANCE * BLOCK_N, stop, PAGES, K, V, BLOCK_N, AHEAD)
        tokens = tile + tl.arange(0, BLOCK_N)
        in_run = (tokens >= start) & (tokens < end)
        num_wild += tl.sum((in_run & ~exists).to(tl.int32), 0)
        if GATHERS_Q:
            dims = kept_channels(k + piece * K[f.SLICE], K)
            is_stored = tl.arange(0, K_PAD) < K[f.STORED]
            gathered = _queries_of(q, row, is_row, tl.where(is_stored, dims, HEAD_DIM), HEAD_DIM)
        else:
            gathered = queries
        scores = _dot(gathered, keys_of(k, piece, offset, exists, PAGE, K, DTYPE)) * scale
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
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
        values = values_of(v, piece, offset, exists, PAGE, V, DTYPE)
        acc = acc * shrink[:, None] + _weighed(weights, values)
        total = total * shrink + tl.sum(weights, 1)
        best = highest
        piece, offset, exists = _places_of_tile(arena, tile + BLOCK_N, start, end, PAGES, K, BLOCK_N)

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
def _length(starts, lens, at, num_entries, PAGES: tl.constexpr):
    """The run's [start, end), cut to its table, and whether it had to be."""
    entry_tokens: tl.constexpr = 16 if PAGES[2] else PAGES[1]
    start, end, num_tokens = tl.load(starts + at), tl.load(lens + at), num_entries.to(tl.int64) * entry_tokens
    is_outside = (start < 0) | (end < 0) | (end > num_tokens)  # padding may be longer than the table
    start, end = tl.minimum(tl.maximum(start, 0), num_tokens), tl.minimum(tl.maximum(end, 0), num_tokens)
    return start.to(tl.int32), end.to(tl.int32), is_outside


@triton.jit
def _part(start, end, split, num_splits, BLOCK_N: tl.constexpr):
    """Tokens [begin, stop) of a split: whole tiles, of which the run's first and last may be cut."""
    first_tile = start // BLOCK_N
    num_tiles = tl.cdiv(tl.cdiv(end, BLOCK_N) - first_tile, num_splits)
    begin = (first_tile + split * num_tiles) * BLOCK_N
    return begin, tl.minimum(begin + num_tiles * BLOCK_N, end)


@triton.jit
def _places_of_tile(arena, tile, start, end, PAGES: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """As `keys_of` takes them: of each token of the run that the tile has, or of its first one."""
    _, _, entries, head, num_slots = arena
    tokens = tile + tl.arange(0, BLOCK_N)
    in_run = (tokens >= start) & (tokens < end)
    if K[f.PACKING] == "rows":
        piece, offset, exists = places(entries, tokens, in_run, head, num_slots, PAGES)
    else:
        piece, offset, is_slot = places(entries, tile, tile < end, head, num_slots, PAGES)
        exists = in_run & is_slot
    return piece, offset, exists


@triton.jit
def _queries_of(q, row, is_row, dims, HEAD_DIM: tl.constexpr):
    """`[rows, dims]`, zeros where there is no row or no dim."""
    return tl.load(q + row[:, None] * HEAD_DIM + dims, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


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
def _tanh(x):
    """By the logistic function, of which little is left beside 1 for small x: there by its series, to 2e-9."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925))))))
    return tl.where(tl.abs(x) < 0.3, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _dot(x, y):
    """In float32. Where dtypes differ both become float32 first, and in the interpreter."""
    if INTERPRETED or x.dtype != y.dtype:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _weighed(weights, values):
    """Sums of values. Weights are multiplied in two parts of the values' dtype, so that little is rounded away: 2^-17
    of a weight in bfloat16, 2^-22 in float16, whose parts are 2^15 times as large, or small ones would be denormal."""
    if values.dtype == tl.float32:
        return _dot(weights, values)
    larger: tl.constexpr = 32768.0 if values.dtype == tl.float16 else 1.0
    weights = weights * larger
    high = rounded(weights, values.dtype)
    low = rounded(weights - high.to(tl.float32), values.dtype)
    return (_dot(high, values) + _dot(low, values)) / larger


@triton.jit
def _is_nan(x):
    return x != x


@triton.jit
def _ask_for_tile(
    arena,
    tile,
    stop,
    PAGES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """For K and V of a tile to be in L2: nobody waits. What lies in one piece is asked for at once."""
    k, v, entries, head, num_slots = arena
    length: tl.constexpr = min(BLOCK_N, 16 if PAGES[2] else PAGES[1])
    for i in tl.static_range(BLOCK_N // length):
        token = tile + i * length
        if token < stop:
            piece, offset, is_slot = places(entries, token, True, head, num_slots, PAGES)
            if is_slot:
                at_k, at_v = k + piece * K[f.SLICE] + offset * K[f.TOKEN], v + piece * V[f.SLICE] + offset * V[f.TOKEN]
                tl.inline_asm_elementwise(AHEAD[1], "=r,l", [at_k], tl.int32, False, 1)
                tl.inline_asm_elementwise(AHEAD[2], "=r,l", [at_v], tl.int32, False, 1)


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


@kernel
def merge_parts(
    outs,
    lses,
    sink,
    out,
    lse,
    num_parts,
    num_rows,
    num_q_heads,
    q_len,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """Grid: rows. outs, lses: float32 `[num_parts, num_rows, V_DIM]` and `[num_parts, num_rows]`; sink float32
    `[num_q_heads]`. In two passes: the highest log-sum-exp, then sums in the order of parts. An empty row stays so."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, V_PAD)
    highest = -float("inf")
    at = row
    for _ in range(num_parts):
        highest = tl.maximum(highest, tl.load(lses + at))
        at += num_rows
    if HAS_SINK:
        sunk = tl.load(sink + row // q_len % num_q_heads)
        highest = tl.maximum(highest, sunk)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = 0.0
    if HAS_SINK:
        total += tl.exp(sunk - base)
    acc = tl.zeros((V_PAD,), tl.float32)
    at = row
    for _ in range(num_parts):
        weight = tl.exp(tl.load(lses + at) - base)
        total += weight
        acc += weight * tl.load(outs + at * V_DIM + dims, mask=dims < V_DIM, other=0.0)
        at += num_rows
    is_empty = total == 0.0
    tl.store(out + row * V_DIM + dims, acc / tl.where(is_empty, 1.0, total), mask=dims < V_DIM)
    tl.store(lse + row, tl.where(is_empty, float("-inf"), base + tl.log(tl.where(is_empty, 1.0, total))))


@kernel
def unpack_pages(
    k,
    v,
    rows_k,
    rows_v,
    slots,
    targets,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Grid: (pages, KV heads, tiles of a page). Page slots[i] of k and v -> page targets[i] of rows."""
    K_PAD: tl.constexpr = K[f.PAD]
    V_PAD: tl.constexpr = V[f.PAD]
    PAGE: tl.constexpr = PAGES[1]
    page, head, offset = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_N
    piece = tl.load(slots + page).to(tl.int64) * PAGES[0] + head
    tokens, exists = offset + tl.arange(0, BLOCK_N), tl.full((BLOCK_N,), True, tl.int1)
    keys = keys_of(k, piece, offset, exists, PAGE, K, DTYPE)
    values = values_of(v, piece, offset, exists, PAGE, V, DTYPE)
    row = (tl.load(targets + page).to(tl.int64) * PAGES[0] + head) * PAGE + tokens
    channels, v_dims = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    names = kept_channels(k + piece * K[f.SLICE], K)
    is_kept = (channels < K[f.STORED]) & (names < HEAD_DIM)
    tl.store(rows_k + row[None, :] * HEAD_DIM + names[:, None], keys, mask=is_kept[:, None] & exists[None, :])
    if K[f.KEPT] >= 0:  # the others are zeros; nobody writes a number twice
        dims = tl.arange(0, D_PAD)
        times = tl.sum((is_kept[:, None] & (names[:, None] == dims[None, :])).to(tl.int32), 0)
        left_out = (times == 0) & (dims < HEAD_DIM)
        zeros = tl.zeros((BLOCK_N, dims.shape[0]), DTYPE)
        tl.store(rows_k + row[:, None] * HEAD_DIM + dims, zeros, mask=left_out[None, :] & exists[:, None])
    tl.store(rows_v + row[:, None] * V_DIM + v_dims, values, mask=(v_dims < V_DIM)[None, :] & exists[:, None])


@kernel
def append_rows(
    k,
    v,
    table,
    new_k,
    new_v,
    k_seq_stride,
    k_head_stride,
    k_token_stride,
    v_seq_stride,
    v_head_stride,
    v_token_stride,
    begin,
    num_new,
    num_slots,
    num_entries,
    PAGES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of new tokens, KV heads, sequences). New tokens become tokens `begin...` of the table's run; their
    dims are next to each other."""
    K_PAD: tl.constexpr = K[f.PAD]
    V_PAD: tl.constexpr = V[f.PAD]
    tokens, head, seq = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1), tl.program_id(2)
    is_new = tokens < num_new
    entries = table + (seq.to(tl.int64) * PAGES[0] + head) * num_entries
    piece, offset, exists = places(entries, begin + tokens, is_new, head, num_slots, PAGES)
    channels, v_dims = tl.arange(0, K_PAD), tl.arange(0, V_PAD)
    from_k = new_k + seq.to(tl.int64) * k_seq_stride + head * k_head_stride + tokens.to(tl.int64) * k_token_stride
    from_v = new_v + seq.to(tl.int64) * v_seq_stride + head * v_head_stride + tokens.to(tl.int64) * v_token_stride
    of_k, of_v = exists[:, None] & (channels < K[f.STORED])[None, :], exists[:, None] & (v_dims < V[f.STORED])[None, :]
    to_k, to_v = k + piece * K[f.SLICE] + offset * K[f.TOKEN], v + piece * V[f.SLICE] + offset * V[f.TOKEN]
    tl.store(to_k[:, None] + channels, tl.load(from_k[:, None] + channels, mask=of_k, other=0.0), mask=of_k)
    tl.store(to_v[:, None] + v_dims, tl.load(from_v[:, None] + v_dims, mask=of_v, other=0.0), mask=of_v)


@kernel
def pull_pages(
    k,
    v,
    table,
    starts,
    lens,
    window,
    num_slots,
    num_entries,
    lens_seq_stride,
    lens_head_stride,
    num_tiles,
    num_splits,
    num_seqs,
    PAGES: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Grid: programs of the `decode_pages` that comes next, as many as have a tile to ask for. Each asks for the first
    tiles of what that one will read, all together for num_tiles, and ends without waiting for them."""
    program, num_programs = tl.program_id(0), num_splits * PAGES[0] * num_seqs
    split, head, seq = program % num_splits, program // num_splits % PAGES[0], program // num_splits // PAGES[0]
    start, end, _ = _length(starts, lens, seq * lens_seq_stride + head * lens_head_stride, num_entries, PAGES)
    begin, stop = _part(tl.maximum(start, end - window), end, split, num_splits, BLOCK_N)
    its_tiles = num_tiles // num_programs + (program < num_tiles % num_programs).to(tl.int32)
    arena = (k, v, table + (seq.to(tl.int64) * PAGES[0] + head) * num_entries, head, num_slots)
    for i in range(its_tiles):
        _ask_for_tile(arena, begin + i * BLOCK_N, stop, PAGES, K, V, BLOCK_N, AHEAD)
