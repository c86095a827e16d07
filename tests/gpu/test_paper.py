"""The paper's kernel: what it compiles to for GPUs that are not at hand, what its text computes as a C++ compiler
compiles it, and which chunks it asks for ahead of which reads."""

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.paper import NUM_WARPS, Paged, PaperKernel, paged
from tandemkv.errors import InputError
from tandemkv.types import Partial
from tests.dense import dense_attention, random_kv, visible_tokens
from tests.gpu.host_paper import BULK, LINE, READ, Call, HostPaper
from tests.tolerances import Bound, assert_within, attend_bound

HEADS = (64, 80, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
GROUPS = (1, 4, 7)
DISTANCES = ((0, False), (1, False), (1, True), (2, False), (2, True), (3, True))
# Whole blocks, and tokens beside them.
LENS = (((0, 1), (9, 3), (0, 0)), ((4, 0), (1, -1), (8, 1)), ((13, -1), (1, 0), (5, 0)), ((10, 2), (0, 2), (3, -1)))
NUM_KV_HEADS = 2


def every_shape() -> Iterator[tuple[PaperKernel, int, tuple[int, ...], bool]]:
    """Every head_dim with every block size; dtypes, distances, groups, lengths and ways to prefetch go round."""
    for i, (head_dim, block_tokens) in enumerate(product(HEADS, (16, 32, 64))):
        kernel = PaperKernel(head_dim, DTYPES[(i // 3 + i % 3) % 2], block_tokens, *DISTANCES[(i + i // 6) % 6])
        lens = tuple(blocks * block_tokens + tokens for blocks, tokens in LENS[(i + i // 4) % 4])
        yield kernel, GROUPS[(i + i // 3) % 3], lens, i % 2 == 0


SHAPES = list(every_shape())


def named(value: object) -> str | None:
    if not isinstance(value, PaperKernel):
        return None
    return f"{str(value.dtype)[6:]}-{value.head_dim}x{value.block_tokens}-ahead{value.distance}{value.prologue:d}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


def poisoned(kernel: PaperKernel, group_size: int, lens: tuple[int, ...]) -> tuple[Call, Partial, Bound]:
    """A call, its truth and bound. NaN: tokens that no sequence has, in blocks of theirs and in all others; wild: the
    table where no block is needed."""
    k, v = random_kv(len(lens) + 1, NUM_KV_HEADS, max(lens), kernel.head_dim, kernel.dtype)
    context_lens = torch.tensor([*lens, 0])
    visible = visible_tokens(torch.zeros_like(context_lens), context_lens, 1, max(lens), False)
    behind = ~visible[:, 0, None, :, None]
    k_cache, v_cache, table = paged(
        k.masked_fill(behind, torch.nan), v.masked_fill(behind, torch.nan), kernel.block_tokens
    )
    needed = torch.arange(table.shape[1]) * kernel.block_tokens < context_lens[:, None]
    wild = torch.tensor([2**31 - 1, -1], dtype=torch.int32).repeat(table.shape[1])[: table.shape[1]]
    table = torch.where(needed, table, wild)[:-1].contiguous()  # the last sequence is nobody's
    q = torch.randn(len(lens), NUM_KV_HEADS * group_size, kernel.head_dim).to(kernel.dtype)
    call = Call(q, Paged(k_cache, v_cache, table), context_lens[:-1].to(torch.int32), kernel.head_dim**-0.5)
    dense = q[:, :, None], k[:-1], v[:-1], visible[:-1], call.scale
    return call, dense_attention(*dense), attend_bound(*dense)


@pytest.mark.parametrize(("kernel", "group_size", "lens", "bulk"), SHAPES, ids=named)
def test_its_text_computes_attention_and_asks_for_what_it_reads(
    kernel: PaperKernel, group_size: int, lens: tuple[int, ...], bulk: bool, directory: Path
) -> None:
    """In both orders of threads, to the bit."""
    call, truth, bound = poisoned(kernel, group_size, lens)
    host = HostPaper.build(kernel, bulk, directory)
    part, events = host.attend(call)
    assert_within(part, truth, bound)
    check_events(kernel, call, events.tolist(), BULK if bulk else LINE)
    again, events = host.attend(call, descending=True)
    assert torch.equal(again.out, part.out)
    assert torch.equal(again.lse, part.lse)
    check_events(kernel, call, events.tolist(), BULK if bulk else LINE)


def check_events(kernel: PaperKernel, call: Call, events: list[list[int]], kind: int) -> None:
    """Every warp reads the chunks of its blocks, and nobody else reads or asks for anything."""
    num_heads, num_kv_heads = call.q.shape[1], call.paged.k_cache.shape[1]
    of_lanes = defaultdict(list)
    for head, seq, thread, event, place, at, num_bytes in events:
        of_lanes[head, seq, thread // 32, place, thread % 32].append((event, at, num_bytes))
    for seq, num_tokens in enumerate(call.context_lens.tolist()):
        num_blocks = -(-num_tokens // kernel.block_tokens)
        for head, warp, place in product(range(num_heads), range(NUM_WARPS), range(2)):
            blocks = call.paged.block_table[seq, warp:num_blocks:NUM_WARPS].tolist()
            chunks = [block * num_kv_heads + head * num_kv_heads // num_heads for block in blocks]
            lanes = [of_lanes.pop((head, seq, warp, place, lane), []) for lane in range(32)]
            check_warp(kernel, lanes, chunks, kind)
    assert not of_lanes


def check_warp(kernel: PaperKernel, lanes: list[list[tuple[int, int, int]]], chunks: list[int], kind: int) -> None:
    """In one cache: every lane reads every chunk in order. Each byte of a chunk is asked for once, right after the lane
    has read the chunk `distance` before it, or before all reads."""
    size, asked = kernel.block_bytes, []
    for lane in lanes:
        read: list[int] = []
        for event, at, num_bytes in lane:
            if event == READ:
                read.append(at // size)
            else:
                assert event == kind
                num_before = chunks.index(at // size) - kernel.distance + 1
                assert read == chunks[: max(0, num_before)]
                asked.append((at, num_bytes))
        assert read == chunks
    expected = chunks if kernel.prologue else chunks[kernel.distance :]
    step, num_bytes = (size, size) if kind == BULK else (128, 1)
    begins = [chunk * size + i for chunk in expected for i in range(0, size, step)] if kernel.distance else []
    assert sorted(asked) == sorted((begin, num_bytes) for begin in begins)
    if kind == BULK:
        assert all(event == READ for lane in lanes[1:] for event, _, _ in lane)


def test_a_length_beyond_the_table_gives_nan_and_nothing_else_does(directory: Path) -> None:
    kernel = PaperKernel(64, torch.float16)
    call, truth, bound = poisoned(kernel, 1, (40, 33))
    call.context_lens[1] = 49
    part, _ = HostPaper.build(kernel, True, directory).attend(call)
    assert part.out[1].isnan().all()
    assert part.lse[1].isnan().all()
    first = Bound(bound.out[:1], bound.lse[:1])
    assert_within(Partial(part.out[:1], part.lse[:1]), Partial(truth.out[:1], truth.lse[:1]), first)


def every_variant() -> Iterator[tuple[int, PaperKernel]]:
    """sm_80, sm_90 and sm_120 with every head_dim and distance, dtypes and prologue in turn; and the widest of all."""
    for i, (capability, head_dim, distance) in enumerate(product((80, 90, 120), (64, 128, 256), range(3))):
        yield capability, PaperKernel(head_dim, DTYPES[i % 2], 16, distance, distance > 0 and i // 3 % 2 == 0)
    for i, capability in enumerate((80, 90, 120)):
        yield capability, PaperKernel(256, DTYPES[i % 2], 64, 1, True)


@pytest.mark.parametrize(("capability", "kernel"), list(every_variant()), ids=named)
def test_it_compiles_and_asks_as_its_architecture_can(capability: int, kernel: PaperKernel) -> None:
    """K and V come in loads of 16 bytes, or 8 where two lanes share a token; registers suffice for them."""
    cubin, ptx, log = kernel.compiled(capability)
    assert len(cubin) > 1000
    assert re.search(rf"\.target sm_{capability}\b", ptx)
    (spilled,) = map(int, re.findall(r"(\d+) bytes spill stores", log))
    assert spilled <= (32 if kernel.block_tokens == 64 else 0)  # for 64, ptxas prefers a word or two to fewer warps
    assert ".local" not in ptx
    assert len(re.findall(r"ld\.global\.v[24]\.u32", ptx)) == kernel.head_dim * (32 + kernel.block_tokens) // 256
    bulk, lines = (ptx.count(name) for name in ("cp.async.bulk.prefetch.L2.global", "prefetch.global.L2"))
    assert ptx.count("cp.async") == bulk
    assert bool(bulk) == (kernel.distance > 0 and capability >= 90)
    assert bool(lines) == (kernel.distance > 0 and capability < 90)
    if bulk:
        assert bulk == 2 * (1 + kernel.prologue * kernel.distance)


def test_the_compiler_may_order_loads() -> None:
    free = PaperKernel(128, torch.float16, loads_first=False).compiled(90).ptx
    held = PaperKernel(128, torch.float16).compiled(90).ptx
    assert ("bar.warp.sync" in free, "bar.warp.sync" in held) == (False, True)
    assert len(re.findall(r"ld\.global\.nc\.", free)) > len(re.findall(r"ld\.global\.nc\.", held))


def test_the_paper_s_rule() -> None:
    """Llama2-7B asks for 512 KiB a sequence: 60 MB of L2 hold 114 of them (120 in the paper, of MiB)."""
    kernel = PaperKernel(128, torch.float16, distance=1)
    assert kernel.block_bytes == 4096
    assert [kernel.fits_l2(32, num_seqs, 60_000_000) for num_seqs in (114, 115)] == [True, False]
    assert kernel.fits_l2(32, 120, 60 << 20)
    assert not PaperKernel(128, torch.float16, distance=2).fits_l2(32, 120, 60 << 20)


def test_shared_memory_limits_the_context() -> None:
    kernel = PaperKernel(128, torch.bfloat16, 32)
    limit = 232_448  # a thread block's on sm_90
    longest = kernel.max_context(limit)
    assert kernel.shared_bytes(longest // 32) <= limit < kernel.shared_bytes(longest // 32 + 1)
    kernel.check_context(longest // 32, limit)
    with pytest.raises(InputError, match=f"at most {longest} tokens.* 232448 bytes.* got one of {longest + 32}"):
        kernel.check_context(longest // 32 + 1, limit)


def test_paged_holds_what_it_was_given() -> None:
    k, v = random_kv(3, 2, 50, 64, torch.float16)
    k_cache, v_cache, table = paged(k, v, 16)
    assert (k_cache.shape, v_cache.shape) == ((12, 2, 8, 16, 8), (12, 2, 64, 16))
    assert sorted(table.flatten().tolist()) == list(range(12))
    assert table.flatten().tolist() != list(range(12))
    for seq, head, token in ((0, 0, 0), (1, 1, 17), (2, 0, 49)):
        block = int(table[seq, token // 16])
        assert torch.equal(k_cache[block, head, :, token % 16].flatten(), k[seq, head, token])
        assert torch.equal(v_cache[block, head, :, token % 16], v[seq, head, token])
    assert v_cache[table[0, 3].long(), 0, :, 2:].isnan().all()


def test_what_it_cannot_attend_is_refused() -> None:
    for arguments in ((72,), (48,), (128, torch.float32), (128, torch.float16, 8), (128, torch.float16, 16, 0, True)):
        with pytest.raises(InputError, match="expected"):
            PaperKernel(*((*arguments, torch.float16) if len(arguments) == 1 else arguments))
    kernel = PaperKernel(64, torch.float16)
    call, *_ = poisoned(kernel, 2, (40, 33))
    with pytest.raises(InputError, match="on a CUDA device, got cpu"):
        kernel.attend(call.q, *call.paged, call.context_lens, call.scale)
    with pytest.raises(InputError, match=r"q must be contiguous torch.float16 \[2, 4, 64\] on cpu.* torch.bfloat16"):
        kernel.attend(call.q.bfloat16(), *call.paged, call.context_lens, call.scale)
    with pytest.raises(InputError, match="k_cache must be contiguous"):
        kernel.attend(call.q, *paged(*random_kv(2, 2, 40, 64, torch.float16), 32), call.context_lens, call.scale)
    with pytest.raises(InputError, match="context_lens must be"):
        kernel.attend(call.q, *call.paged, call.context_lens.long(), call.scale)
    with pytest.raises(InputError, match="a multiple of 2 KV heads, got 3"):
        kernel.attend(call.q[:, :3].contiguous(), *call.paged, call.context_lens, call.scale)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to run the kernel on")
@pytest.mark.parametrize(("kernel", "group_size", "lens", "bulk"), SHAPES, ids=named)
def test_a_gpu_computes_the_same(kernel: PaperKernel, group_size: int, lens: tuple[int, ...], bulk: bool) -> None:
    """What the table's unused entries point at is not read: they are wild there too."""
    call, truth, bound = poisoned(kernel, group_size, lens)
    on_gpu = [tensor.cuda() for tensor in (call.q, *call.paged, call.context_lens)]
    q, k_cache, v_cache, table, context_lens = on_gpu
    out, lse = kernel.attend(q, k_cache, v_cache, table, context_lens, call.scale)
    assert_within(Partial(out.cpu().unsqueeze(2), lse.cpu().unsqueeze(2)), truth, bound)
