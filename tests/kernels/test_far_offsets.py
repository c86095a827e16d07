"""Counts and offsets beyond 32 bits: millions of tokens, and pages that lie gigabytes into an arena."""

import math

import pytest
import torch

from tandemkv.kernels import attend, cpu
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, ScoreRule
from tests.dense import dense_attention
from tests.tolerances import U, assert_within, attend_bound, kernel_rounding, sum_error

NUM_TOKENS = 4 * 2**20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def far_arena(dtype: torch.dtype, packing: Packing, head_dim: int) -> Arena:
    """More than 4 GiB of K and of V, which the system hands out page by page when they are touched."""
    layout = PageLayout(dtype, 64, packing)
    return Arena.allocate(layout, 2**33 // layout.page_bytes(1, head_dim, head_dim) + 8, 1, head_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_million_tokens(dtype: torch.dtype) -> None:
    """Four pages over and over, of which one stands out by its V: lse is ln n, out the mean, to the last bits."""
    arena = Arena.allocate(PageLayout(dtype, 64, "panels"), 4, 1, 16)
    arena.k.zero_()
    arena.v.fill_(1.0)
    arena.v[3] = 9.0
    table = torch.arange(4, dtype=torch.int32).repeat(NUM_TOKENS // 64 // 4)[None, None]
    kv = PagedKV(arena, table, torch.tensor([0]), torch.tensor([NUM_TOKENS]))
    out, lse = attend(torch.ones(1, 2, 1, 16), kv, rule=ScoreRule(1.0), pool=cpu.WorkerPool(2))
    torch.testing.assert_close(lse.double(), torch.full((1, 2, 1), math.log(NUM_TOKENS)).double(), rtol=4 * U, atol=0)
    assert ((out - 3.0).abs() <= 3.0 * sum_error(NUM_TOKENS)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [(0, 1), (NUM_TOKENS - 1, NUM_TOKENS), (NUM_TOKENS // 2 - 3, NUM_TOKENS // 2 + 70)])
def test_the_right_tokens_of_four_million(tokens: tuple[int, int], dtype: torch.dtype) -> None:
    """One page stands out by its K: it, at its place in the run, takes all weight."""
    begin, end = tokens
    arena = Arena.allocate(PageLayout(dtype, 64, "panels"), 2, 1, 16)
    arena.k.zero_()
    arena.v.fill_(1.0)
    table = torch.zeros((1, 1, NUM_TOKENS // 64), dtype=torch.int32)
    table[..., begin // 64] = 1
    arena.k[1], arena.v[1] = 2.0, 5.0
    kv = PagedKV(arena, table, torch.tensor([begin]), torch.tensor([end]))
    out, lse = attend(torch.full((1, 1, 1, 16), 2.0), kv, rule=ScoreRule(1.0))
    near = min(end, begin // 64 * 64 + 64) - begin
    torch.testing.assert_close(out, torch.full_like(out, 5.0), rtol=8 * U, atol=0)
    torch.testing.assert_close(lse.item(), 64.0 + math.log(near), rtol=8 * U, atol=0)


@pytest.mark.parametrize("packing", ["rows", "panels"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_behind_four_gigabytes(dtype: torch.dtype, packing: Packing) -> None:
    """Appended, attended, gathered and moved at offsets behind 2^31 and 2^32; torch finds them in the same place.

    Of K too a page differs from the other, and both from the zeros that the system gives where an offset wrapped.
    """
    arena = far_arena(dtype, packing, 256)
    half, last = arena.num_slots // 2 + 3, arena.num_slots - 1
    page_bytes = arena.layout.page_bytes(1, 256, 256) // 2  # of K
    assert last * page_bytes > 2**32 > half * page_bytes > 2**31
    table = torch.tensor([[[half, last]]], dtype=torch.int32)
    k, v = (
        torch.cat([torch.full((1, 1, 64, 256), x, dtype=dtype) for x in pages], 2) for pages in ((1.0, 2.0), (3.0, 5.0))
    )
    cpu.append(arena, table, 0, k, v)
    for stored, (first, second) in ((arena.k, (1.0, 2.0)), (arena.v, (3.0, 5.0))):
        assert (stored[half] == first).all()
        assert (stored[last] == second).all()
    kv = PagedKV(arena, table, torch.tensor([0]), torch.tensor([128]))
    q, visible, scale = torch.ones(1, 1, 1, 256), torch.ones(1, 1, 128, dtype=torch.bool), 1 / 256
    truth = dense_attention(q, k, v, visible, scale)
    bound = attend_bound(q, k, v, visible, scale, kernel_rounding(dtype))
    for isa, missing in cpu.available_isas().items():
        if not missing:
            assert_within(attend(q, kv, rule=ScoreRule(scale), isa=isa), truth, bound)
    cpu.move_pages(arena, arena, [last], [last - 1])
    moved = torch.tensor([[[last - 1]]], dtype=torch.int32)
    back_k, back_v = torch.empty_like(k[:, :, :64]), torch.empty_like(v[:, :, :64])
    cpu.gather(arena, moved, 0, back_k, back_v)
    assert (back_k == 2.0).all()
    assert (back_v == 5.0).all()
