"""The blocks that got the most attention so far (H2O, 2306.14048); what falls out is gone."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tandemkv.select.base import Seen, Summaries


@dataclass(frozen=True)
class HeavyHitters:
    """The number of a block is the sum of its attention mass over all queries that were watched.

    The budget is what near tokens leave of it: they are the paper's recent half where near_tokens is half the budget.
    Of a prompt its last queries are watched, not all.
    """

    watches_far: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def observe(self, known: Tensor, seen: Seen) -> Tensor:
        """See `Observer`."""
        return known + seen.mass.sum(2)

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        assert summaries.observed is not None
        return summaries.observed
