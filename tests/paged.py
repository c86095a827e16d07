"""Builders of poisoned pages: whatever a kernel must not read is NaN, whatever slot it must not look up is wild."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv.kernels import cpu
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, ScoreRule
from tests.dense import visible_tokens

WILD_SLOTS = (2**31 - 1, -1)
NUM_SPARE_SLOTS = 3


@dataclass(frozen=True)
class Shape:
    """One call of `attend`; hashable, so that its reference is computed once for all instruction sets."""

    page_size: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    kv_len: tuple[int, ...]
    kv_start: tuple[int, ...]
    q_len: int = 1
    causal: bool = False
    v_head_dim: int | None = None
    softcap: float | None = None
    window: int | None = None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def rule(self) -> ScoreRule:
        return ScoreRule(self.scale, self.softcap, self.window)

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.group_size


class Case(NamedTuple):
    """q, the pages that `attend` reads, the same K and V dense (zero where no token is), and who sees what."""

    q: Tensor
    kv: PagedKV
    k: Tensor
    v: Tensor
    visible: Tensor


def build(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    packing: Packing = "rows",
    q_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Normally distributed q, K and V of a shape, behind poisoned pages."""
    generator = torch.Generator().manual_seed(seed)
    kv_start, kv_len = torch.tensor(shape.kv_start), torch.tensor(shape.kv_len)
    dims = (len(shape.kv_len), shape.num_kv_heads, max(shape.kv_len))
    k = torch.randn((*dims, shape.head_dim), generator=generator).to(dtype)
    v = torch.randn((*dims, shape.v_head_dim or shape.head_dim), generator=generator).to(dtype)
    q_dims = (len(shape.kv_len), shape.num_q_heads, shape.q_len, shape.head_dim)
    q = torch.randn(q_dims, generator=generator).to(q_dtype)
    visible = visible_tokens(kv_start, kv_len, shape.q_len, dims[2], shape.causal, shape.window)
    # Tokens that no query sees are poisoned like those that do not exist.
    first = kv_start if shape.window is None else (kv_len - shape.q_len + 1 - shape.window).clamp(min=kv_start)
    kv = paginate(k, v, PageLayout(dtype, shape.page_size, packing), first, kv_len, seed)
    return Case(q, replace(kv, kv_start=kv_start), k, v, visible)


def paginate(
    k: Tensor,
    v: Tensor,
    layout: PageLayout,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    seed: int = 0,
) -> PagedKV:
    """Pages of dense k and v `[num_seqs, num_kv_heads, num_tokens, head_dim, v's own]`, at random slots.

    Every head has slots of its own, so a head that is read through the table of another is NaN; so are tokens outside
    [kv_start, kv_len), other heads' slices of a slot and spare slots. Table entries that are not needed are wild.
    """
    num_seqs, num_heads, num_tokens, head_dim = k.shape
    kv_start = torch.zeros(num_seqs, dtype=torch.int64) if kv_start is None else kv_start
    kv_len = torch.full((num_seqs,), num_tokens) if kv_len is None else kv_len
    num_pages = -(-num_tokens // layout.page_size) + 1
    num_slots = num_seqs * num_heads * num_pages + NUM_SPARE_SLOTS
    rows_layout = PageLayout(layout.dtype, layout.page_size, "rows")
    rows = poisoned_arena(rows_layout, num_slots, num_heads, head_dim, v.shape[3])
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.empty((num_seqs, num_heads, num_pages), dtype=torch.int32)
    for i, wild in enumerate(WILD_SLOTS):
        table[..., i :: len(WILD_SLOTS)] = wild
    for seq in range(num_seqs):
        tokens = torch.arange(int(kv_start[seq]), max(int(kv_start[seq]), int(kv_len[seq])))
        pages, at = tokens // layout.page_size, tokens % layout.page_size
        for head in range(num_heads):
            own = slots[(seq * num_heads + head) * num_pages :][:num_pages]
            table[seq, head, pages] = own[pages]
            rows.k[own[pages].long(), head, at] = k[seq, head, tokens]
            rows.v[own[pages].long(), head, at] = v[seq, head, tokens]
    return PagedKV(repacked(rows, layout.packing), table, kv_start, kv_len)


def poisoned_arena(
    layout: PageLayout, num_slots: int, num_kv_heads: int, head_dim: int, v_head_dim: int | None = None
) -> Arena:
    """An arena of nothing but NaN."""
    arena = Arena.allocate(layout, num_slots, num_kv_heads, head_dim, v_head_dim=v_head_dim)
    arena.k.fill_(math.nan)
    arena.v.fill_(math.nan)
    return arena


def repacked(rows: Arena, packing: Packing) -> Arena:
    """The same pages at the same slots, in the packing asked for."""
    if packing == rows.layout.packing:
        return rows
    layout = PageLayout(rows.layout.dtype, rows.layout.page_size, packing)
    arena = poisoned_arena(layout, rows.num_slots, rows.num_kv_heads, rows.head_dim, rows.v_head_dim)
    every_slot = list(range(rows.num_slots))
    cpu.move_pages(rows, arena, every_slot, every_slot)
    return arena
