"""The specification of `attend`, its halves and `merge`, in float64 and plainly. Only tests import this."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandemkv.types import BLOCK_TOKENS, AnyArena, Arena, PagedKV, Partial, ScoreRule


def attend(q: Tensor, kv: PagedKV, *, rule: ScoreRule, causal: bool) -> Partial:
    """See `tandemkv.kernels.attend`; out and lse are float64. Its halves, one after the other."""
    return weigh(_scores(q, kv, rule, causal), kv)


def logits(q: Tensor, kv: PagedKV, *, rule: ScoreRule) -> Tensor:
    """See `tandemkv.kernels.logits`; float64."""
    return _scores(q, kv, rule, causal=False)


def weigh(logits: Tensor, kv: PagedKV) -> Partial:
    """See `tandemkv.kernels.weigh`; out and lse are float64. V of a token that all rows of a head leave out is not
    read."""
    num_seqs, num_q_heads, q_len, _ = logits.shape
    group_size = num_q_heads // kv.arena.num_kv_heads
    out = torch.zeros((*logits.shape[:3], kv.arena.v_head_dim), dtype=torch.float64)
    lse = torch.full(logits.shape[:3], -math.inf, dtype=torch.float64)
    for seq in range(num_seqs):
        for head in range(num_q_heads):
            counts = (logits[seq, head] != -math.inf).any(0)
            tokens = [t for t in _tokens(kv, seq, head // group_size) if counts[t]]
            _, v = _read(kv, seq, head // group_size, tokens)
            for i in range(q_len):
                scores = logits[seq, head, i, tokens].double()
                seen = scores != -math.inf
                if seen.any():
                    lse[seq, head, i] = torch.logsumexp(scores, 0)
                    out[seq, head, i] = torch.softmax(scores[seen], 0) @ v[seen]
    return Partial(out, lse)


def _scores(q: Tensor, kv: PagedKV, rule: ScoreRule, causal: bool) -> Tensor:
    """Of every query with every token of the table, -inf where it does not see it."""
    num_seqs, num_q_heads, q_len, _ = q.shape
    group_size = num_q_heads // kv.arena.num_kv_heads
    found = torch.full((*q.shape[:3], kv.page_table.shape[2] * kv.entry_tokens), -math.inf, dtype=torch.float64)
    for seq in range(num_seqs):
        for head in range(num_q_heads):
            run = _tokens(kv, seq, head // group_size)
            start, end = run.start, run.stop
            if rule.window is not None:
                start = max(start, end - q_len + 1 - rule.window)  # what no query sees is not read
            k, _ = _read(kv, seq, head // group_size, range(start, end))
            for i in range(q_len):
                last = end - q_len + 1 + i if causal else end
                first = start if rule.window is None else max(start, last - rule.window)
                if last <= first:
                    continue
                scores = rule.scale * (k[first - start : last - start] @ q[seq, head, i].double())
                if rule.softcap is not None:
                    scores = rule.softcap * torch.tanh(scores / rule.softcap)
                if kv.log_counts is not None:
                    scores = scores + kv.log_counts[seq, head // group_size, first:last].double()
                    scores[kv.log_counts[seq, head // group_size, first:last] == -math.inf] = -math.inf
                found[seq, head, i, first:last] = scores
    return found


def _tokens(kv: PagedKV, seq: int, head: int) -> range:
    """Those that a KV head's run has."""
    of_head = (seq, head) if kv.of_blocks else (seq,)
    return range(int(kv.kv_start[of_head]), int(kv.kv_len[of_head]))


