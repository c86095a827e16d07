"""Tiny models of fixed random weights, one builder per supported family, and what stock computes with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 97
MAX_POSITIONS = 1024

# No end-of-sequence token: random weights would end a text anywhere.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,  # the default of 0.02 makes attention flat: a lost page would hardly show
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**changes: Any) -> Any:
    """Grouped heads, 3 layers."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**{**_GROUPED, "num_hidden_layers": 3, **changes}))


def qwen2(**changes: Any) -> Any:
    """Biases on q, k and v."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**{**_GROUPED, **changes}))


def qwen3(**changes: Any) -> Any:
    """Norms on q and k, and a head_dim that is not hidden_size / heads."""
    return _seeded(Qwen3ForCausalLM, Qwen3Config(**{**_GROUPED, "head_dim": 24, **changes}))


def opt(**changes: Any) -> Any:
    """Learned positions, one KV head per query head, queries scaled by the model."""
    shape = {"ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    return _seeded(OPTForCausalLM, OPTConfig(**{**_COMMON, **shape, "dropout": 0.0, **changes}))


FAMILIES: dict[str, Callable[..., Any]] = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "opt": opt}


def _seeded(model_class: Any, config: Any) -> Any:
    """In eval mode, with eager attention: the oracle, because sdpa ignores keywords silently."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return model_class(config).eval()


def random_ids(num_seqs: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Token ids `[num_seqs, num_tokens]`, none of them padding."""
    return torch.randint(2, VOCAB_SIZE, (num_seqs, num_tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[num_seqs, longest]` of prompts of these lengths."""
    ids = random_ids(len(lengths), max(lengths), seed)
    starts = torch.tensor([max(lengths) - length for length in lengths])
    mask = torch.arange(max(lengths)) >= starts[:, None]
    return ids * mask, mask.long()
