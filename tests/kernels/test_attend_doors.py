"""What `attend` refuses at the door, each with its message."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv.errors import InputError, TandemError, UnsupportedError
from tandemkv.kernels import append_and_attend, attend, cpu, probes
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule
from tests.paged import Shape, build, paginate

Call = tuple[Tensor, PagedKV]
LAYOUT = PageLayout(torch.float32, 16)
CASE = build(Shape(16, 2, 2, 64, kv_len=(40, 33), kv_start=(0, 3)))  # tables of 4 pages: 64 tokens


def change_q(q: Tensor) -> Callable[[], Call]:
    return lambda: (q, CASE.kv)


def change_kv(**fields: object) -> Callable[[], Call]:
    return lambda: (CASE.q, replace(CASE.kv, **fields))  # type: ignore[arg-type]


def arena_of(head_dim: int, device: str = "cpu", v_head_dim: int | None = None) -> Callable[[], Call]:
    arena = Arena.allocate(PageLayout(torch.float32, 16), 4, 2, head_dim, device, v_head_dim=v_head_dim)
    return lambda: (torch.zeros(2, 4, 1, head_dim), replace(CASE.kv, arena=arena))


def heads_of_q(num_q_heads: int) -> Callable[[], Call]:
    return change_q(torch.zeros(2, num_q_heads, 1, 64))


table, kv_len = CASE.kv.page_table, CASE.kv.kv_len
REFUSED: dict[str, tuple[Callable[[], Call], type[TandemError], str]] = {
    "q on another device": (change_q(CASE.q.to("meta")), InputError, "queries in host memory, got meta"),
    "q of float64": (
        change_q(CASE.q.double()),
        UnsupportedError,
        "float32, bfloat16 or float16, got torch.float64: load the model with",
    ),
    "q of three dims": (change_q(CASE.q[0]), InputError, r"expected q \[.*, 64\], got \[4, 1, 64\]"),
    "q of another head_dim": (change_q(CASE.q[..., :32]), InputError, r"expected q \[.*, 64\], got \[2, 4, 1, 32\]"),
    "no query": (change_q(CASE.q[:, :, :0]), InputError, r"q_len must be at least 1, got \[2, 4, 0, 64\]"),
    "group of 1.5": (heads_of_q(3), InputError, "must be a multiple of the 2 KV heads, got 3"),
    "group of 0": (heads_of_q(0), InputError, "must be a multiple of the 2 KV heads, got 0"),
    "table of int64": (change_kv(page_table=table.long()), InputError, r"int32 \[2, 2, num_pages\].*got torch.int64"),
    "table of two dims": (
        change_kv(page_table=table[0]),
        InputError,
        r"page_table must be .* got torch.int32 \[2, 4\]",
    ),
    "table of one sequence": (
        change_kv(page_table=table[:1]),
        InputError,
        r"page_table must be \[2, 2, num_pages\]",
    ),
    "table of three heads": (
        change_kv(page_table=table[:, [0, 1, 1]]),
        InputError,
        r"page_table must be .*\[2, 3, 4\]",
    ),
    "table on another device": (change_kv(page_table=table.to("meta")), InputError, "page_table must be .* on meta"),
    "table with strided pages": (change_kv(page_table=table[..., ::2]), InputError, "contiguous along its pages"),
    "table too short": (change_kv(page_table=table[..., :2]), InputError, r"lie in \[0, 32\] for a table of 2 pages"),
    "table of no pages": (change_kv(page_table=table[..., :0]), InputError, r"lie in \[0, 0\] for a table of 0 pages"),
    "kv_len behind the table": (change_kv(kv_len=torch.tensor([40, 65])), InputError, r"lie in \[0, 64\]"),
    "kv_len below 0": (change_kv(kv_len=torch.tensor([40, -5])), InputError, r"lie in \[0, 64\]"),
    "kv_start below 0": (change_kv(kv_start=torch.tensor([0, -1])), InputError, r"lie in \[0, 64\]"),
    "kv_len of int32": (
        change_kv(kv_len=kv_len.int()),
        InputError,
        r"kv_len must be .*int64 \[2\].*got torch.int32 \[2\]",
    ),
    "kv_start of one": (
        change_kv(kv_start=torch.tensor([0])),
        InputError,
        r"kv_start must be .*\[2\].*got torch.int64 \[1\]",
    ),
    "kv_len strided": (change_kv(kv_len=kv_len.repeat_interleave(2)[::2]), InputError, "kv_len must be contiguous"),
    "kv_len on another device": (change_kv(kv_len=kv_len.to("meta")), InputError, "kv_len must be .* on meta"),
    "arena on another device": (arena_of(64, "meta"), InputError, "arenas in host memory, got meta"),
    "head_dim of 257": (arena_of(257), UnsupportedError, "head_dim must be 1 to 256, got 257"),
    "v_head_dim of 257": (arena_of(64, v_head_dim=257), UnsupportedError, "v_head_dim must be 1 to 256, got 257"),
    "v_head_dim of 0": (arena_of(64, v_head_dim=0), UnsupportedError, "v_head_dim must be 1 to 256, got 0"),
}


def test_the_case_itself_is_accepted() -> None:
    attend(CASE.q, CASE.kv, rule=ScoreRule(1.0))


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    q, kv = make()
    with pytest.raises(error, match=message):
        attend(q, kv, rule=ScoreRule(1.0))


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_append_and_attend(name: str) -> None:
    """With its own message or one about k and v; nothing is written."""
    make, _, _ = REFUSED[name]
    q, kv = make()
    v = torch.full((2, 2, 1, 64), 7.0)
    before = kv.arena.k.clone()
    with pytest.raises(TandemError):
        append_and_attend(q, v, v, kv, rule=ScoreRule(1.0), pool=cpu.single_thread())
    if before.device.type == "cpu":
        assert torch.equal(kv.arena.k.nan_to_num(3.0), before.nan_to_num(3.0))


@pytest.mark.parametrize("lengths", [[40, 39], [65, 65], [0, 0], [-3, -3], [2, 2]])
def test_append_and_attend_writes_only_where_its_tokens_are(lengths: list[int]) -> None:
    """Ragged, behind the table, in front of it: refused before a byte is written."""
    kv = replace(CASE.kv, kv_start=torch.zeros(2, dtype=torch.int64), kv_len=torch.tensor(lengths))
    before = kv.arena.k.clone()
    q, k = torch.zeros(2, 4, 3, 64), torch.full((2, 2, 3, 64), 7.0)
    with pytest.raises(InputError, match=r"lie in \[0, 64\] for a table of 4 pages|same for all sequences, count"):
        append_and_attend(q, k, k, kv, rule=ScoreRule(1.0), pool=cpu.single_thread())
    assert torch.equal(kv.arena.k.nan_to_num(3.0), before.nan_to_num(3.0))


def test_tensors_that_moved_are_seen() -> None:
    """C++ keeps addresses between calls; a tensor may get other memory."""
    arena = Arena.allocate(PageLayout(torch.float32, 16), 1, 1, 2)
    arena.k.fill_(1)
    arena.v.fill_(1)
    kv = PagedKV(arena, torch.zeros((1, 1, 1), dtype=torch.int32), torch.tensor([0]), torch.tensor([5]))
    q = torch.ones(1, 1, 1, 2)
    assert attend(q, kv, rule=ScoreRule(1.0)).out.tolist() == [[[[1.0, 1.0]]]]
    arena.v.share_memory_()
    arena.v.fill_(5)
    assert attend(q, kv, rule=ScoreRule(1.0)).out.tolist() == [[[[5.0, 5.0]]]]
    kv.kv_len.data = torch.tensor([0])
    assert attend(q, kv, rule=ScoreRule(1.0)).out.tolist() == [[[[0.0, 0.0]]]]


def test_a_resized_table_is_seen() -> None:
    """The memory stays where it is, the sizes do not."""
    kv = paginate(torch.ones(1, 1, 40, 2), torch.ones(1, 1, 40, 2), PageLayout(torch.float32, 16))
    q = torch.ones(1, 1, 1, 2)
    attend(q, kv, rule=ScoreRule(1.0))
    kv.page_table.resize_(1, 1, 2)
    with pytest.raises(InputError, match=r"lie in \[0, 32\] for a table of 2 pages, got \[0\] and \[40\]"):
        attend(q, kv, rule=ScoreRule(1.0))


def test_the_default_device_does_not_matter() -> None:
    expected = attend(CASE.q, CASE.kv, rule=ScoreRule(1.0))
    with torch.device("meta"):
        found = attend(CASE.q, CASE.kv, rule=ScoreRule(1.0))
    assert torch.equal(found.out, expected.out)


def test_a_negative_view_is_read_as_what_it_says() -> None:
    expected = attend(-CASE.q, CASE.kv, rule=ScoreRule(1.0))
    assert torch.equal(attend(torch._neg_view(CASE.q), CASE.kv, rule=ScoreRule(1.0)).out, expected.out)


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan, 1e39])
def test_a_scale_that_is_no_number(scale: float) -> None:
    with pytest.raises(InputError, match="scale must be finite, got"):
        attend(CASE.q, CASE.kv, rule=ScoreRule(scale))


def test_what_is_no_tensor_or_run() -> None:
    for q, kv in ((None, CASE.kv), (CASE.q, None), (CASE.q.tolist(), CASE.kv), (CASE.q, CASE.kv.arena)):
        with pytest.raises(InputError, match="expected a tensor q and runs of PagedKV, got"):
            attend(q, kv, rule=ScoreRule(1.0))  # type: ignore[arg-type]


def test_what_is_no_rule_pool_or_flag() -> None:
    """Each with a message of its own, not the first attribute that a number lacks."""
    rule = ScoreRule(1.0)
    wrong: Any
    for wrong in (0.5, None, "plain"):
        with pytest.raises(InputError, match=r"rule must be a ScoreRule, such as ScoreRule\(scale=0.125\), got"):
            attend(CASE.q, CASE.kv, rule=wrong)
    for wrong in ("yes", 1, None):
        with pytest.raises(InputError, match="causal must be True or False, got"):
            attend(CASE.q, CASE.kv, rule=rule, causal=wrong)
    for wrong in (2, "all", object()):
        with pytest.raises(InputError, match=r"pool must be a WorkerPool, such as WorkerPool\(2\), or None, got"):
            attend(CASE.q, CASE.kv, rule=rule, pool=wrong)
    k = torch.zeros(2, 2, 1, 64)
    kv = replace(CASE.kv, kv_len=torch.tensor([40, 40]))
    with pytest.raises(InputError, match="rule must be a ScoreRule"):
        append_and_attend(CASE.q, k, k, kv, rule=0.5, pool=cpu.single_thread())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pool must be a WorkerPool"):
        append_and_attend(CASE.q, k, k, kv, rule=rule, pool=2)  # type: ignore[arg-type]


def test_a_run_is_made_of_an_arena_and_tensors() -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"page_table": [[0]]},
        {"kv_start": [0, 0]},
        {"kv_len": 3},
        {"arena": CASE.kv.arena.k},
    )
    for fields in wrong:
        with pytest.raises(InputError, match="PagedKV takes an Arena and the tensors page_table, kv_start and kv_len"):
            replace(CASE.kv, **fields)


def test_no_gradient_is_dropped() -> None:
    q = CASE.q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="no gradient flows through paged attention"):
        attend(q, CASE.kv, rule=ScoreRule(1.0))
    with torch.no_grad():
        attend(q, CASE.kv, rule=ScoreRule(1.0))


def test_runs_are_alike() -> None:
    k = torch.zeros(2, 2, 20, 64)
    for dims in ((66, 64), (64, 66)):
        other = paginate(k[..., :1].expand(-1, -1, -1, dims[0]), k[..., :1].expand(-1, -1, -1, dims[1]), LAYOUT)
        message = rf"\(num_kv_heads, head_dim, v_head_dim\), got \(2, 64, 64\) and \(2, {dims[0]}, {dims[1]}\)"
        with pytest.raises(InputError, match=message):
            attend(CASE.q, CASE.kv, other, rule=ScoreRule(1.0))
    with pytest.raises(InputError, match="at least one run"):
        attend(CASE.q, rule=ScoreRule(1.0))


def test_no_sequences_give_an_empty_result() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = attend(CASE.q[:0], PagedKV(CASE.kv.arena, table[:0], none, none), rule=ScoreRule(1.0))
    assert out.shape == (0, 4, 1, 64)
    assert lse.shape == (0, 4, 1)


def test_the_read_probe_reads() -> None:
    assert probes.read_gbps(cpu.WorkerPool(2), torch.zeros(1 << 20, dtype=torch.uint8)) > 0


# Multiply-adds of one instruction, by instruction set.
OF_ONE_INSTRUCTION = {
    "avx512_bf16": 32,
    "amx_bf16": 16,
    "avx512_vnni": 16,
    "avx512": 16,
    "avx2": 8,
    "neon_bf16": 8,
    "neon": 4,
    "portable": 4,
}


@pytest.mark.parametrize("isa", [isa for isa, missing in cpu.available_isas().items() if not missing])
def test_dot_gops_is_what_a_processor_can_do(isa: str) -> None:
    """Not an optimiser's dream: two such instructions a cycle at 6 GHz (four on Arm), and no slower than 0.1 GHz."""
    per_ns = probes.dot_gops(cpu.single_thread(), isa) / OF_ONE_INSTRUCTION[isa]
    assert 0.1 < per_ns < (24 if isa.startswith("neon") else 12)
    assert probes.dot_gops(cpu.WorkerPool(2), isa) > 0


@pytest.mark.parametrize("isa", [isa for isa, missing in cpu.available_isas().items() if not missing])
def test_multiply_adds_of_a_group(isa: str) -> None:
    for group_size in (1, 4, 5, 16):
        tiles = isa == "amx_bf16" and group_size >= 5
        expected = 0 if tiles else group_size * (3 if isa in ("avx512_bf16", "neon_bf16") else 2)
        assert probes.multiply_adds(group_size, isa) == expected
