"""Runs of blocks, what each block weighs, scores from codes and the choice of the highest, behind poisoned pages."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels import append, append_and_attend, attend, block_mass, cpu
from tandemkv.kernels.blocks import LANE_BLOCKS, BlockCodes, ChosenBlocks, FarPages, choose_blocks, score_blocks
from tandemkv.select import Summaries, Summariser
from tandemkv.select.bounds import Bounds
from tandemkv.select.columns import Columns
from tandemkv.types import BLOCK_TOKENS, Arena, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.dense import dense_attention
from tests.paged import WILD_SLOTS, paginate
from tests.tolerances import Bound, U, assert_within, attend_bound, kernel_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKINGS: tuple[Packing, ...] = ("rows", "panels")
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(missing != "", reason=f"{isa}: this machine lacks {missing}"))
    for isa, missing in cpu.available_isas().items()
]
RUNNABLE = [isa for isa, missing in cpu.available_isas().items() if not missing]


# -- Attention over runs of blocks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A call over chosen blocks `[seq][head]` of far pages, in that order, and over near tokens [near_start, near_len).

    padding: tokens of the first chosen block that do not exist, `[seq][head]`.
    """

    page_size: int
    group_size: int
    head_dim: int
    chosen: tuple[tuple[tuple[int, ...], ...], ...]
    padding: tuple[tuple[int, ...], ...] = ()
    near_len: int = 0
    near_start: tuple[int, ...] = ()
    q_len: int = 1
    causal: bool = False
    v_head_dim: int | None = None
    softcap: float | None = None

    @property
    def num_seqs(self) -> int:
        return len(self.chosen)

    @property
    def num_kv_heads(self) -> int:
        return len(self.chosen[0])

    @property
    def rule(self) -> ScoreRule:
        return ScoreRule(1 / math.sqrt(self.head_dim), self.softcap)


class Case(NamedTuple):
    """q; the runs, of blocks and of pages; K and V dense in the order of the runs' tables; who sees what.

    visible: `[num_seqs, num_kv_heads, q_len, num_tokens]`, tokens of the tables, so that block b has [16 b, 16 b + 16).
    """

    q: Tensor
    runs: tuple[PagedKV, PagedKV]
    k: Tensor
    v: Tensor
    visible: Tensor


