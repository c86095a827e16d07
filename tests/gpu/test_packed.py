"""Pages of panels and codes on a GPU, or in Triton's interpreter: unpacked to the same bits as the CPU's, and attended
as those rows."""

import math
from dataclasses import replace

import pytest
import torch

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels import cpu, gpu, reference
from tandemkv.kernels.checks import raise_for
from tandemkv.kernels.gpu import Config
from tandemkv.types import Arena, Arenas, PagedKV, PageLayout, Partial, ScoreRule
from tests.dense import visible_tokens
from tests.tolerances import assert_within, attend_bound, kernel_rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_SLOTS, NUM_HEADS = 7, 2
LAYOUTS = {
    "panels": PageLayout(torch.bfloat16, 32, "panels"),
    "panels-fp16": PageLayout(torch.float16, 16, "panels"),
    "panels-fp32": PageLayout(torch.float32, 48, "panels"),
    "int8": PageLayout(torch.bfloat16, 64, "int8"),
    "int8-fp16": PageLayout(torch.float16, 16, "int8"),
    "int8-fp32": PageLayout(torch.float32, 48, "int8"),
    "int8/48": PageLayout(torch.bfloat16, 64, "int8", 48),
    "int4": PageLayout(torch.bfloat16, 64, "int4"),
    "int4-fp32": PageLayout(torch.float32, 32, "int4"),
    "int4/80": PageLayout(torch.float16, 16, "int4", 80),
}
WIDTHS = {"panels": (80, 40), "panels-fp32": (33, 65), "int8": (128, 128), "int8-fp16": (72, 33), "int8-fp32": (64, 16)}


def packed(name: str) -> tuple[Arena, Arena]:
    """Random pages of a layout, and the rows that they stand for, both in host memory."""
    layout = LAYOUTS[name]
    head_dim, v_head_dim = WIDTHS.get(name, (128, 192 if layout.packing == "int4" else 64))
    plain = PageLayout(layout.dtype, layout.page_size)
    generator = torch.Generator().manual_seed(3)
    rows = Arena.allocate(plain, NUM_SLOTS, NUM_HEADS, head_dim, v_head_dim=v_head_dim)
    for x in (rows.k, rows.v):
        x.copy_(torch.randn(x.shape, generator=generator) * (1 + 5 * torch.rand(x.shape[3], generator=generator)))
    arena = Arena.allocate(layout, NUM_SLOTS, NUM_HEADS, head_dim, v_head_dim=v_head_dim)
    every = list(range(NUM_SLOTS))
    assert cpu.move_pages(rows, arena, every, every) == {}
    k, v = (
        torch.empty(NUM_SLOTS, NUM_HEADS, layout.page_size, dim, dtype=layout.dtype) for dim in (head_dim, v_head_dim)
    )
    table = torch.arange(NUM_SLOTS, dtype=torch.int32)[:, None, None].expand(NUM_SLOTS, NUM_HEADS, 1)
    cpu.gather(arena, table, 0, k, v, None)
    return arena, Arena(k, v, plain, head_dim, v_head_dim)


def on_device(arena: Arena) -> Arena:
    return replace(arena, k=arena.k.to(DEVICE), v=arena.v.to(DEVICE))


@pytest.mark.parametrize("name", LAYOUTS)
def test_unpacked_to_the_same_bits(name: str) -> None:
    arena, truth = packed(name)
    target = Arena(
        torch.full_like(truth.k, math.nan), torch.full_like(truth.v, math.nan), truth.layout, *dims_of(truth)
    )
    target = on_device(target)
    slots, targets = torch.tensor([5, 0, 3], dtype=torch.int32), torch.tensor([1, 6, 2], dtype=torch.int32)
    gpu.unpack(on_device(arena), target, slots, targets)
    assert torch.equal(target.k[[1, 6, 2]].cpu(), truth.k[[5, 0, 3]])
    assert torch.equal(target.v[[1, 6, 2]].cpu(), truth.v[[5, 0, 3]])
    assert bool(target.k[[0, 3, 4, 5]].isnan().all())


def dims_of(arena: Arena) -> tuple[int, int]:
    return arena.head_dim, arena.v_head_dim


def runs_of(arena: Arena, of_blocks: bool) -> PagedKV:
    """Three sequences, each head with pages, or blocks, of its own; the last one has no tokens."""
    page = arena.layout.page_size
    if of_blocks:
        blocks = arena.num_kv_heads * page // 16
        entries = torch.randint(0, NUM_SLOTS, (3, NUM_HEADS, 5)) * blocks + torch.randint(
            0, page // 16, (3, NUM_HEADS, 5)
        )
        lens = torch.tensor([[80, 35], [17, 64], [0, 0]])
        return PagedKV(arena, entries.int(), torch.tensor([[0, 3], [0, 16], [0, 0]]), lens, of_blocks=True)
    table = torch.stack([torch.randperm(NUM_SLOTS)[:3] for _ in range(3 * NUM_HEADS)]).view(3, NUM_HEADS, 3).int()
    table[1, :, 2] = -1  # not needed: wild
    return PagedKV(arena, table, torch.tensor([0, 5, 0]), torch.tensor([3 * page - 9, 2 * page, 0]))


