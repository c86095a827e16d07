"""Attention over pages in a GPU's memory, by Triton kernels. Run by Triton's interpreter where `TRITON_INTERPRET=1`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from tandemkv.errors import InputError, UnavailableError, UnsupportedError
from tandemkv.kernels.checks import check_mass, check_query, check_rule, raise_for
from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.config import Config, block_n_for, config_for
from tandemkv.kernels.gpu.formats import DTYPES, k_format, padded, v_format
from tandemkv.kernels.gpu.l2 import asks
from tandemkv.kernels.gpu.placed import device_of, num_processors, placed
from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule

LOG2E = 1.4426950408889634

__all__ = ["Config", "append", "attend", "config_for", "failure", "is_interpreted", "merge", "raise_for", "unpack"]


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
    mass: as there, on q's device. flags: int32 `[1]` on q's device, in which a kernel sets a bit for NaN in q (1) and
    for a slot that is none (2), which is not read: `raise_for` tells of them when the step is over, so that no call
    waits for the device. config: without one, `config_for` chooses.
    """
    check_query(q, runs, causal, q.device.type)
    check_rule(rule, causal, len(runs))
    for kv in runs:
        _check_run(q, kv)
    if mass is not None:
        check_mass(mass, q, runs)
        mass.fill_(-torch.inf)
    q, flags = q.contiguous(), torch.zeros(1, dtype=torch.int32, device=q.device) if flags is None else flags
    configs = [_config_of(q, kv, config) for kv in runs]
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


def append(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor) -> None:
    """`tandemkv.kernels.append` into an arena of rows on a device; the table may lie there or in host memory, which no
    call waits for."""
    if arena.layout.packing != "rows":
        raise UnsupportedError(f"on a GPU tokens are appended to pages of rows, got {arena.layout.packing}")
    arena.check_tokens(page_table.shape[0], k, v)
    num_seqs, num_heads, num_new = k.shape[:3]
    if not num_seqs * num_new:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    block_n = min(16, triton.next_power_of_2(num_new))
    with _launching(arena.k):
        decode.append_rows[(triton.cdiv(num_new, block_n), num_heads, num_seqs)](
            arena.k,
            arena.v,
            placed(page_table, arena.k.device),
            k,
            v,
            *k.stride()[:3],
            *v.stride()[:3],
            begin,
            num_new,
            arena.num_slots,
            page_table.shape[2],
            PAGES=(arena.num_kv_heads, arena.layout.page_size, False),
            K=k_format(arena),
            V=v_format(arena),
            BLOCK_N=block_n,
        )


def unpack(source: Arena, target: Arena, source_slots: Tensor, target_slots: Tensor) -> None:
    """Pages of any packing -> pages of rows on the same device, rounded as `gather` does: what came up a link.

    source_slots, target_slots: int32 `[num_pages]`, there or in host memory; slots in range, targets named once.
    InputError for arenas whose pages are not of one shape, or lie on two devices.
    """
    shapes = [(a.layout.dtype, a.layout.page_size, a.num_kv_heads, a.head_dim, a.v_head_dim) for a in (source, target)]
    if shapes[0] != shapes[1] or target.layout.packing != "rows" or source.k.device != target.k.device:
        raise InputError(f"pages become rows of the same shape on one device, got {shapes[0]} and {shapes[1]}")
    slots, targets = (placed(x, source.k.device) for x in (source_slots, target_slots))
    if slots.dtype != torch.int32 or targets.dtype != torch.int32 or slots.dim() != 1 or slots.shape != targets.shape:
        raise InputError(f"slots must be int32 of one length, got {list(slots.shape)} and {list(targets.shape)}")
    block_n = block_n_for(source.layout.page_size)
    if not slots.shape[0]:
        return
    with _launching(source.k):
        decode.unpack_pages[(slots.shape[0], source.num_kv_heads, source.layout.page_size // block_n)](
            source.k,
            source.v,
            target.k,
            target.v,
            slots,
            targets,
            HEAD_DIM=source.head_dim,
            V_DIM=source.v_head_dim,
            PAGES=(source.num_kv_heads, source.layout.page_size, False),
            K=k_format(source),
            V=v_format(source),
            DTYPE=DTYPES[source.layout.dtype],
            BLOCK_N=block_n,
            D_PAD=padded(source.head_dim),
        )


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on tensors in host memory."""
    return bool(triton.knobs.runtime.interpret)


def failure(device: torch.device) -> str:
    """Why these kernels do not work on a device; '' where they do: a call over 16 equal tokens, whose lse is known."""
    rows = PageLayout(torch.float32, 16)
    try:
        arena = Arena.allocate(rows, 1, 1, 16, device)
        x = torch.ones(1, 1, 16, 16, device=device)
        arena.k.zero_()
        append(arena, torch.zeros(1, 1, 1, dtype=torch.int32, device="cpu"), 0, x, x)
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        kv = PagedKV(arena, torch.zeros(1, 1, 1, dtype=torch.int32, device="cpu"), zero, zero + 16)
        lse = float(attend(x[:, :, :1], kv, rule=ScoreRule(1.0)).lse)
    except Exception as error:  # noqa: BLE001  no C compiler, a driver that is too old, whatever Triton raises
        return f"a kernel of Triton {triton.__version__} does not run on {device}: {error or type(error).__name__}"
    return "" if abs(lse - 16 - math.log(16)) < 1e-4 else f"a kernel on {device} computes {lse} for 18.7726"


@contextmanager
def _launching(x: Tensor) -> Iterator[None]:
    """Kernels on x's device. UnavailableError where one does not compile."""
    try:
        with device_of(x):
            yield
    except (CompilationError, OutOfResources, PTXASError) as error:
        raise UnavailableError(f"a kernel does not compile for {x.device}: {error}") from error


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
    with _launching(q):
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
        with _launching(out):
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


def _config_of(q: Tensor, kv: PagedKV, config: Config | None) -> Config:
    if config is None:
        num_seqs, num_q_heads, q_len, _ = q.shape
        num_heads, tokens = kv.arena.num_kv_heads, kv.page_table.shape[2] * kv.entry_tokens
        num_rows = num_q_heads // num_heads * q_len
        config = config_for(num_seqs, num_heads, num_rows, tokens, num_processors(q.device))
    if kv.arena.layout.packing == "rows":
        return config
    return replace(config, block_n=min(config.block_n, block_n_for(kv.entry_tokens)))  # a tile lies in one page


def _check_run(q: Tensor, kv: PagedKV) -> None:
    arena = kv.arena
    if not isinstance(arena, Arena):
        raise UnsupportedError("on a GPU a run's pages are of one packing: expected an Arena, got Arenas")
    if kv.stands_in:
        raise UnsupportedError("on a GPU each token stands for itself, got a run with log_counts")
    if arena.k.device != q.device:
        raise InputError(f"q and pages must lie on one device, got {q.device} and {arena.k.device}")
