"""torch's own kernels behind our convention: lse in base e, any group, causal chunks, out rounded to q's dtype."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels import attend, merge, reference, torch_ops
from tandemkv.kernels.checks import raise_for
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.dense import causal_visible, dense_attention, visible_tokens
from tests.kernels.test_attend import COVER
from tests.paged import Shape, build, paginate
from tests.tolerances import (
    TORCH_BF16,
    TORCH_FLOAT32,
    Bound,
    assert_within,
    attend_bound,
    excess,
    kernel_rounding,
)

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: TORCH_FLOAT32, torch.bfloat16: TORCH_BF16}


def dense(dtype: torch.dtype, group_size: int, q_len: int, kv_len: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(kv_len)
    q = torch.randn(2, 2 * group_size, q_len, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, kv_len, head_dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v


def truth_of(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Partial, Bound]:
    kv = paginate(k, v, PageLayout(k.dtype, 64))
    visible = visible_tokens(kv.kv_start, kv.kv_len, q.shape[2], k.shape[2], causal)
    bound = attend_bound(q, k, v, visible, 0.2, ROUNDING[k.dtype])
    return reference.attend(q, kv, rule=ScoreRule(0.2), causal=causal), bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("group_size", [1, 2, 7])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 100), (5, 70), (33, 17)])
def test_equals_the_reference(q_len: int, kv_len: int, group_size: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = dense(dtype, group_size, q_len, kv_len, head_dim)
    assert_within(torch_ops.attend_dense(q, k, v, rule=ScoreRule(0.2)), *truth_of(q, k, v, causal=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_a_causal_chunk_equals_the_reference(num_tokens: int, group_size: int, dtype: torch.dtype) -> None:
    q, k, v = dense(dtype, group_size, num_tokens, num_tokens, 64)
    truth, bound = truth_of(q, k, v, causal=True)
    assert_within(torch_ops.attend_dense(q, k, v, rule=ScoreRule(0.2), first_query=0), truth, bound)
    if num_tokens > 1:
        assert excess(torch_ops.attend_dense(q, k, v, rule=ScoreRule(0.2)), truth, bound) > 10


def test_out_in_bf16_is_rounded_once_to_bf16_and_lse_is_not() -> None:
    q, k, v = dense(torch.bfloat16, 2, 3, 100, 64)
    out, lse = torch_ops.attend_dense(q, k, v, rule=ScoreRule(0.2))
    assert torch.equal(out, out.bfloat16().float())
    assert not torch.equal(lse, lse.bfloat16().float())


def test_strided_inputs_as_models_give_them() -> None:
    q, k, v = dense(torch.float32, 3, 5, 40, 64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert_within(torch_ops.attend_dense(*strided, rule=ScoreRule(0.2)), *truth_of(q, k, v, causal=False))


@pytest.mark.parametrize(("q_len", "kv_len"), [(3, 0), (0, 3)])
def test_nothing_to_attend_is_the_empty_partial(q_len: int, kv_len: int) -> None:
    q, k, v = dense(torch.bfloat16, 2, q_len, kv_len, 64)
    out, lse = torch_ops.attend_dense(q, k, v, rule=ScoreRule(0.2))
    assert out.shape == q.shape
    assert out.dtype == lse.dtype == torch.float32
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group_size", [1, 2])
def test_the_plain_way_equals_the_reference(group_size: int, causal: bool) -> None:
    """What runs on a device whose torch kernels return no lse; called by name, because the CPU never takes it."""
    q, k, v = dense(torch.float32, 1, 9, 9, 64)
    sees = torch.ones(9, 9, dtype=torch.bool).tril() if causal else None
    out, lse = torch_ops._plain(q, k, v, ScoreRule(0.2), sees)
    assert_within(Partial(out, lse), *truth_of(q, k, v, causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_and_far_merge_into_the_whole(dtype: torch.dtype) -> None:
    """A chunk's attention as the model runs it: far pages by the CPU kernel, the chunk itself causal by torch."""
    q, k, v = dense(dtype, 2, 10, 90, 64)
    far = attend(q, paginate(k[:, :, :80], v[:, :, :80], PageLayout(dtype, 16)), rule=ScoreRule(0.2))
    near = torch_ops.attend_dense(q, k[:, :, 80:], v[:, :, 80:], rule=ScoreRule(0.2), first_query=0)
    truth, _ = truth_of(q, k, v, causal=True)
    visible = causal_visible(90, 10, torch.zeros(2, dtype=torch.int64))
    both = ROUNDING[dtype]._replace(query=kernel_rounding(dtype).query)
    bound = attend_bound(q, k, v, visible, 0.2, both, num_merges=1)
    assert_within(merge([far, near]), truth, bound)
    assert excess(near, truth, bound) > 10
    assert excess(far, truth, bound) > 10


