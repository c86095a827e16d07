"""A sequence under test: a cache, the tokens that it is fed, and how they are compared with stock."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

import tandemkv.integrations.transformers as tandem
from tests import models
from tests.integrations.agreement import attached

# Every expert is asked: which of two nearly equal ones answers is not for a cache to decide.
ALL_EXPERTS = {"num_experts_per_tok": 4}
WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (4, {}),
    "gemma2": (4, {}),
    "gpt_oss": (3, ALL_EXPERTS),
    "opt": (3, {}),
    "lfm2": (3, {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3_next": (1, ALL_EXPERTS),  # stock takes 0.2 s for a prompt
}
"""How often a family is chosen, and what its config has beyond `tests.models`."""
HYBRIDS = ("lfm2", "qwen3_next")

HOW_ONLY = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens")
"""Options that change how an answer comes about and not the answer: stock goes without."""

NEAR_TIE = 2e-4
"""Logits of ours and of stock may differ by so much of the largest; so near to each other either may be chosen."""


@dataclass
class World:
    """A stock model and its attached twin."""

    family: str
    stock: Any = field(init=False)
    ours: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stock = models.build(self.family, **WORLDS[self.family][1])
        self.ours = attached(self.stock)

    def assert_logits(self, found: Tensor, expected: Tensor) -> None:
        error, largest = (found - expected).abs().max(), expected.abs().max()
        assert error <= NEAR_TIE * largest, f"logits differ by {error:.2e} of {largest:.2e}"


@dataclass
class Sequence:
    """A batch of sequences in one cache, which holds the first of the tokens `ids` `[num_seqs, num_tokens]`.

    padding: `[num_seqs]`, how many tokens in front of each are padding.
    """

    world: World
    cache: tandem.TieredCache
    ids: Tensor
    padding: Tensor
    name: str

    @property
    def held(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def mask(self) -> Tensor:
        """`[num_seqs, num_tokens]`, as tokenizers give it."""
        return _mask(self.ids, self.padding)

    @torch.no_grad()
    def assert_goes_on(self, cache: tandem.TieredCache, end: int) -> None:
        """Feed what is missing up to `end`: the logits of the last token, where it is none of padding, are stock's."""
        new = inputs_of(self.ids[:, :end], self.padding, cache.get_seq_length())
        found = self.world.ours(**new, past_key_values=cache).logits[:, -1]
        rows = self.padding < end
        if rows.any():
            self.world.assert_logits(found[rows], self._stock_logits(self.ids[:, :end])[rows])

    def generate(self, seed: int, options: dict[str, Any]) -> int:
        """By stock, then by ours; the tokens become those of ours. Returns how many were new."""
        full = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, **options}
        plain = {name: value for name, value in full.items() if name not in HOW_ONLY}
        mask, was = self.mask, self.ids.shape[1]
        set_seed(seed)
        expected = self.world.stock.generate(self.ids, attention_mask=mask, **plain)
        set_seed(seed)
        found = self.world.ours.generate(self.ids, attention_mask=mask, past_key_values=self.cache, **full)
        self.padding = self.padding.repeat_interleave(len(found.sequences) // len(self.ids))
        self.ids = found.sequences
        if not torch.equal(found.sequences, expected.sequences):
            self._assert_near_tie(expected, found, was, "num_beams" in options)
        return int(found.sequences.shape[1]) - was

    @torch.no_grad()
    def _assert_near_tie(self, expected: Any, found: Any, was: int, has_beams: bool) -> None:
        """Other tokens than stock's, from the first on that rounding may have decided."""
        if has_beams:
            torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-3, rtol=0)
            return
        length = min(found.sequences.shape[1], expected.sequences.shape[1])
        differs = (found.sequences[:, :length] != expected.sequences[:, :length]).any(0).nonzero().flatten()
        first = int(differs[0]) if len(differs) else length
        stock = self._stock_logits(expected.sequences[:, :first])
        if len(found.logits) == len(expected.logits):
            self.world.assert_logits(found.logits[first - was], expected.logits[first - was])
            return
        chosen = [each.sequences[:, first, None] for each in (found, expected)]
        near = (stock.gather(1, chosen[0]) - stock.gather(1, chosen[1])).abs().max() / stock.abs().max()
        assert near <= NEAR_TIE, f"tokens differ, logits by {near:.2e}"

    def _stock_logits(self, ids: Tensor) -> Tensor:
        """Of the last token, `[num_seqs, vocab_size]`."""
        logits: Tensor = self.world.stock(**inputs_of(ids, self.padding)).logits[:, -1]
        return logits


def _mask(ids: Tensor, padding: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1]) >= padding[:, None]).long()


def inputs_of(ids: Tensor, padding: Tensor, held: int = 0) -> dict[str, Tensor]:
    """What a forward pass is given behind `held` tokens; without padding no more than the ids."""
    if not padding.any():
        return {"input_ids": ids[:, held:]}
    mask = _mask(ids, padding)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids[:, held:], "attention_mask": mask, "position_ids": places[:, held:]}
