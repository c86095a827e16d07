"""The newest far tokens, whatever is asked (StreamingLLM, 2309.17453); positions stay those of the text."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tandemkv.select.base import Summaries


@dataclass(frozen=True)
class Window:
    """Newer is better."""

    is_standing: ClassVar[bool] = True

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        newness = torch.arange(summaries.num_blocks, dtype=torch.float32, device="cpu")
        return newness.expand(q.shape[0], summaries.num_kv_heads, summaries.num_blocks)
