"""`attend` on every instruction set of this machine against the float64 reference, behind poisoned pages."""

import math
import os
import threading
import time
import warnings
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.errors import InputError, UnavailableError
from tandemkv.kernels import append_and_attend, attend, cpu, reference
from tandemkv.types import Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.dense import dense_attention
from tests.paged import WILD_SLOTS, Case, Shape, build, paginate, poisoned_arena
from tests.tolerances import Bound, U, assert_within, attend_bound, kernel_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = [(kv, q) for kv in DTYPES for q in DTYPES if kv == q or torch.float32 in (kv, q)]
PACKINGS: tuple[Packing, ...] = ("rows", "panels")
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(missing != "", reason=f"{isa}: this machine lacks {missing}"))
    for isa, missing in cpu.available_isas().items()
]
RUNNABLE = [isa for isa, missing in cpu.available_isas().items() if not missing]

# Every page size, head_dim, kind of group and rule; lengths around the ends of blocks, tiles, pages and chunks.
COVER = {
    "one-token": Shape(64, 2, 4, 128, kv_len=(1,), kv_start=(0,)),
    "ragged": Shape(64, 2, 4, 128, kv_len=(129, 64, 1, 193), kv_start=(0, 3, 0, 190)),
    "pages-of-16": Shape(16, 2, 7, 64, kv_len=(50, 16, 33), kv_start=(0, 2, 32)),
    "pages-of-48": Shape(48, 1, 8, 80, kv_len=(100, 47), kv_start=(17, 0)),
    "mha": Shape(64, 5, 1, 96, kv_len=(65, 15), kv_start=(0, 14)),
    "head-dim-2": Shape(16, 3, 2, 2, kv_len=(40,), kv_start=(1,)),
    "head-dim-8": Shape(64, 2, 3, 8, kv_len=(130, 128), kv_start=(63, 64)),
    "groups-of-5": Shape(48, 1, 5, 64, kv_len=(97,), kv_start=(48,)),
    "groups-of-6": Shape(64, 1, 6, 128, kv_len=(70,), kv_start=(0,)),
    "head-batches": Shape(16, 5, 16, 8, kv_len=(20,), kv_start=(0,)),
    "chunks": Shape(64, 8, 2, 256, kv_len=(270,), kv_start=(100,)),
    "causal": Shape(16, 2, 2, 64, kv_len=(50, 5, 33), kv_start=(0, 2, 16), q_len=3, causal=True),
    "causal-rows-of-two-items": Shape(48, 1, 16, 80, kv_len=(100,), kv_start=(17,), q_len=2, causal=True),
    "causal-prefill": Shape(64, 2, 1, 128, kv_len=(37,), kv_start=(0,), q_len=37, causal=True),
    "causal-padded": Shape(64, 1, 3, 64, kv_len=(70, 9, 6), kv_start=(68, 0, 6), q_len=6, causal=True),
    "several-queries": Shape(64, 2, 3, 96, kv_len=(30, 0), kv_start=(0, 0), q_len=4),
    "groups-of-17": Shape(16, 2, 17, 24, kv_len=(50, 9), kv_start=(3, 0), q_len=2, causal=True),
    "groups-of-48": Shape(64, 1, 48, 128, kv_len=(70,), kv_start=(0,)),
    "groups-of-71": Shape(48, 2, 71, 64, kv_len=(49,), kv_start=(1,)),
    "v-is-narrower": Shape(64, 2, 4, 192, kv_len=(129, 64), kv_start=(0, 3), v_head_dim=128),
    "v-is-wider": Shape(16, 3, 2, 17, kv_len=(40,), kv_start=(5,), q_len=3, causal=True, v_head_dim=250),
    "v-of-one": Shape(16, 2, 2, 64, kv_len=(40,), kv_start=(5,), v_head_dim=1),
    "odd-head-dim": Shape(48, 2, 3, 65, kv_len=(97, 30), kv_start=(7, 0), v_head_dim=67),
    "head-dim-1": Shape(16, 2, 5, 1, kv_len=(40,), kv_start=(1,)),
    "head-dim-255": Shape(64, 1, 6, 255, kv_len=(70,), kv_start=(0,)),
    "softcap": Shape(16, 2, 3, 64, kv_len=(50, 5), kv_start=(0, 2), q_len=2, causal=True, softcap=0.7),
    "window": Shape(16, 2, 3, 64, kv_len=(90, 33, 5), kv_start=(0, 20, 2), q_len=4, causal=True, window=19),
    "window-of-one": Shape(64, 2, 4, 80, kv_len=(130, 64), kv_start=(0, 64), causal=True, window=1),
    "capped-window": Shape(
        48, 1, 20, 31, kv_len=(150,), kv_start=(0,), q_len=9, causal=True, softcap=3.0, window=49, v_head_dim=40
    ),
    "nothing": Shape(16, 2, 2, 64, kv_len=(5, 0, 20), kv_start=(5, 0, 30)),
}


