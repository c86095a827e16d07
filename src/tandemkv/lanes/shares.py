"""Attention mass of parts, as shares of the whole that they are merged to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.types import BLOCK_TOKENS, PagedKV, Partial


class Weighed(NamedTuple):
    """Attention over a run. mass: `[num_seqs, num_q_heads, q_len, num_blocks]`, the shares that its blocks have of
    this part alone; None where nobody observes."""

    part: Partial
    mass: Tensor | None


def room_like(mass: Tensor | None, q: Tensor, run: PagedKV) -> Tensor | None:
    """Where the shares of a run go, if any are asked for."""
    return None if mass is None else kernels.block_mass(q, run)


def joined(found: Sequence[Weighed], mass: Tensor | None) -> Partial:
    """All parts together; mass gets their shares of that, one behind the other."""
    whole = kernels.merge([each.part for each in found])
    if mass is not None:
        put_shares(found, whole.lse, mass)
    return whole


def put_shares(found: Sequence[Weighed], lse: Tensor, mass: Tensor) -> None:
    """Write shares of parts, as shares of a whole with this lse, one behind the other.

    A part without tokens has no share, whatever the whole is.
    """
    begin = 0
    for part, own in found:
        assert own is not None
        end = begin + own.shape[3]
        share = torch.exp(part.lse - lse).nan_to_num_(0.0)
        torch.mul(own, share.unsqueeze(-1), out=mass[..., begin:end])
        begin = end


def mass_of(logits: Tensor, lse: Tensor) -> Tensor:
    """Shares of blocks `[num_seqs, num_q_heads, q_len, num_blocks]`, of logits of all tokens and their lse."""
    weights = torch.exp(logits - lse.unsqueeze(-1)).nan_to_num_(0.0)
    mass: Tensor = weights.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1)
    return mass
