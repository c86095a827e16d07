"""That a sparse step attended to certain tokens and to nothing else, told from what it gave."""

import math

import torch
from torch import Tensor

from tandemkv.types import Partial
from tests.dense import causal_visible, dense_attention
from tests.tolerances import TORCH_FLOAT32, assert_within, attend_bound


def assert_attends_to(
    kept: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, scale: float
) -> None:
    """out `[num_seqs, q_len, num_q_heads, v_head_dim]` of float32 q, the last q_len of k's tokens, over those kept.

    kept: bool `[num_seqs, num_kv_heads, num_tokens]`; causal, and padding is not seen.
    """
    num_kv_heads, q_len = k.shape[1], q.shape[2]
    group_size = q.shape[1] // num_kv_heads
    causal = causal_visible(k.shape[2], q_len, kv_start)
    for head in range(num_kv_heads):
        rows = slice(head * group_size, (head + 1) * group_size)
        visible = causal & kept[:, head, None]
        one_k, one_v = k[:, head : head + 1], v[:, head : head + 1]
        truth = dense_attention(q[:, rows], one_k, one_v, visible, scale)
        bound = attend_bound(q[:, rows], one_k, one_v, visible, scale, TORCH_FLOAT32, num_merges=4)
        got = Partial(out[:, :, rows].transpose(1, 2), truth.lse.float())
        assert_within(got, truth, bound._replace(lse=torch.full_like(bound.lse, math.inf)))
