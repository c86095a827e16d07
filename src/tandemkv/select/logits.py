"""The blocks whose keys a query weighs most, by its logits over all of them (HybridGen's Post-QK, 2604.18529)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.select.base import Summaries
from tandemkv.types import BLOCK_TOKENS, ScoreRule


@dataclass(frozen=True)
class Logits:
    """score = the share of its softmax over far tokens that a query gives a block, the largest of a group's.

    The query is the one foreseen from what entered the layer before, where there is one. With `joins_logits` a step is
    HybridGen's: logits of far tokens are those of the query they were picked with, and join those of near tokens
    before one softmax; `score` itself, which is told no rule, takes 1 / sqrt(head_dim) for the scale.
    """

    foresees: ClassVar[bool] = True
    joins_logits: ClassVar[bool] = True

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        q = q if summaries.foreseen is None else summaries.foreseen.cpu()
        rule = ScoreRule(summaries.far.arena.head_dim**-0.5)
        logits = kernels.logits(q, summaries.far.run, rule=rule, pool=summaries.pool)
        return mass_of_blocks(logits, summaries.num_kv_heads)


def mass_of_blocks(logits: Tensor, num_kv_heads: int) -> Tensor:
    """float32 `[num_seqs, num_kv_heads, num_blocks]`, the shares of blocks in the softmax of `[num_seqs, num_q_heads,
    q_len, num_tokens]`, the largest of a group and of all queries; 0 where nothing is seen."""
    weights = torch.softmax(logits, -1).nan_to_num_(0.0).unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1)
    most: Tensor = weights.unflatten(1, (num_kv_heads, -1)).flatten(2, 3).amax(2)
    return most
