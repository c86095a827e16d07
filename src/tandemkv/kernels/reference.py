"""The specification of `attend` and `merge`, in float64 and as plainly as possible. Only tests import this."""

import math

import torch
from torch import Tensor

from tandemkv.types import AnyArena, Arena, PagedKV, Partial, ScoreRule


def attend(q: Tensor, kv: PagedKV, *, rule: ScoreRule, causal: bool) -> Partial:
    """See `tandemkv.kernels.attend`; out and lse are float64."""
    num_seqs, num_q_heads, q_len, _ = q.shape
    group_size = num_q_heads // kv.arena.num_kv_heads
    out = torch.zeros((*q.shape[:3], kv.arena.v_head_dim), dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for seq in range(num_seqs):
        start, end = int(kv.kv_start[seq]), int(kv.kv_len[seq])
        if rule.window is not None:
            start = max(start, end - q_len + 1 - rule.window)  # what no query sees is not read
        for head in range(num_q_heads):
            k, v = read_tokens(
                kv.arena, kv.page_table[seq, head // group_size], head // group_size, start, max(start, end)
            )
            for i in range(q_len):
                last = end - q_len + 1 + i if causal else end
                first = start if rule.window is None else max(start, last - rule.window)
                if last <= first:
                    continue
                seen = slice(first - start, last - start)
                scores = rule.scale * (k[seen].double() @ q[seq, head, i].double())
                if rule.softcap is not None:
                    scores = rule.softcap * torch.tanh(scores / rule.softcap)
                if kv.log_counts is not None:
                    scores = scores + kv.log_counts[seq, head // group_size, first:last].double()
                lse[seq, head, i] = torch.logsumexp(scores, 0)
                out[seq, head, i] = torch.softmax(scores, 0) @ v[seen].double()
    return Partial(out, lse)


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
    size, rows_k, rows_v = arena.layout.page_size, [], []
    for token in range(begin, end):
        part, slot, at = *_locate(arena, int(slots[token // size])), token % size
        rows_k.append(_token_k(part, part.k[slot, head], at))
        rows_v.append(_token_v(part, part.v[slot, head], at))
    if not rows_k:
        return torch.zeros(0, arena.head_dim), torch.zeros(0, arena.v_head_dim)
    return torch.stack([row.double() for row in rows_k]), torch.stack([row.double() for row in rows_v])


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
