"""Attention over pages, and the merge of its parts: how calls become launches."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels.checks import check_flags, check_lengths, check_mass, check_query, check_rule, check_table
from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.config import Config, block_n_for, config_for, fitted
from tandemkv.kernels.gpu.formats import DTYPES, k_format, padded, tile_token_bytes, v_format
from tandemkv.kernels.gpu.l2 import asks
from tandemkv.kernels.gpu.placed import launching, num_processors, placed, shared_bytes
from tandemkv.types import Arena, PagedKV, Partial, ScoreRule

LOG2E = 1.4426950408889634


def attend(
    q: Tensor,
    *runs: PagedKV,
    rule: ScoreRule,
    causal: bool = False,
    mass: Tensor | None = None,
    flags: Tensor | None = None,
    config: Config | None = None,
) -> Partial:
    """`tandemkv.kernels.attend` for q and arenas on one device; tables may lie there or in host memory.

    Pages of any packing count as the rows that `gather` makes of them, in the arena's dtype.
    mass: as there, on q's device. flags: int32 `[1]` on q's device, in which a kernel sets bits for NaN in q, a slot
    that is none and lengths beyond a table, which are not read: `checks.raise_for` tells of them when the step is over,
    so that no call waits for the device. config: without one, `config_for` chooses.
    """
    check_query(q, runs, causal, q.device.type if isinstance(q, Tensor) else "cuda")
    check_rule(rule, causal, len(runs))
    for kv in runs:
        check_run(q, kv)
    if mass is not None:
        check_mass(mass, q, runs)
        mass.fill_(-torch.inf)
    q, flags = q.contiguous(), torch.zeros(1, dtype=torch.int32, device=q.device) if flags is None else flags
    check_flags(flags, q)
    configs = [config_of(q, kv, config) for kv in runs]
    parts = _room(sum(each.num_splits for each in configs), q, runs[0].arena.v_head_dim)
    first_part, first_block = 0, 0
    for kv, each in zip(runs, configs, strict=True):
        its = Partial(*(x.narrow(0, first_part, each.num_splits) for x in parts))
        block_lse = None if mass is None else mass.narrow(3, first_block, kv.num_blocks)
        _attend_run(_Call(q, rule, causal and kv is runs[-1], flags), kv, each, its, block_lse)
        first_part, first_block = first_part + each.num_splits, first_block + kv.num_blocks
    whole = _merged(parts)
    if mass is not None:
        mass.sub_(whole.lse.unsqueeze(-1) * LOG2E).exp2_().nan_to_num_(0.0)
    return whole


def merge(parts: Sequence[Partial], sink_logit: Tensor | None = None) -> Partial:
    """`tandemkv.kernels.merge` of any number of parts, in one kernel."""
    if len(parts) == 1 and sink_logit is None:
        return parts[0]
    return _merged(Partial(*(torch.stack(xs) for xs in zip(*parts, strict=True))), sink_logit)


def config_of(q: Tensor, kv: PagedKV, config: Config | None) -> Config:
    """The one asked for, or the one stored for such a call; its tiles fit the pages."""
    if config is None:
        num_seqs, num_q_heads, q_len, _ = q.shape
        num_heads, tokens = kv.arena.num_kv_heads, kv.page_table.shape[2] * kv.entry_tokens
        num_rows = num_q_heads // num_heads * q_len
        config = config_for(num_seqs, num_heads, num_rows, tokens, num_processors(q.device))
        config = fitted(config, tile_token_bytes(kv.arena), shared_bytes(q.device), num_programs=2)
    if kv.arena.layout.packing != "rows":
        config = replace(config, block_n=min(config.block_n, block_n_for(kv.entry_tokens)))  # a tile lies in one page
    return fitted(config, tile_token_bytes(kv.arena), shared_bytes(q.device))


def check_run(q: Tensor, kv: PagedKV) -> None:
    """UnsupportedError or InputError for pages that a kernel cannot attend to from q."""
    arena = kv.arena
    check_table(arena, kv.page_table, q.shape[0], on_cpu=False)
    check_lengths(kv, q.shape[0], on_cpu=False)
    if not isinstance(arena, Arena):
        raise UnsupportedError("on a GPU a run's pages are of one packing: expected an Arena, got Arenas")
    if kv.stands_in:
        raise UnsupportedError("on a GPU each token stands for itself, got a run with log_counts")
    if arena.k.device != q.device:
        raise InputError(f"q and pages must lie on one device, got {q.device} and {arena.k.device}")


class _Call(NamedTuple):
    """What all runs of a call have in common."""

    q: Tensor
    rule: ScoreRule
    causal: bool
    flags: Tensor


def _room(num_parts: int, q: Tensor, v_head_dim: int) -> Partial:
    """Uninitialised, a part behind the other."""
    shape = (num_parts, *q.shape[:3])
    out = torch.empty((*shape, v_head_dim), dtype=torch.float32, device=q.device)
    return Partial(out, torch.empty(shape, dtype=torch.float32, device=q.device))


def _attend_run(call: _Call, kv: PagedKV, config: Config, parts: Partial, block_lse: Tensor | None) -> None:
    """Fills a part for each split, and block_lse."""
    (q, rule, causal, flags), arena, device = call, kv.arena, call.q.device
    assert isinstance(arena, Arena)
    num_seqs, num_q_heads, q_len, head_dim = q.shape
    group_size = num_q_heads // arena.num_kv_heads
    table, starts, lens = (placed(x, device) for x in (kv.page_table, kv.kv_start, kv.kv_len))
    rows_of_masses = parts.lse if block_lse is None else block_lse
    k, row_blocks = k_format(arena), -(-group_size * q_len // config.block_m)
    grid = config.num_splits, arena.num_kv_heads * row_blocks, num_seqs
    if not num_seqs:
        return
    with launching(q):
        decode.decode_pages[grid](
            q,
            arena.k,
            arena.v,
            table,
            starts,
            lens,
            *parts,
            rows_of_masses,
            flags,
            rule.scale,
            rule.softcap or 0.0,
            min(rule.window or 0, 1 << 30),
            num_q_heads,
            arena.num_slots,
            table.shape[2],
            lens.stride(0),
            lens.stride(1) if lens.dim() == 2 else 0,
            kv.num_blocks,
            rows_of_masses.stride(2),
            GROUP=group_size,
            Q_LEN=q_len,
            HEAD_DIM=head_dim,
            V_DIM=arena.v_head_dim,
            PAGES=(arena.num_kv_heads, arena.layout.page_size, kv.of_blocks),
            K=k,
            V=v_format(arena),
            DTYPE=DTYPES[arena.layout.dtype],
            Q_PAD=padded(head_dim) if arena.layout.num_channels else k[2],
            RULE=(causal, rule.softcap is not None, rule.window is not None, block_lse is not None),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            AHEAD=asks(kv, config, math.prod(grid), device),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _merged(parts: Partial, sink_logit: Tensor | None = None) -> Partial:
    """Of parts one behind the other."""
    if parts.lse.shape[0] == 1 and sink_logit is None:
        return Partial(*(x[0] for x in parts))
    out, lse = torch.empty_like(parts.out[0]), torch.empty_like(parts.lse[0])
    if lse.numel():
        with launching(out):
            decode.merge_parts[(lse.numel(),)](
                *parts,
                lse if sink_logit is None else sink_logit,
                out,
                lse,
                parts.lse.shape[0],
                lse.numel(),
                *lse.shape[1:],
                V_DIM=out.shape[3],
                V_PAD=triton.next_power_of_2(out.shape[3]),
                HAS_SINK=sink_logit is not None,
            )
    return Partial(out, lse)
