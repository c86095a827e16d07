"""Quantised pages: what they hold, and attention over them on every instruction set against the float64 reference."""

import math
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels import append, append_and_attend, attend, block_mass, cpu, gather, merge, reference
from tandemkv.types import Arena, Arenas, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.paged import Shape
from tests.quantised import FORMATS, Quantised, code_error, quantised, stored
from tests.tolerances import FLOAT32, Bound, assert_within, attend_bound, excess

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(missing != "", reason=f"{isa}: this machine lacks {missing}"))
    for isa, missing in cpu.available_isas().items()
]
RUNNABLE = [isa for isa, missing in cpu.available_isas().items() if not missing]

# Groups 1 to 16 and more, every width of a head, pages of several tiles and of parts of one.
COVER = {
    "pages-of-64": Shape(64, 2, 4, 128, kv_len=(192, 100, 1), kv_start=(0, 3, 0)),
    "mha": Shape(64, 3, 1, 64, kv_len=(65, 15), kv_start=(0, 14)),
    "pages-of-16": Shape(16, 2, 7, 64, kv_len=(50, 16, 33), kv_start=(0, 2, 32)),
    "pages-of-48": Shape(48, 1, 8, 192, kv_len=(100, 47), kv_start=(17, 0), v_head_dim=128),
    "pages-of-160": Shape(160, 1, 5, 128, kv_len=(300,), kv_start=(70,)),
    "groups-of-16": Shape(64, 2, 16, 256, kv_len=(130,), kv_start=(0,)),
    "groups-of-19": Shape(32, 1, 19, 64, kv_len=(70,), kv_start=(5,), q_len=2),
    "several-queries": Shape(64, 2, 3, 128, kv_len=(30, 0), kv_start=(0, 0), q_len=4),
    "softcap": Shape(16, 2, 3, 64, kv_len=(50, 5), kv_start=(0, 2), q_len=2, softcap=0.7),
    "nothing": Shape(16, 2, 2, 64, kv_len=(5, 0, 20), kv_start=(5, 0, 30)),
}
OTHER_WIDTHS = {  # for int8 alone
    "head-dim-80": Shape(64, 2, 4, 80, kv_len=(130,), kv_start=(1,)),
    "head-dim-96": Shape(64, 1, 6, 96, kv_len=(130,), kv_start=(1,), v_head_dim=72),
    "head-dim-1": Shape(16, 1, 2, 1, kv_len=(33,), kv_start=(0,), v_head_dim=255),
}


