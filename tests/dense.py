"""Dense attention in float64, as plainly as possible, for K and V that lie in one tensor."""

import math

import torch
from torch import Tensor

from tandemkv.types import Partial


def random_kv(
    num_seqs: int, num_kv_heads: int, num_tokens: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """K and V `[num_seqs, num_kv_heads, num_tokens, head_dim]`, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_seqs, num_kv_heads, num_tokens, head_dim)
    k = torch.randn(shape, generator=generator).to(dtype)
    return k, torch.randn(shape, generator=generator).to(dtype)


def visible_tokens(
    kv_start: Tensor, kv_len: Tensor, q_len: int, num_tokens: int, causal: bool, window: int | None = None
) -> Tensor:
    """bool `[num_seqs, q_len, num_tokens]`: the rule of `kernels.attend`, for dense K and V."""
    token = torch.arange(num_tokens)
    ends = kv_len[:, None] - (q_len - 1 - torch.arange(q_len) if causal else torch.zeros(q_len, dtype=torch.int64))
    begins = kv_start[:, None] if window is None else (ends - window).clamp(min=kv_start[:, None])
    return (token >= begins[:, :, None]) & (token < ends[:, :, None])


def causal_visible(num_tokens: int, q_len: int, kv_start: Tensor, window: int | None = None) -> Tensor:
    """The same where all sequences have num_tokens, of which the last q_len are the queries."""
    return visible_tokens(kv_start, torch.full_like(kv_start, num_tokens), q_len, num_tokens, True, window)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Partial:
    """Attention of q `[S, Hq, Q, D]` over k and v `[S, Hkv, T, D]` where `visible` `[S, Q, T]`; float64."""
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group_size, 1) for x in (k, v))
    scores = (scale * q.double() @ k.mT).masked_fill(~visible.unsqueeze(1), -math.inf)
    return Partial(torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1))