DENSE = torch.zeros(2, 4, 5, 8)
REFUSED = {
    "fewer query heads": (DENSE[:, :1], DENSE[:, :2], DENSE[:, :2], False, "must be a multiple of the KV heads"),
    "3 query heads of 2": (DENSE[:, :3], DENSE[:, :2], DENSE[:, :2], False, "must be a multiple of the KV heads"),
    "v shorter than k": (DENSE, DENSE, DENSE[:, :, :4], False, "k and v alike, got q"),
    "another batch": (DENSE[:1], DENSE, DENSE, False, "of as many sequences"),
    "another head_dim": (DENSE[..., :4], DENSE, DENSE, False, "one head_dim"),
    "three dims": (DENSE[0], DENSE, DENSE, False, r"got q \[4, 5, 8\]"),
    "a window nowhere": (DENSE, DENSE, DENSE, True, "a window needs to know where the queries are"),
    "two dtypes": (DENSE, DENSE.bfloat16(), DENSE.bfloat16(), False, "one dtype and device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_dense_attention_refuses(name: str) -> None:
    q, k, v, has_window, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        kernels.attend_dense(q, k, v, rule=ScoreRule(1.0, window=4 if has_window else None))


@pytest.mark.parametrize("window", [None, 1, 7, 16, 90, 500])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "first_query"),
    [(40, 40, 0), (40, 90, 90), (40, 90, 50), (40, 90, 20), (5, 90, 300), (40, 90, 103), (1, 90, 89), (3, 1, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_anywhere_behind_or_among_the_tokens(
    dtype: torch.dtype, q_len: int, kv_len: int, first_query: int, window: int | None
) -> None:
    """With and without a window; rows that see no token at all are the identity of merge."""
    q, k, v = dense(dtype, 2, q_len, kv_len, 64)
    last = first_query + q_len
    visible = causal_visible(last, q_len, torch.zeros(1, dtype=torch.int64), window)
    visible = torch.nn.functional.pad(visible, (0, max(0, kv_len - last)))[:, :, :kv_len]
    truth = dense_attention(q, k, v, visible, 0.2)
    bound = attend_bound(q, k, v, visible, 0.2, ROUNDING[dtype])
    rule = ScoreRule(0.2, window=window)
    assert_within(torch_ops.attend_dense(q, k, v, rule=rule, first_query=first_query), truth, bound)


@pytest.mark.parametrize("v_head_dim", [8, 24, 32])
def test_values_of_another_width(v_head_dim: int) -> None:
    """torch's kernels want one width; zeros in the others change nothing."""
    q, k, _ = dense(torch.float32, 2, 20, 20, 24)
    v = torch.randn(*k.shape[:3], v_head_dim, generator=torch.Generator().manual_seed(3))
    for first_query in (None, 0, 5):
        sees = torch.ones(20, 20, dtype=torch.bool).tril(20 if first_query is None else first_query)
        truth = dense_attention(q, k, v, sees[None], 0.2)
        bound = attend_bound(q, k, v, sees[None], 0.2, ROUNDING[torch.float32])
        got = torch_ops.attend_dense(q, k, v, rule=ScoreRule(0.2), first_query=first_query)
        assert_within(got, truth, bound)


@pytest.mark.parametrize("packing", ["rows", "panels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", COVER)
def test_pages_as_devices_attend_them_by_torch(name: str, dtype: torch.dtype, packing: Packing) -> None:
    """The backend behind our own kernels, over the shapes and the poison of the others."""
    shape = COVER[name]
    case = build(shape, dtype, packing, dtype)
    flags, mass = torch.zeros(1, dtype=torch.int32), kernels.block_mass(case.q, case.kv)
    part = torch_ops.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal, flags=flags, mass=mass)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule)
    assert_within(part, reference.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal), bound)
    assert torch.allclose(mass.sum(-1), (part.lse > -torch.inf).float(), atol=1e-5)
    assert not flags.any()


def test_nan_in_q_sets_the_flag_of_torch_s_backend_too() -> None:
    case = build(COVER["causal"], torch.float32)
    flags = torch.zeros(1, dtype=torch.int32)
    torch_ops.attend(case.q * math.nan, case.kv, rule=ScoreRule(1.0), flags=flags)
    with pytest.raises(InputError, match="q contains NaN"):
        raise_for(flags)


def test_a_wild_slot_is_told_and_not_read() -> None:
    case = build(COVER["causal"], torch.float32)
    table, flags = case.kv.page_table.clone(), torch.zeros(1, dtype=torch.int32)
    table[0, 0, 0] = 1 << 20
    torch_ops.attend(case.q, replace(case.kv, page_table=table), rule=ScoreRule(1.0), flags=flags)
    with pytest.raises(AssertionError, match="points outside its arena"):
        raise_for(flags)


def test_runs_of_torch_s_backend_are_one_attention() -> None:
    shape = Shape(16, 2, 3, 64, kv_len=(96, 96), kv_start=(0, 40), q_len=2, causal=True)
    case = build(shape)
    flags = torch.zeros(1, dtype=torch.int32)
    parts = case.kv.part(0, 4), case.kv.part(4, 6)
    part = torch_ops.attend(case.q, *parts, rule=shape.rule, causal=True, flags=flags)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule)
    assert_within(part, reference.attend(case.q, case.kv, rule=shape.rule, causal=True), bound)


def test_what_torch_s_backend_cannot_attend_is_refused() -> None:
    arena = Arena.allocate(PageLayout(torch.float32, 16, "int8"), 1, 1, 16)
    zero = torch.zeros(1, dtype=torch.int64)
    kv = PagedKV(arena, zero.int().view(1, 1, 1), zero, zero + 5)
    with pytest.raises(UnsupportedError, match="whole pages of rows or panels"):
        torch_ops.attend(torch.randn(1, 1, 1, 16), kv, rule=ScoreRule(1.0), flags=zero.int())


@pytest.mark.parametrize(("kv_start", "kv_len", "told"), [(-1, 5, True), (0, 33, True), (0, -1, True), (90, 5, False)])
def test_lengths_beyond_a_table_are_told_by_torch_s_backend(kv_start: int, kv_len: int, told: bool) -> None:
    """Padding may be longer than a table."""
    arena = Arena.allocate(PageLayout(torch.float32, 16), 2, 1, 16)
    kv = PagedKV(arena, torch.zeros(1, 1, 2).int(), torch.tensor([kv_start]), torch.tensor([kv_len]))
    flags = torch.zeros(1, dtype=torch.int32)
    torch_ops.attend(torch.randn(1, 1, 1, 16), kv, rule=ScoreRule(1.0), flags=flags)
    assert bool(flags.any()) == told
