"""The newest far tokens, whatever is asked (StreamingLLM, 2309.17453); positions stay those of the text."""

import torch
from torch import Tensor

from tandemkv.select.base import Summaries


class Window:
    """Newer is better."""

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        newness = torch.arange(summaries.num_pages, dtype=torch.float32)
        return newness.expand(q.shape[0], summaries.num_kv_heads, summaries.num_pages)
