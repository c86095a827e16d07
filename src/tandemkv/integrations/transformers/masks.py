"""The mask function: what a forward pass wants masked, told to our attention and to the stock one.

transformers calls it once a forward pass for every kind of layer, without the cache. So both answers are prepared: a
stand-in tensor carries the padding and the window for us, and the recipe of the stock mask, which is followed only if
the attention turns out to be a stock one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from tandemkv.errors import InputError, UnsupportedError

_RULE = "_tandem_rule"
"""The attribute of a stand-in that holds its `MaskRule`."""


class MaskRule:
    """What a stand-in stands for."""

    def __init__(
        self, padding: Tensor | None, window: int | None, is_other: bool, make_stock: Callable[[], Tensor | None]
    ) -> None:
        """padding: bool `[num_seqs, kv_len]`, False for padding; None where there is none.

        window: tokens that a query sees; None for all. is_other: another rule than causal with or without a window
        (packed sequences, overlays, chunks). make_stock: builds the mask that the model's own attention takes.
        """
        self.padding, self.window, self.is_other = padding, window, is_other
        self._make_stock = make_stock
        self._made: tuple[Tensor | None] | None = None

    def stock_mask(self) -> Tensor | None:
        """Made once for all layers, as stock does."""
        if self._made is None:
            self._made = (self._make_stock(),)
        return self._made[0]


def make_mask(
    stock: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A stand-in for the mask, as `AttentionMaskInterface` wants it; `stock` names the attention it stands in for."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError(f"attention_mask must be [num_seqs, kv_len], got {list(attention_mask.shape)}")
    # On the meta device: whoever takes it for a mask, its attribute lost, fails instead of attending to everything.
    stand_in = torch.empty((batch_size, kv_length), dtype=torch.bool, device="meta")
    recipe = partial(
        ALL_MASK_ATTENTION_FUNCTIONS[stock],
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    is_known, window = _told_window(kwargs) if torch.compiler.is_compiling() else _window_of(mask_function)
    is_other = not is_known or bool(kwargs.get("use_vmap"))
    setattr(stand_in, _RULE, MaskRule(attention_mask, window, is_other, recipe))
    return stand_in


def is_stand_in(mask: Any) -> bool:
    """Whether it only stands for a mask."""
    return hasattr(mask, _RULE)


def stock_mask_of(mask: Any) -> Any:
    """What stock would have made where the mask is a stand-in; any other mask as it is."""
    rule: MaskRule | None = getattr(mask, _RULE, None)
    return mask if rule is None else rule.stock_mask()


def padding_of(mask: Any, window: int | None) -> Tensor | None:
    """The 2D padding behind a stand-in for a layer with this window; None without padding.

    Raises UnsupportedError for a ready-made mask and for any rule but causal with that window.
    """
    if mask is None:
        return None
    rule: MaskRule | None = getattr(mask, _RULE, None)
    if rule is None:
        raise UnsupportedError("a TieredCache takes 2D attention masks (left padding), not ready-made 4D masks")
    if rule.is_other:
        raise UnsupportedError("only causal masks with left padding are supported: no packed sequences, no overlays")
    if rule.window != window:
        raise UnsupportedError(f"the model masks a window of {rule.window} where the cache's layer has {window}")
    return rule.padding


def _window_of(mask_function: Callable[..., Any]) -> tuple[bool, int | None]:
    """Whether a mask function is causal, with or without a sliding window, and the window.

    transformers hands over a function of indices; what it does can be told by the code that it was made of.
    """
    if mask_function is causal_mask_function:
        return True, None
    parts = _combined(mask_function)
    known = _combined(sliding_window_causal_mask_function(1))
    if [part.__code__ for part in parts] != [part.__code__ for part in known]:
        return False, None
    windows = [cell.cell_contents for part in parts if part.__closure__ for cell in part.__closure__]
    return len(windows) == 1, windows[0]


def _told_window(kwargs: dict[str, Any]) -> tuple[bool, int | None]:
    """The same while a model is compiled, where functions show no code: transformers forbids to leave a mask out
    (`allow_is_causal_skip`) wherever it is more than causal with a window of `local_size`."""
    return bool(kwargs.get("allow_is_causal_skip", True)), kwargs.get("local_size")


def _combined(mask_function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The functions that `and_masks` put together; none for any other."""
    both = sliding_window_causal_mask_function(1)
    if getattr(mask_function, "__code__", None) is not both.__code__:
        return ()
    (cell,) = mask_function.__closure__ or ()
    parts: tuple[Callable[..., Any], ...] = tuple(cell.cell_contents)
    return parts
