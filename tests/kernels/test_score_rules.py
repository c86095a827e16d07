"""Soft caps and windows: what a `ScoreRule` does to scores and to what is read."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels import append_and_attend, attend, cpu, reference
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule
from tests.dense import dense_attention
from tests.paged import Shape, build, paginate, poisoned_arena
from tests.tolerances import U, assert_within, attend_bound, excess, kernel_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(missing != "", reason=f"{isa}: this machine lacks {missing}"))
    for isa, missing in cpu.available_isas().items()
]

# ---- Soft caps ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [0.25, 1.0, 30.0, 1e4])
def test_a_capped_score_is_tanh(softcap: float, isa: str) -> None:
    """Of one token, lse is the score itself: tanh over 12 decades, its sign and its ends; 8 u, and 4 u around it."""
    scores = torch.cat([torch.logspace(-8, 4, 4000), torch.linspace(0, 30, 4000)]) * softcap
    scores = torch.cat([scores, -scores, torch.tensor([math.inf, -math.inf, 3e38])])
    k = torch.ones(1, 1, 1, 1)
    _, lse = attend(scores[None, :, None, None], paginate(k, k, LAYOUT), rule=ScoreRule(1.0, softcap=softcap), isa=isa)
    truth = softcap * torch.tanh(scores.double() / softcap)
    assert ((lse[0, :, 0].double() - truth).abs() <= 12 * U * truth.abs()).all()


LAYOUT = PageLayout(torch.float32, 16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits_are_capped_like_others(dtype: torch.dtype, isa: str) -> None:
    """Logits of +-1e4 are +-the cap: two kinds of tokens whose weights differ by exp(2 cap)."""
    k = torch.full((1, 1, 40, 8), 12.5, dtype=dtype)
    k[:, :, ::4] *= -1
    v = torch.zeros(1, 1, 40, 8, dtype=dtype)
    v[:, :, ::4] = 1.0
    rule = ScoreRule(1.0, softcap=2.0)
    out, lse = attend(torch.full((1, 1, 1, 8), 100.0), paginate(k, v, PageLayout(dtype, 16)), rule=rule, isa=isa)
    low, high = 10 * math.exp(-2.0), 30 * math.exp(2.0)
    torch.testing.assert_close(out.double(), torch.full((1, 1, 1, 8), low / (low + high)).double(), rtol=3e-5, atol=0)
    torch.testing.assert_close(lse.double().item(), math.log(low + high), rtol=16 * U, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_k_is_not_capped_away(isa: str) -> None:
    k = torch.full((1, 1, 5, 8), math.nan)
    out, lse = attend(torch.ones(1, 1, 1, 8), paginate(k, k, LAYOUT), rule=ScoreRule(1.0, softcap=5.0), isa=isa)
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("softcap", [None, 0.95, 1.05])
def test_a_lost_or_wrong_cap_is_seen(softcap: float | None) -> None:
    shape = Shape(16, 1, 2, 64, kv_len=(100,), kv_start=(0,), softcap=1.0)
    case = build(shape)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=False)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule)
    assert excess(attend(case.q, case.kv, rule=replace(shape.rule, softcap=softcap)), truth, bound) > 10


# ---- Windows ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 48, 64, 65, 1000, 2**63])
def test_only_the_newest_tokens_are_seen(window: int, q_len: int, isa: str) -> None:
    """Windows that begin inside blocks and on their edges, before kv_start and before the sequence."""
    shape = Shape(
        16, 2, 3, 8, kv_len=(150, 64, 20), kv_start=(0, 50, 0), q_len=q_len, causal=True, window=min(window, 2**40)
    )
    case = build(shape)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=True)
    assert_within(attend(case.q, case.kv, rule=replace(shape.rule, window=window), causal=True, isa=isa), truth, bound)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_that_is_off_by_one_is_seen(off: int) -> None:
    shape = Shape(16, 1, 2, 64, kv_len=(100,), kv_start=(0,), q_len=3, causal=True, window=40)
    case = build(shape)
    whole = paginate(case.k, case.v, LAYOUT)
    truth = reference.attend(case.q, whole, rule=shape.rule, causal=True)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule)
    assert_within(attend(case.q, whole, rule=shape.rule, causal=True), truth, bound)
    wrong = replace(shape.rule, window=40 + off)
    assert excess(attend(case.q, whole, rule=wrong, causal=True), truth, bound) > 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_items_in_which_a_row_sees_nothing(dtype: torch.dtype, isa: str) -> None:
    """More queries than the window is wide, over several items: early rows are blind in late items and the reverse."""
    shape = Shape(64, 1, 1, 256, kv_len=(3000,), kv_start=(0,), q_len=40, causal=True, window=2970)
    case = build(shape, dtype, "panels", dtype)
    for window in (2970, 5):
        rule = replace(shape.rule, window=window)
        visible = case.visible & (torch.arange(3000) >= torch.arange(3000 - 40 + 1, 3001)[:, None] - window)
        truth = dense_attention(case.q, case.k, case.v, visible, shape.scale)
        bound = attend_bound(case.q, case.k, case.v, visible, rule, kernel_rounding(dtype))
        got = attend(case.q, case.kv, rule=rule, causal=True, isa=isa, pool=cpu.WorkerPool(2))
        assert_within(got, truth, bound)


def test_a_window_costs_what_it_shows() -> None:
    """Of a table of 2^26 pages whose other entries are wild, and whose pages do not exist."""
    arena = Arena.allocate(LAYOUT, 1, 1, 8)
    arena.k.zero_()
    arena.v.fill_(3.0)
    table = torch.full((1, 1, 2**26), -1, dtype=torch.int32)
    table[..., -1] = 0
    num_tokens = torch.tensor([2**26 * 16])
    kv = PagedKV(arena, table, torch.tensor([0]), num_tokens)
    out, lse = attend(torch.ones(1, 1, 2, 8), kv, rule=ScoreRule(1.0, window=5), causal=True)
    assert (out == 3.0).all()
    assert torch.allclose(lse, torch.full((1, 1, 2), math.log(5.0)))


def test_append_and_attend_takes_every_rule() -> None:
    rule = ScoreRule(0.3, softcap=0.5, window=7)
    q, k, v = torch.randn(2, 6, 3, 24), torch.randn(2, 2, 33, 24), torch.randn(2, 2, 33, 17)
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)[:, None].expand(2, 2, 3)
    arena = poisoned_arena(LAYOUT, 6, 2, 24, 17)
    cpu.append(arena, table, 0, k[:, :, :30], v[:, :, :30])
    kv = PagedKV(arena, table, torch.tensor([0, 28]), torch.tensor([33, 33]))
    out = append_and_attend(q, k[:, :, 30:], v[:, :, 30:], kv, rule=rule, pool=cpu.WorkerPool(2))
    assert out.shape == (2, 3, 6, 17)
    whole = paginate(k, v, LAYOUT, kv.kv_start, kv.kv_len)
    assert torch.equal(out.transpose(1, 2), attend(q, whole, rule=rule, causal=True).out)


def test_windows_are_of_causal_queries_over_one_run() -> None:
    case = build(Shape(16, 2, 2, 64, kv_len=(40,), kv_start=(0,)))
    rule = ScoreRule(1.0, window=5)
    message = "expected causal=True and 1 run, got causal={} and {}"
    calls: dict[str, tuple[bool, tuple[PagedKV, ...]]] = {
        message.format(False, 1): (False, (case.kv,)),
        message.format(True, 2): (True, (case.kv, case.kv)),
    }
    for text, (causal, runs) in calls.items():
        with pytest.raises(InputError, match=text):
            attend(case.q, *runs, rule=rule, causal=causal)
    k: Tensor = torch.zeros(1, 2, 1, 64)
    with pytest.raises(InputError, match=message.format(True, 2)):
        append_and_attend(case.q, k, k, case.kv, case.kv, rule=rule, pool=cpu.single_thread())
