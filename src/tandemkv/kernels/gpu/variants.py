"""Kernels compiled ahead of time for GPUs that are not at hand: which, and how."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.config import Config, block_m_for, block_n_for, fitted
from tandemkv.kernels.gpu.formats import DTYPES, k_format, padded, tile_token_bytes, v_format
from tandemkv.kernels.gpu.l2 import code_bytes, prefetch_ptx
from tandemkv.types import Arena, PageLayout

CAPABILITIES = 80, 90, 120
"""A100, H100 and H200, RTX PRO 6000 and 5090."""

SHARED_BYTES = {80: 166_912, 90: 232_448, 120: 101_376}
"""Of shared memory that a program can have there (CUDA C++ Programming Guide, compute capabilities)."""

PACKINGS = "rows", "panels", "int8", "int4", "int8/48", "int4/48"
"""As `far_dtype` names them; /48: that many channels of K are kept."""

AXES: Mapping[str, Sequence[Any]] = {
    "capability": CAPABILITIES,
    "packing": PACKINGS,
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

_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NUM_KV_HEADS = 8
_POINTERS = {
    **dict.fromkeys(("out", "lse", "block_lse", "outs", "lses", "sink"), "*fp32"),
    **dict.fromkeys(("table", "flags", "slots", "targets"), "*i32"),
    **dict.fromkeys(("starts", "lens"), "*i64"),
}


class Variant(NamedTuple):
    """A decode kernel. dtype: of q, and of the rows that pages stand for. distance: tiles asked for in L2 ahead."""

    capability: int
    packing: str
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
    """Few variants in which every two values of two axes meet, where they can (greedily, always the one that covers
    most new pairs)."""
    names, axes = list(AXES), list(AXES.values())
    places = list(combinations(range(len(axes)), 2))
    left = {(i, j, x, y) for i, j in places for x, y in product(axes[i], axes[j]) if _fits({i: x, j: y}, names)}
    found = []
    while left:
        i, j, x, y = min(left, key=repr)
        chosen: dict[int, Any] = {i: x, j: y}
        for place, axis in enumerate(axes):
            if place not in chosen:
                possible = [value for value in axis if _fits({**chosen, place: value}, names)]
                chosen[place] = max(possible, key=lambda value: _num_covered(left, {**chosen, place: value}, place))
        variant = Variant(*(chosen[place] for place in range(len(axes))))
        left -= {(i, j, variant[i], variant[j]) for i, j in places}
        found.append(variant)
    return found


def every() -> list[Variant]:
    """All that are code of their own: of queries and of tiles ahead, which only set sizes, few and many; of packings,
    which only change how a tile is loaded, one rule."""
    shapes, pages = ((4, 1), (8, 16)), ((16, False), (64, False), (64, True))
    found = []
    for packing, *axes in product(*(AXES[name] for name in ("packing", "capability", "dtype", "head_dim"))):
        rules = product(AXES["rule"], AXES["mass"]) if packing == "rows" else [("plain", False)]
        for (rule, mass), (page_size, of_blocks), (group_size, q_len), distance in product(
            rules, pages, shapes, (0, 2)
        ):
            capability, dtype, head_dim = axes
            rows = group_size, q_len, page_size, of_blocks
            found.append(Variant(capability, packing, dtype, head_dim, *rows, rule, mass, distance))
    return [variant for variant in found if _fits(dict(enumerate(variant)), list(AXES))]


def _fits(chosen: Mapping[int, Any], names: Sequence[str]) -> bool:
    """Whether such pages can be."""
    value = {names[place]: x for place, x in chosen.items()}
    return not (value.get("packing", "").startswith("int4") and value.get("head_dim", 64) % 64)


def _num_covered(left: set[tuple[int, int, Any, Any]], chosen: Mapping[int, Any], place: int) -> int:
    pairs = ((min(place, other), max(place, other)) for other in chosen if other != place)
    return sum((i, j, chosen[i], chosen[j]) in left for i, j in pairs)


def arena_of(packing: str, dtype: str, head_dim: int, page_size: int = 64) -> Arena:
    """An arena without memory."""
    name, _, num_channels = packing.partition("/")
    layout = PageLayout(_TORCH[dtype], page_size, name, int(num_channels) if num_channels else None)  # type: ignore[arg-type]
    return Arena.allocate(layout, 1, _NUM_KV_HEADS, head_dim, "meta")


def compiled(variant: Variant) -> Any:
    """Triton's compiled decode kernel: `asm["ptx"]`, `asm["cubin"]`, `metadata`. Needs no GPU."""
    arena = arena_of(variant.packing, variant.dtype, variant.head_dim, variant.page_size)
    entry_tokens = 16 if variant.of_blocks else variant.page_size
    config = Config(64 if variant.packing == "rows" else block_n_for(entry_tokens))
    config = fitted(config, tile_token_bytes(arena), SHARED_BYTES[variant.capability], num_programs=2)
    sizes = [int(min(config.block_n, entry_tokens) * size) for size in code_bytes(arena)]
    asks = [prefetch_ptx(variant.capability, size, 32 * config.num_warps) if variant.distance else "" for size in sizes]
    k = k_format(arena)
    constants = {
        **_of_pages(arena, variant.of_blocks),
        "GROUP": variant.group_size,
        "Q_LEN": variant.q_len,
        "Q_PAD": padded(variant.head_dim) if arena.layout.num_channels else k[2],
        "RULE": (not variant.of_blocks, variant.rule == "softcap", variant.rule == "window", variant.mass),
        "BLOCK_M": block_m_for(variant.group_size * variant.q_len),
        "BLOCK_N": config.block_n,
        "AHEAD": (variant.distance, *asks),
    }
    types = {"q": f"*{variant.dtype}", **_arena_types(arena)}
    return _compiled(decode.decode_pages, variant.capability, types, constants, config)


