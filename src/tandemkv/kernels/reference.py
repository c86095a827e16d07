"""The specification of `attend` and `merge`, in float64 and as plainly as possible. Only tests import this."""

import math

import torch
from torch import Tensor

from tandemkv.types import Arena, PagedKV, Partial, ScoreRule


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


def read_tokens(arena: Arena, slots: Tensor, head: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """K `[end - begin, head_dim]` and V `[end - begin, v_head_dim]` of one head, read token by token."""
    size, rows_k, rows_v = arena.layout.page_size, [], []
    for token in range(begin, end):
        slot, at = int(slots[token // size]), token % size
        rows_k.append(_token_k(arena, arena.k[slot, head], at))
        rows_v.append(_token_v(arena, arena.v[slot, head], at))
    if not rows_k:
        return arena.k.new_empty(0, arena.head_dim), arena.v.new_empty(0, arena.v_head_dim)
    return torch.stack(rows_k), torch.stack(rows_v)


def _token_k(arena: Arena, page: Tensor, at: int) -> Tensor:
    if arena.layout.packing == "rows":
        return page[at]
    pair = arena.layout.pair
    blocks = page.reshape(-1, page.shape[1] // pair, 16, pair)
    return blocks[at // 16, :, at % 16].reshape(-1)[: arena.head_dim]


def _token_v(arena: Arena, page: Tensor, at: int) -> Tensor:
    if arena.layout.packing == "rows":
        return page[at]
    pair = arena.layout.pair
    return page.reshape(-1, page.shape[1], pair)[at // pair, :, at % pair][: arena.v_head_dim]
