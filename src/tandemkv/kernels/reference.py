"""The specification of `attend` and `merge`, in float64 and as plainly as possible. Only tests import this."""

import math

import torch
from torch import Tensor

from tandemkv.types import Arena, PagedKV, Partial, ScoreRule


def attend(q: Tensor, kv: PagedKV, *, rule: ScoreRule, causal: bool) -> Partial:
    """See `tandemkv.kernels.attend`; out and lse are float64."""
    num_seqs, num_q_heads, q_len, _ = q.shape
    group_size = num_q_heads // kv.arena.num_kv_heads
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for seq in range(num_seqs):
        start, end = int(kv.kv_start[seq]), int(kv.kv_len[seq])
        for head in range(num_q_heads):
            k, v = read_tokens(
                kv.arena, kv.page_table[seq, head // group_size], head // group_size, start, max(start, end)
            )
            for i in range(q_len):
                last = end - q_len + 1 + i if causal else end
                num_visible = max(last - start, 0)
                if num_visible == 0:
                    continue
                scores = rule.scale * (k[:num_visible].double() @ q[seq, head, i].double())
                lse[seq, head, i] = torch.logsumexp(scores, 0)
                out[seq, head, i] = torch.softmax(scores, 0) @ v[:num_visible].double()
    return Partial(out, lse)


def merge(parts: list[Partial]) -> Partial:
    """See `tandemkv.kernels.merge`; out and lse are float64."""
    lse = torch.stack([part.lse.double() for part in parts])
    total = torch.logsumexp(lse, 0)
    weights = torch.where(torch.isinf(total), 0.0, torch.exp(lse - total)).nan_to_num(0.0)
    out = sum((w.unsqueeze(-1) * part.out.double() for w, part in zip(weights, parts, strict=True)), torch.zeros(()))
    return Partial(out, total)


def read_tokens(arena: Arena, slots: Tensor, head: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """K and V `[end - begin, head_dim]` of one head, read token by token from either packing."""
    size, rows_k, rows_v = arena.layout.page_size, [], []
    for token in range(begin, end):
        slot, at = int(slots[token // size]), token % size
        rows_k.append(_token_k(arena, arena.k[slot, head], at))
        rows_v.append(_token_v(arena, arena.v[slot, head], at))
    empty = torch.empty((0, arena.head_dim), dtype=arena.layout.dtype)
    return (torch.stack(rows_k), torch.stack(rows_v)) if rows_k else (empty, empty)


def _token_k(arena: Arena, page: Tensor, at: int) -> Tensor:
    if arena.layout.packing == "rows":
        return page[at]
    pair = 4 // arena.layout.dtype.itemsize
    blocks = page.reshape(-1, page.shape[1] // pair, 16, pair)
    return blocks[at // 16, :, at % 16].reshape(-1)[: arena.head_dim]


def _token_v(arena: Arena, page: Tensor, at: int) -> Tensor:
    if arena.layout.packing == "rows":
        return page[at]
    pair = 4 // arena.layout.dtype.itemsize
    return page.reshape(-1, page.shape[1], pair)[at // pair, :, at % pair][: arena.head_dim]