def _read(kv: PagedKV, seq: int, head: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """K and V of some tokens of a KV head's run, `[num_tokens, dim]`."""
    size, page_blocks = kv.entry_tokens, kv.arena.layout.page_size // BLOCK_TOKENS
    places = []
    for token in tokens:
        entry, at = int(kv.page_table[seq, head, token // size]), token % size
        if kv.of_blocks:
            entry, block = divmod(entry, kv.arena.num_kv_heads * page_blocks)
            at += block * BLOCK_TOKENS
        places.append((entry, at))
    return _read_places(kv.arena, places, head)


def merge(parts: list[Partial], sink_logit: Tensor | None = None) -> Partial:
    """See `tandemkv.kernels.merge`; out and lse are float64."""
    lse = torch.stack([part.lse.double() for part in parts])
    total = torch.logsumexp(lse, 0)
    weights = torch.where(torch.isinf(total), 0.0, torch.exp(lse - total)).nan_to_num(0.0)
    out = sum((w.unsqueeze(-1) * part.out.double() for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
    if sink_logit is None:
        return Partial(out, total)
    sink = sink_logit.double()[:, None].expand_as(total)
    return Partial(out * _sigmoid_of_difference(total, sink).unsqueeze(-1), torch.logaddexp(total, sink))


def _sigmoid_of_difference(a: Tensor, b: Tensor) -> Tensor:
    """sigmoid(a - b), and 1 where b is -inf."""
    return torch.where(b == -math.inf, 1.0, torch.sigmoid(a - b))


def read_tokens(arena: AnyArena, slots: Tensor, head: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """K `[end - begin, head_dim]` and V `[end - begin, v_head_dim]` of one head, read token by token."""
    size = arena.layout.page_size
    return _read_places(arena, [(int(slots[token // size]), token % size) for token in range(begin, end)], head)


def _read_places(arena: AnyArena, places: Sequence[tuple[int, int]], head: int) -> tuple[Tensor, Tensor]:
    """Of slots and tokens in them."""
    rows_k, rows_v = [], []
    for slot, at in places:
        part, slot_of_part = _locate(arena, slot)
        rows_k.append(_token_k(part, part.k[slot_of_part, head], at).double())
        rows_v.append(_token_v(part, part.v[slot_of_part, head], at).double())
    if not rows_k:
        return torch.zeros(0, arena.head_dim).double(), torch.zeros(0, arena.v_head_dim).double()
    return torch.stack(rows_k), torch.stack(rows_v)


def _locate(arena: AnyArena, slot: int) -> tuple[Arena, int]:
    for part in arena.parts:
        if slot < part.num_slots:
            return part, slot
        slot -= part.num_slots
    raise IndexError("a slot outside its arenas")


def _token_k(arena: Arena, page: Tensor, at: int) -> Tensor:
    if arena.layout.is_quantised:
        return _quantised_k(arena, page, at)
    if arena.layout.packing == "rows":
        return page[at]
    pair = arena.layout.pair
    blocks = page.reshape(-1, page.shape[1] // pair, 16, pair)
    return blocks[at // 16, :, at % 16].reshape(-1)[: arena.head_dim]


def _token_v(arena: Arena, page: Tensor, at: int) -> Tensor:
    if arena.layout.is_quantised:
        return _quantised_v(arena, page, at)
    if arena.layout.packing == "rows":
        return page[at]
    pair = arena.layout.pair
    return page.reshape(-1, page.shape[1], pair)[at // pair, :, at % pair][: arena.v_head_dim]


def _quantised_k(arena: Arena, page: Tensor, at: int) -> Tensor:
    """The bytes of `SliceOfK` (csrc/attend.h), one part behind the other."""
    layout, size, head_dim = arena.layout, arena.layout.page_size, arena.head_dim
    is_int4, num_kept = layout.packing == "int4", layout.num_channels or head_dim
    num_channels = -(-num_kept // 16) * 16
    bytes_of = _Reader(page)
    if is_int4:  # [block][channel / 8][16 tokens][4 bytes], low halves the first 4 channels
        words = bytes_of.take(size * num_channels // 2).view(-1, num_channels // 8, 16, 4)[at // 16, :, at % 16]
        codes = torch.stack([words & 15, words >> 4], 1).reshape(-1).double()
        scales, zeros = (bytes_of.take(2 * num_channels).view(torch.bfloat16).double() for _ in range(2))
        k = scales * codes + zeros
    else:
        words = bytes_of.take(size * num_channels).view(-1, num_channels // 4, 16, 4)[at // 16, :, at % 16]
        k = bytes_of.take(2 * num_channels).view(torch.bfloat16).double() * (words.reshape(-1).double() - 128)
    bytes_of.align()
    num_exact = head_dim // 64 if is_int4 else 0
    exact = bytes_of.take(num_exact * size * layout.dtype.itemsize).view(layout.dtype).view(num_exact, size)[:, at]
    bytes_of.align()
    row = torch.zeros(head_dim, dtype=torch.float64)
    index = torch.arange(head_dim) if layout.num_channels is None else bytes_of.take(num_channels)[:num_kept].long()
    row[index] = k[:num_kept]
    bytes_of.align()
    row[bytes_of.take(num_exact).long()] = exact.double()
    return row


def _quantised_v(arena: Arena, page: Tensor, at: int) -> Tensor:
    """The bytes of `SliceOfV`."""
    size, v_head_dim, is_int4 = arena.layout.page_size, arena.v_head_dim, arena.layout.packing == "int4"
    num_dims, num_groups = -(-v_head_dim // 16) * 16, v_head_dim // 64 if is_int4 else 1
    bytes_of = _Reader(page)
    if is_int4:  # [token / 8][dim][4 bytes], low halves the first 4 tokens
        words = bytes_of.take(size * num_dims // 2).view(-1, num_dims, 4)[at // 8, :, at % 4]
        codes = (words >> 4 if at % 8 >= 4 else words & 15).double()
        scales, zeros = (bytes_of.take(2 * num_groups * size).view(torch.bfloat16).double() for _ in range(2))
        of_dims = (x.view(num_groups, size)[:, at].repeat_interleave(64) for x in (scales, zeros))
        scale, zero = of_dims
        return scale * codes + zero
    codes = bytes_of.take(size * num_dims).view(-1, num_dims, 4)[at // 4, :, at % 4].double() - 128
    return (bytes_of.take(2 * size).view(torch.bfloat16)[at].double() * codes)[:v_head_dim]


class _Reader:
    """Takes bytes from the front."""

    def __init__(self, page: Tensor) -> None:
        self._page, self._at = page, 0

    def take(self, num_bytes: int) -> Tensor:
        self._at += num_bytes
        return self._page[self._at - num_bytes : self._at].clone()

    def align(self) -> None:
        """To the next line of 64 bytes."""
        self._at = -(-self._at // 64) * 64
