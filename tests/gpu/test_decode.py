"""The decode kernel, as a GPU or Triton's interpreter computes it, against the float64 reference behind poisoned
pages."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl

from tandemkv.errors import InputError
from tandemkv.kernels import gpu, reference
from tandemkv.kernels.checks import raise_for
from tandemkv.kernels.gpu import Config, l2
from tandemkv.kernels.gpu.config import config_for, fitted
from tandemkv.kernels.gpu.l2 import code_bytes
from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule
from tests.kernels.test_attend import COVER
from tests.paged import Case, Shape, build
from tests.tolerances import assert_within, attend_bound, kernel_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def placed(kv: PagedKV) -> PagedKV:
    """On the device, tables in host memory."""
    arena = kv.arena
    assert isinstance(arena, Arena)
    return replace(kv, arena=replace(arena, k=arena.k.to(DEVICE), v=arena.v.to(DEVICE)))


def attend(case: Case, shape: Shape, config: Config | None = None, mass: torch.Tensor | None = None) -> Partial:
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    part = gpu.attend(
        case.q.to(DEVICE), placed(case.kv), rule=shape.rule, causal=shape.causal, config=config, flags=flags, mass=mass
    )
    raise_for(flags)
    return Partial(part.out.cpu(), part.lse.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("name", COVER)
def test_equals_the_reference(name: str, num_splits: int, dtype: torch.dtype) -> None:
    shape = COVER[name]
    case = build(shape, dtype, "rows", dtype)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype), num_splits)
    assert_within(attend(case, shape, Config(num_splits=num_splits)), truth, bound)


@pytest.mark.parametrize("name", ["ragged", "causal-padded", "window", "groups-of-17"])
def test_with_the_configuration_that_is_chosen(name: str) -> None:
    shape = COVER[name]
    case = build(shape, torch.bfloat16, "rows", torch.bfloat16)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(torch.bfloat16), 64)
    assert_within(attend(case, shape), truth, bound)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
def test_soft_caps_that_bend_little_and_much(softcap: float) -> None:
    shape = replace(COVER["ragged"], softcap=softcap)
    case = build(shape, torch.float32, "rows", torch.float32)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=shape.causal)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(torch.float32), 1)
    assert_within(attend(case, shape, Config()), truth, bound)


@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_sixteen_causal_queries(group_size: int) -> None:
    """With 8 heads to a group they are two blocks of 64 rows."""
    shape = Shape(16, 2, group_size, 64, kv_len=(90, 16), kv_start=(3, 5), q_len=16, causal=True)
    case = build(shape, torch.bfloat16, "rows", torch.bfloat16)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=True)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(torch.bfloat16), 2)
    assert_within(attend(case, shape, Config(block_m=64, num_splits=2)), truth, bound)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits(scale: float) -> None:
    shape = COVER["ragged"]
    case = build(shape, torch.float32, "rows", torch.float32)
    rule = ScoreRule(scale)
    part = gpu.attend(case.q.to(DEVICE), placed(case.kv), rule=rule, config=Config(num_splits=3))
    bound = attend_bound(case.q, case.k, case.v, case.visible, rule, kernel_rounding(torch.float32), 3)
    assert_within(
        Partial(part.out.cpu(), part.lse.cpu()), reference.attend(case.q, case.kv, rule=rule, causal=False), bound
    )


@pytest.mark.parametrize("name", ["ragged", "causal", "window", "nothing"])
def test_masses_of_blocks(name: str) -> None:
    """The share of every 16 tokens, of two runs one behind the other."""
    shape = COVER[name]
    case = build(shape, torch.float32, "rows", torch.float32)
    mass = torch.full((*case.q.shape[:3], case.kv.num_blocks), 7.0, device=DEVICE)
    attend(case, shape, Config(num_splits=2), mass)
    group_size = case.q.shape[1] // case.k.shape[1]
    k = case.k.double().repeat_interleave(group_size, 1)
    scores = shape.scale * (case.q.double() @ k.mT)
    weights = torch.softmax(scores.masked_fill(~case.visible.unsqueeze(1), -torch.inf), -1).nan_to_num(0.0)
    padded = torch.nn.functional.pad(weights, (0, 16 * mass.shape[3] - weights.shape[3]))
    assert torch.allclose(mass.cpu().double(), padded.unflatten(-1, (-1, 16)).sum(-1), atol=1e-5)


def test_several_runs_are_one_attention() -> None:
    shape = Shape(16, 2, 3, 64, kv_len=(96, 96), kv_start=(0, 40), q_len=2, causal=True)
    case = build(shape, torch.float32, "rows", torch.float32)
    kv = placed(case.kv)
    mass = torch.zeros((*case.q.shape[:3], 6), device=DEVICE)
    parts, kv = [kv.part(0, 4), kv.part(4, 6)], kv.part(0, 6)
    part = gpu.attend(case.q.to(DEVICE), *parts, rule=shape.rule, causal=True, mass=mass)
    truth = reference.attend(case.q, case.kv, rule=shape.rule, causal=True)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, num_merges=2)
    assert_within(Partial(part.out.cpu(), part.lse.cpu()), truth, bound)
    assert torch.allclose(mass.sum(-1).cpu(), torch.ones(mass.shape[:3]))
    whole = torch.zeros_like(mass)
    gpu.attend(case.q.to(DEVICE), kv, rule=shape.rule, causal=True, mass=whole)
    assert torch.allclose(mass, whole, atol=1e-6)


def test_blocks_of_every_head() -> None:
    """Each head reads blocks of its own, as a choice names them."""
    arena = Arena.allocate(PageLayout(torch.float32, 64, "rows"), 5, 2, 32)
    arena.k.normal_()
    arena.v.normal_()
    entries = torch.tensor([[[0, 9, 17], [35, 3, 0]]], dtype=torch.int32)  # slot * 2 heads * 4 blocks + block
    kv = PagedKV(arena, entries, torch.tensor([[0, 5]]), torch.tensor([[48, 25]]), of_blocks=True)
    q = torch.randn(1, 4, 1, 32)
    rule = ScoreRule(0.2)
    part = gpu.attend(q.to(DEVICE), placed(kv), rule=rule)
    truth = reference.attend(q, kv, rule=rule, causal=False)
    assert torch.allclose(part.out.cpu().double(), truth.out, atol=1e-5)
    assert torch.allclose(part.lse.cpu().double(), truth.lse, atol=1e-5)


def test_a_flag_tells_of_nan_in_q_and_of_wild_slots() -> None:
    shape = COVER["ragged"]
    case = build(shape, torch.bfloat16, "rows", torch.bfloat16)
    spoilt = case.q.clone()
    spoilt[1, 3, 0, 5] = torch.nan
    with pytest.raises(InputError, match="q contains NaN"):
        attend(case._replace(q=spoilt), shape)
    table = case.kv.page_table.clone()
    table[0, 0, 0] = 1 << 20
    with pytest.raises(AssertionError, match="points outside its arena"):
        attend(case._replace(kv=replace(case.kv, page_table=table)), shape)


def test_merge_of_many_parts_with_a_sink() -> None:
    parts = [Partial(torch.randn(2, 4, 3, 40), 5 * torch.randn(2, 4, 3)) for _ in range(7)]
    parts[2].lse[:] = -torch.inf
    for part in parts:
        part.lse[1, 2] = -torch.inf
    sink = torch.tensor([0.5, -torch.inf, 2.0, -torch.inf])
    for logit in (None, sink):
        on_device = [Partial(part.out.to(DEVICE), part.lse.to(DEVICE)) for part in parts]
        found = gpu.merge(on_device, None if logit is None else logit.to(DEVICE))
        truth = reference.merge(parts, sink_logit=logit)
        assert torch.allclose(found.out.cpu().double(), truth.out, atol=1e-6)
        assert torch.allclose(found.lse.cpu().double(), truth.lse, atol=1e-5)


def test_what_it_cannot_attend_is_refused() -> None:
    shape = COVER["causal"]
    case = build(shape, torch.bfloat16, "rows", torch.bfloat16)
    with pytest.raises(InputError, match=r"expected q \[num_seqs, num_q_heads, q_len, 64\]"):
        attend(case._replace(q=case.q[..., :32]), shape)
    with pytest.raises(InputError, match=r"mass must be contiguous float32 \[3, 4, 3, \d+\] on"):
        attend(case, shape, mass=torch.zeros(3, 4, 3, 1, device=DEVICE))
    with pytest.raises(InputError, match="a window counts back"):
        gpu.attend(case.q.to(DEVICE), placed(case.kv), rule=ScoreRule(1.0, window=4))


def test_programs_fill_the_gpu_and_parts_stay_long() -> None:
    one = config_for(1, 8, 4, 131_072, 132)
    assert (one.block_m, one.num_splits) == (16, 33)  # 264 programs
    assert config_for(64, 32, 1, 131_072, 132).num_splits == 1
    assert config_for(1, 8, 4, 512, 132).num_splits == 2
    assert config_for(1, 8, 128, 131_072, 132).block_m == 64


class Asked:
    """In the place of the assembly that asks for pieces: byte addresses in K and V, as the interpreter has them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: dict[str, list[int]] = {"k": [], "v": []}
        monkeypatch.setattr(tl, "inline_asm_elementwise", self.note)

    def note(self, asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> None:
        self.addresses[asm] += [int(address) for address in args[0].handle.data.reshape(-1)]

    def pieces(self, x: torch.Tensor, name: str, piece_bytes: int) -> Counter[int]:
        """How often each piece of an arena was asked for."""
        offsets = [address - x.data_ptr() for address in self.addresses[name]]
        assert all(offset % piece_bytes == 0 and 0 <= offset < x.nbytes for offset in offsets)
        return Counter(offset // piece_bytes for offset in offsets)


@pytest.mark.skipif(DEVICE == "cuda", reason="assembly cannot be looked into on a GPU")
@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("packing", ["rows", "int8"])
def test_every_piece_that_is_read_is_asked_for_once(
    packing: str, distance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena.allocate(PageLayout(torch.float32, 32, packing), 9, 2, 64)  # type: ignore[arg-type]
    for x in (arena.k, arena.v):
        x.zero_()
    table = torch.randperm(9)[:8].view(2, 1, 4).int().expand(2, 2, 4)
    kv = PagedKV(arena, table, torch.tensor([0, 40]), torch.tensor([100, 70]))
    sizes = [int(32 * size) for size in code_bytes(arena)]
    asked = Asked(monkeypatch)
    monkeypatch.setattr("tandemkv.kernels.gpu.calls.asks", lambda *args: (distance, "k", "v"))
    config = Config(block_n=64 if packing == "rows" else 32, num_splits=2, distance=distance)
    gpu.attend(torch.randn(2, 4, 1, 64), kv, rule=ScoreRule(0.1), config=config)
    slots = [
        *table[0, 0].tolist(),
        *table[1, 0, 0 if packing == "rows" else 1 : 3].tolist(),
    ]  # tiles, of 2 pages in rows
    for x, name, size in ((arena.k, "k", sizes[0]), (arena.v, "v", sizes[1])):
        if packing == "int8":  # codes are in front of the scales
            offsets = [address - x.data_ptr() for address in asked.addresses[name]]
            found = Counter(divmod(offset, x.shape[2]) for offset in offsets)
            assert found == Counter({(2 * slot + head, 0): 1 for slot in slots for head in range(2)})
        else:
            assert asked.pieces(x, name, size) == Counter({2 * slot + head: 1 for slot in slots for head in range(2)})


@pytest.mark.skipif(DEVICE == "cuda", reason="assembly cannot be looked into on a GPU")
@pytest.mark.parametrize(("share", "expected"), [(1.0, 12), (0.25, 5), (0.049, 0)])
def test_what_is_pulled_is_bounded(share: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 tokens x 128 in float32 are 64 KiB, K and V; 12 are read."""
    arena = Arena.allocate(PageLayout(torch.float32), 9, 2, 128)
    kv = PagedKV(arena, torch.randperm(9)[:8].view(2, 1, 4).int().expand(2, 2, 4), *torch.tensor([[0, 64], [256, 190]]))
    asked = Asked(monkeypatch)
    monkeypatch.setattr("tandemkv.kernels.gpu.moves.asks_for_pieces", lambda *args: ("k", "v"))
    monkeypatch.setattr("tandemkv.kernels.gpu.calls.config_for", lambda *args: Config(num_splits=2))
    monkeypatch.setattr("tandemkv.kernels.gpu.moves.l2_bytes", lambda device: 20 * 65_536)
    pull = gpu.prepare_pull(torch.randn(2, 4, 1, 128), kv, ScoreRule(1.0), share)
    assert (pull is None) == (expected == 0)
    if pull is not None:
        assert pull.num_bytes <= share * 20 * 65_536
        pull.launch()
    pieces = asked.pieces(arena.k, "k", 32_768), asked.pieces(arena.v, "v", 32_768)
    assert pieces[0] == pieces[1]
    assert sum(pieces[0].values()) == expected
    assert set(pieces[0].values()) <= {1}


@pytest.mark.parametrize(("guarded", "num_programs", "asks"), [(True, 16, True), (True, 17, False), (False, 17, True)])
def test_what_would_not_fit_l2_is_not_asked_for(
    guarded: bool, num_programs: int, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 64 KiB, two ahead, in 2 MiB of L2; the paper's rule is a default, which a measurement can set aside."""
    kv = PagedKV(Arena.allocate(PageLayout(torch.float32), 1, 2, 128), *torch.zeros(3, 1, 1, 1).int())
    monkeypatch.setattr(l2, "l2_bytes", lambda device: 2 << 20)
    monkeypatch.setattr(l2, "capability", lambda device: 90)
    config = Config(distance=2, guarded=guarded)
    distance, ask_k, ask_v = l2.asks(kv, config, num_programs, torch.device("cuda"))
    assert (distance > 0) == asks == ("32768" in ask_k) == ("prefetch.L2" in ask_v)


@pytest.mark.parametrize(
    ("token_bytes", "shared_bytes", "block_n", "num_stages"),
    [
        (512, 232_448, 64, 3),  # head_dim 128 in bf16 on an H100: 32 KiB tiles, two programs of two
        (1024, 232_448, 64, 2),  # head_dim 256
        (512, 101_376, 64, 2),  # on an RTX PRO 6000
        (2048, 101_376, 32, 2),  # head_dim 256 in float32 there: 64 tokens would not fit at all
        (72, 101_376, 64, 3),
    ],
)
def test_tiles_fit_shared_memory(token_bytes: int, shared_bytes: int, block_n: int, num_stages: int) -> None:
    config = fitted(Config(), token_bytes, shared_bytes, num_programs=2)
    assert (config.block_n, config.num_stages) == (block_n, num_stages)


def test_a_configuration_that_was_asked_for_is_cut_where_it_would_not_fit() -> None:
    """float32 tiles of head_dim 255 are 128 KiB: two ahead are more than an H100 has."""
    assert fitted(Config(num_splits=3), 2048, 232_448) == Config(num_splits=3, num_stages=2)
    assert fitted(Config(num_stages=4), 512, 232_448) == Config(num_stages=4)


@pytest.mark.parametrize(("kv_start", "kv_len"), [(0, 129), (-5, 60), (0, 2**32 + 5), (0, -1)])
def test_lengths_beyond_a_table_are_told_and_not_read(kv_start: int, kv_len: int) -> None:
    arena = Arena.allocate(PageLayout(torch.float32), 2, 2, 32)
    kv = PagedKV(arena, torch.zeros(1, 2, 2).int(), torch.tensor([kv_start]), torch.tensor([kv_len]))
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    gpu.attend(torch.randn(1, 2, 1, 32).to(DEVICE), placed(kv), rule=ScoreRule(0.1), flags=flags)
    with pytest.raises(InputError, match=r"\[kv_start, kv_len\) of a run must lie in"):
        raise_for(flags)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"page_table": torch.zeros(1, 1, 2).int()},
            r"page_table must be int32 \[1, 2, num_pages\], got torch.int32 \[1, 1, 2\]",
        ),
        ({"page_table": torch.zeros(1, 2, 2)}, "page_table must be int32"),
        ({"kv_len": torch.zeros(2).long()}, r"kv_len must be contiguous int64 \[1\], got torch.int64 \[2\]"),
        ({"kv_start": torch.zeros(1, 2).long()}, "kv_start must be contiguous int64"),
        ({"kv_len": torch.zeros(1).int()}, "kv_len must be contiguous int64"),
        ({"of_blocks": True}, r"kv_start must be contiguous int64 \[1, 2\]"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    arena, zero = Arena.allocate(PageLayout(torch.float32), 2, 2, 32), torch.zeros(1).long()
    kv = replace(placed(PagedKV(arena, torch.zeros(1, 2, 2).int(), zero, zero + 9)), **changes)
    with pytest.raises(InputError, match=told):
        gpu.attend(torch.randn(1, 2, 1, 32).to(DEVICE), kv, rule=ScoreRule(0.1))


@pytest.mark.parametrize("begin", [-2, 126, 6200])
def test_tokens_beyond_a_table_are_not_appended(begin: int) -> None:
    arena = Arena.allocate(PageLayout(torch.float32), 4, 2, 32, DEVICE)
    x = torch.randn(1, 2, 3, 32, device=DEVICE)
    with pytest.raises(InputError, match=rf"tokens \[{begin}, {begin + 3}\) lie outside a table of 2 pages"):
        gpu.append(arena, torch.tensor([[[0, 1], [0, 1]]]).int(), begin, x, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_n", 48), ("block_n", 0), ("block_m", -1), ("num_splits", 0), ("distance", -1), ("num_warps", 3)],
)
def test_a_configuration_that_cannot_be_is_refused(name: str, value: int) -> None:
    words: Any = {name: value}
    with pytest.raises(InputError, match=f"{name} must be a .*, got {value}"):
        replace(Config(), **words)


def test_a_batch_of_nothing() -> None:
    arena, none = Arena.allocate(PageLayout(torch.float32), 1, 2, 32), torch.zeros(0).long()
    kv = placed(PagedKV(arena, torch.zeros(0, 2, 1).int(), none, none))
    assert gpu.attend(torch.randn(0, 4, 1, 32).to(DEVICE), kv, rule=ScoreRule(0.1)).out.shape == (0, 4, 1, 32)


def test_padding_may_be_longer_than_a_table() -> None:
    arena = Arena.allocate(PageLayout(torch.float32), 2, 2, 32)
    kv = PagedKV(arena, torch.zeros(1, 2, 2).int(), torch.tensor([200]), torch.tensor([60]))
    flags = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    part = gpu.attend(torch.randn(1, 2, 1, 32).to(DEVICE), placed(kv), rule=ScoreRule(0.1), flags=flags)
    raise_for(flags)
    assert bool((part.lse == -torch.inf).all())
