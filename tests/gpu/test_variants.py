"""Every kind of kernel compiles for GPUs that are not at hand, and asks for what comes next as its architecture can."""

import re
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tandemkv.kernels import gpu
from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.l2 import fits_l2, prefetch_ptx
from tandemkv.kernels.gpu.variants import (
    AXES,
    CAPABILITIES,
    PACKINGS,
    SHARED_BYTES,
    Variant,
    arena_of,
    asks_of,
    compiled,
    compiled_moves,
    every,
    pairwise,
)
from tandemkv.types import PagedKV, ScoreRule

PAIRWISE = pairwise()


def test_every_two_values_meet_in_few_variants() -> None:
    assert len(PAIRWISE) <= 40
    for (i, xs), (j, ys) in combinations(enumerate(AXES.values()), 2):
        possible = {(x, y) for x, y in product(xs, ys) if not (y == 80 and str(x).startswith("int4"))}
        assert {(variant[i], variant[j]) for variant in PAIRWISE} >= possible
    assert {variant[:4] for variant in every()} >= {variant[:4] for variant in PAIRWISE}


@pytest.mark.parametrize("variant", PAIRWISE, ids=lambda variant: variant.name)
def test_it_compiles_and_asks_ahead(variant: Variant) -> None:
    kernel = compiled(variant)
    ptx: str = kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000
    assert kernel.metadata.shared <= SHARED_BYTES[variant.capability]
    assert re.search(rf"\.target sm_{variant.capability}", ptx)
    bulk, lines = asks_of(ptx)
    if not variant.distance:
        assert (bulk, lines) == (0, 0)
    elif variant.capability >= 90:
        assert bulk >= 2 * (1 + variant.distance)
        assert lines == 0
    else:
        assert bulk == 0
        assert lines >= 2 * (1 + variant.distance)


def test_tiles_are_loaded_asynchronously() -> None:
    """Of a plain call K and V go to shared memory by cp.async, 16 bytes each, two tiles of both ahead of products."""
    plain = compiled(Variant(90, "rows", "bf16", 128, 4, 1, 64, False, "plain", False, 0))
    assert plain.asm["ptx"].count("cp.async.cg.shared.global") >= 48
    assert "cp.async.ca" not in plain.asm["ptx"]
    assert sorted(re.findall(r"local_alloc : .*?memdesc<(2x[\dx]+)xbf16", plain.asm["ttgir"])) == [
        "2x128x64",
        "2x64x128",
    ]


@pytest.mark.parametrize(("packing", "capability"), [*product(PACKINGS, CAPABILITIES)])
def test_moves_compile(packing: str, capability: int) -> None:
    for name, kernel in compiled_moves(capability, packing, "bf16", 128).items():
        assert len(kernel.asm["cubin"]) > 1000
        assert f".target sm_{capability}" in kernel.asm["ptx"]
        assert asks_of(kernel.asm["ptx"]) == ((2, 0) if capability >= 90 else (0, 2)) if name == "pull" else (0, 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_asked_for(capability: int) -> None:
    """A page of 64 tokens of 128 in bf16 is 16 KiB: one bulk request, or one line of each of 128 threads."""
    ptx = prefetch_ptx(capability, 16_384, 128)
    assert ("cp.async.bulk.prefetch.L2.global [$1], 16384;" in ptx) == (capability >= 90)
    assert ptx.count("prefetch.global.L2 [") == (1 if capability < 90 else 0)
    assert prefetch_ptx(capability, 8, 128) == ""
    assert "16384" not in prefetch_ptx(capability, 20, 128)


def test_lines_beyond_what_threads_reach_are_asked_for_in_turn() -> None:
    ptx = prefetch_ptx(80, 32_768, 64)  # 64 threads reach 8 KiB
    assert re.findall(r"setp\.lt\.u64 p, a, (\d+)", ptx) == ["32768", "24576", "16384", "8192"]
    assert re.findall(r"\[b\+(\d+)\]", ptx) == ["0", "8192", "16384", "24576"]


def test_the_paper_s_rule() -> None:
    """Llama2-7B: 4 KiB blocks, 4 warps, 32 heads, in 60 MB of L2: up to a batch of 114 (the paper says 120 of 60e6)."""
    assert fits_l2(4096, 1, 4 * 32 * 114, 60_000_000)
    assert not fits_l2(4096, 1, 4 * 32 * 115, 60_000_000)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton as on an H100 that is not there: kernels are bound and compiled as they are launched, but not run."""

    class Driver:
        def get_current_device(self) -> int:
            return 99  # where no kernel is cached for one that is there

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    names: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **{**kwargs, "warmup": True})

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Driver())
    return names


def test_a_context_that_grows_compiles_nothing_anew(launches: list[str]) -> None:
    """Nor does another batch, or another number of splits: their numbers are no constants of the kernels."""
    arena = arena_of("rows", "bf16", 64)
    arena = replace(
        arena, k=torch.empty(99, *arena.k.shape[1:]).bfloat16(), v=torch.empty(99, *arena.v.shape[1:]).bfloat16()
    )
    counts = set()
    for num_seqs, num_pages, num_splits in ((1, 1, 1), (1, 15, 2), (1, 16, 3), (3, 17, 2), (16, 64, 16)):
        table = torch.zeros(num_seqs, 8, num_pages, dtype=torch.int32)
        kv = PagedKV(arena, table, torch.zeros(num_seqs).long(), torch.full((num_seqs,), 64 * num_pages - 5))
        x = torch.randn(num_seqs, 8, 1, 64).bfloat16()
        mass = torch.zeros(num_seqs, 8, 1, kv.num_blocks)
        gpu.attend(x, kv, rule=ScoreRule(0.1), mass=mass, config=gpu.Config(num_splits=num_splits))
        gpu.append(arena, table, 64 * num_pages - 6, x, x)
        caches = (kernel.device_caches[99][0] for kernel in (decode.decode_pages, decode.append_rows))
        counts.add(tuple(map(len, caches)))
    assert len(counts) == 1


@pytest.mark.parametrize("packing", ["rows", "panels", "int4/48"])
def test_launches_bind_to_their_kernels(packing: str, launches: list[str]) -> None:
    shapes = arena_of(packing, "bf16", 128), arena_of("rows", "bf16", 128)
    arena, rows = (
        replace(a, k=torch.empty_like(a.k, device="cpu"), v=torch.empty_like(a.v, device="cpu")) for a in shapes
    )
    one, x = torch.zeros(1, dtype=torch.int32), torch.randn(1, 8, 3, 128).bfloat16()
    table = one.view(1, 1, 1).expand(1, 8, 1)
    kv = PagedKV(arena, table, torch.tensor([0]), torch.tensor([40]))
    mass = torch.zeros(1, 8, 3, kv.num_blocks)
    gpu.attend(x, kv, rule=ScoreRule(0.1), causal=True, mass=mass, config=gpu.Config(num_splits=2))
    gpu.attend(x[:, :, :1], kv, rule=ScoreRule(0.1, 30.0))
    if packing != "rows":
        gpu.unpack(arena, rows, one, one)
    gpu.append(rows, table, 5, x, x)
    unpacks = ["unpack_pages"] * (packing != "rows")
    assert launches == ["decode_pages", "merge_parts", "decode_pages", *unpacks, "append_rows"]
