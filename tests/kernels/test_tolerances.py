"""The bounds are tight enough: what a subtly wrong kernel would return lies outside them."""

import math
from dataclasses import replace

import pytest
import torch

from tandemkv.kernels import attend, merge, reference
from tandemkv.types import PagedKV, PageLayout, Partial, ScoreRule
from tests.paged import Case, Shape, build, paginate
from tests.tolerances import Bound, attend_bound, excess, kernel_rounding, merge_bound, sum_error

DTYPES = [torch.float32, torch.bfloat16]
HEAD_DIMS = [2, 8, 64, 80, 96, 128, 256]


def measured(shape: Shape, dtype: torch.dtype) -> tuple[Case, Partial, Bound]:
    case = build(shape, dtype)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.scale, kernel_rounding(dtype))
    return case, reference.attend(case.q, case.kv, rule=ScoreRule(shape.scale), causal=shape.causal), bound


def hundred(head_dim: int, num_kv_heads: int = 1, group_size: int = 1) -> Shape:
    return Shape(16, num_kv_heads, group_size, head_dim, kv_len=(100,), kv_start=(0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_missing_token_of_a_hundred_is_seen(head_dim: int, dtype: torch.dtype) -> None:
    shape = hundred(head_dim)
    case, truth, bound = measured(shape, dtype)
    for token in range(0, 100, 3):
        kept = [t for t in range(100) if t != token]
        kv = paginate(case.k[:, :, kept], case.v[:, :, kept], case.kv.arena.layout)
        assert excess(attend(case.q, kv, rule=ScoreRule(shape.scale)), truth, bound) > 1, token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_token_read_twice_or_as_its_neighbour_is_seen(head_dim: int, dtype: torch.dtype) -> None:
    shape = hundred(head_dim)
    case, truth, bound = measured(shape, dtype)
    for tokens in ([*range(100), 50], [*range(50), 51, *range(51, 100)]):
        kv = paginate(case.k[:, :, tokens], case.v[:, :, tokens], case.kv.arena.layout)
        assert excess(attend(case.q, kv, rule=ScoreRule(shape.scale)), truth, bound) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_of_the_scale_is_seen(factor: float, head_dim: int, dtype: torch.dtype) -> None:
    shape = hundred(head_dim)
    case, truth, bound = measured(shape, dtype)
    assert excess(attend(case.q, case.kv, rule=ScoreRule(shape.scale * factor)), truth, bound) > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_causal_mask_and_the_padding_are_seen(head_dim: int, dtype: torch.dtype) -> None:
    shape = replace(hundred(head_dim), kv_start=(7,), q_len=3, causal=True)
    case, truth, bound = measured(shape, dtype)
    assert excess(attend(case.q, case.kv, rule=ScoreRule(shape.scale), causal=True), truth, bound) <= 1
    assert excess(attend(case.q, case.kv, rule=ScoreRule(shape.scale), causal=False), truth, bound) > 10
    for kv_start in (6, 8):
        whole = paginate(case.k, case.v, case.kv.arena.layout)
        kv = replace(whole, kv_start=torch.tensor([kv_start]))
        assert excess(attend(case.q, kv, rule=ScoreRule(shape.scale), causal=True), truth, bound) > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_kv_head_is_seen(dtype: torch.dtype) -> None:
    shape = hundred(64, num_kv_heads=2, group_size=2)
    case, truth, bound = measured(shape, dtype)
    interleaved = case.q[:, [0, 2, 1, 3]]  # query head h reading KV head h % num_kv_heads
    out, lse = attend(interleaved, case.kv, rule=ScoreRule(shape.scale))
    assert excess(Partial(out[:, [0, 2, 1, 3]], lse[:, [0, 2, 1, 3]]), truth, bound) > 10


def test_a_poisoned_token_or_head_is_seen() -> None:
    shape = hundred(64, num_kv_heads=2)
    case, truth, bound = measured(shape, torch.float32)
    beyond = replace(case.kv, kv_len=torch.tensor([101]))
    crossed = replace(case.kv, page_table=case.kv.page_table.flip(1))
    for kv in (beyond, crossed):
        assert excess(attend(case.q, kv, rule=ScoreRule(shape.scale)), truth, bound) == math.inf


def test_query_rounded_once_to_bf16_is_seen() -> None:
    """Why the kernel multiplies q and probabilities as two bf16 parts: one part is off by 2^-8."""
    shape = hundred(128)
    case, truth, bound = measured(shape, torch.bfloat16)
    assert excess(attend(case.q.bfloat16(), case.kv, rule=ScoreRule(shape.scale)), truth, bound) > 1


def split_in_two(shape: Shape, dtype: torch.dtype) -> tuple[Partial, Partial, Partial, Bound]:
    case, truth, _ = measured(shape, dtype)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.scale, kernel_rounding(dtype), num_merges=1)
    layout = PageLayout(dtype, 16)
    first, second = (
        attend(case.q, paginate(case.k[:, :, part], case.v[:, :, part], layout), rule=ScoreRule(shape.scale))
        for part in (slice(0, 40), slice(40, 100))
    )
    return first, second, truth, bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_base_2_lse_is_seen(head_dim: int, dtype: torch.dtype) -> None:
    """Parts whose lse is in base 2 merge without an exception into something about 6e-2 wrong."""
    first, second, truth, bound = split_in_two(hundred(head_dim), dtype)
    assert excess(merge([first, second]), truth, bound) <= 1
    base_2 = merge([Partial(part.out, part.lse / math.log(2)) for part in (first, second)])
    assert excess(Partial(base_2.out, base_2.lse * math.log(2)), truth, bound) > 10
    assert excess(Partial(base_2.out, truth.lse), truth, bound) > 10  # by out alone, not only by lse


def test_a_lost_part_is_seen() -> None:
    first, second, truth, bound = split_in_two(hundred(64), torch.bfloat16)
    assert excess(first, truth, bound) > 10
    assert excess(second, truth, bound) > 10


def test_merge_bound_sees_an_unweighted_mean() -> None:
    parts = [Partial(torch.randn(1, 1, 1, 8), torch.tensor([[[lse]]])) for lse in (0.0, 0.01)]
    mean = Partial((parts[0].out + parts[1].out) / 2, merge(parts).lse)
    assert excess(mean, reference.merge(parts), merge_bound(parts)) > 10


def test_equal_infinities_agree_and_nan_never_does() -> None:
    identity = Partial(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -math.inf))
    bound = Bound(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1))
    assert excess(identity, identity, bound) == 0
    assert excess(Partial(identity.out, torch.zeros(1, 1, 1)), identity, bound) == math.inf
    assert excess(Partial(identity.out * math.nan, identity.lse), identity, bound) == math.inf


def test_sum_error_is_the_worst_case_for_few_terms() -> None:
    assert sum_error(10) == 10 * 2.0**-24
    assert sum_error(10**6) == 6000 * 2.0**-24


def test_shapes_must_agree() -> None:
    part = Partial(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1))
    with pytest.raises(AssertionError):
        excess(Partial(part.out[0], part.lse), part, Bound(*part))


def test_page_tables_are_poisoned() -> None:
    kv: PagedKV = build(Shape(16, 2, 1, 8, kv_len=(20,), kv_start=(18,))).kv
    used = kv.page_table[0, 0, 1].long()
    assert kv.page_table[0, 0, 0] == 2**31 - 1
    assert kv.page_table[0, 0, 2] == 2**31 - 1
    assert kv.arena.k[used, 0].isnan().any(-1).tolist() == [t not in (2, 3) for t in range(16)]
    assert kv.arena.k[used, 1].isnan().all()
