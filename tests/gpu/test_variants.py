"""Every kind of kernel compiles for GPUs that are not at hand, and asks for what comes next as its architecture can."""

import re
from itertools import combinations, product

import pytest

from tandemkv.kernels.gpu.l2 import fits_l2, prefetch_ptx
from tandemkv.kernels.gpu.variants import AXES, CAPABILITIES, Variant, compiled, pairwise

PAIRWISE = pairwise()


def test_every_two_values_meet_in_few_variants() -> None:
    assert len(PAIRWISE) <= 40
    for (i, xs), (j, ys) in combinations(enumerate(AXES.values()), 2):
        assert {(variant[i], variant[j]) for variant in PAIRWISE} >= set(product(xs, ys))


@pytest.mark.parametrize("variant", PAIRWISE, ids=lambda variant: variant.name)
def test_it_compiles_and_asks_ahead(variant: Variant) -> None:
    kernel = compiled(variant)
    ptx: str = kernel.asm["ptx"]
    assert len(kernel.asm["cubin"]) > 1000
    assert re.search(rf"\.target sm_{variant.capability}", ptx)
    bulk, lines = (
        len(re.findall(rf"{name}\b", ptx))
        for name in (r"cp\.async\.bulk\.prefetch\.L2\.global", r"prefetch\.global\.L2")
    )
    if not variant.distance:
        assert (bulk, lines) == (0, 0)
    elif variant.capability >= 90:
        assert bulk >= 2 * (1 + variant.distance)
        assert lines == 0
    else:
        assert bulk == 0
        assert lines >= 2 * (1 + variant.distance)


def test_tiles_are_loaded_asynchronously() -> None:
    """Of a plain call K and V go to shared memory by cp.async: 16 bytes each."""
    plain = Variant(90, "bf16", 128, 4, 1, 64, False, "plain", False, 0)
    assert compiled(plain).asm["ptx"].count("cp.async.cg.shared.global") >= 16


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
