"""The decode kernel, as a GPU or Triton's interpreter computes it, against the float64 reference behind poisoned
pages."""

from dataclasses import replace

import pytest
import torch

from tandemkv.errors import InputError
from tandemkv.kernels import gpu, reference
from tandemkv.kernels.gpu import Config
from tandemkv.kernels.gpu.config import config_for
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
    gpu.raise_for(flags)
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