@lru_cache(maxsize=4)  # the instruction set varies fastest
def expected(shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype) -> tuple[Case, Partial, Bound]:
    case = build(shape, dtype, packing, q_dtype)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype))
    return case, reference.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal), bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "q_dtype"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", COVER)
def test_equals_the_reference(name: str, packing: Packing, dtype: torch.dtype, q_dtype: torch.dtype, isa: str) -> None:
    shape = COVER[name]
    case, truth, bound = expected(shape, dtype, packing, q_dtype)
    assert_within(attend(case.q, case.kv, rule=shape.rule, causal=shape.causal, isa=isa), truth, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", range(1, 19))
def test_every_group_size(group_size: int, dtype: torch.dtype, isa: str) -> None:
    shape = Shape(16, 2, group_size, 32, kv_len=(67,), kv_start=(0,), q_len=1 + group_size % 2, causal=True)
    case, truth, bound = expected(shape, dtype, "panels", torch.float32)
    assert_within(attend(case.q, case.kv, rule=shape.rule, causal=True, isa=isa), truth, bound)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(dtype: torch.dtype, packing: Packing) -> None:
    """K has every width from 1 to 256, V another one."""
    for head_dim in range(1, 257):
        v_head_dim = 1 + (head_dim * 37) % 256
        shape = Shape(16, 1, 2, head_dim, kv_len=(21,), kv_start=(2,), v_head_dim=v_head_dim)
        case = build(shape, dtype, packing, dtype)
        truth = dense_attention(case.q, case.k, case.v, case.visible, shape.scale)
        bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype))
        for isa in RUNNABLE:
            assert_within(attend(case.q, case.kv, rule=shape.rule, isa=isa), truth, bound)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Any legal shape that the token-by-token reference reads in a few milliseconds."""
    num_seqs = draw(st.integers(1, 3))
    tokens = st.lists(st.integers(0, 80), min_size=num_seqs, max_size=num_seqs)
    causal = draw(st.booleans())
    return Shape(
        page_size=draw(st.sampled_from((16, 48, 64))),
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from((1, 2, 3, 4, 7, 8, 11, 13, 16, 19))),
        head_dim=draw(st.integers(1, 256)),
        kv_len=tuple(draw(tokens)),
        kv_start=tuple(start // 2 for start in draw(tokens)),
        q_len=draw(st.integers(1, 5)),
        causal=causal,
        v_head_dim=draw(st.one_of(st.none(), st.integers(1, 256))),
        softcap=draw(st.one_of(st.none(), st.sampled_from((0.1, 1.0, 50.0)))),
        window=draw(st.one_of(st.none(), st.integers(1, 90))) if causal else None,
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(PACKINGS), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_any_shape(shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype, seed: int) -> None:
    case = build(shape, dtype, packing, q_dtype, seed)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype))
    for isa in RUNNABLE:
        assert_within(attend(case.q, case.kv, rule=shape.rule, causal=shape.causal, isa=isa), truth, bound)


# ---- Edges ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing_get_the_identity(dtype: torch.dtype, isa: str) -> None:
    """Empty runs, kv_start behind kv_len, and the padded rows of a left-padded causal chunk."""
    shape = Shape(16, 2, 2, 64, kv_len=(0, 20, 20, 20), kv_start=(0, 20, 30, 17), q_len=5, causal=True)
    case = build(shape, dtype, "panels")
    out, lse = attend(case.q, case.kv, rule=ScoreRule(shape.scale), causal=True, isa=isa)
    blind = ~case.visible.any(-1)
    assert blind.sum(-1).tolist() == [5, 5, 5, 2]
    assert (out.transpose(1, 2)[blind] == 0).all()
    assert (lse.transpose(1, 2)[blind] == -math.inf).all()
    assert lse.transpose(1, 2)[~blind].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_equal_huge_logits_are_a_mean(logit: float, dtype: torch.dtype, isa: str) -> None:
    num_tokens = 100
    k = torch.zeros(1, 1, num_tokens, 8, dtype=dtype)
    k[..., 3] = 64.0
    v = torch.arange(num_tokens * 8).reshape(1, 1, num_tokens, 8).remainder(16).to(dtype)
    q = torch.zeros(1, 1, 1, 8)
    q[..., 3] = logit / 64.0
    out, lse = attend(q, paginate(k, v, PageLayout(dtype, 16)), rule=ScoreRule(1.0), isa=isa)
    # Probabilities are exactly 1 and the sums are small integers, so only the last division and rounding remain.
    torch.testing.assert_close(out, v.float().mean(2, keepdim=True), rtol=4 * U, atol=0)
    torch.testing.assert_close(lse.double().item(), logit + math.log(num_tokens), rtol=4 * U, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_huge_logits(dtype: torch.dtype, isa: str) -> None:
    """Logits spread over about +-1e4, rising and falling along the run: the running maximum moves by thousands."""
    shape = Shape(16, 1, 4, 8, kv_len=(100,), kv_start=(0,))
    case = build(shape, dtype)
    q = case.q * 1e4
    out, lse = attend(q, case.kv, rule=ScoreRule(0.25), isa=isa)
    truth = reference.attend(q, case.kv, rule=ScoreRule(0.25), causal=False)
    assert truth.lse.abs().max() > 1e4
    bound = attend_bound(q, case.k, case.v, case.visible, 0.25, kernel_rounding(dtype))
    assert_within(Partial(out, lse), truth, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_float16_number_is_read_as_it_is(packing: Packing, isa: str) -> None:
    """Subnormal ones, infinities and NaN too. Of one token, lse is q.k and out is v."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    rows = poisoned_arena(PageLayout(torch.float16, 16), 2**12, 1, 1)
    arena = poisoned_arena(PageLayout(torch.float16, 16, packing), 2**12, 1, 1)
    rows.k.view(-1)[:], rows.v.view(-1)[:] = numbers, numbers
    every_slot = list(range(2**12))
    cpu.move_pages(rows, arena, every_slot, every_slot)
    token = torch.arange(2**16)
    table = (token // 16).int().reshape(-1, 1, 1)
    runs = PagedKV(arena, table, token % 16, token % 16 + 1)
    for q in (torch.ones(2**16, 1, 1, 1), torch.ones(2**16, 1, 1, 1).half()):
        out, lse = attend(q, runs, rule=ScoreRule(1.0), isa=isa)
        known = numbers.isfinite()  # an infinite score is no number of weight
        assert torch.equal(out.flatten()[known], numbers.float()[known])
        assert torch.equal(lse.flatten()[known], numbers.float()[known])
        assert lse.flatten()[numbers.isnan()].isnan().all()
    ones = torch.ones(1, 1, 1, 1).half()
    run = paginate(ones, ones, PageLayout(torch.float16, 16, packing))
    q = numbers[known].reshape(1, 1, -1, 1)
    assert torch.equal(attend(q, run, rule=ScoreRule(1.0), isa=isa).lse.flatten(), numbers[known].float())
    rows.k.fill_(0.0)
    cpu.move_pages(rows, arena, every_slot, every_slot)
    out, _ = attend(torch.ones(2**16, 1, 1, 1), runs, rule=ScoreRule(1.0), isa=isa)
    assert torch.equal(out.flatten()[~numbers.isnan()], numbers.float()[~numbers.isnan()])
    assert out.flatten()[numbers.isnan()].isnan().all()


@pytest.fixture(scope="module")
def million() -> tuple[PagedKV, Tensor, Tensor]:
    """2^20 tokens of one head, float32, at random slots; V is about 1, so that an error of the sums is seen in it."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 2**20, 8, generator=generator)
    v = 1 + torch.randn(1, 1, 2**20, 8, generator=generator)
    return paginate(k, v, PageLayout(torch.float32, 64)), k, v


@pytest.mark.parametrize("isa", ISAS)
def test_a_million_random_tokens(million: tuple[PagedKV, Tensor, Tensor], isa: str) -> None:
    kv, k, v = million
    q = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(1))
    visible = torch.ones(1, 1, 2**20, dtype=torch.bool)
    truth, bound = dense_attention(q, k, v, visible, 0.5), attend_bound(q, k, v, visible, 0.5)
    assert bound.lse.max() < 1e-3  # one chunk of 64 that is lost or read twice would be 1.6e-2
    assert_within(attend(q, kv, rule=ScoreRule(0.5), isa=isa, pool=cpu.WorkerPool(2)), truth, bound)


@pytest.mark.parametrize("isa", ISAS)
def test_a_million_equal_tokens_are_counted_exactly(million: tuple[PagedKV, Tensor, Tensor], isa: str) -> None:
    """A query of zeros weighs all tokens alike: lse is ln(2^20), to the last bits, and of the sums only V's remain."""
    kv, _, v = million
    out, lse = attend(torch.zeros(1, 1, 1, 8), kv, rule=ScoreRule(1.0), isa=isa, pool=cpu.WorkerPool(2))
    assert abs(lse.item() - 20 * math.log(2)) <= 20 * math.log(2) * 2 * U
    torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True), rtol=1e-4, atol=0)


