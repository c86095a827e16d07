"""Attention over two halves of a sequence, merged: the algebra that everything here rests on."""

import torch

from tandemkv import Arena, PagedKV, PageLayout, ScoreRule, attend, merge
from tandemkv.kernels import append


def half(k: torch.Tensor, v: torch.Tensor) -> PagedKV:
    """Put `[1, 2, 64, 32]` K and V into a page of their own."""
    arena = Arena.allocate(PageLayout(torch.float32), num_slots=1, num_kv_heads=2, head_dim=32)
    table = torch.zeros((1, 2, 1), dtype=torch.int32)
    append(arena, table, 0, k, v)
    return PagedKV(arena, table, kv_start=torch.tensor([0]), kv_len=torch.tensor([64]))


def main() -> float:
    """The largest difference from attention over the whole."""
    q = torch.randn(1, 8, 1, 32)
    k, v = torch.randn(1, 2, 128, 32), torch.randn(1, 2, 128, 32)
    older, newer = half(k[:, :, :64], v[:, :, :64]), half(k[:, :, 64:], v[:, :, 64:])
    rule = ScoreRule(scale=0.2)
    merged = merge([attend(q, older, rule=rule), attend(q, newer, rule=rule)])
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2, enable_gqa=True)
    return (merged.out - whole).abs().max().item()


if __name__ == "__main__":
    print(f"two halves, merged, differ from the whole by {main():.1e}")
