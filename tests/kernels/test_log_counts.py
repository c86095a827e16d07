"""Tokens that stand for several: each counts as often as it says."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels import append_and_attend, attend, block_mass, cpu, reference
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.paged import Shape, build, paginate
from tests.tolerances import assert_within, attend_bound, excess, kernel_rounding

ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(missing != "", reason=f"{isa}: this machine lacks {missing}"))
    for isa, missing in cpu.available_isas().items()
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def counted(kv: PagedKV, counts: Tensor) -> PagedKV:
    """counts: whole numbers `[num_seqs, num_kv_heads, num_tokens]`; what the table has room for besides is NaN."""
    room = kv.page_table.shape[2] * kv.entry_tokens - counts.shape[2]
    return replace(kv, log_counts=torch.nn.functional.pad(counts.float().log(), (0, room), value=math.nan))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Up to two sequences, of which the first tokens may be padding."""
    kv_len = draw(st.lists(st.integers(1, 300), min_size=1, max_size=2))
    kv_start = (min(draw(st.integers(0, 40)), n) for n in kv_len)
    softcap = draw(st.sampled_from([None, 0.7]))
    sizes = draw(st.integers(1, 5)), 24, tuple(kv_len), tuple(kv_start), draw(st.integers(1, 2))
    return Shape(64, 2, *sizes, v_head_dim=40, softcap=softcap)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8, deadline=None)
@given(shape=shapes(), packing=st.sampled_from(["rows", "panels"]), seed=st.integers(0, 99))
def test_a_token_that_stands_for_n_is_n_tokens(
    isa: str, dtype: torch.dtype, shape: Shape, packing: Packing, seed: int
) -> None:
    """Against the reference, in which the token is really there so often; K of tokens that stand for none is NaN."""
    case = build(shape, dtype, "rows", dtype, seed)
    counts = torch.randint(0, 4, case.k.shape[:3], generator=torch.Generator().manual_seed(seed)) * 37
    k = case.k.masked_fill(counts[..., None] == 0, math.nan)
    kv = paginate(k, case.v, PageLayout(dtype, 64, packing), case.kv.kv_start, case.kv.kv_len, seed)
    got = attend(case.q, counted(kv, counts), rule=shape.rule, isa=isa, pool=cpu.WorkerPool(2))
    group_size, q_len = shape.group_size, shape.q_len
    for seq in range(len(shape.kv_len)):
        for head in range(2):
            times, rows = counts[seq, head], slice(head * group_size, (head + 1) * group_size)
            one = slice(seq, seq + 1), slice(head, head + 1)
            k_n, v_n = (x[one].repeat_interleave(times, 2) for x in (case.k, case.v))
            seen = case.visible[seq, :1].expand(q_len, -1) if case.visible.dim() == 3 else case.visible[seq]
            sees = seen[..., : len(times)].repeat_interleave(times, -1)[None]
            truth = attention(case.q[one[0], rows], k_n, v_n, sees, shape.rule)
            bound = attend_bound(case.q[one[0], rows], k_n, v_n, sees, shape.rule, kernel_rounding(dtype))
            assert_within(Partial(got.out[one[0], rows], got.lse[one[0], rows]), truth, bound)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rule: ScoreRule) -> Partial:
    """One KV head in float64; visible: `[1, q_len, num_tokens]`."""
    scores = rule.scale * (q.double() @ k.double().mT)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    return Partial(torch.softmax(scores, -1).nan_to_num(0.0) @ v.double(), torch.logsumexp(scores, -1))


def test_they_are_attended_beside_others_and_the_step_s_own() -> None:
    """The middle one of three runs counts, with blocks before and pages behind it, appended to; its mass too."""
    rule, first, second = ScoreRule(0.2), build(FAR), build(replace(FAR, kv_len=(100,)), seed=1)
    counts = torch.randint(1, 9, (1, 2, 100), generator=torch.Generator().manual_seed(0))
    q, k, v = torch.randn(1, 6, 2, 64), torch.randn(1, 2, 33, 64), torch.randn(1, 2, 33, 64)
    arena = Arena.allocate(PageLayout(torch.float32, 16), 3, 2, 64)
    table = torch.arange(3, dtype=torch.int32)[None, None].expand(1, 2, 3)
    cpu.append(arena, table, 0, k[:, :, :31], v[:, :, :31])
    near = PagedKV(arena, table, torch.tensor([0]), torch.tensor([33]))
    runs = first.kv, counted(second.kv, counts), near
    mass = block_mass(q, *runs)
    out = append_and_attend(q, k[:, :, 31:], v[:, :, 31:], *runs, rule=rule, pool=cpu.WorkerPool(2), mass=mass)
    parts = [reference.attend(q, kv, rule=rule, causal=kv is near) for kv in runs]
    truth = reference.merge(parts)
    torch.testing.assert_close(out.transpose(1, 2).double(), truth.out, rtol=1e-4, atol=1e-5)
    shares = mass.split([kv.num_blocks for kv in runs], -1)
    for share, part in zip(shares, parts, strict=True):
        torch.testing.assert_close(share.sum(-1).double(), (part.lse - truth.lse).exp(), rtol=1e-4, atol=1e-6)


FAR = Shape(16, 2, 3, 64, kv_len=(150,), kv_start=(0,))


def test_a_count_that_is_off_by_one_is_seen() -> None:
    case = build(FAR)
    counts = torch.full((1, 2, 150), 5)
    truth = reference.attend(case.q, counted(case.kv, counts), rule=FAR.rule, causal=False)
    bound = attend_bound(case.q, case.k, case.v, case.visible, FAR.rule)
    assert_within(attend(case.q, counted(case.kv, counts), rule=FAR.rule), truth, bound)
    counts[0, 1, 77] = 6
    assert excess(attend(case.q, counted(case.kv, counts), rule=FAR.rule), truth, bound) > 10


def test_what_stands_for_nothing_is_the_identity() -> None:
    case = build(FAR)
    found = attend(case.q, counted(case.kv, torch.zeros(1, 2, 150)), rule=FAR.rule)
    assert (found.out == 0).all() and (found.lse == -math.inf).all()


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 2, 159), torch.zeros(1, 2, 176).double(), torch.zeros(1, 176, 2).mT, torch.zeros(1, 2, 0)]
)
def test_counts_that_do_not_fit_are_refused(bad: Tensor) -> None:
    case = build(FAR)
    with pytest.raises(InputError, match=r"log_counts must be contiguous float32 \[1, 2, 176\] on the CPU, got"):
        attend(case.q, replace(case.kv, log_counts=bad), rule=FAR.rule)


def test_causal_queries_are_no_stand_ins() -> None:
    case = build(FAR)
    with pytest.raises(InputError, match="expected pages there, got tokens that stand for others"):
        attend(case.q, counted(case.kv, torch.ones(1, 2, 150)), rule=FAR.rule, causal=True)
