"""What is left out of a step, drawn from: a shuffle of its blocks, and how groups of a sample scatter. Native."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tandemkv.kernels.blocks import ChosenBlocks, FarPages
from tandemkv.types import Partial

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


def shuffle_left(far: FarPages, chosen: ChosenBlocks, seed: int, pool: "WorkerPool") -> Tensor:
    """int32 `[num_seqs, num_kv_heads, num_blocks]`: table entries of all far blocks but these and those of padding
    alone, in random order, for every sequence and head another; 0 behind them.

    The same seed, 0 to 2^64 - 1, gives the same order for a sequence, whatever comes behind it in the batch.
    """
    from tandemkv.kernels import cpu

    shape = far.slots.shape[0], far.arena.num_kv_heads, far.num_blocks
    order = torch.empty(shape, dtype=torch.int32, device="cpu")
    chosen_of = chosen.blocks.data_ptr(), chosen.blocks.shape[2], chosen.run.kv_len.data_ptr()
    slots = far.slots.data_ptr(), far.slots.stride(0)
    kv_start = far.kv_start.data_ptr()
    cpu.native.shuffle_left(pool, shape, far.page_blocks, kv_start, *chosen_of, *slots, seed, order.data_ptr())
    return order


def collapse(groups: Partial, pool: "WorkerPool | None" = None) -> Partial:
    """Attention over the union of the groups on axis 1: out `[num_seqs, num_groups, num_q_heads, q_len, dim]`, lse
    accordingly, float32. Like `merge`, where all lie in one tensor."""
    from tandemkv.kernels import cpu

    groups = Partial(groups.out.contiguous(), groups.lse.contiguous())
    num_seqs, _, *rows, dim = groups.out.shape
    out = torch.empty((num_seqs, *rows, dim), dtype=torch.float32, device="cpu")
    lse = torch.empty((num_seqs, *rows), dtype=torch.float32, device="cpu")
    cpu.native.collapse(pool or cpu.single_thread(), _native(groups), out.data_ptr(), lse.data_ptr())
    return Partial(out, lse)


def scatter(groups: Partial, whole: Partial, pool: "WorkerPool | None" = None) -> tuple[Tensor, Tensor]:
    """How the residuals r_j = exp(lse_j - lse) (out_j - out) of the groups on axis 1 scatter about their mean.

    The trace of their covariance, and the mean of (r_i . r_j)^2 over all i and j that differ, float64
    `[num_seqs, num_q_heads, q_len]`; both 0 of a single group.
    """
    from tandemkv.kernels import cpu

    groups = Partial(groups.out.contiguous(), groups.lse.contiguous())
    out, lse = whole.out.contiguous(), whole.lse.contiguous()
    variance, products = (torch.empty(lse.shape, dtype=torch.float64, device="cpu") for _ in range(2))
    to = variance.data_ptr(), products.data_ptr()
    cpu.native.scatter(pool or cpu.single_thread(), _native(groups), out.data_ptr(), lse.data_ptr(), *to)
    return variance, products


def _native(groups: Partial) -> Any:
    """The view that C++ takes, of tensors that the caller holds."""
    from tandemkv.kernels import cpu

    num_seqs, num_groups, num_heads, q_len, dim = groups.out.shape
    shape = num_seqs, num_groups, num_heads * q_len, dim
    return cpu.native.Groups(groups.out.data_ptr(), groups.lse.data_ptr(), shape)
