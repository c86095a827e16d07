"""The blocks that could hold the best key (Quest, 2406.10774): channel minima and maxima of every block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tandemkv.kernels.blocks import LANE_BLOCKS, BlockCodes
from tandemkv.select.base import Summaries
from tandemkv.select.codes import code_queries
from tandemkv.types import BLOCK_TOKENS

_LINE_WORDS = 4


@dataclass(frozen=True)
class Bounds:
    """score = sum over channels of max(q min, q max), an upper bound of q.k for every key of the block.

    The bounds are int8 with a step for each block, rounded outward: 2 head_dim + 4 bytes for 16 tokens, 3.2 % of K and
    V in bfloat16 at head_dim 128. The query is rounded to 8 bits too, which moves a score by 0.4 % of the largest.
    """

    def begin(self, k: Tensor) -> None:
        """See `Summariser`: nothing is needed."""

    def summarise(self, k: Tensor, basis: None) -> BlockCodes:
        """See `Summariser`."""
        num_pages, num_kv_heads, page_size, head_dim = k.shape
        blocks = k.unflatten(2, (-1, BLOCK_TOKENS))
        low, high = blocks.amin(3), blocks.amax(3)  # [page, head, block, channel]
        # 126 codes, not 127: a quotient that rounding pushes up still has one.
        steps = torch.maximum(low.abs(), high.abs()).amax(-1) / 126.0
        divisor = torch.where(steps > 0, steps, 1.0)[..., None]
        low_codes, high_codes = (low / divisor).floor_(), (high / divisor).ceil_()
        # Quotient and product both round; neither may cut a corner off.
        low_codes -= (low_codes * steps[..., None] > low).to(low_codes.dtype)
        high_codes += (high_codes * steps[..., None] < high).to(high_codes.dtype)
        num_blocks, missing = page_size // BLOCK_TOKENS, -(page_size // BLOCK_TOKENS) % LANE_BLOCKS
        codes = torch.cat([_as_words(low_codes), _as_words(high_codes)], -2)  # [page, head, block, word, 4]
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[-2] % _LINE_WORDS, 0, missing))
        codes = codes.nan_to_num_(0.0, 0.0, 0.0).clamp_(-128, 127) + 128
        # [page, head, unit, block, line, word, 4] -> [head, page, unit, line, word, block, 4]
        lines = codes.to(torch.uint8).unflatten(2, (-1, LANE_BLOCKS)).unflatten(4, (-1, _LINE_WORDS))
        lines = lines.permute(1, 0, 2, 4, 5, 3, 6).contiguous()
        # A key that is no number makes its block's score none: it is chosen, and seen.
        steps = torch.nn.functional.pad(torch.where(steps.isfinite(), steps, torch.nan), (0, missing))
        return BlockCodes("bounds", lines, steps.transpose(0, 1).contiguous(), num_blocks)

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        q = q.float()
        missing = (0, -q.shape[-1] % 4)
        rows = torch.cat([torch.nn.functional.pad(x, missing) for x in (q.clamp(max=0), q.clamp(min=0))], -1)
        return summaries.score_codes(code_queries(rows, summaries.num_kv_heads, (_LINE_WORDS, LANE_BLOCKS)))


def _as_words(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4))
