"""Heavy hitters that noise gives a second chance (Keyformer, 2403.09054); what falls out is gone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.select.base import Seen, Summaries
from tandemkv.types import is_number


@dataclass(frozen=True)
class Keyformer:
    """The number of a block is the sum over queries of softmax((log mass + noise) / temperature) over the blocks seen.

    The noise is Gumbel's, the temperature rises from `first` to `last` over `num_steps` decoded tokens. The paper adds
    the noise to the logit of each token; here, as blocks are the unit, to the logarithm of a block's mass. Runs with
    the same `seed` repeat.
    """

    first: float = 1.0
    last: float = 2.0
    num_steps: int = 256
    seed: int = 0
    watches_far: ClassVar[bool] = True
    forgets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (is_number(self.first) and is_number(self.last) and 0 < self.first <= self.last):
            raise InputError(f"temperatures must be above 0 and rise, got {self.first!r} to {self.last!r}")
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise InputError(f"num_steps must be a whole number of tokens, at least 1, got {self.num_steps!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, got {self.seed!r}")

    def observe(self, known: Tensor, seen: Seen) -> Tensor:
        """See `Observer`."""
        # One stream per call: repeated after an undone step, it gives the same numbers.
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + seen.num_queries) % 2**32)  # it takes 32 bits
        uniform = torch.rand(seen.mass.shape, generator=random, dtype=torch.float32, device="cpu").clamp_(
            1e-9, 1 - 1e-7
        )
        temperature = self.first + (self.last - self.first) * min(1.0, seen.num_decoded / self.num_steps)
        logits = (seen.mass.log() - (-uniform.log()).log()) / temperature
        return known + logits.softmax(-1).nan_to_num(0.0).sum(2)  # a query of padding sees nothing

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        assert summaries.observed is not None
        return summaries.observed