def build(
    shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    """Normally distributed numbers; every far token that is not of a chosen block, or padding, is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_seqs, num_heads, v_dim = shape.num_seqs, shape.num_kv_heads, shape.v_head_dim or shape.head_dim
    page_blocks = shape.page_size // BLOCK_TOKENS
    num_blocks = 1 + max((block for seq in shape.chosen for head in seq for block in head), default=0)
    num_far = -(-num_blocks // page_blocks) * shape.page_size
    dims = num_seqs, num_heads, num_far
    far_k, far_v = (torch.randn((*dims, dim), generator=generator).to(dtype) for dim in (shape.head_dim, v_dim))
    exists = torch.zeros(dims, dtype=torch.bool)
    capacity = 2 + max(len(head) for seq in shape.chosen for head in seq)
    entries = torch.tensor(WILD_SLOTS, dtype=torch.int32).repeat(capacity)[:capacity].repeat(num_seqs, num_heads, 1)
    kv_start, kv_len = (torch.zeros(num_seqs, num_heads, dtype=torch.int64) for _ in range(2))
    k = torch.zeros(num_seqs, num_heads, capacity * BLOCK_TOKENS, shape.head_dim, dtype=dtype)
    v = torch.zeros(num_seqs, num_heads, capacity * BLOCK_TOKENS, v_dim, dtype=dtype)
    visible = torch.zeros(num_seqs, num_heads, shape.q_len, capacity * BLOCK_TOKENS, dtype=torch.bool)
    for seq, heads in enumerate(shape.chosen):
        for head, blocks in enumerate(heads):
            padding = shape.padding[seq][head] if shape.padding else 0
            for at, block in enumerate(blocks):
                first = padding if at == 0 else 0
                come = slice(block * BLOCK_TOKENS + first, (block + 1) * BLOCK_TOKENS)
                go = slice(at * BLOCK_TOKENS + first, (at + 1) * BLOCK_TOKENS)
                exists[seq, head, come], visible[seq, head, :, go] = True, True
                k[seq, head, go], v[seq, head, go] = far_k[seq, head, come], far_v[seq, head, come]
            kv_start[seq, head], kv_len[seq, head] = padding, len(blocks) * BLOCK_TOKENS
    far_k, far_v = (x.masked_fill(~exists[..., None], math.nan) for x in (far_k, far_v))
    pages = paginate(far_k, far_v, PageLayout(dtype, shape.page_size, packing), seed=seed)
    for seq, heads in enumerate(shape.chosen):
        for head, blocks in enumerate(heads):
            for at, block in enumerate(blocks):
                slot = int(pages.page_table[seq, head, block // page_blocks])
                entries[seq, head, at] = slot * num_heads * page_blocks + block % page_blocks
    far = PagedKV(pages.arena, entries, kv_start, kv_len, of_blocks=True)
    near, near_k, near_v, near_visible = near_run(shape, dtype, packing, generator, seed)
    q_dims = (num_seqs, num_heads * shape.group_size, shape.q_len, shape.head_dim)
    q = torch.randn(q_dims, generator=generator).to(q_dtype)
    return Case(
        q, (far, near), torch.cat([k, near_k], 2), torch.cat([v, near_v], 2), torch.cat([visible, near_visible], 3)
    )


def near_run(
    shape: Shape, dtype: torch.dtype, packing: Packing, generator: torch.Generator, seed: int
) -> tuple[PagedKV, Tensor, Tensor, Tensor]:
    """A run of pages, with K, V and who sees them for as many tokens as its table has room for."""
    starts = torch.tensor(shape.near_start or (0,) * shape.num_seqs)
    dims = shape.num_seqs, shape.num_kv_heads, shape.near_len
    k, v = (
        torch.randn((*dims, dim), generator=generator).to(dtype)
        for dim in (shape.head_dim, shape.v_head_dim or shape.head_dim)
    )
    lens = torch.full((shape.num_seqs,), shape.near_len)
    run = paginate(k, v, PageLayout(dtype, shape.page_size, packing), starts, lens, seed + 1)
    token, i = torch.arange(run.page_table.shape[2] * shape.page_size), torch.arange(shape.q_len)
    ends = shape.near_len - shape.q_len + 1 + i if shape.causal else torch.full_like(i, shape.near_len)
    visible = (token >= starts[:, None, None]) & (token < ends[:, None])
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, len(token) - shape.near_len)) for x in (k, v))
    return run, k, v, visible[:, None].expand(-1, shape.num_kv_heads, -1, -1)


def expected(case: Case, v: Tensor, rule: ScoreRule, dtype: torch.dtype, num_merges: int) -> tuple[Partial, Bound]:
    """Float64 attention of every head over what it sees of its own, with these values, and how far float32 may be."""
    group_size = case.q.shape[1] // case.k.shape[1]
    truths, bounds = [], []
    for head in range(case.k.shape[1]):
        q = case.q[:, head * group_size : (head + 1) * group_size]
        one_k, one_v, visible = case.k[:, head : head + 1], v[:, head : head + 1], case.visible[:, head]
        bound = attend_bound(q, one_k, one_v, visible, rule, kernel_rounding(dtype), num_merges)
        truths.append(capped_attention(q, one_k, one_v, visible, rule))
        bounds.append(bound)
    truth = Partial(torch.cat([part.out for part in truths], 1), torch.cat([part.lse for part in truths], 1))
    return truth, Bound(torch.cat([bound.out for bound in bounds], 1), torch.cat([bound.lse for bound in bounds], 1))


def capped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rule: ScoreRule) -> Partial:
    if rule.softcap is None:
        return dense_attention(q, k, v, visible, rule.scale)
    scores = rule.softcap * torch.tanh(rule.scale * (q.double() @ k.double().mT) / rule.softcap)
    scores = scores.masked_fill(~visible.unsqueeze(1), -math.inf)
    return Partial(torch.softmax(scores, -1).nan_to_num(0.0) @ v.double(), torch.logsumexp(scores, -1))


def shares(case: Case, rule: ScoreRule, dtype: torch.dtype, num_merges: int) -> tuple[Tensor, Tensor]:
    """The share of every block, float64, and its bound: attention whose values say which block a token is of."""
    num_tokens = case.k.shape[2]
    one_hot = torch.nn.functional.one_hot(torch.arange(num_tokens) // BLOCK_TOKENS).float()
    truth, bound = expected(case, one_hot.expand(*case.k.shape[:2], -1, -1), rule, dtype, num_merges)
    return truth.out, bound.out


def assert_shares(mass: Tensor, truth: Tensor, bound: Tensor) -> None:
    assert mass.shape == truth.shape
    assert ((mass.double() - truth).abs() <= bound).all()
    assert (mass[truth == 0] == 0).all()


# Merges: of items, of runs, and a share is weighed once more by what a merge weighs parts with.
NUM_MERGES = 2

# A tile is 4 blocks. Pages are at random slots, so that only blocks of one page follow each other in memory.
COVER = {
    "one-block": Shape(64, 4, 128, chosen=(((5,), (0,)),)),
    "uneven": Shape(64, 4, 128, chosen=(((1, 2, 9), (0,)), ((), (3, 4, 5, 6, 7))), near_len=70),
    "none-at-all": Shape(16, 2, 64, chosen=(((), ()),), near_len=33),
    "nothing-anywhere": Shape(16, 2, 64, chosen=(((), ()),)),
    "a-whole-page": Shape(64, 2, 64, chosen=(((0, 1, 2, 3), (4, 5, 6, 7, 8)),), near_len=1),
    "first-and-last-of-a-tile": Shape(64, 2, 64, chosen=(((0, 5, 6, 3), (4, 9, 2, 7, 8)),), near_len=20),
    "middle-of-a-tile": Shape(64, 3, 40, chosen=(((9, 1, 2, 12), (0, 1, 8, 3), (8, 1, 2, 3)),)),
    "second-tile-astray": Shape(128, 2, 64, chosen=(((0, 1, 2, 3, 4, 9, 10, 7), (8, 9, 10, 11, 12, 1, 14, 15)),)),
    "any-order": Shape(48, 5, 80, chosen=(((7, 0, 5, 2, 2 + 6, 1), (6, 5, 4, 3, 2, 1, 0)),), near_len=48),
    "padded": Shape(
        64, 2, 96, chosen=(((0, 1, 6), (0, 2)), ((1, 2, 3, 4), (7,))), padding=((3, 15), (8, 0)), near_len=40
    ),
    "padding-reaches-near": Shape(16, 2, 24, chosen=(((), ()), ((0,), (2,))), near_len=40, near_start=(17, 0)),
    "causal": Shape(
        16, 3, 64, chosen=(((0, 3), (1,)), ((2,), ())), padding=((5, 0), (0, 0)), near_len=50, q_len=5, causal=True
    ),
    "causal-padded": Shape(
        16, 1, 64, chosen=(((), ()), ((2,), (0, 1))), near_len=20, near_start=(18, 0), q_len=6, causal=True
    ),
    "several-queries": Shape(64, 2, 17, chosen=(((3, 9), (0, 1, 2)),), near_len=5, q_len=4, v_head_dim=50),
    "softcap": Shape(16, 2, 33, chosen=(((3, 9), (0,)),), near_len=25, q_len=2, causal=True, softcap=0.7),
    "mha": Shape(48, 1, 65, chosen=(((0,), (1, 2), (), (5, 6, 7, 8), (9,)),), near_len=17),
    "many": Shape(64, 8, 128, chosen=((tuple(range(1, 90, 2)), tuple(range(70))),), near_len=130),
    "groups-of-17": Shape(16, 17, 24, chosen=(((0, 2), (1,)),), near_len=19, q_len=2, causal=True),
}


@lru_cache(maxsize=4)  # the instruction set varies fastest
def solved(
    shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype
) -> tuple[Case, Partial, Bound, Tensor, Tensor]:
    case = build(shape, dtype, packing, q_dtype)
    return (
        case,
        *expected(case, case.v, shape.rule, dtype, NUM_MERGES),
        *shares(case, shape.rule, dtype, NUM_MERGES + 1),
    )


def check(shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype, isa: str) -> None:
    """Out, lse and mass; and out and lse are to the bit what they are where nobody asks for mass."""
    case, truth, bound, mass_truth, mass_bound = solved(shape, dtype, packing, q_dtype)
    mass = block_mass(case.q, *case.runs)
    got = attend(case.q, *case.runs, rule=shape.rule, causal=shape.causal, mass=mass, isa=isa)
    assert_within(got, truth, bound)
    assert_shares(mass, mass_truth, mass_bound)
    alone = attend(case.q, *case.runs, rule=shape.rule, causal=shape.causal, isa=isa)
    assert torch.equal(alone.out, got.out)
    assert torch.equal(alone.lse, got.lse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", COVER)
def test_equals_the_reference(name: str, packing: Packing, dtype: torch.dtype, isa: str) -> None:
    check(COVER[name], dtype, packing, torch.float32, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", range(1, 9))
def test_every_group_size(group_size: int, dtype: torch.dtype, isa: str) -> None:
    """With queries of KV's own type, and with three at once, which AMX multiplies in tiles."""
    for q_len in (1, 3):
        shape = Shape(
            64, group_size, 72, ((((4, 5, 1, 7, 8), (2,))),), ((5, 0),), near_len=30, q_len=q_len, causal=True
        )
        check(shape, dtype, "panels", dtype, isa)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    num_seqs, num_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    causal, near_len = draw(st.booleans()), draw(st.integers(0, 70))
    lists = st.lists(st.integers(0, 11), unique=True, max_size=9)
    rising = draw(st.booleans())

    def heads() -> tuple[tuple[int, ...], ...]:
        found = [draw(lists) for _ in range(num_heads)]
        return tuple(tuple(sorted(blocks) if rising else blocks) for blocks in found)

    return Shape(
        page_size=draw(st.sampled_from((16, 48, 64, 128))),
        group_size=draw(st.integers(1, 9)),
        head_dim=draw(st.integers(1, 140)),
        chosen=tuple(heads() for _ in range(num_seqs)),
        padding=tuple(tuple(draw(st.integers(0, 15)) for _ in range(num_heads)) for _ in range(num_seqs)),
        near_len=near_len,
        near_start=tuple(draw(st.integers(0, near_len)) for _ in range(num_seqs)),
        q_len=draw(st.integers(1, min(5, max(near_len, 1)) if causal else 5)),
        causal=causal,
        v_head_dim=draw(st.one_of(st.none(), st.integers(1, 140))),
        softcap=draw(st.sampled_from((None, None, 0.5, 30.0))),
    )


@settings(max_examples=60, deadline=None)
@given(shapes(), st.sampled_from(DTYPES), st.sampled_from(PACKINGS), st.sampled_from(DTYPES))
def test_any_shape(shape: Shape, dtype: torch.dtype, packing: Packing, q_dtype: torch.dtype) -> None:
    no_blocks = [
        [0 if not blocks else pad for blocks, pad in zip(*row, strict=True)]
        for row in zip(shape.chosen, shape.padding, strict=True)
    ]
    shape = replace(shape, padding=tuple(map(tuple, no_blocks)))
    for isa in RUNNABLE:
        check(shape, dtype, packing, q_dtype, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_block_in_the_middle_that_is_read_from_elsewhere_is_seen(isa: str) -> None:
    """The bounds are tight enough: one block of a tile exchanged for its neighbour lies outside of them."""
    shape = COVER["first-and-last-of-a-tile"]
    case, truth, bound, *_ = solved(shape, torch.float32, "panels", torch.float32)
    other = case.runs[0].page_table.clone()
    other[:, :, 1] = other[:, :, 2]
    got = attend(case.q, replace(case.runs[0], page_table=other), case.runs[1], rule=shape.rule, isa=isa)
    assert ((got.out.double() - truth.out).abs() > 100 * bound.out).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wild", [*WILD_SLOTS, "end"])
def test_a_wild_entry_in_use_is_a_broken_invariant(wild: int | str, isa: str) -> None:
    shape = COVER["uneven"]
    case = build(shape, torch.float32, "panels")
    far, arena = case.runs[0], case.runs[0].arena
    first_outside = arena.num_slots * shape.num_kv_heads * (shape.page_size // BLOCK_TOKENS)
    far.page_table[1, 1, 4] = first_outside if isinstance(wild, str) else wild
    with pytest.raises(AssertionError, match="a page table entry in use points outside its arena"):
        attend(case.q, *case.runs, rule=shape.rule, isa=isa)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_no_bit(num_threads: int) -> None:
    """Blocks of many items: their parts are merged and their shares are weighed alike."""
    shape = Shape(64, 4, 256, ((tuple(range(0, 400, 2)), tuple(range(300))),), near_len=100)
    case = build(shape, torch.float32, "panels")
    found = []
    for pool in (None, cpu.WorkerPool(num_threads)):
        mass = block_mass(case.q, *case.runs)
        part = attend(case.q, *case.runs, rule=shape.rule, mass=mass, pool=pool)
        found.append((part.out, part.lse, mass))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    truth, bound = shares(case, shape.rule, torch.float32, 12)
    assert_shares(found[0][2], truth, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["causal", "padded", "uneven", "softcap", "many"])
def test_a_sinks_logit_counts_in_the_whole(name: str, dtype: torch.dtype) -> None:
    """`append_and_attend`: shares are what the sink leaves, and what it gives is unchanged by asking for them."""
    shape = replace(COVER[name], causal=True)
    case = build(shape, dtype, "panels", dtype)
    own = slice(shape.near_len - shape.q_len, shape.near_len)
    begin = case.runs[0].num_blocks * BLOCK_TOKENS
    k, v = (x[:, :, begin + own.start : begin + own.stop] for x in (case.k, case.v))
    truth, bound = expected(case, case.v, shape.rule, dtype, NUM_MERGES)
    sink = (truth.lse.mean((0, 2)) + torch.linspace(-2, 2, case.q.shape[1])).float()
    pool = cpu.WorkerPool(2)
    plain = append_and_attend(case.q, k, v, *case.runs, rule=shape.rule, pool=pool, sink_logit=sink)
    mass = block_mass(case.q, *case.runs)
    got = append_and_attend(case.q, k, v, *case.runs, rule=shape.rule, pool=pool, sink_logit=sink, mass=mass)
    assert torch.equal(got, plain)
    left = torch.sigmoid(truth.lse - sink.double()[:, None]).unsqueeze(-1)
    assert left.min() < 0.9
    mass_truth, mass_bound = shares(case, shape.rule, dtype, NUM_MERGES + 2)
    # What the sink leaves follows from lse, whose error passes on at most as it is; its own rounding is a merge's.
    assert_shares(mass, mass_truth * left, mass_bound + mass_truth * left * 2 * bound.lse.unsqueeze(-1))


def test_shares_of_a_query_add_up_to_one() -> None:
    case = build(COVER["uneven"], torch.float32, "panels")
    mass = block_mass(case.q, *case.runs)
    attend(case.q, *case.runs, rule=COVER["uneven"].rule, mass=mass)
    torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:3]), rtol=100 * U, atol=0)


