"""The far blocks that mattered while they were near (HGCA, 2507.03153)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.select.base import Seen, Summaries
from tandemkv.types import is_number


@dataclass(frozen=True)
class Salience:
    """Keeps what weighs more than `beta` times its head's mean, the heaviest first; nothing is deleted.

    The number of a block is the moving average of its attention mass, `old + rate (mass - old)` with each query, taken
    along when its page becomes far. Where several tokens are appended, everything is attended and every block is
    weighed anew. The paper's unit is a token; its constant and its exact threshold are not to be had.
    """

    beta: float = 1.0
    rate: float = 0.1
    watches_far: ClassVar[bool] = False
    forgets: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not is_number(self.beta) or not self.beta > 0:
            raise InputError(f"beta must be above 0 (0.5 keeps more, 2 fewer), got {self.beta!r}")
        if not is_number(self.rate) or not 0 < self.rate <= 1:
            raise InputError(f"rate must be above 0 and at most 1, got {self.rate!r}")

    def observe(self, known: Tensor, seen: Seen) -> Tensor:
        """See `Observer`."""
        num_queries = seen.mass.shape[2]
        if num_queries == 1:
            return torch.lerp(known, seen.mass[:, :, 0], self.rate)
        if num_queries > MAX_AVERAGED:  # a prompt's last queries: the average begins with their mean
            return seen.mass.mean(2)
        ages = torch.arange(num_queries - 1, -1, -1, dtype=torch.float32, device="cpu")
        weights = self.rate * (1 - self.rate) ** ages
        averaged = torch.einsum("shqb,q->shb", seen.mass, weights)
        return known * (1 - self.rate) ** num_queries + averaged

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        mass = summaries.observed
        assert mass is not None
        num_real = (~summaries.is_padding).sum(-1, keepdim=True).clamp(min=1)
        mean = mass.masked_fill(summaries.is_padding, 0).sum(-1, keepdim=True) / num_real
        return mass.masked_fill(mass <= self.beta * mean, -torch.inf)


# Queries whose mass is averaged one after the other; more of them are a prompt's.
MAX_AVERAGED = 16
