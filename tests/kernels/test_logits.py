"""`logits` and `weigh`, the halves of `attend`, on every instruction set of this machine, behind poisoned pages."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.errors import InputError, TandemError, UnsupportedError
from tandemkv.kernels import attend, cpu, logits, merge, reference, weigh
from tandemkv.types import AnyArena, Arena, Arenas, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.kernels import test_attend, test_attend_doors, test_blocks, test_log_counts, test_quantised
from tests.paged import WILD_SLOTS, Case, Shape, build
from tests.quantised import FORMATS, code_error
from tests.tolerances import U, assert_within, attend_bound, kernel_rounding, logit_bound, weigh_bound

DTYPES, PACKINGS = test_attend.DTYPES, test_attend.PACKINGS
DTYPE_PAIRS, ISAS, RUNNABLE = test_attend.DTYPE_PAIRS, test_attend.ISAS, test_attend.RUNNABLE


def all_seeing(shape: Shape) -> Shape:
    """Without a mask but that of the run."""
    return replace(shape, causal=False, window=None)


COVER = {name: all_seeing(shape) for name, shape in test_attend.COVER.items()} | {
    "sixteen-queries": Shape(64, 2, 4, 128, kv_len=(129, 64), kv_start=(0, 3), q_len=16),
}
LONG = Shape(64, 2, 4, 64, kv_len=(9000, 100), kv_start=(5, 0))  # five chunks of 2 MiB, and a short sequence


def without_v(arena: AnyArena) -> AnyArena:
    """NaN, or codes of 255 with scales of NaN, wherever V was."""
    return with_parts(arena, [replace(part, v=poisoned(part.v)) for part in arena.parts])


def without_k(arena: AnyArena) -> AnyArena:
    return with_parts(arena, [replace(part, k=poisoned(part.k)) for part in arena.parts])


def with_parts(arena: AnyArena, parts: list[Arena]) -> AnyArena:
    return Arenas(tuple(parts)) if isinstance(arena, Arenas) else parts[0]


def poisoned(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan if x.is_floating_point() else 255)


def halves(q: Tensor, kv: PagedKV, rule: ScoreRule, isa: str, pool: cpu.WorkerPool | None = None) -> Partial:
    """Each sees its own half of the pages alone, and the second nothing of what lies outside the run."""
    found = logits(q, replace(kv, arena=without_v(kv.arena)), rule=rule, isa=isa, pool=pool)
    found[~inside(kv, found)] = math.nan
    return weigh(found, replace(kv, arena=without_k(kv.arena)), isa=isa, pool=pool)


def inside(kv: PagedKV, scores: Tensor) -> Tensor:
    """Which scores are of tokens in [kv_start, kv_len)."""
    token = torch.arange(scores.shape[3])
    starts, ends = (x if kv.of_blocks else x[:, None] for x in (kv.kv_start, kv.kv_len))
    of_heads = (token >= starts[..., None]) & (token < ends[..., None])
    of_heads = of_heads.expand(scores.shape[0], kv.arena.num_kv_heads, -1)
    return of_heads.repeat_interleave(scores.shape[1] // kv.arena.num_kv_heads, 1)[:, :, None].expand_as(scores)


def assert_same_bits(got: Partial, want: Partial) -> None:
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


def assert_logits(got: Tensor, truth: Tensor, bound: Tensor) -> None:
    """bound: of the tokens that some table needs; the others are -inf."""
    assert got.dtype == torch.float32
    assert got.shape == truth.shape
    outside = truth == -math.inf
    assert bool((got[outside] == -math.inf).all())
    error = (got.double() - truth).masked_fill(outside, 0.0).abs()
    assert bool((error[..., : bound.shape[3]] <= bound).all())
    assert bool(outside[..., bound.shape[3] :].all())


# ---- Against the reference ----


@lru_cache(maxsize=4)  # the instruction set varies fastest
def expected(shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype) -> tuple[Case, Tensor, Tensor]:
    case = build(shape, dtype, packing, q_dtype)
    bound = logit_bound(case.q, case.k, shape.rule, kernel_rounding(dtype))
    return case, reference.logits(case.q, case.kv, rule=shape.rule), bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "q_dtype"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", COVER)
def test_both_halves(name: str, packing: Packing, dtype: torch.dtype, q_dtype: torch.dtype, isa: str) -> None:
    """Scores against the reference; what they weigh is attention, to the bit."""
    shape = COVER[name]
    case, truth, bound = expected(shape, dtype, packing, q_dtype)
    got = logits(case.q, replace(case.kv, arena=without_v(case.kv.arena)), rule=shape.rule, isa=isa)
    assert_logits(got, truth, bound)
    whole = attend(case.q, case.kv, rule=shape.rule, isa=isa)
    assert_same_bits(halves(case.q, case.kv, shape.rule, isa), whole)


@settings(max_examples=40, deadline=None)
@given(
    test_attend.shapes(),
    st.sampled_from(DTYPES),
    st.sampled_from(PACKINGS),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_any_shape(shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype, seed: int) -> None:
    shape = all_seeing(shape)
    case = build(shape, dtype, packing, q_dtype, seed)
    truth = reference.logits(case.q, case.kv, rule=shape.rule)
    bound = logit_bound(case.q, case.k, shape.rule, kernel_rounding(dtype))
    for isa in RUNNABLE:
        assert_logits(logits(case.q, case.kv, rule=shape.rule, isa=isa), truth, bound)
        assert_same_bits(halves(case.q, case.kv, shape.rule, isa), attend(case.q, case.kv, rule=shape.rule, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    shape=test_attend.shapes(),
    packing=st.sampled_from(PACKINGS),
    spread=st.sampled_from((0.0, 1.0, 1e4)),
    share=st.sampled_from((0.0, 0.1, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_any_logits_are_weighed(
    isa: str, dtype: torch.dtype, shape: Shape, packing: Packing, spread: float, share: float, seed: int
) -> None:
    """Also those that no rule gave, some of them -inf, against the reference; K is NaN."""
    shape = all_seeing(shape)
    case = build(shape, dtype, packing, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    room = case.kv.page_table.shape[2] * shape.page_size
    scores = spread * torch.randn((*case.q.shape[:3], room), generator=generator)
    scores[torch.rand(scores.shape, generator=generator) >= share] = -math.inf
    truth = reference.weigh(scores, case.kv)
    counted = scores.masked_fill(~inside(case.kv, scores), -math.inf)[..., : case.v.shape[2]]
    scores[~inside(case.kv, scores)] = math.nan
    got = weigh(scores, replace(case.kv, arena=without_k(case.kv.arena)), isa=isa)
    assert_within(got, truth, weigh_bound(counted, case.v, kernel_rounding(dtype)))


# ---- Codes, mixtures, blocks, counts ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("name", test_quantised.COVER)
def test_codes(name: str, packing: Packing, dtype: torch.dtype, isa: str) -> None:
    shape = test_quantised.COVER[name]
    case, _, _ = test_quantised.expected(shape, dtype, packing)
    bound = logit_bound(case.q, case.k, shape.rule, codes=code_error(case, shape.rule))
    got = logits(case.q, replace(case.kv, arena=without_v(case.kv.arena)), rule=shape.rule, isa=isa)
    assert_logits(got, reference.logits(case.q, case.kv, rule=shape.rule), bound)
    assert_same_bits(halves(case.q, case.kv, shape.rule, isa), attend(case.q, case.kv, rule=shape.rule, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", FORMATS)
def test_codes_of_fewer_channels(packing: Packing, isa: str) -> None:
    shape = Shape(48, 2, 3, 128, kv_len=(100,), kv_start=(7,))
    case, _, _ = test_quantised.expected(shape, torch.bfloat16, packing, 48)
    assert_same_bits(halves(case.q, case.kv, shape.rule, isa), attend(case.q, case.kv, rule=shape.rule, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_of_several_formats(dtype: torch.dtype, isa: str) -> None:
    _, run, _, _ = test_quantised.mixture(dtype)
    q = torch.randn((1, 6, 2, 64), generator=torch.Generator().manual_seed(5))
    rule = ScoreRule(0.03)
    got = logits(q, replace(run, arena=without_v(run.arena)), rule=rule, isa=isa)
    torch.testing.assert_close(got.double(), reference.logits(q, run, rule=rule), rtol=0, atol=5e-4)
    assert_same_bits(halves(q, run, rule, isa), attend(q, run, rule=rule, isa=isa))


BLOCKS = test_blocks.Shape(
    64, 3, 40, chosen=(((0, 3, 4, 9), (1,)), ((), (2, 7, 8, 5, 0))), padding=((3, 0), (0, 15)), q_len=2, v_head_dim=24
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_runs_of_blocks(softcap: float | None, packing: Packing, dtype: torch.dtype, isa: str) -> None:
    """Each head its own, some none."""
    shape = replace(BLOCKS, softcap=softcap)
    case = test_blocks.build(shape, dtype, packing)
    run = case.runs[0]
    num_tokens = run.page_table.shape[2] * 16
    got = logits(case.q, replace(run, arena=without_v(run.arena)), rule=shape.rule, isa=isa)
    bound = logit_bound(case.q, case.k[:, :, :num_tokens], shape.rule, kernel_rounding(dtype))
    assert_logits(got, reference.logits(case.q, run, rule=shape.rule), bound)
    assert torch.equal(got != -math.inf, inside(run, got))
    assert_same_bits(halves(case.q, run, shape.rule, isa), attend(case.q, run, rule=shape.rule, isa=isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_tokens_that_stand_for_others(softcap: float | None, isa: str) -> None:
    """Counts are in logits, once; what stands for none is -inf, whatever its K is."""
    shape = Shape(16, 2, 3, 64, kv_len=(150, 20), kv_start=(3, 0), softcap=softcap)
    case = build(shape)
    counts = torch.randint(0, 4, case.k.shape[:3], generator=torch.Generator().manual_seed(0))
    kv = test_log_counts.counted(case.kv, counts)
    truth = reference.logits(case.q, kv, rule=shape.rule)
    of_rows = counts.double().log().repeat_interleave(3, 1)[:, :, None].clamp(min=0)
    bound = logit_bound(case.q, case.k, shape.rule) + 2 * U * (of_rows + truth[..., :150].abs().nan_to_num(0, 0, 0))
    got = logits(case.q, kv, rule=shape.rule, isa=isa)
    assert_logits(got, truth, bound)
    whole = attend(case.q, kv, rule=shape.rule, isa=isa)
    assert_same_bits(halves(case.q, kv, shape.rule, isa), whole)
    assert_same_bits(weigh(got, case.kv, isa=isa), whole)


# ---- Subsets ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 11), max_size=3), packing=st.sampled_from(PACKINGS), seed=st.integers(0, 99))
def test_any_split_of_pages_merges_to_the_whole(
    isa: str, dtype: torch.dtype, cuts: list[int], packing: Packing, seed: int
) -> None:
    shape = Shape(16, 2, 3, 64, kv_len=(170, 41), kv_start=(5, 30), q_len=2)
    case = build(shape, dtype, packing, dtype, seed)
    edges = [0, *sorted(cuts), case.kv.page_table.shape[2]]
    parts = []
    for first, last in pairwise(edges):
        table = case.kv.page_table[..., first:last].contiguous()
        start, end = ((x - 16 * first).clamp(0, 16 * (last - first)) for x in (case.kv.kv_start, case.kv.kv_len))
        parts.append(halves(case.q, PagedKV(case.kv.arena, table, start, end), shape.rule, isa))
    bound = attend_bound(
        case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype), num_merges=len(parts)
    )
    assert_within(merge(parts), reference.attend(case.q, case.kv, rule=shape.rule, causal=False), bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None)
@given(share=st.sampled_from((0.0, 0.05, 0.5, 0.95)), packing=st.sampled_from(PACKINGS), seed=st.integers(0, 99))
def test_what_is_selected_and_what_is_not_merge_to_the_whole(
    isa: str, dtype: torch.dtype, share: float, packing: Packing, seed: int
) -> None:
    """Every query head selects its own tokens."""
    shape = Shape(16, 2, 3, 64, kv_len=(170, 41), kv_start=(5, 30), q_len=2)
    case = build(shape, dtype, packing, dtype, seed)
    scores = logits(case.q, case.kv, rule=shape.rule, isa=isa)
    selected = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < share
    parts = [weigh(scores.masked_fill(left_out, -math.inf), case.kv, isa=isa) for left_out in (selected, ~selected)]
    for part, kept in zip(parts, (~selected, selected), strict=True):
        empty = ~(kept & inside(case.kv, scores)).any(-1)
        assert bool((part.lse[empty] == -math.inf).all()) and bool((part.out[empty] == 0).all())
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype), num_merges=2)
    assert_within(merge(parts), reference.attend(case.q, case.kv, rule=shape.rule, causal=False), bound)


# ---- Edges ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_nothing_but_minus_infinity_is_the_identity(packing: Packing, isa: str) -> None:
    case = build(Shape(16, 2, 3, 64, kv_len=(170, 41), kv_start=(5, 30)), torch.bfloat16, packing)
    nothing = torch.full((2, 6, 1, case.kv.page_table.shape[2] * 16), -math.inf)
    out, lse = weigh(nothing, case.kv, isa=isa)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outside", [math.nan, math.inf, 1e30])
def test_what_lies_outside_the_run_does_not_count(outside: float, isa: str) -> None:
    case = build(Shape(16, 2, 3, 64, kv_len=(170, 41, 0, 20), kv_start=(5, 30, 0, 25)), torch.bfloat16, "panels")
    scores = logits(case.q, case.kv, rule=ScoreRule(0.125), isa=isa)
    want = weigh(scores, case.kv, isa=isa)
    assert_same_bits(weigh(scores.masked_fill(~inside(case.kv, scores), outside), case.kv, isa=isa), want)


@pytest.mark.parametrize("isa", ISAS)
def test_a_logit_that_is_nan_comes_out_as_nan(isa: str) -> None:
    case = build(Shape(16, 1, 2, 64, kv_len=(40,), kv_start=(0,)))
    scores = logits(case.q, case.kv, rule=ScoreRule(0.125), isa=isa)
    scores[0, 1, 0, 33] = math.nan
    out, lse = weigh(scores, case.kv, isa=isa)
    assert bool(out[0, 1].isnan().all()) and bool(lse[0, 1].isnan().all())
    assert bool(out[0, 0].isfinite().all()) and bool(lse[0, 0].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_any_number_of_threads_gives_the_same_bits(packing: Packing, isa: str) -> None:
    case = build(LONG, torch.float32, packing)
    scores = logits(case.q, case.kv, rule=LONG.rule, isa=isa)
    want = attend(case.q, case.kv, rule=LONG.rule, isa=isa)
    for num_threads in (1, 2, 3):
        pool = cpu.WorkerPool(num_threads)
        for _ in range(3):
            assert torch.equal(logits(case.q, case.kv, rule=LONG.rule, isa=isa, pool=pool), scores)
            assert_same_bits(weigh(scores, case.kv, isa=isa, pool=pool), want)


def test_strided_and_negative_operands() -> None:
    shape = Shape(16, 2, 3, 64, kv_len=(40, 17), kv_start=(0, 5), q_len=3)
    case = build(shape)
    want = logits(case.q, case.kv, rule=shape.rule)
    strided = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(logits(strided, case.kv, rule=shape.rule), want)
    assert torch.equal(logits(torch._neg_view(-case.q), case.kv, rule=shape.rule), want)
    assert_same_bits(weigh(torch._neg_view(-want), case.kv), weigh(want, case.kv))
    off_by_a_float = torch.empty(want.numel() + 1)[1:].view(want.shape).copy_(want)
    assert_same_bits(weigh(off_by_a_float, case.kv), weigh(want, case.kv))


def test_no_sequences_and_no_pages_give_empty_results() -> None:
    case = build(Shape(16, 2, 2, 64, kv_len=(40,), kv_start=(0,)))
    none = torch.zeros(0, dtype=torch.int64)
    no_seqs = PagedKV(case.kv.arena, case.kv.page_table[:0], none, none)
    scores = logits(case.q[:0], no_seqs, rule=ScoreRule(1.0))
    assert scores.shape == (0, 4, 1, 64)
    assert weigh(scores, no_seqs).out.shape == (0, 4, 1, 64)
    zero = torch.zeros(1, dtype=torch.int64)
    no_pages = PagedKV(case.kv.arena, case.kv.page_table[..., :0], zero, zero)
    scores = logits(case.q, no_pages, rule=ScoreRule(1.0))
    assert scores.shape == (1, 4, 1, 0)
    assert bool((weigh(scores, no_pages).lse == -math.inf).all())


# ---- What is refused ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wild", [*WILD_SLOTS, "num_slots"])
@pytest.mark.parametrize("token", [3, 63])
def test_a_wild_slot_in_use_is_a_broken_invariant(token: int, wild: int | str, isa: str) -> None:
    case = build(Shape(16, 2, 2, 64, kv_len=(64,), kv_start=(2,)))
    scores = logits(case.q, case.kv, rule=ScoreRule(1.0), isa=isa)
    case.kv.page_table[0, 1, token // 16] = case.kv.arena.num_slots if isinstance(wild, str) else wild
    with pytest.raises(AssertionError, match="a page table entry in use points outside its arena"):
        logits(case.q, case.kv, rule=ScoreRule(1.0), isa=isa)
    with pytest.raises(AssertionError, match="a page table entry in use points outside its arena"):
        weigh(scores, case.kv, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_q_is_refused_even_where_nothing_is_read(dtype: torch.dtype, isa: str) -> None:
    case = build(Shape(16, 2, 9, 64, kv_len=(0, 40), kv_start=(0, 0), q_len=2), dtype, q_dtype=dtype)
    for seq in range(2):
        q = case.q.clone()
        q[seq, 17, 1, 63] = math.nan
        with pytest.raises(InputError, match="q contains NaN"):
            logits(q, case.kv, rule=ScoreRule(1.0), isa=isa)


@pytest.mark.parametrize("name", test_attend_doors.REFUSED)
def test_is_refused_as_attend_refuses_it(name: str) -> None:
    make, error, message = test_attend_doors.REFUSED[name]
    q, kv = make()
    with pytest.raises(error, match=message):
        logits(q, kv, rule=ScoreRule(1.0))


CASE = build(Shape(16, 2, 2, 64, kv_len=(40, 33), kv_start=(0, 3)))  # tables of 4 pages: 64 tokens
SCORES = torch.zeros(2, 4, 1, 64)
BAD_LOGITS: dict[str, tuple[Callable[[], Tensor], type[TandemError], str]] = {
    "no tensor": (lambda: [0.0], InputError, "expected a tensor logits and a PagedKV, got list, PagedKV"),  # type: ignore[dict-item,return-value]
    "float64": (SCORES.double, InputError, r"float32 \[2, num_q_heads, q_len, 64\].* got torch.float64"),
    "three dims": (lambda: SCORES[0], InputError, r"\[2, num_q_heads, q_len, 64\] on the CPU, got .* \[4, 1, 64\]"),
    "too few tokens": (SCORES[..., :48].contiguous, InputError, r"got torch.float32 \[2, 4, 1, 48\]"),
    "one sequence": (lambda: SCORES[:1], InputError, r"got torch.float32 \[1, 4, 1, 64\]"),
    "strided": (lambda: SCORES.repeat(1, 1, 1, 2)[..., ::2], InputError, "logits must be contiguous"),
    "on another device": (lambda: SCORES.to("meta"), InputError, "on the CPU, got .* on meta"),
    "group of 1.5": (SCORES[:, :3].contiguous, InputError, r"multiple of the 2 KV heads.*got 3 and 1"),
    "no heads": (lambda: SCORES[:, :0], InputError, r"multiple of the 2 KV heads.*got 0 and 1"),
    "no query": (lambda: SCORES[:, :, :0], InputError, r"q_len at least 1, got 4 and 0"),
    "a gradient": (lambda: SCORES.clone().requires_grad_(), UnsupportedError, "no gradient flows through"),
}


def test_the_scores_themselves_are_accepted() -> None:
    weigh(SCORES, CASE.kv)
    with torch.no_grad():
        weigh(SCORES.clone().requires_grad_(), CASE.kv)


@pytest.mark.parametrize("name", BAD_LOGITS)
def test_logits_that_do_not_fit_are_refused(name: str) -> None:
    make, error, message = BAD_LOGITS[name]
    with pytest.raises(error, match=message):
        weigh(make(), CASE.kv)


OF_Q = ("q ", "no query", "group of")  # cases that are about the query


@pytest.mark.parametrize("name", [name for name in test_attend_doors.REFUSED if not name.startswith(OF_Q)])
def test_runs_that_do_not_fit_are_refused(name: str) -> None:
    make, error, message = test_attend_doors.REFUSED[name]
    _, kv = make()
    room = kv.page_table.shape[-1] * 16
    with pytest.raises(error) as caught:
        weigh(torch.zeros(2, 4, 1, room), kv)
    if "page_table" not in message and "logits must be" not in str(caught.value):
        assert caught.match(message)


def test_a_window_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected a rule without a window, got ScoreRule\(.*window=9\)"):
        logits(CASE.q, CASE.kv, rule=ScoreRule(1.0, window=9))


def test_what_is_no_run_rule_or_pool() -> None:
    with pytest.raises(InputError, match="expected a tensor q and runs of PagedKV, got Tensor, Arena"):
        logits(CASE.q, CASE.kv.arena, rule=ScoreRule(1.0))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a tensor logits and a PagedKV, got Tensor, Arena"):
        weigh(SCORES, CASE.kv.arena)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"rule must be a ScoreRule, such as ScoreRule\(scale=0.125\), got 0.5"):
        logits(CASE.q, CASE.kv, rule=0.5)  # type: ignore[arg-type]
    for wrong in (2, "all"):
        with pytest.raises(InputError, match=r"pool must be a WorkerPool, such as WorkerPool\(2\), or None, got"):
            logits(CASE.q, CASE.kv, rule=ScoreRule(1.0), pool=wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"pool must be a WorkerPool, such as WorkerPool\(2\), or None, got"):
            weigh(SCORES, CASE.kv, pool=wrong)  # type: ignore[arg-type]


def test_the_default_device_does_not_matter() -> None:
    want = logits(CASE.q, CASE.kv, rule=ScoreRule(1.0))
    with torch.device("meta"):
        got = logits(CASE.q, CASE.kv, rule=ScoreRule(1.0))
        assert_same_bits(weigh(got, CASE.kv), weigh(want, CASE.kv))
    assert torch.equal(got, want)


# ---- Tests that can fail ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_of_logits_sees_a_token_that_is_off(dtype: torch.dtype) -> None:
    """By 1 % of the scale, or the neighbour's score."""
    shape = Shape(16, 2, 3, 64, kv_len=(40,), kv_start=(0,))
    case, truth, bound = expected(shape, dtype, "rows", torch.float32)
    scaled = logits(case.q, case.kv, rule=ScoreRule(shape.scale * 1.01))
    moved = logits(case.q, case.kv, rule=shape.rule).roll(1, -1)
    for wrong in (scaled[..., :40], moved[..., :40]):
        assert bool(((wrong - truth[..., :40]).abs() > bound).any(-1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_page_layouts_of_both_halves_are_one(dtype: torch.dtype) -> None:
    """Page sizes that are no multiple of a tile, whose tiles straddle pages."""
    for page_size in (16, 48, 80):
        case = build(Shape(page_size, 2, 4, 64, kv_len=(333,), kv_start=(17,)), dtype, "panels", dtype)
        assert case.kv.arena.layout == PageLayout(dtype, page_size, "panels")
        for isa in RUNNABLE:
            want = attend(case.q, case.kv, rule=ScoreRule(0.1), isa=isa)
            assert_same_bits(halves(case.q, case.kv, ScoreRule(0.1), isa), want)