# -- The choice --------------------------------------------------------------------------------------------------------


def plain_choice(scores: list[float], wanted: int, capacity: int, start: int, num_sink_tokens: int) -> list[int]:
    """Blocks that are not padding alone, by rank: first tokens, NaN, then the highest, of equal ones the earliest."""

    def key(block: int) -> tuple[float, float, int]:
        is_sink = num_sink_tokens > 0 and block * BLOCK_TOKENS < start + num_sink_tokens
        is_nan = math.isnan(scores[block])
        return (0 if is_sink else 1 if is_nan else 2), 0 if is_sink or is_nan else -scores[block], block

    real = [block for block in range(len(scores)) if (block + 1) * BLOCK_TOKENS > start]
    allowed = [block for block in real if key(block)[0] < 2 or scores[block] > -math.inf]
    return sorted(sorted(allowed, key=key)[: max(0, min(wanted, capacity))])


def far_pages(page_size: int, num_pages: int, kv_start: list[int], num_heads: int, seed: int = 0) -> FarPages:
    generator = torch.Generator().manual_seed(seed)
    num_slots = len(kv_start) * num_pages + 2
    slots = torch.randperm(num_slots, generator=generator)[: len(kv_start) * num_pages].int()
    arena = Arena.allocate(PageLayout(torch.float32, page_size, "panels"), num_slots, num_heads, 1)
    return FarPages(arena, slots.reshape(len(kv_start), num_pages), torch.tensor(kv_start))