@lru_cache(maxsize=4)  # the instruction set varies fastest
def expected(
    shape: Shape, dtype: torch.dtype, packing: Packing, num_channels: int | None = None, seed: int = 0
) -> tuple[Quantised, Partial, Bound]:
    layout = PageLayout(dtype, shape.page_size, packing, num_channels)
    case = quantised(shape, dtype, layout, torch.float32 if dtype == torch.float16 else dtype, seed)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, FLOAT32, codes=code_error(case, shape.rule))
    return case, reference.attend(case.q, case.kv, rule=shape.rule, causal=False), bound


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "packing"), [*((n, p) for n in COVER for p in FORMATS), *((n, "int8") for n in OTHER_WIDTHS)]
)
def test_equals_the_reference(name: str, packing: Packing, dtype: torch.dtype, isa: str) -> None:
    shape = (COVER | OTHER_WIDTHS)[name]
    case, truth, bound = expected(shape, dtype, packing)
    assert_within(attend(case.q, case.kv, rule=shape.rule, isa=isa), truth, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("group_size", range(1, 18))
def test_every_group_size(group_size: int, packing: Packing, isa: str) -> None:
    shape = Shape(64, 2, group_size, 64, kv_len=(100,), kv_start=(0,))
    case, truth, bound = expected(shape, torch.bfloat16, packing)
    assert_within(attend(case.q, case.kv, rule=shape.rule, isa=isa), truth, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("num_channels", [16, 48, 112, 128])
def test_keys_of_fewer_channels(num_channels: int, packing: Packing, isa: str) -> None:
    shape = Shape(48, 2, 3, 128, kv_len=(100,), kv_start=(7,))
    case, truth, bound = expected(shape, torch.bfloat16, packing, num_channels)
    kept = (
        (case.k[0, :, :96] != 0).view(2, 2, 48, 128).any(2).sum(2)
    )  # of each head and page, which choose for themselves
    assert bool((kept <= num_channels).all())
    assert int(kept.max()) == num_channels
    assert_within(attend(case.q, case.kv, rule=shape.rule, isa=isa), truth, bound)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from((16, 48, 64, 128)),
    st.integers(1, 3),
    st.sampled_from((1, 2, 3, 4, 7, 8, 11, 16)),
    st.sampled_from((64, 128, 192, 256)),
    st.lists(st.tuples(st.integers(0, 150), st.integers(0, 90)), min_size=1, max_size=2),
    st.sampled_from(FORMATS),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_any_shape(
    page_size: int,
    num_heads: int,
    group_size: int,
    head_dim: int,
    runs: list[tuple[int, int]],
    packing: Packing,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if not any(length for length, _ in runs):
        runs = [(1, 0)]
    lens, starts = tuple(length for length, _ in runs), tuple(start for _, start in runs)
    shape = Shape(page_size, num_heads, group_size, head_dim, kv_len=lens, kv_start=starts)
    case, truth, bound = expected(shape, dtype, packing, None, seed)
    for isa in RUNNABLE:
        assert_within(attend(case.q, case.kv, rule=shape.rule, isa=isa), truth, bound)


@pytest.mark.parametrize("packing", FORMATS)
def test_instruction_sets_agree_on_scores(packing: Packing) -> None:
    """Products of codes are whole numbers: of one token, where no softmax rounds, lse is equal to a few last bits."""
    shape = Shape(64, 2, 4, 128, kv_len=(1,), kv_start=(0,))
    case, _, _ = expected(shape, torch.bfloat16, packing)
    found = torch.stack([attend(case.q, case.kv, rule=shape.rule, isa=isa).lse for isa in RUNNABLE])
    allowed = 8 * 2.0**-24 * code_error(case, shape.rule).magnitude
    assert bool(((found - found[0]).abs() <= allowed).all())


@pytest.mark.parametrize("half", ["k", "v"])
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_sees_a_lost_bit(dtype: torch.dtype, packing: Packing, half: str) -> None:
    """The lowest bit of the codes of one page of two, in K or in V: then attention is out of bounds."""
    shape = Shape(64, 1, 2, 64, kv_len=(128,), kv_start=(0,))
    case, truth, bound = expected(shape, dtype, packing)
    arena = case.kv.arena.parts[0]
    spoilt = Arena(arena.k.clone(), arena.v.clone(), arena.layout, arena.head_dim, arena.v_head_dim)
    slot, num_bytes = int(case.kv.page_table[0, 0, 0]), 64 * 64 if packing == "int8" else 64 * 32
    codes = (spoilt.k if half == "k" else spoilt.v)[slot, 0, :num_bytes]
    codes &= 0xFE if packing == "int8" else 0xEE
    got = attend(case.q, PagedKV(spoilt, case.kv.page_table, case.kv.kv_start, case.kv.kv_len), rule=shape.rule)
    assert excess(got, truth, bound) > 1


# ---- What pages hold ----


def pages_of(k: Tensor, v: Tensor, layout: PageLayout, weights: Tensor | None = None) -> tuple[Arena, dict[int, int]]:
    """Dense `[1, num_kv_heads, num_tokens, dim]` as pages 0, 1, ... of an arena, and which were refused."""
    num_pages = k.shape[2] // layout.page_size
    rows = Arena.allocate(
        PageLayout(layout.dtype, layout.page_size), num_pages, k.shape[1], k.shape[3], v_head_dim=v.shape[3]
    )
    append(rows, table_of(num_pages, k.shape[1]), 0, k, v)
    arena = Arena.allocate(layout, num_pages, k.shape[1], k.shape[3], v_head_dim=v.shape[3])
    arena.k.fill_(255)
    arena.v.fill_(255)
    slots = list(range(num_pages))
    return arena, cpu.move_pages(rows, arena, slots, slots, channel_weights=weights)


def table_of(num_pages: int, num_heads: int) -> Tensor:
    return torch.arange(num_pages, dtype=torch.int32).expand(1, num_heads, num_pages)


def run_of(arena: Arena | Arenas, num_pages: int) -> PagedKV:
    length = torch.tensor([num_pages * arena.layout.page_size])
    return PagedKV(arena, table_of(num_pages, arena.num_kv_heads), torch.zeros(1, dtype=torch.int64), length)


def normal(num_heads: int, num_tokens: int, dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((1, num_heads, num_tokens, dim), generator=generator)
    return (x * (1 + 5 * torch.rand(dim, generator=generator)) + torch.randn(dim, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", FORMATS)
def test_a_number_is_off_by_half_a_step(packing: Packing, dtype: torch.dtype) -> None:
    """K's steps are those of a channel of a page, V's those of a token (int8) or of 64 dims of it (int4)."""
    k, v = normal(2, 192, 128, dtype), normal(2, 192, 192, dtype, 1)
    arena, refused = pages_of(k, v, PageLayout(dtype, 64, packing))
    assert refused == {}
    got_k, got_v = stored(run_of(arena, 3), 192)
    pages = k.double().unflatten(2, (3, 64))
    groups = v.double().unflatten(3, (-1, 64)) if packing == "int4" else v.double()[..., None, :]
    if packing == "int4":
        k_range, v_range = (x.amax(d) - x.amin(d) for x, d in ((pages, 3), (groups, 4)))
        # A zero is rounded down to bf16, a step up: 2^-8 of the number, and of the step.
        k_step = (k_range + 2.0**-8 * pages.amin(3).abs()) / 15 * (1 + 2.0**-7)
        v_step = (v_range + 2.0**-8 * groups.amin(4).abs()) / 15 * (1 + 2.0**-7)
    else:
        k_step, v_step = (x.abs().amax(d) / 127 * (1 + 2.0**-7) for x, d in ((pages, 3), (groups, 4)))
    k_off = (got_k - k.double()).abs().unflatten(2, (3, 64)).amax(3)
    v_off = (got_v - v.double()).abs().view(groups.shape).amax(4)
    assert bool((k_off <= k_step / 2 * 1.0001).all()) and bool((v_off <= v_step / 2 * 1.0001).all())
    exact = (k_off == 0).sum(-1)
    assert exact.min() >= (2 if packing == "int4" else 0)
    if packing == "int4":  # of every 64 channels the widest is kept as it is
        widest = k_range.topk(2, -1).indices
        assert bool((k_off.gather(-1, widest) == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("num_channels", [None, 32])
def test_gather_gives_what_is_stored(num_channels: int | None, packing: Packing, dtype: torch.dtype) -> None:
    """Rounded to the dtype of rows; from any token, in the middle of blocks too."""
    k, v = normal(2, 96, 64, dtype), normal(2, 96, 128, dtype, 1)
    arena, _ = pages_of(k, v, PageLayout(dtype, 48, packing, num_channels))
    run = run_of(arena, 2)
    want_k, want_v = stored(run, 96)
    for begin, end in ((0, 96), (5, 6), (47, 90)):
        got_k, got_v = torch.empty(1, 2, end - begin, 64, dtype=dtype), torch.empty(1, 2, end - begin, 128, dtype=dtype)
        gather(arena, run.page_table, begin, got_k, got_v)
        for got, want in ((got_k, want_k[:, :, begin:end]), (got_v, want_v[:, :, begin:end])):
            torch.testing.assert_close(got, want.float().to(dtype), rtol=2.0**-20, atol=1e-30)


def test_channels_are_kept_by_what_queries_weigh() -> None:
    """ThinK's score: the norm of a channel's queries times that of its keys; each head and page has its own."""
    k, v = normal(2, 64, 64, torch.float32), normal(2, 64, 64, torch.float32, 1)
    weights = torch.rand((2, 2, 64), generator=torch.Generator().manual_seed(2)) ** 4
    k, v = torch.cat([k, k.flip(3)], 2), torch.cat([v, v], 2)
    arena, _ = pages_of(k, v, PageLayout(torch.float32, 64, "int8", 16), weights)
    got, _ = stored(run_of(arena, 2), 128)
    score = k.double().unflatten(2, (2, 64)).square().sum(3)[0] * weights.transpose(0, 1)
    kept = (got.unflatten(2, (2, 64)) != 0).any(3)[0]
    assert kept.sum(-1).tolist() == [[16, 16], [16, 16]]
    assert bool((score[kept].view(2, 2, 16).amin(-1) >= score.masked_fill(kept, 0.0).amax(-1)).all())


@pytest.mark.parametrize("packing", FORMATS)
def test_numbers_of_no_width(packing: Packing) -> None:
    """Equal, tiny and huge numbers have a scale too, and come back."""
    k = torch.zeros(1, 1, 64, 64)
    k[..., 1], k[..., 2], k[..., 3], k[..., 4] = 3.0, 1e-42, 3e38, -2.5e-39
    k[..., 5] = torch.linspace(-1e-38, 1e-38, 64)
    arena, refused = pages_of(k, k, PageLayout(torch.float32, 64, packing))
    assert refused == {}
    got_k, got_v = stored(run_of(arena, 1), 64)
    assert bool(got_k.isfinite().all())
    assert bool(got_v.isfinite().all())
    steps = 2 * k.double().abs().amax(3, keepdim=True) / (127 if packing == "int8" else 15)
    assert bool(((got_v - k.double()).abs() <= 1e-36 + steps).all())
    assert float((got_k - k.double()).abs()[..., 1].max()) <= 3.0 / 127
    assert bool(((got_k - k.double()).abs() <= 1e-36 + k.double().abs() / 120).all())


# ---- What cannot be quantised ----


@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["k", "v"])
def test_a_page_with_a_number_that_is_not_finite_is_refused(half: str, spoilt: float, packing: Packing) -> None:
    """With its first such token, and nothing of it is written; other pages are."""
    k, v = normal(2, 192, 64, torch.bfloat16), normal(2, 192, 64, torch.bfloat16, 1)
    (k if half == "k" else v)[0, 1, 64 + 37 :: 5, 3] = spoilt
    (k if half == "k" else v)[0, 1, 128:, 3] = 0.0
    arena, refused = pages_of(k, v, PageLayout(torch.bfloat16, 64, packing))
    assert refused == {1: 37}
    assert bool((arena.k[1, 1] == 255).all()) and bool((arena.v[1, 1] == 255).all())
    got, _ = stored(run_of(arena, 1), 64)
    assert float((got - k[:, :, :64].double()).abs().max()) < 1.5


def test_keys_too_far_apart_for_float32_are_refused() -> None:
    k = torch.zeros(1, 1, 64, 64)
    k[..., 9, 3], k[..., 50, 3] = -3e38, 3e38
    for packing in FORMATS:
        assert pages_of(k, torch.zeros_like(k), PageLayout(torch.float32, 64, packing))[1] == {0: 0}


def test_values_too_far_apart_for_float32_are_refused() -> None:
    """In int4, whose groups of a token have a range of their own; int8 has a scale for both signs."""
    v = torch.zeros(1, 1, 64, 128)
    v[..., 9, 66], v[..., 9, 67] = -3e38, 3e38
    k = torch.zeros_like(v)
    assert pages_of(k, v, PageLayout(torch.float32, 64, "int4"))[1] == {0: 9}
    arena, refused = pages_of(k, v, PageLayout(torch.float32, 64, "int8"))
    assert refused == {}
    _, got = stored(run_of(arena, 1), 64)
    assert float((got - v.double()).abs().max()) <= 3e38 / 127
    v[..., 9, 67], v[..., 9, 127] = 0.0, 3e38  # within reach of a float, though in one token
    v[..., 9, 66] = 0.0
    assert pages_of(k, v, PageLayout(torch.float32, 64, "int4"))[1] == {}


# ---- Formats side by side ----


def mixture(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> tuple[Arenas, PagedKV, Tensor, Tensor]:
    """Eight pages of 32 tokens, in panels, int8 and int4 in turn, behind one table."""
    k, v = normal(2, 256, head_dim, dtype), normal(2, 256, head_dim, dtype, 1)
    rows = Arena.allocate(PageLayout(dtype, 32), 8, 2, head_dim)
    append(rows, table_of(8, 2), 0, k, v)
    room: dict[Packing, int] = {"panels": 4, "int8": 5, "int4": 6}
    parts = [Arena.allocate(PageLayout(dtype, 32, packing), num, 2, head_dim) for packing, num in room.items()]
    arenas = Arenas(tuple(parts))
    slots = [2, 4, 9, 8, 0, 14, 11, 5]
    assert cpu.move_pages(rows, arenas, list(range(8)), slots) == {}
    table = torch.tensor(slots, dtype=torch.int32).expand(1, 2, 8)
    run = PagedKV(arenas, table, torch.tensor([7]), torch.tensor([250]))
    return arenas, run, *stored(run, 250)


@pytest.mark.parametrize("isa", ISAS)
def test_a_table_lists_pages_of_several_formats(isa: str) -> None:
    """A tile of 64 tokens is then two pages of different kinds. The same as each kind alone, merged."""
    arenas, run, _, _ = mixture()
    rule = ScoreRule(0.03)
    q = torch.randn((1, 6, 2, 64), generator=torch.Generator().manual_seed(5))
    got = attend(q, run, rule=rule, isa=isa)
    slots, alone = run.page_table[0, 0].tolist(), []
    first = 0
    for part in arenas.parts:
        for page, slot in enumerate(slots):
            if first <= slot < first + part.num_slots:
                start, end = (7 if page == 0 else 0), (26 if page == 7 else 32)
                table = torch.tensor([[[slot - first]]], dtype=torch.int32).expand(1, 2, 1)
                one = PagedKV(part, table, torch.tensor([start]), torch.tensor([end]))
                alone.append(attend(q, one, rule=rule, isa="portable"))
        first += part.num_slots
    assert len(alone) == 8
    whole = merge(alone)
    torch.testing.assert_close(got.out, whole.out, rtol=0, atol=5e-4)
    torch.testing.assert_close(got.lse, whole.lse, rtol=0, atol=2e-4)
    truth = reference.attend(q, run, rule=rule, causal=False)
    torch.testing.assert_close(got.out.double(), truth.out, rtol=0, atol=5e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_blocks_of_several_formats(isa: str) -> None:
    """Each head its own blocks, in an order that mixes formats and pages."""
    arenas, run, k, v = mixture()
    rule, blocks = ScoreRule(0.03), [[0, 3, 4, 9, 14], [1, 2, 7, 8]]
    entries = torch.full((1, 2, 6), 2**30, dtype=torch.int32)
    for head, chosen in enumerate(blocks):
        for i, block in enumerate(chosen):
            entries[0, head, i] = int(run.page_table[0, head, block // 2]) * 2 * 2 + block % 2
    lens = torch.tensor([[16 * len(chosen) for chosen in blocks]])
    some = PagedKV(arenas, entries, torch.zeros(1, 2, dtype=torch.int64), lens, of_blocks=True)
    q = torch.randn((1, 6, 1, 64), generator=torch.Generator().manual_seed(5))
    mass = block_mass(q, some)
    got = attend(q, some, rule=rule, mass=mass, isa=isa)
    for head, chosen in enumerate(blocks):
        tokens = torch.cat([torch.arange(16 * block, 16 * block + 16) for block in chosen])
        for row in range(3):
            scores = rule.scale * (k[0, head, tokens] @ q[0, 3 * head + row, 0].double())
            p = scores.softmax(0)
            torch.testing.assert_close(
                got.out[0, 3 * head + row, 0].double(), p @ v[0, head, tokens], rtol=0, atol=5e-4
            )
            shares = p.view(-1, 16).sum(1)
            torch.testing.assert_close(mass[0, 3 * head + row, 0, : len(chosen)].double(), shares, rtol=0, atol=5e-4)


def test_pages_move_from_format_to_format() -> None:
    """int8 becomes int4 of what int8 stands for, rounded to rows."""
    k, v = normal(2, 64, 64, torch.float32), normal(2, 64, 64, torch.float32, 1)
    first, _ = pages_of(k, v, PageLayout(torch.float32, 64, "int8"))
    second = Arena.allocate(PageLayout(torch.float32, 64, "int4"), 1, 2, 64)
    assert cpu.move_pages(first, second, [0], [0]) == {}
    told_k, told_v = stored(run_of(first, 1), 64)
    straight, _ = pages_of(told_k.float(), told_v.float(), PageLayout(torch.float32, 64, "int4"))
    for got, want in zip(stored(run_of(second, 1), 64), stored(run_of(straight, 1), 64), strict=True):
        assert torch.equal(got, want)


# ---- Doors ----


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("packing", "least"), [("int8", 1.9), ("int4", 3.4)])
def test_bytes_buy_more_tokens(packing: Packing, least: float, head_dim: int) -> None:
    dtype = torch.bfloat16
    wide, narrow = (PageLayout(dtype, 64, p).page_bytes(8, head_dim, head_dim) for p in ("panels", packing))
    assert wide / narrow >= least


@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("num_channels", [None, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("page_size", "head_dim", "v_head_dim"), [(16, 64, 64), (48, 128, 192), (64, 256, 64), (160, 64, 128)]
)
def test_both_sides_count_the_same_bytes(
    page_size: int, head_dim: int, v_head_dim: int, dtype: torch.dtype, num_channels: int | None, packing: Packing
) -> None:
    layout = PageLayout(dtype, page_size, packing, num_channels)
    arena = Arena.allocate(layout, 1, 1, head_dim, v_head_dim=v_head_dim)
    assert cpu._native_part(arena).slice_bytes == (arena.k.nbytes, arena.v.nbytes)


def test_a_width_that_has_no_groups_is_refused() -> None:
    arena = Arena.allocate(PageLayout(torch.bfloat16, 64, "int4"), 1, 1, 80)
    with pytest.raises(
        UnsupportedError, match=r"scale for 64 dims: head_dim must be a multiple of it, got 80; use int8"
    ):
        cpu.native_arena(arena)


@pytest.mark.parametrize(
    ("packing", "num_channels"), [("int8", 0), ("int8", 24), ("int4", "16"), ("panels", 16), ("rows", 16)]
)
def test_channels_that_cannot_be_kept_are_refused(packing: Packing, num_channels: int) -> None:
    with pytest.raises(InputError, match="num_channels must be a multiple of 16, of int8 or int4 pages"):
        PageLayout(torch.bfloat16, 64, packing, num_channels)


def test_more_channels_than_keys_have_are_refused() -> None:
    arena = Arena.allocate(PageLayout(torch.bfloat16, 64, "int8", 128), 1, 1, 64)
    with pytest.raises(InputError, match="cannot keep 128 channels of keys that have 64"):
        cpu.native_arena(arena)


@pytest.mark.parametrize("packing", FORMATS)
def test_tokens_are_not_appended_to_codes(packing: Packing) -> None:
    arena = Arena.allocate(PageLayout(torch.float32, 16, packing), 1, 1, 64)
    one = torch.ones(1, 1, 1, 64)
    with pytest.raises(InputError, match="quantised pages are filled whole"):
        append(arena, table_of(1, 1), 0, one, one)
    run = PagedKV(arena, table_of(1, 1), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    with pytest.raises(InputError, match="quantised pages are filled whole"):
        append_and_attend(one, one, one, run, rule=ScoreRule(1.0), pool=cpu.single_thread())


def test_weights_of_another_shape_are_refused() -> None:
    k = normal(2, 64, 64, torch.float32)
    with pytest.raises(InputError, match=r"channel_weights must be float32 \[1, 2, 64\], got torch.float32 \[2, 64\]"):
        pages_of(k, k, PageLayout(torch.float32, 64, "int8", 16), torch.ones(2, 64))


def test_arenas_that_differ_in_more_than_packing_are_refused() -> None:
    one, other = (Arena.allocate(PageLayout(torch.float32, size), 1, 1, 64) for size in (16, 32))
    with pytest.raises(InputError, match="1 to 4 arenas that differ in packing alone"):
        Arenas((one, other))
    with pytest.raises(InputError, match="1 to 4 arenas that differ in packing alone"):
        Arenas((one,) * 5)


def test_codes_do_not_become_rows() -> None:
    codes = Arena.allocate(PageLayout(torch.float32, 16, "int8"), 1, 1, 64)
    rows = Arena.allocate(PageLayout(torch.float32, 16), 1, 1, 64)
    with pytest.raises(InputError, match=r"packs, and does not unpack: got \['int8'\] into \['rows'\]"):
        cpu.move_pages(codes, rows, [0], [0])
