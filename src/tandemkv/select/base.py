"""What every selector is, and what is done for all of them: first tokens and the top k."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# One selection serves all queries of a call up to this many; longer runs are prompts and attend to everything.
MAX_SELECT_QUERIES = 16


class Summaries(NamedTuple):
    """What a selector knows of the far pages of a layer.

    kv_start: int64 `[num_seqs]`, tokens of padding in front.
    """

    num_kv_heads: int
    num_pages: int
    page_size: int
    kv_start: Tensor


class Selector(Protocol):
    """Scores far pages; sees what is asked for, never where it lies."""

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """float32 `[num_seqs, num_kv_heads, num_pages]`, higher = keep.

        q: `[num_seqs, num_q_heads, q_len, head_dim]`, the queries of one step, q_len at most MAX_SELECT_QUERIES.
        """


def choose_pages(scores: Tensor, summaries: Summaries, num_sink_tokens: int, num_chosen: int) -> Tensor:
    """The far pages that take part, in their order: int64 `[num_seqs, num_kv_heads, at most num_chosen]`.

    Those of the first `num_sink_tokens` tokens behind the padding always do, and a page that padding ends in. Pages of
    padding alone come in only where nothing else is left. So padding is the same for all heads.
    """
    pages = torch.arange(summaries.num_pages)
    begins, kv_start = pages * summaries.page_size, summaries.kv_start[:, None, None]
    is_first = (begins + summaries.page_size > kv_start) & (begins < kv_start + num_sink_tokens)
    above_all = 1e300 * (2.0 - pages.double() / summaries.num_pages)  # the earliest first: padding may split them
    ranked = torch.where(is_first, above_all, scores.double().masked_fill(begins < kv_start, -torch.inf))
    chosen = ranked.topk(min(num_chosen, summaries.num_pages), dim=-1, sorted=False).indices
    return chosen.sort(dim=-1).values