odd_scores = st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2**-23, -1e38, 1e38, math.inf, -math.inf, math.nan, 1e-45, -1e-45])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_choice_equals_a_plain_sort(data: st.DataObject) -> None:
    page_size, num_heads = data.draw(st.sampled_from((16, 48, 64))), data.draw(st.integers(1, 3))
    num_pages, num_seqs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    num_blocks, page_blocks = num_pages * page_size // BLOCK_TOKENS, page_size // BLOCK_TOKENS
    kv_start = data.draw(st.lists(st.integers(0, 200), min_size=num_seqs, max_size=num_seqs))
    far = far_pages(page_size, num_pages, kv_start, num_heads, seed=data.draw(st.integers(0, 99)))
    some = data.draw(st.sampled_from((odd_scores, st.floats(width=32), st.floats(0, 1, width=32))))
    flat = data.draw(st.lists(some, min_size=num_blocks, max_size=num_blocks * num_seqs * num_heads))
    shape = num_seqs, num_heads, num_blocks
    scores = torch.tensor(flat).repeat(num_seqs * num_heads)[: math.prod(shape)].reshape(shape)
    wanted = data.draw(st.integers(-1, 30))
    sinks, capacity = data.draw(st.sampled_from((0, 1, 4, 16, 17, 300))), data.draw(st.integers(1, 30))
    into = ChosenBlocks.allocate(far.arena, num_seqs, capacity)
    isa = data.draw(st.sampled_from([name for name, missing in cpu.available_isas().items() if not missing]))
    choose_blocks(scores, wanted, far, sinks, into, cpu.WorkerPool(data.draw(st.sampled_from((1, 2)))), isa)
    for seq in range(num_seqs):
        for head in range(num_heads):
            chosen = plain_choice(scores[seq, head].tolist(), wanted, capacity, kv_start[seq], sinks)
            assert into.counts[seq, head] == len(chosen)
            assert into.blocks[seq, head, : len(chosen)].tolist() == chosen
            assert into.is_chosen[seq, head].tolist() == [at < len(chosen) for at in range(capacity)]
            entries = [
                int(far.slots[seq, block // page_blocks]) * num_heads * page_blocks + block % page_blocks
                for block in chosen
            ]
            assert into.run.page_table[seq, head, : len(chosen)].tolist() == entries
            starts_here = chosen and chosen[0] == kv_start[seq] // BLOCK_TOKENS
            assert into.run.kv_start[seq, head] == (kv_start[seq] % BLOCK_TOKENS if starts_here else 0)
            assert into.run.kv_len[seq, head] == len(chosen) * BLOCK_TOKENS


def test_zeros_of_either_sign_are_equal() -> None:
    far = far_pages(16, 3, [0], 1)
    into = ChosenBlocks.allocate(far.arena, 1, 1)
    choose_blocks(torch.tensor([[[-0.0, 0.0, -0.0]]]), 1, far, 0, into)
    assert into.blocks.tolist() == [[[0]]]


def test_many_blocks_are_chosen_as_topk_does() -> None:
    """A length that no list has: 40,000 blocks, scores of one binade, and many that are equal."""
    far = far_pages(64, 10_000, [37], 2)
    generator = torch.Generator().manual_seed(0)
    scores = 1 + torch.randint(0, 9000, (1, 2, 40_000), generator=generator) / 9000
    into = ChosenBlocks.allocate(far.arena, 1, 5000)
    for wanted in (5000, 123):
        choose_blocks(scores, wanted, far, 4, into, cpu.WorkerPool(2))
        for head in range(2):
            chosen = plain_choice(scores[0, head].tolist(), wanted, 5000, 37, 4)
            assert into.blocks[0, head, :wanted].tolist() == chosen


def test_scores_may_be_a_view() -> None:
    """Heads and sequences that share their scores, as `Window` gives them."""
    far = far_pages(16, 6, [0, 20], 3)
    into = ChosenBlocks.allocate(far.arena, 2, 2)
    choose_blocks(torch.arange(6.0).expand(2, 3, 6), 2, far, 0, into)
    assert (into.blocks == torch.tensor([4, 5])).all()


def test_numbers_are_put_where_blocks_were_chosen() -> None:
    far = far_pages(16, 5, [0], 2)
    into = ChosenBlocks.allocate(far.arena, 1, 3)
    scores = torch.tensor([[[5.0, 1, 4, 2, 3], [-math.inf, 1, -math.inf, -math.inf, -math.inf]]])
    choose_blocks(scores, 2, far, 0, into)
    x = torch.zeros(1, 2, 5)
    put = into.put(x, torch.tensor([[[7.0, 8, 9], [6, 5, 4]]]))
    assert put.tolist() == [[[7, 0, 8, 0, 0], [0, 6, 0, 0, 0]]]
    assert (x == 0).all()


# -- Scores from codes -------------------------------------------------------------------------------------------------

CODED = [(page_size, head_dim) for page_size in (16, 48, 64) for head_dim in (4, 5, 24, 80, 128)]
NUM_SLOTS, NUM_HEADS = 9, 2


def keys(page_size: int, head_dim: int) -> Tensor:
    """float32 `[num_slots, num_kv_heads, page_size, head_dim]`, blocks and channels of very different sizes."""
    generator = torch.Generator().manual_seed(head_dim)
    k = torch.randn(NUM_SLOTS, NUM_HEADS, page_size, head_dim, generator=generator)
    k *= torch.exp(2 * torch.randn(NUM_SLOTS, NUM_HEADS, page_size // 16, 1, generator=generator)).repeat_interleave(
        16, 2
    )
    return k + torch.randn(head_dim, generator=generator)


def coded_pages(page_size: int) -> FarPages:
    """Two sequences, some slots of both, some of none, some that follow each other."""
    slots = torch.tensor([[7, 3, 4, 5, 0], [3, 8, 2, 4, 5]], dtype=torch.int32)
    arena = Arena.allocate(PageLayout(torch.bfloat16, page_size, "panels"), NUM_SLOTS, NUM_HEADS, 4)
    return FarPages(arena, slots, torch.zeros(2, dtype=torch.int64))


def coded(selector: Summariser, k: Tensor, basis: Any = None) -> tuple[BlockCodes, Any]:
    """Codes of pages of float32 keys `[num_slots, heads, page_size, head_dim]`, and what they were made with."""
    num_slots, num_heads, page_size, head_dim = k.shape
    arena = Arena.allocate(PageLayout(torch.float32, page_size, "panels"), num_slots, num_heads, head_dim)
    slots = torch.arange(num_slots, dtype=torch.int32)
    append(arena, slots[:, None, None].expand(-1, num_heads, 1), 0, k, k)
    codes = selector.allocate(arena)
    basis = selector.begin(arena, slots, None) if basis is None else basis
    selector.summarise(arena, slots, basis, codes, cpu.WorkerPool(2))
    return codes, basis


def only_used(codes: BlockCodes, far: FarPages) -> BlockCodes:
    """Codes whose unused slots would win every choice."""
    unused = [slot for slot in range(NUM_SLOTS) if slot not in far.slots]
    wild = BlockCodes(
        codes.kind, codes.codes.clone(), None if codes.steps is None else codes.steps.clone(), codes.page_blocks
    )
    wild.codes[:, unused] = 255
    if wild.steps is not None:
        wild.steps[:, unused] = math.nan
    return wild


def of_pages(x: Tensor, far: FarPages) -> Tensor:
    """`[num_slots, heads, blocks of a page, ...]` as `[num_seqs, heads, num_blocks, ...]`."""
    return x[far.slots.long()].transpose(1, 2).flatten(2, 3)


def bounds_of(codes: BlockCodes, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of minima and maxima, int64 `[num_slots, heads, blocks, head_dim]`, and the steps of blocks."""
    assert codes.steps is not None
    lines = codes.codes.permute(1, 0, 2, 5, 3, 4, 6)  # [slot, head, unit, block, line, word, 4]
    flat = lines.flatten(4).flatten(2, 3)[:, :, : codes.page_blocks].long() - 128
    half = -(-head_dim // 4) * 4
    return (
        flat[..., :head_dim],
        flat[..., half : half + head_dim],
        codes.steps.transpose(0, 1)[..., : codes.page_blocks],
    )


class OnIsa(Summaries):
    """Summaries whose codes are scored by one instruction set."""

    isa: str

    def score_codes(self, q: Tensor, directions: Tensor | None = None) -> Tensor:
        assert self.codes is not None
        rows = q.reshape(q.shape[0], self.num_kv_heads, -1, q.shape[3])
        return score_blocks(self.codes, rows, self.far, directions, self.pool, self.isa)


def summaries(isa: str, far: FarPages, codes: BlockCodes, basis: object = None) -> OnIsa:
    found = OnIsa(far, only_used(codes, far), basis, pool=cpu.WorkerPool(2))
    found.isa = isa
    return found


def weights_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rounded to 8 bits, and what a weight counts; rows `[num_seqs, heads, rows, n]`."""
    steps = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / steps).round().long(), steps


def queries(head_dim: int, q_len: int, group_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, NUM_HEADS * group_size, q_len, head_dim, generator=generator)


@pytest.mark.parametrize(("page_size", "head_dim"), CODED)
def test_bounds_contain_every_key(page_size: int, head_dim: int) -> None:
    k = keys(page_size, head_dim)
    for found in (k, k.bfloat16().float(), k * 1e-30, k * 1e30, torch.zeros_like(k), k.abs(), -k.abs()):
        low, high, steps = bounds_of(coded(Bounds(), found)[0], head_dim)
        blocks = found.unflatten(2, (-1, BLOCK_TOKENS))
        assert (low * steps[..., None] <= blocks.amin(3)).all()
        assert (high * steps[..., None] >= blocks.amax(3)).all()
        # And no more than a step beside it, of which the largest number has at least 126.
        assert (low * steps[..., None] >= blocks.amin(3) - 1.01 * steps[..., None]).all()
        assert (high * steps[..., None] <= blocks.amax(3) + 1.01 * steps[..., None]).all()
        assert (steps <= blocks.abs().amax((3, 4)) / 126 * (1 + 4 * U)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize(("page_size", "head_dim"), CODED)
def test_scores_of_bounds_are_integer_arithmetic(page_size: int, head_dim: int, q_len: int, isa: str) -> None:
    """To the bit: the largest of the rows of a group and all queries, of one, three, four or more."""
    far, codes = coded_pages(page_size), coded(Bounds(), keys(page_size, head_dim))[0]
    low, high, steps = (of_pages(x, far) for x in bounds_of(codes, head_dim))
    for group_size in (1, 3, 4):
        q = queries(head_dim, q_len, group_size)
        rows = q.unflatten(1, (NUM_HEADS, group_size)).flatten(2, 3)
        weights, scales = weights_of(torch.cat([rows.clamp(max=0), rows.clamp(min=0)], -1))
        dots = weights @ torch.cat([low, high], -1).mT  # [seq, head, row, block]
        want = (dots.float() * scales).amax(2) * steps
        assert torch.equal(Bounds().score(q, summaries(isa, far, codes)), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("page_size", "head_dim"), CODED)
def test_no_key_beats_the_bound_of_its_block(page_size: int, head_dim: int, isa: str) -> None:
    """Queries that 8 bits hold."""
    far, k = coded_pages(page_size), keys(page_size, head_dim)
    q = torch.randint(-127, 128, (2, NUM_HEADS * 3, 2, head_dim), generator=torch.Generator().manual_seed(1)).float()
    q[..., 0] = 127
    got = Bounds().score(q, summaries(isa, far, coded(Bounds(), k)[0])).double()
    rows = q.unflatten(1, (NUM_HEADS, 3)).flatten(2, 3).double()
    blocks = of_pages(k.unflatten(2, (-1, BLOCK_TOKENS)), far).double()  # [seq, head, block, token, dim]
    best = torch.einsum("shrd,shbtd->shbrt", rows, blocks).amax((3, 4))
    assert (got * (1 + 8 * U * got.sign()) >= best).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("num_columns", [4, 24])
@pytest.mark.parametrize(("page_size", "head_dim"), CODED)
def test_scores_of_columns_are_integer_arithmetic(
    page_size: int, head_dim: int, num_columns: int, q_len: int, isa: str
) -> None:
    selector, far, k = Columns(num_columns), coded_pages(page_size), keys(page_size, head_dim)
    made, basis = coded(selector, k)
    # [head, slot, block, line, 1, token, 4] -> [slot, head, block, token, column]
    codes = made.codes.permute(1, 0, 2, 5, 3, 4, 6).flatten(4).long() - 128
    for group_size in (1, 3, 4):
        q = queries(head_dim, q_len, group_size)
        grouped = q.unflatten(1, (NUM_HEADS, group_size)).flatten(2, 3)
        rows = torch.zeros(*grouped.shape[:3], basis.weights.shape[2])
        for d in range(head_dim):  # in the kernel's order, so that roundings are the same
            rows = rows + grouped[..., d, None] * basis.weights[:, None, d]
        weights, scales = weights_of(rows)
        dots = torch.einsum("shrc,shbtc->shrbt", weights, of_pages(codes, far)).amax(-1)
        want = (dots.float() * scales).amax(2)
        assert torch.equal(selector.score(q, summaries(isa, far, made, basis)), want)


@pytest.mark.parametrize("selector", [Bounds(), Columns(24)], ids=["bounds", "columns"])
def test_a_bf16_query_scores_as_its_numbers_in_float32(selector: Bounds | Columns) -> None:
    far, (codes, basis) = coded_pages(64), coded(selector, keys(64, 32))
    q = queries(32, 2, 3).bfloat16()
    got, want = (selector.score(x, summaries(cpu.resolve_isa(), far, codes, basis)) for x in (q, q.float()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", [4, 16, 20])
def test_columns_of_all_directions_are_the_keys(head_dim: int) -> None:
    """Where there are as many columns as channels, a score is q.k of the best key, less the mean's, in 8 bits."""
    selector, far, k = Columns(24), coded_pages(16), torch.randn(NUM_SLOTS, NUM_HEADS, 16, head_dim)
    made, basis = coded(selector, k)
    eye = torch.eye(head_dim)
    for directions in basis.directions:
        torch.testing.assert_close(directions[:, :head_dim].mT @ directions[:, :head_dim], eye, atol=1e-5, rtol=0)
    widths = basis.steps[:, :head_dim]
    assert (widths.diff(dim=1) <= 0).all()
    q = queries(head_dim, 1, 1)
    got = selector.score(q, summaries(RUNNABLE[0], far, made, basis)).double()
    blocks = of_pages((k - basis.mean[:, None]).unflatten(2, (-1, BLOCK_TOKENS)), far)
    want = torch.einsum("shd,shbtd->shbt", q[:, :, 0], blocks).amax(-1).double()
    # A weight and a code are off by half a step each, a code is at most 127.
    along = (q[:, :, 0, None] @ basis.directions)[:, :, 0]
    weight_step = (along * basis.steps).abs().amax(-1) / 127
    numbers = (of_pages(k.unflatten(2, (-1, BLOCK_TOKENS)), far) - basis.mean[:, None, None]) @ basis.directions[
        :, None
    ]
    assert (numbers.abs() / basis.steps[:, None, None] < 127).all()  # nothing is cut off
    allowed = 0.5 * (along.abs() * basis.steps).sum(-1) + 0.5 * weight_step * 127 * head_dim
    assert ((got - want).abs() <= 1.001 * allowed[..., None]).all()


@pytest.mark.parametrize("selector", [Bounds(), Columns()], ids=["bounds", "columns"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_keys_that_are_no_numbers_are_seen(selector: Summariser, number: float) -> None:
    """Their block is among the chosen ones, so that attention shows them; other blocks keep their scores."""
    far, k = coded_pages(64), keys(64, 80)
    codes, basis = coded(selector, k)
    before = selector.score(queries(80, 1, 1).abs(), summaries(RUNNABLE[0], far, codes, basis))
    k[4, 1, 20] = number  # the second block of slot 4: block 9 of sequence 0, 13 of sequence 1
    codes, basis = coded(selector, k, basis)
    after = selector.score(queries(80, 1, 1).abs(), summaries(RUNNABLE[0], far, codes, basis))
    changed = torch.zeros(2, NUM_HEADS, 20, dtype=torch.bool)
    changed[0, 1, 9] = changed[1, 1, 13] = True
    assert torch.equal(before[~changed], after[~changed])
    if isinstance(selector, Bounds):
        assert after[changed].isnan().all()


def test_bounds_cost_a_thirtieth_of_what_they_say() -> None:
    num_pages, head_dim, page_size = 3, 128, 64
    codes, _ = coded(Bounds(), torch.randn(num_pages, 8, page_size, head_dim))
    assert codes.steps is not None
    kv_bytes = num_pages * 8 * page_size * head_dim * 2 * 2
    assert codes.codes.nbytes + codes.steps.nbytes <= 0.035 * kv_bytes
    assert codes.codes.shape[2] * LANE_BLOCKS == page_size // BLOCK_TOKENS


# -- Doors -------------------------------------------------------------------------------------------------------------


def test_mass_of_another_shape_is_refused() -> None:
    case = build(COVER["uneven"], torch.float32, "panels")
    q, runs, rule = case.q, case.runs, COVER["uneven"].rule
    good = block_mass(q, *runs)
    assert good.shape == (*q.shape[:3], sum(run.num_blocks for run in runs))
    wrong: list[Any] = [
        good[..., 1:].contiguous(),
        good.double(),
        good.flatten(1),
        good.transpose(0, 1).contiguous().transpose(0, 1),
        good.to("meta"),
        block_mass(q, runs[0]),
        good.tolist(),
    ]
    for mass in wrong:
        with pytest.raises(InputError, match=r"mass must be contiguous float32 \[2, 8, 1, \d+\] on the CPU, got"):
            attend(q, *runs, rule=rule, mass=mass)
        with pytest.raises(InputError, match=r"mass must be contiguous float32 \[2, 8, 1, \d+\] on the CPU, got"):
            k = torch.zeros(2, 2, 1, 128)
            append_and_attend(q, k, k, *runs, rule=rule, pool=cpu.single_thread(), mass=mass)


@pytest.mark.parametrize("name", ["kv_start", "kv_len"])
@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2), (2, 2, 1), (4,)])
def test_lengths_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    case = build(COVER["uneven"], torch.float32, "panels")
    lengths: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.int64)}
    far = replace(case.runs[0], **lengths)
    with pytest.raises(InputError, match=rf"{name} must be contiguous int64 \[2, 2\] on the CPU, got"):
        attend(case.q, far, case.runs[1], rule=COVER["uneven"].rule)


def test_lengths_of_a_head_are_refused_of_pages() -> None:
    case = build(COVER["uneven"], torch.float32, "panels")
    near = replace(case.runs[1], kv_len=torch.zeros((2, 2), dtype=torch.int64))
    with pytest.raises(InputError, match=r"kv_len must be contiguous int64 \[2\] on the CPU, got"):
        attend(case.q, case.runs[0], near, rule=COVER["uneven"].rule)


@pytest.mark.parametrize("kv_len", [-16, 16 * 8])
def test_a_length_outside_the_table_is_refused(kv_len: int) -> None:
    case = build(COVER["uneven"], torch.float32, "panels")
    case.runs[0].kv_len[1, 0] = kv_len
    with pytest.raises(InputError, match=r"must lie in \[0, 112\] for a table of 7 blocks"):
        attend(case.q, *case.runs, rule=COVER["uneven"].rule)


def test_blocks_have_no_newest_token() -> None:
    """Causal queries are the last tokens of the last run: not of blocks, whose heads have lengths of their own."""
    case = build(COVER["uneven"], torch.float32, "panels")
    with pytest.raises(InputError, match="blocks"):
        attend(case.q, case.runs[1], case.runs[0], rule=COVER["uneven"].rule, causal=True)
    k = torch.zeros(2, 2, 1, 128)
    with pytest.raises(InputError, match="blocks"):
        append_and_attend(case.q, k, k, case.runs[0], rule=COVER["uneven"].rule, pool=cpu.single_thread())


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(1, 2, 5),
        torch.zeros(1, 2, 7),
        torch.zeros(1, 2, 6).double(),
        torch.zeros(1, 6, 2).mT,
        torch.zeros(1, 1, 6),
        torch.zeros(2, 2, 6),
    ],
    ids=["too few", "too many", "double", "strided", "heads", "sequences"],
)
def test_scores_of_another_shape_are_refused(scores: Tensor) -> None:
    far = far_pages(16, 6, [0], 2)
    into = ChosenBlocks.allocate(far.arena, 1, 3)
    with pytest.raises(InputError, match="scores must be float32"):
        choose_blocks(scores, 2, far, 0, into)
