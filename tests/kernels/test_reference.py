"""The reference itself, against torch's attention on dense K and V in float64."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tandemkv.kernels import reference
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.paged import Shape, build, poisoned_arena

SHAPES = {
    "ragged": Shape(16, 2, 3, 24, kv_len=(40, 17), kv_start=(0, 5)),
    "causal": Shape(48, 1, 4, 10, kv_len=(50, 9), kv_start=(20, 2), q_len=5, causal=True),
    "v-of-another-width": Shape(16, 2, 3, 24, kv_len=(40, 17), kv_start=(0, 5), v_head_dim=9),
    "window": Shape(16, 1, 4, 10, kv_len=(50, 9), kv_start=(20, 2), q_len=5, causal=True, window=7),
    "prefill": Shape(64, 2, 1, 64, kv_len=(30,), kv_start=(0,), q_len=30, causal=True),
}


@pytest.mark.parametrize("packing", ["rows", "panels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_torch_in_float64(name: str, dtype: torch.dtype, packing: Packing) -> None:
    shape = SHAPES[name]
    q, kv, k, v, visible = build(shape, dtype, packing)
    q, k, v = q.double(), k.double(), v.double()
    mask = visible.unsqueeze(1)
    got = reference.attend(q, kv, rule=shape.rule, causal=shape.causal)
    out = scaled_dot_product_attention(q, k, v, mask, scale=shape.scale, enable_gqa=True)
    scores = shape.scale * q @ k.repeat_interleave(shape.group_size, 1).mT
    lse = torch.logsumexp(scores.masked_fill(~mask, -math.inf), -1)
    torch.testing.assert_close(got.out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse, lse, rtol=1e-12, atol=1e-12)


def test_causal_tail_is_torchs_causal_mask() -> None:
    """Where q_len == kv_len the two conventions are one."""
    shape = SHAPES["prefill"]
    q, kv, k, v, _ = build(shape)
    got = reference.attend(q, kv, rule=ScoreRule(shape.scale), causal=True)
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, scale=shape.scale)
    torch.testing.assert_close(got.out, want, rtol=1e-12, atol=1e-12)


def test_queries_that_see_nothing_get_the_identity() -> None:
    shape = Shape(16, 1, 2, 8, kv_len=(0, 5, 9, 6), kv_start=(0, 5, 12, 5), q_len=3, causal=True)
    case = build(shape)
    out, lse = reference.attend(case.q, case.kv, rule=ScoreRule(1.0), causal=True)
    assert (lse == -math.inf).tolist() == [[[True] * 3] * 2] * 3 + [[[True, True, False]] * 2]
    assert (out[lse == -math.inf] == 0).all()


def test_float16_panels_are_read_as_their_definition_says() -> None:
    """K `[block][dim][16]`, V `[token][dim]`, of another width, dims padded to 16."""
    k, v = torch.randn(32, 19).half(), torch.randn(32, 5).half()
    arena = poisoned_arena(PageLayout(torch.float16, 32, "panels"), 1, 1, 19, 5)
    flat_k, flat_v = arena.k.view(-1), arena.v.view(-1)
    for t in range(32):
        flat_k[(t // 16) * 16 * 32 + torch.arange(19) * 16 + t % 16] = k[t]
        flat_v[t * 16 + torch.arange(5)] = v[t]
    got_k, got_v = reference.read_tokens(arena, torch.tensor([0]), 0, 0, 32)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)


def test_panels_are_read_as_their_definition_says() -> None:
    """K `[block][dim / 2][16][2]`, V `[token / 2][dim][2]`, dim padded to 16: written by hand, one by one."""
    head_dim, tokens = 18, 32
    k, v = torch.randn(2, tokens, head_dim).bfloat16()
    arena: Arena = poisoned_arena(PageLayout(torch.bfloat16, 32, "panels"), 1, 1, head_dim)
    flat_k, flat_v = arena.k.view(-1), arena.v.view(-1)
    for t in range(tokens):
        for d in range(head_dim):
            flat_k[(t // 16) * 16 * 32 + (d // 2) * 32 + (t % 16) * 2 + d % 2] = k[t, d]
            flat_v[(t // 2) * 64 + d * 2 + t % 2] = v[t, d]
    got_k, got_v = reference.read_tokens(arena, torch.tensor([0]), 0, 0, tokens)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)


def test_merge_of_halves_is_the_whole() -> None:
    shape = Shape(16, 2, 2, 16, kv_len=(50,), kv_start=(0,))
    case = build(shape)
    whole = reference.attend(case.q, case.kv, rule=ScoreRule(0.3), causal=False)
    ends = [(0, 20), (20, 20), (20, 50)]
    parts = [
        reference.attend(
            case.q,
            PagedKV(case.kv.arena, case.kv.page_table, torch.tensor([begin]), torch.tensor([end])),
            rule=ScoreRule(0.3),
            causal=False,
        )
        for begin, end in ends
    ]
    merged = reference.merge(parts)
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-12, atol=1e-12)


def test_merge_of_nothing_is_nothing() -> None:
    empty = Partial(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -math.inf))
    out, lse = reference.merge([empty, empty])
    assert (out == 0).all()
    assert (lse == -math.inf).all()
