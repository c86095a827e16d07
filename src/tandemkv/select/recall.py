"""The blocks that one of the last queries recalled (CORM, 2404.15949); what falls out is gone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.select.base import Seen, Summaries
from tandemkv.types import BLOCK_TOKENS


@dataclass(frozen=True)
class Recall:
    """Kept is what any of the last `num_queries` queries gave more than its even share, the latest recalled first.

    The number of a block is how many queries are left until it is forgotten: `num_queries` when a query gives it more
    than 1/t of its attention per token, t tokens being attended to, and one less with each that does not. The paper has
    no budget and counts tokens; here the budget still holds, and the share is that of a block of 16.
    """

    num_queries: int = 256
    watches_far: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.num_queries, int) or self.num_queries < 1:
            raise InputError(f"num_queries must be a whole number, at least 1, got {self.num_queries!r}")

    def observe(self, known: Tensor, seen: Seen) -> Tensor:
        """See `Observer`."""
        num = seen.mass.shape[2]
        is_recalled = seen.mass > BLOCK_TOKENS / seen.num_tokens.float()[:, None, None, None]
        left = self.num_queries - torch.arange(num - 1, -1, -1, dtype=torch.float32, device="cpu")
        latest = (is_recalled * left[:, None]).amax(2)
        return torch.where(known == -torch.inf, known, torch.maximum(latest, (known - num).clamp(min=0)))

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        left = summaries.observed
        assert left is not None
        return left.masked_fill(left <= 0, -torch.inf)
