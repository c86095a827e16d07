"""What every backend asks of a call before it reads anything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.types import AnyArena, Arena, Arenas, PagedKV, ScoreRule

NAN_IN_Q, SLOT_OUT_OF_RANGE, OUTSIDE_TABLE = 1, 2, 4
"""Bits of the flags that kernels on a device set."""


def check_query(q: Tensor, runs: Sequence[PagedKV], causal: bool, device_type: str) -> None:
    """InputError or UnsupportedError unless a kernel on this kind of device can attend from q over these runs."""
    if not runs:
        raise InputError("attend needs at least one run of tokens; an empty one gives the identity of merge")
    if not isinstance(q, Tensor) or not all(isinstance(kv, PagedKV) for kv in runs):
        raise InputError(f"expected a tensor q and runs of PagedKV, got {types_of(q, *runs)}")
    if q.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("no gradient flows through paged attention: use torch.no_grad()")
    arena = runs[0].arena
    if q.device.type != device_type:
        where = "in host memory" if device_type == "cpu" else f"on {device_type}"
        raise InputError(f"this kernel attends queries {where}, got {q.device}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"queries must be float32, bfloat16 or float16, got {q.dtype}: load the model with dtype=torch.bfloat16"
        )
    if q.dim() != 4 or q.shape[3] != arena.head_dim:
        raise InputError(f"expected q [num_seqs, num_q_heads, q_len, {arena.head_dim}], got {list(q.shape)}")
    if q.shape[2] < 1:
        raise InputError(f"q_len must be at least 1, got {list(q.shape)}")
    if arena.num_kv_heads < 1 or q.shape[1] < 1 or q.shape[1] % arena.num_kv_heads:
        raise InputError(f"query heads must be a multiple of the {arena.num_kv_heads} KV heads, got {q.shape[1]}")
    if causal and (runs[-1].of_blocks or runs[-1].stands_in):
        kind = "blocks" if runs[-1].of_blocks else "tokens that stand for others"
        raise InputError(f"causal queries are the last tokens of the last run: expected pages there, got {kind}")
    for kv in runs:
        if kv.page_table.shape[:1] != q.shape[:1]:
            got = list(kv.page_table.shape)
            raise InputError(f"page_table must be [{q.shape[0]}, {arena.num_kv_heads}, num_pages] as q is, got {got}")
        first, other = ((a.num_kv_heads, a.head_dim, a.v_head_dim) for a in (arena, kv.arena))
        if first != other:
            raise InputError(f"runs must have one (num_kv_heads, head_dim, v_head_dim), got {first} and {other}")


def check_rule(rule: ScoreRule, causal: bool, num_runs: int) -> None:
    """InputError for what is none, and for a window that has nothing to count back from."""
    if not isinstance(causal, bool):
        raise InputError(f"causal must be True or False, got {causal!r}")
    if not isinstance(rule, ScoreRule):
        raise InputError(f"rule must be a ScoreRule, such as ScoreRule(scale=0.125), got {rule!r}")
    if rule.window is not None and (not causal or num_runs != 1):
        raise InputError(
            "a window counts back from causal queries over one run: expected causal=True and 1 run, got "
            f"causal={causal} and {num_runs}"
        )


def check_mass(mass: Tensor, q: Tensor, runs: Sequence[PagedKV]) -> None:
    """InputError unless there is room for every block of these runs, on q's device."""
    expected = (*q.shape[:3], sum(kv.num_blocks for kv in runs))
    good = isinstance(mass, Tensor) and mass.dtype == torch.float32 and mass.shape == expected
    if not good or not mass.is_contiguous() or mass.device != q.device:
        got = f"{mass.dtype} {list(mass.shape)} on {mass.device}" if isinstance(mass, Tensor) else types_of(mass)
        where = "the CPU" if q.device.type == "cpu" else q.device
        raise InputError(f"mass must be contiguous float32 {list(expected)} on {where}, got {got}")


def check_flags(flags: Tensor, q: Tensor) -> None:
    """InputError unless kernels can set bits of them."""
    if not isinstance(flags, Tensor) or flags.dtype != torch.int32 or flags.shape != (1,) or flags.device != q.device:
        got = f"{flags.dtype} {list(flags.shape)} on {flags.device}" if isinstance(flags, Tensor) else types_of(flags)
        raise InputError(f"flags must be int32 [1] on {q.device}, got {got}")


def check_table(arena: AnyArena, page_table: Tensor, num_seqs: int, on_cpu: bool = True) -> None:
    """InputError unless it is one of these pages for so many sequences; on_cpu: and lies in host memory."""
    good = page_table.dtype == torch.int32 and page_table.dim() == 3
    if (
        not good
        or page_table.shape[:2] != (num_seqs, arena.num_kv_heads)
        or (on_cpu and page_table.device.type != "cpu")
    ):
        got, where = f"{page_table.dtype} {list(page_table.shape)} on {page_table.device}", " on the CPU" * on_cpu
        raise InputError(f"page_table must be int32 [{num_seqs}, {arena.num_kv_heads}, num_pages]{where}, got {got}")
    if page_table.stride(2) != 1 and page_table.shape[2] > 1:
        raise InputError("page_table must be contiguous along its pages")


def check_lengths(kv: PagedKV, num_seqs: int, on_cpu: bool = True) -> None:
    """InputError unless kv_start and kv_len are those of so many sequences; their values are looked at by kernels."""
    shape = (num_seqs, kv.arena.num_kv_heads) if kv.of_blocks else (num_seqs,)
    for name, tensor in (("kv_start", kv.kv_start), ("kv_len", kv.kv_len)):
        good = tensor.dtype == torch.int64 and tensor.shape == shape and not (on_cpu and tensor.device.type != "cpu")
        if not good or not tensor.is_contiguous():
            got, where = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}", " on the CPU" * on_cpu
            raise InputError(f"{name} must be contiguous int64 {list(shape)}{where}, got {got}")


def check_tokens(arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, on_cpu: bool = True) -> None:
    """InputError unless k and v can be tokens `begin...` of the table's run."""
    if not isinstance(arena, Arena | Arenas):
        raise InputError(f"pages lie in an Arena, got {types_of(arena)}")
    if not isinstance(page_table, Tensor) or not isinstance(begin, int):
        raise InputError(f"expected a page_table tensor and a whole number begin, got {types_of(page_table, begin)}")
    num_seqs = page_table.shape[0] if page_table.dim() else 0
    arena.check_tokens(num_seqs, k, v)
    check_table(arena, page_table, num_seqs, on_cpu)
    end = begin + k.shape[2]
    if begin < 0 or end > page_table.shape[2] * arena.layout.page_size:
        raise InputError(f"tokens [{begin}, {end}) lie outside a table of {page_table.shape[2]} pages")


def raise_for(flags: Tensor) -> None:
    """Waits for the device on which flags, int32 `[1]`, lie. InputError for NaN in q and for lengths beyond a table,
    AssertionError for a slot that is none."""
    found = int(flags)
    if found & SLOT_OUT_OF_RANGE:
        raise AssertionError("a page table entry in use points outside its arena")
    if found & OUTSIDE_TABLE:
        raise InputError("[kv_start, kv_len) of a run must lie in [0, tokens of its page table]")
    if found & NAN_IN_Q:
        raise InputError("q contains NaN: a layer before this attention produced it")


def types_of(*values: object) -> str:
    """Their names, for errors."""
    return ", ".join(type(value).__name__ for value in values)
