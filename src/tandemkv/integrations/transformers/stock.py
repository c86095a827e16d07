"""Layers of a cache that stay as transformers has them: linear attention and convolutions, which keep states."""

import copy
from typing import Any

from tandemkv.errors import CacheError


def cropped(layers: dict[int, Any], seq_len: int, keep: int) -> dict[int, Any]:
    """Copies of stock layers without the tokens from `keep` on; CacheError where one has not recorded what it was."""
    layers = copy.deepcopy(layers)
    for layer in layers.values():
        recorded = _recorded_tokens(layer, seq_len)
        if seq_len - keep > recorded:
            raise CacheError(
                f"cannot crop {seq_len} tokens to {keep}: a layer of linear attention or convolution keeps a state "
                f"that has moved on, and has recorded {recorded} tokens; reset() and prefill again"
            )
        if layer.record_past and layer.is_croppable:
            layer.crop(keep - seq_len)
    return layers


def _recorded_tokens(layer: Any, seq_len: int) -> int:
    """How far a stock layer can go back: a convolution, while `generate` looks ahead, as far as the last crop."""
    if not (layer.record_past and layer.is_croppable):
        return 0
    lengths = [(state.shape[-1], layer.conv_kernel_size[index]) for index, state in layer.conv_states.items()]
    return min(seq_len if length >= seq_len else max(0, length - kernel_size) for length, kernel_size in lengths)
