"""What a model's config says of the cache that it needs."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tandemkv.errors import CacheError, UnsupportedError

IMPLEMENTATIONS = {"sdpa": "tandem", "eager": "tandem_eager"}
"""The names under which transformers knows our attention function and mask, by the stock one that it replaces."""


def refuse_detached(config: PreTrainedConfig) -> None:
    """CacheError unless the config is that of an attached model."""
    if config._attn_implementation not in IMPLEMENTATIONS.values():
        raise CacheError(
            "this config's model is not attached; call tandemkv.integrations.transformers.attach(model) first"
        )


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """KV heads and head_dim, which older families leave to be derived. The first keys set right what is not so."""
    heads: int = config.num_attention_heads
    stated = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    num_kv_heads: int = 1 if getattr(config, "multi_query", False) else stated or heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return num_kv_heads, head_dim


def depends_on_length(config: PreTrainedConfig) -> bool:
    """Whether a token's key depends on how many tokens are read with it (longrope): then a prompt is read at once."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return bool(rope.get("rope_type") == "longrope")


def layers_of(config: PreTrainedConfig) -> tuple[list[Any], tuple[int | None, ...]]:
    """The cache layers of a model as stock has them, None for each that is ours, and the windows of those."""
    layers = list(DynamicCache(config=config).layers)
    windows: list[int | None] = []
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    for index, (layer, layer_type) in enumerate(zip(layers, types, strict=True)):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and layer_type != "chunked_attention":
            windows.append(layer.sliding_window)
        else:
            continue
        layers[index] = None
    if not windows:
        raise UnsupportedError(f"none of the layers of a {config.model_type} model keeps plain keys and values")
    return layers, tuple(windows)


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """The model's dtype; `save_pretrained` turns it into its name, and a fresh config has none."""
    found = config.dtype or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found
