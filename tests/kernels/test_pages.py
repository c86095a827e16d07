"""`append`, `gather` and `move_pages`: every token comes back as written, and nothing else is touched."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv import kernels
from tandemkv.errors import InputError
from tandemkv.kernels import cpu, reference
from tandemkv.types import Arena, Packing, PageLayout
from tests.paged import poisoned_arena, repacked

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PACKINGS: list[Packing] = ["rows", "panels"]
NUM_HEADS, NUM_PAGES, NUM_SLOTS = 3, 3, 11


def tables(num_seqs: int) -> Tensor:
    """Slots in random order; heads of a sequence share a page, sequences do not. The last slots stay unused."""
    order = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(num_seqs)).to(torch.int32)
    return order[: num_seqs * NUM_PAGES].reshape(num_seqs, 1, NUM_PAGES).expand(-1, NUM_HEADS, -1)


def tokens_of(
    num_seqs: int, num_tokens: int, head_dim: int, dtype: torch.dtype, v_head_dim: int | None = None
) -> tuple[Tensor, Tensor]:
    k, v = (torch.randn(num_seqs, NUM_HEADS, num_tokens, dim).to(dtype) for dim in (head_dim, v_head_dim or head_dim))
    return k, v


def read_back(arena: Arena, table: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    shape = (table.shape[0], NUM_HEADS, end - begin)
    k, v = (torch.full((*shape, dim), 7.0, dtype=arena.layout.dtype) for dim in (arena.head_dim, arena.v_head_dim))
    cpu.gather(arena, table, begin, k, v)
    return k, v


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([("rows", "rows"), ("rows", "panels"), ("panels", "panels")]),
    st.sampled_from([16, 48, 64]),
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 3),
    st.data(),
)
def test_append_move_gather_is_the_identity(
    dtype: torch.dtype,
    packings: tuple[Packing, Packing],
    page_size: int,
    head_dim: int,
    v_head_dim: int,
    num_seqs: int,
    data: st.DataObject,
) -> None:
    """Any run of tokens, cut into any appends, moved into a packing, read back over any range."""
    appended_to, packing = packings
    first, last = sorted(data.draw(st.integers(0, NUM_PAGES * page_size)) for _ in range(2))
    cuts = sorted({first, last, *data.draw(st.lists(st.integers(first, last), max_size=3))})
    begin, end = sorted(data.draw(st.integers(first, last)) for _ in range(2))
    source = poisoned_arena(PageLayout(dtype, page_size, appended_to), NUM_SLOTS, NUM_HEADS, head_dim, v_head_dim)
    table = tables(num_seqs)
    k, v = tokens_of(num_seqs, last - first, head_dim, dtype, v_head_dim)
    for a, b in pairwise(cuts):
        cpu.append(source, table, a, k[:, :, a - first : b - first], v[:, :, a - first : b - first])
    got_k, got_v = read_back(repacked(source, packing), table, begin, end)
    assert torch.equal(got_k, k[:, :, begin - first : end - first])
    assert torch.equal(got_v, v[:, :, begin - first : end - first])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("begin", "end"), [(0, 0), (5, 6), (0, 16), (15, 17), (3, 48)])
def test_append_touches_nothing_else(begin: int, end: int, packing: Packing, dtype: torch.dtype) -> None:
    arena = poisoned_arena(PageLayout(dtype, 16, packing), NUM_SLOTS, NUM_HEADS, 10)
    table = tables(2)
    k, v = tokens_of(2, end - begin, 10, dtype)
    cpu.append(arena, table, begin, k, v, cpu.WorkerPool(3))
    per_token = NUM_HEADS * arena.layout.stored_dim(10)
    for x in (arena.k, arena.v):
        assert int((~x.isnan()).sum()) == 2 * (end - begin) * per_token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 18, 33, 64, 80])
def test_panels_are_what_the_reference_reads(head_dim: int, dtype: torch.dtype) -> None:
    rows = poisoned_arena(PageLayout(dtype, 48), 2, NUM_HEADS, head_dim)
    rows.k.normal_()
    rows.v.normal_()
    panels = repacked(rows, "panels")
    for slot in range(2):
        for head in range(NUM_HEADS):
            k, v = reference.read_tokens(panels, torch.tensor([slot]), head, 0, 48)
            assert torch.equal(k, rows.k[slot, head])
            assert torch.equal(v, rows.v[slot, head])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_dims_of_panels_are_zero(dtype: torch.dtype) -> None:
    """A NaN there would survive a weight of zero."""
    rows = poisoned_arena(PageLayout(dtype, 16), 1, 1, 18)
    rows.k.fill_(1)
    rows.v.fill_(1)
    panels = repacked(rows, "panels")
    for x in (panels.k, panels.v):
        assert int((x == 1).sum()) == 16 * 18
        assert int((x == 0).sum()) == 16 * (32 - 18)


@pytest.mark.parametrize("packing", PACKINGS)
def test_move_pages_writes_the_named_slots_alone(packing: Packing) -> None:
    rows = poisoned_arena(PageLayout(torch.bfloat16, 16), 5, NUM_HEADS, 64)
    rows.k.normal_()
    rows.v.normal_()
    target = poisoned_arena(PageLayout(torch.bfloat16, 16, packing), 9, NUM_HEADS, 64)
    cpu.move_pages(rows, target, [4, 0, 4], [8, 2, 5], cpu.WorkerPool(2))
    written = ~target.k.flatten(1).isnan().any(1)
    assert written.nonzero().flatten().tolist() == [2, 5, 8]
    table = torch.tensor([8, 2, 5], dtype=torch.int32).expand(1, NUM_HEADS, 3)
    k, v = read_back(target, table, 0, 48)
    assert torch.equal(k[0], torch.cat([rows.k[4], rows.k[0], rows.k[4]], 1))
    assert torch.equal(v[0], torch.cat([rows.v[4], rows.v[0], rows.v[4]], 1))


def test_append_takes_the_strides_of_a_model() -> None:
    arena = poisoned_arena(PageLayout(torch.float32, 16), NUM_SLOTS, NUM_HEADS, 10)
    table = tables(2)
    k, v = tokens_of(2, 20, 10, torch.float32)
    as_projected = k.transpose(1, 2).contiguous().transpose(1, 2)
    every_other_dim = v.repeat_interleave(2, -1)[..., ::2]
    cpu.append(arena, table, 9, as_projected, every_other_dim)
    got_k, got_v = read_back(arena, table, 9, 29)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)


def test_gather_writes_into_a_slice() -> None:
    arena = poisoned_arena(PageLayout(torch.float32, 16), NUM_SLOTS, NUM_HEADS, 10)
    table = tables(1)
    k, v = tokens_of(1, 20, 10, torch.float32)
    cpu.append(arena, table, 0, k, v)
    wide = torch.full((2, 1, NUM_HEADS, 30, 10), 7.0)
    cpu.gather(arena, table, 0, wide[0, :, :, 5:25], wide[1, :, :, 5:25])
    assert torch.equal(wide[0, :, :, 5:25], k)
    assert torch.equal(wide[1, :, :, 5:25], v)
    assert (wide[..., :5, :] == 7).all()
    assert (wide[..., 25:, :] == 7).all()


# ---- What is refused; nothing is written then ----

Move = Callable[[Arena, Tensor, int, Tensor, Tensor], None]


@pytest.mark.parametrize("move", [cpu.append, cpu.gather])
@pytest.mark.parametrize("wild", [-1, 2**31 - 1, NUM_SLOTS])
def test_a_wild_slot_in_use_is_a_broken_invariant(wild: int, move: Move) -> None:
    arena = poisoned_arena(PageLayout(torch.float32, 16), NUM_SLOTS, NUM_HEADS, 10)
    table = tables(2).clone()
    table[1, 2, 1] = wild
    k, v = (torch.full((2, NUM_HEADS, 20, 10), 7.0) for _ in range(2))
    with pytest.raises(AssertionError, match="points outside its arena"):
        move(arena, table, 0, k, v)
    assert arena.k.isnan().all()
    assert (k == 7).all()
    move(arena, table, 0, k[:, :, :16], v[:, :, :16])  # the wild page is not in this run


@pytest.mark.parametrize("slots", [([0], [2]), ([2], [0]), ([-1], [0]), ([0, 0], [0, -1])])
def test_move_pages_beyond_an_arena_is_a_broken_invariant(slots: tuple[list[int], list[int]]) -> None:
    source = Arena.allocate(PageLayout(torch.float32, 16), 2, 1, 8)
    source.k.zero_()
    source.v.zero_()
    target = poisoned_arena(PageLayout(torch.float32, 16, "panels"), 2, 1, 8)
    with pytest.raises(AssertionError, match="points outside its arena"):
        cpu.move_pages(source, target, *slots)
    assert target.k.isnan().all()


ARENA = Arena.allocate(PageLayout(torch.float32, 16), NUM_SLOTS, NUM_HEADS, 10)
GOOD = torch.zeros(2, NUM_HEADS, 20, 10)
TABLE = tables(2)
REFUSED: dict[str, tuple[Arena, Tensor, int, Tensor, Tensor, str]] = {
    "k of bf16": (
        ARENA,
        TABLE,
        0,
        GOOD.bfloat16(),
        GOOD,
        r"k must be torch.float32 \[2, 3, 20, 10\].*got torch.bfloat16",
    ),
    "v of fp16": (ARENA, TABLE, 0, GOOD, GOOD.half(), "v must be .* got torch.float16"),
    "v shorter than k": (
        ARENA,
        TABLE,
        0,
        GOOD,
        GOOD[:, :, 1:],
        r"v must be .*\[2, 3, 20, 10\].* got .*\[2, 3, 19, 10\]",
    ),
    "two heads of three": (ARENA, TABLE, 0, GOOD[:, :2], GOOD[:, :2], r"k must be .* got .*\[2, 2, 20, 10\]"),
    "another head_dim": (ARENA, TABLE, 0, GOOD[..., :8], GOOD[..., :8], r"k must be .* got .*\[2, 3, 20, 8\]"),
    "three dims": (
        ARENA,
        TABLE,
        0,
        GOOD[0],
        GOOD[0],
        r"k must be .*num_tokens, 10\] .* got .*\[3, 20, 10\]",
    ),
    "v of three dims": (ARENA, TABLE, 0, GOOD, GOOD[0], r"v must be .* got .*\[3, 20, 10\]"),
    "k on another device": (ARENA, TABLE, 0, GOOD.to("meta"), GOOD, "k must be .* on cpu, got .* on meta"),
    "table of int64": (ARENA, TABLE.long(), 0, GOOD, GOOD, "page_table must be int32"),
    "table of one sequence": (
        ARENA,
        TABLE[:1],
        0,
        GOOD,
        GOOD,
        r"k must be .* \[1, 3, 20, 10\]",
    ),
    "a negative token": (ARENA, TABLE, -1, GOOD, GOOD, r"tokens \[-1, 19\) lie outside a table of 3 pages"),
    "behind the table": (ARENA, TABLE, 29, GOOD, GOOD, r"tokens \[29, 49\) lie outside a table of 3 pages"),
}


@pytest.mark.parametrize("move", [cpu.append, cpu.gather])
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str, move: Move) -> None:
    arena, table, begin, k, v, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        move(arena, table, begin, k, v)


def test_gather_refuses_targets_that_it_could_not_fill() -> None:
    strided = GOOD.mT.contiguous().mT
    for k, v in ((strided, GOOD), (GOOD, strided)):
        with pytest.raises(InputError, match="tensors whose head_dim is contiguous"):
            cpu.gather(ARENA, TABLE, 0, k, v)


ARENA_LIKE: dict[str, tuple[Any, ...]] = {
    "page_size": (PageLayout(torch.float32, 32), NUM_HEADS, 10),
    "dtype": (PageLayout(torch.bfloat16, 16), NUM_HEADS, 10),
    "heads": (PageLayout(torch.float32, 16), 2, 10),
    "head_dim": (PageLayout(torch.float32, 16), NUM_HEADS, 12, 10),
    "v_head_dim": (PageLayout(torch.float32, 16), NUM_HEADS, 10, 12),
}


@pytest.mark.parametrize("differs_in", ARENA_LIKE)
def test_move_pages_refuses_unlike_arenas(differs_in: str) -> None:
    layout, num_heads, head_dim, *v_head_dim = ARENA_LIKE[differs_in]
    other = Arena.allocate(layout, 2, num_heads, head_dim, v_head_dim=next(iter(v_head_dim), None))
    with pytest.raises(InputError, match="arenas differ in more than packing"):
        cpu.move_pages(ARENA, other, [0], [0])


def test_move_pages_refuses_to_unpack_and_uneven_slots() -> None:
    panels = repacked(ARENA, "panels")
    with pytest.raises(InputError, match=r"packs, and does not unpack: got \['panels'\] into \['rows'\]"):
        cpu.move_pages(panels, ARENA, [0], [0])
    with pytest.raises(InputError, match="1 source slots and 2 target slots: expected as many"):
        cpu.move_pages(ARENA, panels, [0], [0, 1])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moves_inside_one_arena(dtype: torch.dtype, packing: Packing) -> None:
    """Copy on write: the copy is the page, its source and every other slot stay."""
    rows = poisoned_arena(PageLayout(dtype, 16), 6, NUM_HEADS, 33, 20)
    for x in (rows.k, rows.v):
        x[:3].normal_()
    arena = repacked(rows, packing)
    before = arena.k.clone(), arena.v.clone()
    cpu.move_pages(arena, arena, [2, 0], [5, 3], cpu.WorkerPool(2))
    for x, was in zip((arena.k, arena.v), before, strict=True):
        assert torch.equal(x[[5, 3]], was[[2, 0]])
        assert torch.equal(x[:3], was[:3])
        assert torch.equal(x[4].nan_to_num(7.0), was[4].nan_to_num(7.0))


MOVES = {
    "a target twice": ([0, 1], [4, 4], r"written once by a move, got target slots \[4, 4\]"),
    "a target that is a source": ([0, 1], [4, 0], r"either read or written by a move, got \[0\] as source and target"),
    "a page onto itself": ([3], [3], r"either read or written by a move, got \[3\] as source and target"),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_that_overlap_are_refused(name: str) -> None:
    source_slots, target_slots, message = MOVES[name]
    arena = poisoned_arena(PageLayout(torch.float32, 16), 6, 1, 8)
    again = Arena(arena.k, arena.v, arena.layout, 8, 8)
    for target in (arena, again):
        with pytest.raises(InputError, match=message):
            cpu.move_pages(arena, target, source_slots, target_slots)


def test_a_target_named_twice_is_refused_between_arenas_too() -> None:
    other = Arena.allocate(ARENA.layout, 4, NUM_HEADS, 10)
    with pytest.raises(InputError, match=r"written once by a move, got target slots \[2, 2\]"):
        cpu.move_pages(ARENA, other, [0, 1], [2, 2])


def test_what_is_no_arena_table_or_slot_is_refused() -> None:
    for move in (cpu.append, cpu.gather):
        with pytest.raises(InputError, match="pages lie in an Arena, got Tensor"):
            move(ARENA.k, TABLE, 0, GOOD, GOOD)  # type: ignore[arg-type]
        wrong: tuple[tuple[Any, Any], ...] = ((TABLE.tolist(), 0), (TABLE, 0.5), (TABLE, None))
        for table, begin in wrong:
            with pytest.raises(InputError, match="expected a page_table tensor and a whole number begin, got"):
                move(ARENA, table, begin, GOOD, GOOD)
        with pytest.raises(InputError, match="k and v must be tensors, got list"):
            move(ARENA, TABLE, 0, GOOD.tolist(), GOOD)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="pool must be a WorkerPool"):
            move(ARENA, TABLE, 0, GOOD, GOOD, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pages lie in an Arena, got Arena, PageLayout"):
        kernels.move_pages(ARENA, ARENA.layout, [0], [1])  # type: ignore[arg-type]
    for slots in (torch.tensor([0]), [0.5], 0):
        with pytest.raises(InputError, match="slots must be a list of whole numbers, got"):
            cpu.move_pages(ARENA, ARENA, slots, [1])  # type: ignore[arg-type]