@pytest.mark.parametrize("of_blocks", [False, True], ids=["pages", "blocks"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attended_as_the_rows_that_they_stand_for(name: str, of_blocks: bool) -> None:
    torch.manual_seed(1)
    arena, truth = packed(name)
    kv = runs_of(truth, of_blocks)
    dtype, causal = truth.layout.dtype, not of_blocks
    rule = ScoreRule(1 / math.sqrt(truth.head_dim))
    q = torch.randn(3, 3 * NUM_HEADS, 2, truth.head_dim).to(dtype)
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    there = replace(kv, arena=on_device(arena))
    part = gpu.attend(q.to(DEVICE), there, rule=rule, causal=causal, flags=flags, config=Config(num_splits=2))
    raise_for(flags)
    part = Partial(part.out.cpu(), part.lse.cpu())
    expected = reference.attend(q, kv, rule=rule, causal=causal)
    if of_blocks:  # heads see tokens of their own: as sequences of one head each
        for head in range(NUM_HEADS):
            for seq in range(3):
                one = of_one_head(kv, truth, seq, head)
                rows, heads = slice(seq, seq + 1), slice(3 * head, 3 * head + 3)
                check(part, expected, q[rows, heads], one, (rows, heads), rule, causal=False)
    else:
        dense = [dense_of(kv, truth, seq) for seq in range(3)]
        for seq in range(3):
            check(part, expected, q[seq : seq + 1], dense[seq], (slice(seq, seq + 1), slice(None)), rule, causal=True)


def check(part, expected, q, dense, where, rule, causal) -> None:  # type: ignore[no-untyped-def]
    """Of some rows of a call, within the bounds of the dense k and v that they see."""
    k, v, start = dense
    length = torch.tensor([k.shape[2]])
    visible = visible_tokens(torch.tensor([start]), length, q.shape[2], k.shape[2], causal, None)
    bound = attend_bound(q, k, v, visible, rule, kernel_rounding(k.dtype), 2)
    assert_within(Partial(part.out[where], part.lse[where]), Partial(expected.out[where], expected.lse[where]), bound)


def dense_of(kv: PagedKV, rows: Arena, seq: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    slots, length = kv.page_table[seq].long().clamp(min=0), int(kv.kv_len[seq])
    heads = torch.arange(NUM_HEADS)[:, None]
    k, v = (x[slots, heads].flatten(1, 2)[None, :, :length] for x in (rows.k, rows.v))
    return k, v, int(kv.kv_start[seq])


def of_one_head(kv: PagedKV, rows: Arena, seq: int, head: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    blocks = rows.layout.page_size // 16
    entries, length = kv.page_table[seq, head].long(), int(kv.kv_len[seq, head])
    slots, places = entries // (NUM_HEADS * blocks), entries % (NUM_HEADS * blocks)
    found = [x[slots, head].unflatten(1, (blocks, 16))[torch.arange(5), places] for x in (rows.k, rows.v)]
    k, v = (x.flatten(0, 1)[None, None, :length] for x in found)
    return k, v, int(kv.kv_start[seq, head])


@pytest.mark.parametrize("of_blocks", [False, True], ids=["pages", "blocks"])
@pytest.mark.parametrize("packing", ["rows", "int4"])
@pytest.mark.parametrize("entry", [NUM_SLOTS * NUM_HEADS * 4, -1, -7, 2**31 - 1, -(2**31)])
def test_wild_entries_set_the_flag(packing: str, of_blocks: bool, entry: int) -> None:
    arena = packed("int4")[packing == "rows"]
    table = torch.full((1, NUM_HEADS, 1), entry, dtype=torch.int32)
    shape = (1, NUM_HEADS) if of_blocks else (1,)
    kv = PagedKV(on_device(arena), table, torch.zeros(shape).long(), torch.full(shape, 16), of_blocks)
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    part = gpu.attend(torch.randn(1, 2, 1, 128).to(DEVICE), kv, rule=ScoreRule(0.1), flags=flags)
    assert bool((part.lse == -torch.inf).all())
    with pytest.raises(AssertionError, match="points outside its arena"):
        raise_for(flags)


def test_what_cannot_be_unpacked_or_attended_is_refused() -> None:
    arena, rows = packed("int8")
    one = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InputError, match="become rows of the same shape on one device"):
        gpu.unpack(rows, arena, one, one)
    with pytest.raises(InputError, match=r"as many of both, got torch.int32 \[1\] and torch.int32 \[2\]"):
        gpu.unpack(arena, rows, one, torch.zeros(2, dtype=torch.int32))
    kv = PagedKV(Arenas((rows, arena)), one.view(1, 1, 1).expand(1, 2, 1), torch.tensor([0]), torch.tensor([5]))
    with pytest.raises(UnsupportedError, match="pages are of one packing"):
        gpu.attend(torch.randn(1, 2, 1, 128), kv, rule=ScoreRule(1.0))


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_appended_where_the_table_says(num_tokens: int) -> None:
    arena = on_device(packed("int8-fp16")[1])
    before, table = (
        replace(arena, k=arena.k.clone(), v=arena.v.clone()),
        torch.tensor([[4, 1, 2, 5], [6, 0, 3, -1]]).int(),
    )
    k = torch.randn(2, num_tokens, NUM_HEADS, 72).half().transpose(1, 2).to(DEVICE)
    v = torch.randn(2, NUM_HEADS, 33, num_tokens).half().transpose(2, 3).to(DEVICE)
    gpu.append(arena, table[:, None].expand(2, NUM_HEADS, 4), 7, k, v)
    expected = replace(before, k=before.k.cpu(), v=before.v.cpu())
    cpu.append(expected, table[:, None].expand(2, NUM_HEADS, 4), 7, k.cpu(), v.cpu(), None)
    assert torch.equal(arena.k.cpu(), expected.k)
    assert torch.equal(arena.v.cpu(), expected.v)
