"""Kernels compiled ahead of time for GPUs that are not at hand: which, and how."""

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.l2 import prefetch_ptx

CAPABILITIES = 80, 90, 120
"""A100, H100 and H200, RTX PRO 6000 and 5090."""

AXES: Mapping[str, Sequence[Any]] = {
    "capability": CAPABILITIES,
    "dtype": ("bf16", "fp16", "fp32"),
    "head_dim": (64, 80, 128, 256),
    "group_size": (1, 4, 7, 8),
    "q_len": (1, 4, 16),
    "page_size": (16, 64),
    "of_blocks": (False, True),
    "rule": ("plain", "softcap", "window"),
    "mass": (False, True),
    "distance": (0, 1, 2),
}
"""What a variant of the decode kernel is."""


class Variant(NamedTuple):
    """A decode kernel. dtype: of q, K and V. distance: tiles asked for in L2 ahead."""

    capability: int
    dtype: str
    head_dim: int
    group_size: int
    q_len: int
    page_size: int
    of_blocks: bool
    rule: str
    mass: bool
    distance: int

    @property
    def name(self) -> str:
        """Of its values."""
        return "-".join(map(str, self))


def pairwise() -> list[Variant]:
    """Few variants in which every two values of two axes meet (greedily, always the one that covers most new pairs)."""
    axes = list(AXES.values())
    places = list(combinations(range(len(axes)), 2))
    left = {(i, j, x, y) for i, j in places for x, y in product(axes[i], axes[j])}
    found = []
    while left:
        i, j, x, y = min(left, key=repr)
        chosen: dict[int, Any] = {i: x, j: y}
        for place, axis in enumerate(axes):
            if place not in chosen:
                chosen[place] = max(axis, key=lambda value: _num_covered(left, {**chosen, place: value}, place))
        variant = Variant(*(chosen[place] for place in range(len(axes))))
        left -= {(i, j, variant[i], variant[j]) for i, j in places}
        found.append(variant)
    return found


def every() -> list[Variant]:
    """All that are code of their own: of rows and of tiles ahead, which only set sizes, few and many."""
    names = ("capability", "dtype", "head_dim", "rule", "mass")
    found = []
    for capability, dtype, head_dim, rule, mass in product(*(AXES[name] for name in names)):
        for (page_size, of_blocks), (group_size, q_len), distance in product(
            ((16, False), (64, False), (64, True)), ((4, 1), (8, 16)), (0, 2)
        ):
            rows = group_size, q_len, page_size, of_blocks
            found.append(Variant(capability, dtype, head_dim, *rows, rule, mass, distance))
    return found


def _num_covered(left: set[tuple[int, int, Any, Any]], chosen: Mapping[int, Any], place: int) -> int:
    pairs = ((min(place, other), max(place, other)) for other in chosen if other != place)
    return sum((i, j, chosen[i], chosen[j]) in left for i, j in pairs)


def compiled(variant: Variant, num_warps: int = 4, num_stages: int = 3) -> Any:
    """Triton's compiled kernel: `asm["ptx"]`, `asm["cubin"]`, `metadata`. Needs no GPU."""
    constants = _constants(variant, 32 * num_warps)
    kernel = decode.decode_rows
    types = {
        **dict.fromkeys(("q", "k", "v"), f"*{variant.dtype}"),
        **dict.fromkeys(("out", "lse", "block_lse"), "*fp32"),
        **dict.fromkeys(("table", "flags"), "*i32"),
        **dict.fromkeys(("starts", "lens"), "*i64"),
        **dict.fromkeys(("scale", "softcap"), "fp32"),
    }
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in types and types[name][0] == "*"
    }
    by_place = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=by_place, attrs=aligned)
    target = GPUTarget("cuda", variant.capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def _constants(variant: Variant, num_threads: int) -> dict[str, Any]:
    num_rows, block_n = variant.group_size * variant.q_len, 64
    item_bytes = 4 if variant.dtype == "fp32" else 2
    piece = 16 if variant.of_blocks else min(block_n, variant.page_size)
    ask = (
        prefetch_ptx(variant.capability, piece * variant.head_dim * item_bytes, num_threads) if variant.distance else ""
    )
    return {
        "GROUP": variant.group_size,
        "Q_LEN": variant.q_len,
        "HEAD_DIM": variant.head_dim,
        "V_DIM": variant.head_dim,
        "NUM_KV_HEADS": 8,
        "PAGE": variant.page_size,
        "OF_BLOCKS": variant.of_blocks,
        "CAUSAL": not variant.of_blocks,
        "HAS_SOFTCAP": variant.rule == "softcap",
        "HAS_WINDOW": variant.rule == "window",
        "WITH_MASS": variant.mass,
        "BLOCK_M": min(64, max(16, triton.next_power_of_2(num_rows))),
        "BLOCK_N": block_n,
        "D_PAD": triton.next_power_of_2(variant.head_dim),
        "V_PAD": triton.next_power_of_2(variant.head_dim),
        "ASK_K": ask,
        "ASK_V": ask,
        "DISTANCE": variant.distance,
        "WIDEN": False,
    }
