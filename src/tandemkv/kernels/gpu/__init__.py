"""Attention over pages in a GPU's memory, by Triton kernels. Run by Triton's interpreter where `TRITON_INTERPRET=1`."""

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels.checks import check_mass, check_query, check_rule
from tandemkv.kernels.gpu import decode
from tandemkv.kernels.gpu.config import Config, config_for
from tandemkv.kernels.gpu.l2 import prefetch_ptx
from tandemkv.types import Arena, PagedKV, Partial, ScoreRule

LOG2E = 1.4426950408889634

__all__ = ["Config", "attend", "config_for", "merge", "raise_for"]


def attend(
    q: Tensor,
    *runs: PagedKV,
    rule: ScoreRule,
    causal: bool = False,
    mass: Tensor | None = None,
    flags: Tensor | None = None,
    config: Config | None = None,
) -> Partial:
    """`tandemkv.kernels.attend` for q and arenas of rows on one device; tables may lie there or in host memory.

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
    flags = torch.zeros(1, dtype=torch.int32, device=q.device) if flags is None else flags
    parts, first_block = [], 0
    for kv in runs:
        is_last = kv is runs[-1]
        parts += _attend_run(q.contiguous(), kv, rule, causal and is_last, _Extras(flags, mass, first_block, config))
        first_block += kv.num_blocks
    whole = merge(parts)
    if mass is not None:
        mass.sub_(whole.lse.unsqueeze(-1) * LOG2E).exp2_().nan_to_num_(0.0)
    return whole


def merge(parts: Sequence[Partial], sink_logit: Tensor | None = None) -> Partial:
    """`tandemkv.kernels.merge` of any number of parts, in one kernel."""
    if len(parts) == 1 and sink_logit is None:
        return parts[0]
    parts = [Partial(part.out.contiguous(), part.lse.contiguous()) for part in parts]
    first = parts[0]
    addresses = [[part.out.data_ptr() for part in parts], [part.lse.data_ptr() for part in parts]]
    outs, lses = torch.tensor(addresses, dtype=torch.int64).to(first.out.device, non_blocking=True)
    out, lse = torch.empty_like(first.out), torch.empty_like(first.lse)
    if lse.numel():
        decode.merge_parts[(lse.numel(),)](
            outs,
            lses,
            lse if sink_logit is None else sink_logit,
            out,
            lse,
            len(parts),
            *lse.shape[1:],
            V_DIM=out.shape[3],
            V_PAD=triton.next_power_of_2(out.shape[3]),
            HAS_SINK=sink_logit is not None,
        )
    return Partial(out, lse)


def raise_for(flags: Tensor) -> None:
    """Waits for the device. InputError for NaN in q, AssertionError for a slot that is none."""
    found = int(flags)
    if found & decode.SLOT_OUT_OF_RANGE.value:
        raise AssertionError("a page table entry in use points outside its arena")
    if found & decode.NAN_IN_Q.value:
        raise InputError("q contains NaN: a layer before this attention produced it")


class _Extras:
    """Beside a run: flags, room for block masses and where the run's begin, and how it is cut."""

    def __init__(self, flags: Tensor, mass: Tensor | None, first_block: int, config: Config | None) -> None:
        self.flags, self.first_block, self.config = flags, first_block, config
        self.block_lse = None if mass is None else mass.narrow(3, first_block, mass.shape[3] - first_block)
        if mass is not None and first_block == 0:
            mass.fill_(-torch.inf)


def _attend_run(q: Tensor, kv: PagedKV, rule: ScoreRule, causal: bool, extras: _Extras) -> list[Partial]:
    """A part for each split."""
    arena, device = kv.arena, q.device
    assert isinstance(arena, Arena)
    num_seqs, num_q_heads, q_len, head_dim = q.shape
    group_size = num_q_heads // arena.num_kv_heads
    tokens = kv.page_table.shape[2] * kv.entry_tokens
    config = extras.config or config_for(
        num_seqs, arena.num_kv_heads, group_size * q_len, tokens, _num_processors(device)
    )
    shape = (config.num_splits, num_seqs, num_q_heads, q_len)
    out = torch.empty((*shape, arena.v_head_dim), dtype=torch.float32, device=device)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    table, starts, lens = (x.to(device).contiguous() for x in (kv.page_table, kv.kv_start, kv.kv_len))
    block_lse = lse if extras.block_lse is None else extras.block_lse
    ask_k, ask_v = _asks(arena, kv, config, device)
    row_blocks = -(-group_size * q_len // config.block_m)
    decode.decode_rows[(config.num_splits, arena.num_kv_heads * row_blocks, num_seqs)](
        q,
        arena.k,
        arena.v,
        table,
        starts,
        lens,
        out,
        lse,
        block_lse,
        extras.flags,
        rule.scale,
        rule.softcap or 0.0,
        min(rule.window or 0, 1 << 30),
        num_q_heads,
        arena.num_slots,
        table.shape[2],
        lens.stride(0),
        lens.stride(1) if lens.dim() == 2 else 0,
        kv.num_blocks,
        block_lse.stride(2),
        GROUP=group_size,
        Q_LEN=q_len,
        HEAD_DIM=head_dim,
        V_DIM=arena.v_head_dim,
        NUM_KV_HEADS=arena.num_kv_heads,
        PAGE=arena.layout.page_size,
        OF_BLOCKS=kv.of_blocks,
        CAUSAL=causal,
        HAS_SOFTCAP=rule.softcap is not None,
        HAS_WINDOW=rule.window is not None,
        WITH_MASS=extras.block_lse is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        D_PAD=max(16, triton.next_power_of_2(head_dim)),
        V_PAD=max(16, triton.next_power_of_2(arena.v_head_dim)),
        ASK_K=ask_k,
        ASK_V=ask_v,
        DISTANCE=config.distance if ask_k and ask_v else 0,
        WIDEN=triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return [Partial(*part) for part in zip(out.unbind(), lse.unbind(), strict=True)]


def _asks(arena: Arena, kv: PagedKV, config: Config, device: torch.device) -> tuple[str, str]:
    """Assembly that asks for a piece of K and of V; none where tiles are no whole pieces, and in the interpreter."""
    piece = min(config.block_n, kv.entry_tokens)
    if config.distance == 0 or device.type != "cuda" or config.block_n % piece or kv.entry_tokens % piece:
        return "", ""
    major, minor = torch.cuda.get_device_capability(device)
    sizes = (piece * dim * arena.layout.dtype.itemsize for dim in (arena.head_dim, arena.v_head_dim))
    ask_k, ask_v = (prefetch_ptx(10 * major + minor, size, 32 * config.num_warps) for size in sizes)
    return ask_k, ask_v


def _check_run(q: Tensor, kv: PagedKV) -> None:
    arena = kv.arena
    if not isinstance(arena, Arena) or arena.layout.packing != "rows" or kv.stands_in:
        raise UnsupportedError("on a GPU pages of rows are attended, each token for itself: unpack other pages first")
    if arena.k.device != q.device:
        raise InputError(f"q and pages must lie on one device, got {q.device} and {arena.k.device}")
    if arena.k.numel() >= 1 << 62:
        raise UnsupportedError("an arena of so many numbers is not supported")


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
