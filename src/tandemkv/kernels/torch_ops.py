"""torch's own attention kernels that return lse, for prefill-sized queries and for any device torch knows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandemkv.types import Arena, Partial, ScoreRule


def attend_dense(q: Tensor, k: Tensor, v: Tensor, *, rule: ScoreRule, causal: bool = False) -> Partial:
    """Attention of q over dense k and v, all of them tokens that exist.

    q: `[num_seqs, num_q_heads, q_len, head_dim]`; k, v: `[num_seqs, num_kv_heads, kv_len, head_dim]`, one dtype and
    device. causal: q and k are the same tokens (q_len == kv_len). out is rounded to q's dtype, then it is widened.
    """
    num_seqs, num_q_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    if kv_len == 0 or q_len == 0:
        return empty_partial(q)
    group_size = num_q_heads // num_kv_heads
    if causal and group_size > 1:
        # The causal mask is per query token, so query heads cannot become rows; a chunk's K and V are small.
        k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    elif group_size > 1:
        q = q.reshape(num_seqs, num_kv_heads, group_size * q_len, head_dim)
    out, lse = _flash(q, k, v, causal, rule.scale)
    return Partial(
        out.reshape(num_seqs, num_q_heads, q_len, head_dim).float(), lse.reshape(num_seqs, num_q_heads, q_len).float()
    )


def empty_partial(q: Tensor) -> Partial:
    """The identity of `merge` in q's shape."""
    return Partial(
        torch.zeros(q.shape, dtype=torch.float32, device=q.device),
        torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device),
    )


def merge(parts: Sequence[Partial], sink_logit: Tensor | None = None) -> Partial:
    """See `tandemkv.kernels.merge`."""
    lses = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(lses, 0)
    if sink_logit is not None:
        lse = torch.logaddexp(lse, sink_logit[:, None])
    weights = torch.exp(lses - torch.where(lse == -math.inf, 0.0, lse))
    out = torch.zeros_like(parts[0].out)
    for weight, part in zip(weights, parts, strict=True):
        out += weight.unsqueeze(-1) * part.out
    return Partial(out, lse)


def append(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: object = None) -> None:
    """See `tandemkv.kernels.append`; an arena of rows on any device. `pool` has no use here."""
    arena.check_tokens(page_table.shape[0], k, v)
    slots, offsets = _places(arena, page_table, begin, k.shape[2])
    arena.k[slots, :, offsets] = k.transpose(1, 2)
    arena.v[slots, :, offsets] = v.transpose(1, 2)


def gather(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: object = None) -> None:
    """See `tandemkv.kernels.gather`; an arena of rows on any device. `pool` has no use here."""
    slots, offsets = _places(arena, page_table, begin, k.shape[2])
    k.copy_(arena.k[slots, :, offsets].transpose(1, 2))
    v.copy_(arena.v[slots, :, offsets].transpose(1, 2))


def _places(arena: Arena, page_table: Tensor, begin: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Slot `[num_seqs, num_tokens]` and place in the page `[num_tokens]` of each token; heads share their pages."""
    tokens = torch.arange(begin, begin + num_tokens)
    slots = page_table[:, 0].long()[:, tokens // arena.layout.page_size]
    return slots.to(arena.k.device), (tokens % arena.layout.page_size).to(arena.k.device)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    ops = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        result = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        return result[0], result[1]
    return _plain(q, k, v, causal, scale)


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Two products and a softmax, where torch has no kernel that returns lse (float32 on CUDA)."""
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.matmul(torch.exp(scores - lse.unsqueeze(-1)), v.float()), lse
