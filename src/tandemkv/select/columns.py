"""The blocks whose best key is best along the directions in which keys differ most."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels.blocks import BlockCodes, read_keys, room_for_codes
from tandemkv.select.base import Summaries
from tandemkv.types import BLOCK_TOKENS, AnyArena

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


class Basis(NamedTuple):
    """Of a layer. mean: `[num_kv_heads, head_dim]`; directions: `[num_kv_heads, head_dim, num_columns]`, orthonormal,
    the widest first; steps: `[num_kv_heads, num_columns]`, what a code along each counts; weights: their products, by
    which a query's follow. float32."""

    mean: Tensor
    directions: Tensor
    steps: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Columns:
    """score = that of the block's best key, q.k taken along the `num_columns` principal directions of a head's keys.

    InfiniGen's partial keys (2406.19707) with the true query and directions found in the keys at hand, not offline: one
    byte for each direction and token, 24 bytes beside 256 of K and V in bfloat16 at head_dim 64, 9 % (5 % at 128).
    """

    num_columns: int = 24

    def __post_init__(self) -> None:
        if not isinstance(self.num_columns, int) or self.num_columns < 4 or self.num_columns % 4:
            raise InputError(f"num_columns must be a multiple of 4, at least 4, got {self.num_columns!r}")

    def allocate(self, arena: AnyArena) -> BlockCodes:
        """See `Summariser`."""
        num_blocks, num_words = arena.layout.page_size // BLOCK_TOKENS, -(-min(self.num_columns, arena.head_dim) // 4)
        shape = (arena.num_kv_heads, arena.num_slots, num_blocks, num_words, 1, BLOCK_TOKENS, 4)
        return BlockCodes("columns", room_for_codes(*shape), None, num_blocks)

    def begin(self, arena: AnyArena, slots: Tensor, pool: "WorkerPool | None") -> Basis:
        """See `Summariser`: the principal directions of each head's keys."""
        k = read_keys(arena, slots, pool).transpose(0, 1).flatten(1, 2)
        k = k.nan_to_num_(0.0, 0.0, 0.0)
        mean = k.mean(1)
        centred = k - mean[:, None]
        widths, directions = torch.linalg.eigh((centred.mT @ centred).double() / k.shape[1])  # narrowest first
        num = min(self.num_columns, k.shape[2])
        directions = directions.flip(-1)[..., :num].float()
        directions = torch.nn.functional.pad(directions, (0, -num % 4))
        # A code counts a 20th of the deviation: numbers of up to 6 deviations have one.
        steps = torch.nn.functional.pad(widths.flip(-1)[..., :num].clamp(min=0).sqrt().float() / 20.0, (0, -num % 4))
        steps = steps.clamp_(min=torch.finfo(torch.float32).tiny)
        return Basis(mean, directions, steps, (directions * steps[:, None]).contiguous())

    def summarise(
        self, arena: AnyArena, slots: Tensor, basis: Basis, into: BlockCodes, pool: "WorkerPool | None"
    ) -> None:
        """See `Summariser`."""
        k = read_keys(arena, slots, pool)
        along = (k - basis.mean[:, None]) @ basis.directions  # [page, head, token, column]
        codes = (along / basis.steps[:, None]).nan_to_num_(127.0, 127.0, -127.0).round_().clamp_(-127, 127) + 128
        # [page, head, block, token, line, word of 1, 4] -> [head, page, block, line, 1, token, 4]
        lines = codes.to(torch.uint8).unflatten(2, (-1, BLOCK_TOKENS)).unflatten(4, (-1, 1, 4))
        into.codes[:, slots.long()] = lines.permute(1, 0, 2, 4, 5, 3, 6)

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        basis: Basis = summaries.basis
        return summaries.score_codes(q, basis.weights)
