"""The blocks that could hold the best key (Quest, 2406.10774): channel minima and maxima of every block."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv.kernels.blocks import LANE_BLOCKS, BlockCodes, make_bounds, room_for_codes
from tandemkv.select.base import Summaries
from tandemkv.types import BLOCK_TOKENS, AnyArena

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

_LINE_WORDS = 4


@dataclass(frozen=True)
class Bounds:
    """score = sum over channels of max(q min, q max), an upper bound of q.k for every key of the block.

    The bounds are int8 with a step for each block, rounded outward: 2 head_dim + 4 bytes for 16 tokens, 3.2 % of K and
    V in bfloat16 at head_dim 128. The query is rounded to 8 bits too: a weight moves by 0.4 % of the largest.
    """

    def allocate(self, arena: AnyArena) -> BlockCodes:
        """See `Summariser`."""
        num_blocks = arena.layout.page_size // BLOCK_TOKENS
        num_units, num_words = -(-num_blocks // LANE_BLOCKS), 2 * -(-arena.head_dim // 4)
        shape = (arena.num_kv_heads, arena.num_slots, num_units)
        codes = room_for_codes(*shape, -(-num_words // _LINE_WORDS), _LINE_WORDS, LANE_BLOCKS, 4)
        steps = room_for_codes(*shape[:2], num_units * LANE_BLOCKS, dtype=torch.float32)
        return BlockCodes("bounds", codes, steps, num_blocks)

    def begin(self, arena: AnyArena, slots: Tensor, pool: "WorkerPool | None") -> None:
        """See `Summariser`: nothing is needed."""

    def summarise(
        self, arena: AnyArena, slots: Tensor, basis: None, into: BlockCodes, pool: "WorkerPool | None"
    ) -> None:
        """See `Summariser`. A key that is no number makes its block's score none: it is chosen, and seen."""
        make_bounds(into, arena, slots, pool)

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        return summaries.score_codes(q)
