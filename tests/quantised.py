"""Quantised pages for tests: what they hold, read from their bytes by the reference, and how far attention may lie."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv.kernels import cpu, reference
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, ScoreRule
from tests.paged import Case, Shape, build
from tests.tolerances import CodeError

FORMATS: tuple[Packing, ...] = ("int8", "int4")


class Quantised(NamedTuple):
    """A case over codes: k and v are what the codes stand for, in float64."""

    q: Tensor
    kv: PagedKV
    k: Tensor
    v: Tensor
    visible: Tensor


def quantised(shape: Shape, dtype: torch.dtype, layout: PageLayout, q_dtype: torch.dtype, seed: int = 0) -> Quantised:
    """Every page that holds a token of the run is whole, as a sealed page is; all others are bytes of ones, which are
    codes of 255 with scales of NaN."""
    case = build(
        replace(shape, kv_start=(0,) * len(shape.kv_len), kv_len=whole_pages(shape)), dtype, "rows", q_dtype, seed
    )
    spread(case)
    arena = quantised_arena(case.kv, layout)
    kv = PagedKV(arena, case.kv.page_table, torch.tensor(shape.kv_start), torch.tensor(shape.kv_len))
    k, v = stored(kv, max(shape.kv_len))
    visible = build(shape, dtype, "rows", q_dtype, seed).visible
    return Quantised(case.q, kv, k, v, visible)


def whole_pages(shape: Shape) -> tuple[int, ...]:
    return tuple(-(-num // shape.page_size) * shape.page_size for num in shape.kv_len)


def spread(case: Case) -> None:
    """Channels of K differ in width and have means of their own, as those of models do."""
    arena, generator = case.kv.arena, torch.Generator().manual_seed(1)
    width = torch.rand(arena.head_dim, generator=generator) * 3
    mean = torch.randn(arena.head_dim, generator=generator)
    arena.k.copy_((arena.k.float() * width + mean).to(arena.k.dtype))


def quantised_arena(rows: PagedKV, layout: PageLayout) -> Arena:
    """The same pages at the same slots, where the table lists them."""
    source = rows.arena.parts[0]
    arena = Arena.allocate(layout, source.num_slots, source.num_kv_heads, source.head_dim, v_head_dim=source.v_head_dim)
    arena.k.fill_(255)
    arena.v.fill_(255)
    for head in range(source.num_kv_heads):  # every head has slots of its own: the others of a page stay NaN
        listed = rows.page_table[:, head].flatten()
        slots = [slot for slot in listed.tolist() if 0 <= slot < source.num_slots]
        one = Arena(
            source.k[:, head : head + 1].contiguous(),
            source.v[:, head : head + 1].contiguous(),
            source.layout,
            source.head_dim,
            source.v_head_dim,
        )
        to = Arena.allocate(layout, source.num_slots, 1, source.head_dim, v_head_dim=source.v_head_dim)
        assert cpu.move_pages(one, to, slots, slots) == {}
        arena.k[slots, head], arena.v[slots, head] = to.k[slots, 0], to.v[slots, 0]
    return arena


def stored(kv: PagedKV, num_tokens: int) -> tuple[Tensor, Tensor]:
    """K and V `[num_seqs, num_kv_heads, num_tokens, dim]` in float64; zeros where a sequence has no page."""
    num_seqs, num_heads = kv.page_table.shape[:2]
    k = torch.zeros(num_seqs, num_heads, num_tokens, kv.arena.head_dim, dtype=torch.float64)
    v = torch.zeros(num_seqs, num_heads, num_tokens, kv.arena.v_head_dim, dtype=torch.float64)
    for seq in range(num_seqs):
        for head in range(num_heads):
            end = int(kv.kv_len[seq])
            k[seq, head, :end], v[seq, head, :end] = reference.read_tokens(
                kv.arena, kv.page_table[seq, head], head, 0, end
            )
    return k, v


def code_error(case: Quantised, rule: ScoreRule) -> CodeError:
    """From the scales that are stored; see `tolerances`.

    A weight is off by half a unit at most, of either sign, where the unit is the largest weight / 32639. Errors that
    are spread evenly have a deviation of 1 / sqrt(12): times codes c_i, at most 128 (int8) or 15 (int4), their sum is
    taken to be below 6 deviations, 1.75 sqrt(sum c_i^2) units.
    """
    arena = case.kv.arena.parts[0]
    highest = 15 if arena.layout.packing == "int4" else 128
    k_scale, k_zero, v_scale = scales(case)
    group_size = case.q.shape[1] // arena.num_kv_heads
    q = case.q.double().abs()
    wide_k, wide_zero, wide_v = (x.repeat_interleave(group_size, 1) for x in (k_scale, k_zero, v_scale))
    largest = (q[:, :, :, None] * wide_k[:, :, None]).amax((3, 4))
    score = abs(rule.scale) * 1.75 * (arena.head_dim**0.5) * highest * largest / 32639
    magnitude = abs(rule.scale) * (q @ (wide_k * highest + wide_zero.abs()).mT).amax(-1)
    # Of a tile of 64 tokens the largest weight of V is at most the sum of all.
    scores = rule.scale * (case.q.double() @ case.k.repeat_interleave(group_size, 1).mT)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~case.visible[:, None], -torch.inf)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    out = 1.75 * 8 * highest / 32639 * (p @ wide_v)
    return CodeError(score, out, magnitude)


def scales(case: Quantised) -> tuple[Tensor, Tensor, Tensor]:
    """Of K `[S, H, T, D]` largest scales, and what bounds zeros; of V `[S, H, T, Dv]` the largest scale of a token."""
    kv, arena = case.kv, case.kv.arena.parts[0]
    layout, size = arena.layout, arena.layout.page_size
    k_scale, k_zero = torch.zeros_like(case.k), torch.zeros_like(case.k)
    v_scale = torch.zeros_like(case.v)
    num_channels = -(-(layout.num_channels or arena.head_dim) // 16) * 16
    bits = 4 if layout.packing == "int4" else 8
    for seq, head in torch.cartesian_prod(
        torch.arange(kv.page_table.shape[0]), torch.arange(kv.page_table.shape[1])
    ).tolist():
        for page in range(-(-int(kv.kv_len[seq]) // size)):
            slot, tokens = int(kv.page_table[seq, head, page]), slice(page * size, (page + 1) * size)
            codes = size * num_channels * bits // 8
            steps = arena.k[slot, head, codes : codes + 4 * num_channels].clone().view(torch.bfloat16).double()
            # Where channels are left out, the widest step stands for all.
            keeps_all, of_channels = layout.num_channels is None, steps[:num_channels]
            k_scale[seq, head, tokens] = of_channels[: arena.head_dim] if keeps_all else of_channels.amax()
            widest = 15 * k_scale[seq, head, tokens] if bits == 4 else 0
            k_zero[seq, head, tokens] = case.k[seq, head, tokens].abs().amax(0) + widest
            codes = size * (-(-arena.v_head_dim // 16) * 16) * bits // 8
            num_groups = arena.v_head_dim // 64 if bits == 4 else 1
            v_steps = arena.v[slot, head, codes : codes + 2 * num_groups * size].clone().view(torch.bfloat16).double()
            count = case.v[seq, head, tokens].shape[0]
            v_scale[seq, head, tokens] = v_steps.view(num_groups, size).amax(0)[:count, None]
    return k_scale, k_zero, v_scale