def asks_of(ptx: str) -> tuple[int, int]:
    """How often it asks for pages in L2, in bulk and line by line."""
    names = r"cp\.async\.bulk\.prefetch\.L2\.global\b", r"(?<![.\w])prefetch\.global\.L2\b"
    bulk, lines = (len(re.findall(name, ptx)) for name in names)
    return bulk, lines


def compiled_moves(capability: int, packing: str, dtype: str, head_dim: int) -> dict[str, Any]:
    """The kernel that unpacks such pages, by its name; and of rows those that append tokens, merge parts and pull
    pages into L2."""
    arena = arena_of(packing, dtype, head_dim)
    if packing != "rows":
        types = {**_arena_types(arena), **_arena_types(arena_of("rows", dtype, head_dim), "rows_k", "rows_v")}
        constants = {**_of_pages(arena), "BLOCK_N": 64, "D_PAD": padded(head_dim)}
        return {"unpack": _compiled(decode.unpack_pages, capability, types, constants)}
    types = {**_arena_types(arena), **_arena_types(arena, "new_k", "new_v")}
    asks = [prefetch_ptx(capability, int(64 * size), 128) for size in code_bytes(arena)]
    of_merge = {"V_DIM": head_dim, "V_PAD": padded(head_dim), "HAS_SINK": True}
    return {
        "append": _compiled(decode.append_rows, capability, types, {**_of_pages(arena), "BLOCK_N": 16}),
        "merge": _compiled(decode.merge_parts, capability, {}, of_merge),
        "pull": _compiled(
            decode.pull_pages, capability, types, {**_of_pages(arena), "BLOCK_N": 64, "AHEAD": (0, *asks)}
        ),
    }


def _of_pages(arena: Arena, of_blocks: bool = False) -> dict[str, Any]:
    return {
        "HEAD_DIM": arena.head_dim,
        "V_DIM": arena.v_head_dim,
        "PAGES": (arena.num_kv_heads, arena.layout.page_size, of_blocks),
        "K": k_format(arena),
        "V": v_format(arena),
        "DTYPE": DTYPES[arena.layout.dtype],
    }


def _arena_types(arena: Arena, *names: str) -> dict[str, str]:
    stored = "*u8" if arena.layout.is_quantised else f"*{DTYPES[arena.layout.dtype]}"
    return dict.fromkeys(names or ("k", "v"), stored)


def _compiled(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    config: Config | None = None,
) -> Any:
    """types: of what pointers point to, beside those that have one name everywhere; numbers are int32 or float32."""
    names = kernel.arg_names
    pointers = {**_POINTERS, **types}
    numbers = dict.fromkeys(("scale", "softcap"), "fp32")
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or numbers.get(name, "i32") for name in names
    }
    aligned = {
        (param.num,): [["tt.divisibility", 16]]
        for param in kernel.params
        if signature[param.name][0] == "*" and not param.do_not_specialize
    }
    by_place = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=by_place, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    config = config or Config()
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)