# ---- What must not be read, and what must be refused ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wild", [*WILD_SLOTS, "num_slots"])
@pytest.mark.parametrize("token", [3, 20, 63])
def test_a_wild_slot_in_use_is_a_broken_invariant(token: int, wild: int | str, isa: str) -> None:
    shape = Shape(16, 2, 2, 64, kv_len=(64,), kv_start=(2,))
    case = build(shape)
    slot = case.kv.arena.num_slots if isinstance(wild, str) else wild
    case.kv.page_table[0, 1, token // 16] = slot
    with pytest.raises(AssertionError, match="a page table entry in use points outside its arena"):
        attend(case.q, case.kv, rule=ScoreRule(shape.scale), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_q_is_refused_even_where_nothing_is_read(dtype: torch.dtype, isa: str) -> None:
    case = build(Shape(16, 2, 9, 64, kv_len=(0, 40), kv_start=(0, 0), q_len=2), dtype, q_dtype=dtype)
    for seq in range(2):
        q = case.q.clone()
        q[seq, 17, 1, 63] = math.nan
        with pytest.raises(InputError, match="q contains NaN"):
            attend(q, case.kv, rule=ScoreRule(1.0), isa=isa)


def test_unavailable_instruction_sets_are_named() -> None:
    with pytest.raises(UnavailableError, match=r"'sse9' is not available: .*portable \(available\)"):
        cpu.resolve_isa("sse9")
    for isa, missing in cpu.available_isas().items():
        if missing:
            with pytest.raises(UnavailableError, match=f"{isa} \\(lacks {missing}\\)"):
                cpu.resolve_isa(isa)
    assert cpu.resolve_isa() == RUNNABLE[0]
    assert [cpu.resolve_isa(isa) for isa in RUNNABLE] == RUNNABLE


@pytest.mark.parametrize("isa", ISAS)
def test_nan_in_k_comes_out_as_nan_not_as_nothing(isa: str) -> None:
    """A model that overflowed must not look like an empty cache."""
    k = torch.full((1, 1, 5, 8), math.nan)
    out, lse = attend(
        torch.ones(1, 1, 1, 8), paginate(k, k, PageLayout(torch.float32, 16)), rule=ScoreRule(1.0), isa=isa
    )
    assert out.isnan().all()
    assert lse.isnan().all()


# ---- Strides ----


@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_strided_queries_give_the_same_bits(q_dtype: torch.dtype) -> None:
    shape = Shape(16, 2, 3, 64, kv_len=(40, 17), kv_start=(0, 5), q_len=3, causal=True)
    case = build(shape, q_dtype=q_dtype)
    as_models_project = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    every_other_dim = case.q.repeat_interleave(2, -1)[..., ::2]
    sliced = torch.cat([case.q, case.q], -1)[..., 64:]
    want = attend(case.q, case.kv, rule=ScoreRule(shape.scale), causal=True)
    for q in (as_models_project, every_other_dim, sliced):
        assert not q.is_contiguous()
        assert_same_bits(attend(q, case.kv, rule=ScoreRule(shape.scale), causal=True), want)


def test_one_query_expanded_over_sequences() -> None:
    case = build(Shape(16, 2, 3, 64, kv_len=(40, 17), kv_start=(0, 5)))
    q = case.q[:1].expand(2, -1, -1, -1)
    assert_same_bits(attend(q, case.kv, rule=ScoreRule(1.0)), attend(q.contiguous(), case.kv, rule=ScoreRule(1.0)))


@pytest.mark.parametrize("packing", PACKINGS)
def test_heads_and_sequences_may_share_a_table_row(packing: Packing) -> None:
    layout = PageLayout(torch.bfloat16, 16, packing)
    rows = poisoned_arena(PageLayout(torch.bfloat16, 16), 6, 3, 64)
    k, v = torch.randn(2, 1, 3, 40, 64).bfloat16()
    row = torch.tensor([4, 0, 5, -1], dtype=torch.int32)
    cpu.append(rows, row.expand(1, 3, 4), 0, k, v)
    arena = rows
    if packing == "panels":
        arena = poisoned_arena(layout, 6, 3, 64)
        cpu.move_pages(rows, arena, [4, 0, 5], [4, 0, 5])
    shared = row.expand(2, 3, 4)
    assert shared.stride()[:2] == (0, 0)
    q = torch.randn(2, 6, 1, 64)
    run = (torch.tensor([0, 7]), torch.tensor([40, 33]))
    got = attend(q, PagedKV(arena, shared, *run), rule=ScoreRule(0.125))
    assert_same_bits(got, attend(q, PagedKV(arena, shared.contiguous(), *run), rule=ScoreRule(0.125)))
    k, v = k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)
    same = paginate(k, v, layout, *run)
    truth = reference.attend(q, same, rule=ScoreRule(0.125), causal=False)
    visible = (torch.arange(40) >= run[0][:, None, None]) & (torch.arange(40) < run[1][:, None, None])
    assert_within(got, truth, attend_bound(q, k, v, visible, 0.125, kernel_rounding(torch.bfloat16)))


# ---- Threads and processes ----


def long_case(packing: Packing = "rows") -> tuple[Tensor, PagedKV]:
    """Five chunks of 2 MiB, and a second, short sequence."""
    shape = Shape(64, 2, 4, 64, kv_len=(9000, 100), kv_start=(5, 0))
    case = build(shape, torch.float32, packing)
    return case.q, case.kv


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_any_number_of_threads_gives_the_same_bits(packing: Packing, isa: str) -> None:
    q, kv = long_case(packing)
    want = attend(q, kv, rule=ScoreRule(0.125), isa=isa)
    for num_threads in (1, 2, 3):
        pool = cpu.WorkerPool(num_threads)
        assert pool.num_threads == num_threads
        for _ in range(5):
            assert_same_bits(attend(q, kv, rule=ScoreRule(0.125), isa=isa, pool=pool), want)


def test_two_python_threads_may_share_a_pool() -> None:
    pool = cpu.WorkerPool(2)
    q, kv = long_case()
    other = build(Shape(16, 2, 3, 64, kv_len=(400, 17), kv_start=(0, 5)))
    jobs = [(q, kv), (other.q, other.kv)]
    wants = [attend(*job, rule=ScoreRule(0.125)) for job in jobs]
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for _ in range(50):
                assert_same_bits(attend(*jobs[i], rule=ScoreRule(0.125), pool=pool), wants[i])
        except BaseException as error:  # noqa: BLE001  a thread's failure must reach the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system lacks os.fork")
def test_a_pool_works_in_a_child_forked_while_it_is_busy() -> None:
    """The threads stay in the parent and the locks are held for ever: the child must take neither."""
    pool = cpu.WorkerPool(3)
    q, kv = long_case()
    want = attend(q, kv, rule=ScoreRule(0.125), pool=pool)
    long_q = q.repeat(
        1, 1, 64, 1
    )  # tens of milliseconds in the slowest kernel: a fork falls into the job, not between two
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            attend(long_q, kv, rule=ScoreRule(0.125), pool=pool, isa="portable")

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        statuses = [wait_for(fork_and_attend(q, kv, pool, want), seconds=10) for _ in range(5)]
    finally:
        stop.set()
        busy.join()
    assert None not in statuses, "a child hung"
    assert statuses == [0] * 5
    assert_same_bits(attend(q, kv, rule=ScoreRule(0.125), pool=pool), want)


def fork_and_attend(q: Tensor, kv: PagedKV, pool: cpu.WorkerPool, want: Partial) -> int:
    """The child's process id; it ends with 0 where it got the same bits."""
    time.sleep(0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads, which is the point
        child = os.fork()
    if child:
        return child
    got = attend(q, kv, rule=ScoreRule(0.125), pool=pool)
    os._exit(0 if got.out.equal(want.out) and got.lse.equal(want.lse) else 3)


def wait_for(child: int, seconds: float) -> int | None:
    """The child's exit status, or None (and its end) where it does not come in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def assert_same_bits(got: Partial, want: Partial) -> None:
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 5])
def test_append_and_attend_is_append_then_attend(q_len: int, dtype: torch.dtype, packing: Packing) -> None:
    """To the bit, over an older run and one that the tokens are appended to; inputs as models stride them."""
    older = build(Shape(16, 2, 3, 24, kv_len=(40, 9), kv_start=(7, 9)), dtype, "panels", dtype).kv
    q, k, v = (torch.randn(2, q_len, heads, 24).to(dtype).transpose(1, 2) for heads in (6, 2, 2))
    table = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)[:, None].expand(2, 2, 3)
    starts, ends = torch.tensor([0, 22]), torch.full((2,), 20 + q_len)
    results = []
    for call in (append_and_attend, append_then_attend):
        arena = poisoned_arena(PageLayout(dtype, 16, packing), 6, 2, 24)
        cpu.append(arena, table, 0, torch.ones(2, 2, 20, 24, dtype=dtype), torch.ones(2, 2, 20, 24, dtype=dtype))
        results.append(
            call(q, k, v, older, PagedKV(arena, table, starts, ends), rule=ScoreRule(0.3), pool=cpu.WorkerPool(2))
        )
        assert not results[-1].isnan().any()
        back_k, back_v = torch.empty_like(k), torch.empty_like(v)
        cpu.gather(arena, table, 20, back_k, back_v)
        assert torch.equal(back_k, k)
        assert torch.equal(back_v, v)
    assert results[0].shape == (2, q_len, 6, 24)
    assert results[0].is_contiguous()
    assert torch.equal(results[0], results[1])


def append_then_attend(
    q: Tensor, k: Tensor, v: Tensor, *runs: PagedKV, rule: ScoreRule, pool: cpu.WorkerPool
) -> Tensor:
    cpu.append(runs[-1].arena, runs[-1].page_table, 20, k, v, pool)
    part = attend(q, *runs, rule=rule, causal=True, pool=pool)
    return part.out.transpose(1, 2).to(q.dtype)
