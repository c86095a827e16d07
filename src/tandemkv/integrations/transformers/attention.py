"""The attention function that transformers calls for every layer of an attached model."""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.integrations.transformers.adapter import WANTS_QUERY, QueryCaught
from tandemkv.integrations.transformers.cache import LAYER_OF_KEYS, TieredLayer, layer_of
from tandemkv.integrations.transformers.masks import padding_of, stock_mask_of
from tandemkv.types import ScoreRule

_HARMLESS = frozenset(
    (
        "position_ids",
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "return_dict",
        "is_causal",
        "logits_to_keep",
    )
)
"""Keywords that models pass to every attention function and that do not change what a causal layer computes."""


def attend(
    stock: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What `AttentionInterface` wants; `stock` names the attention that a model used before it was attached.

    query: `[num_seqs, num_q_heads, q_len, head_dim]`; key, value: the new tokens, not repeated for grouped heads.
    Returns `[num_seqs, q_len, num_q_heads, v_head_dim]`, contiguous, and attention weights where stock gives them.
    """
    found: tuple[TieredLayer, torch.dtype] | None = getattr(key, LAYER_OF_KEYS, None)
    if found is None:
        if getattr(key, WANTS_QUERY, False):
            raise QueryCaught(query)
        mask = stock_mask_of(attention_mask)
        out: tuple[Tensor, Any] = _stock_attention(stock, module)(module, query, key, value, mask, **kwargs)
        return out
    layer, dtype = found
    qkv = query, key.view(dtype), value
    if torch.compiler.is_compiling():
        _refuse_call(module, layer, qkv, kwargs)
        padding, rule, sink_logit = _told(layer, query, attention_mask, kwargs)
        return _compiled(*qkv, layer.handle, layer.length, padding, rule.scale, rule.softcap, sink_logit), None
    with layer.attending():
        _refuse_call(module, layer, qkv, kwargs)
        return layer.attend(*qkv, *_told(layer, query, attention_mask, kwargs)), None


@torch.library.custom_op("tandemkv::extend_and_attend", mutates_args=("handle", "length"))
def _compiled(  # noqa: PLR0913, PLR0917  an operator's schema knows no other way to hand over a rule
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    length: Tensor,
    padding: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logit: Tensor | None,
) -> Tensor:
    """One layer's step in a compiled graph. Named as mutated, `handle` and `length` keep the order of these calls."""
    layer = layer_of(int(handle))
    layer.cache.begin_compiled_layer(layer)
    with layer.attending():
        return layer.attend(q, k, v, padding, ScoreRule(scale, softcap, layer.window), sink_logit)


@torch.library.custom_op("tandemkv::end_pass", mutates_args=("handle", "length"))
def end_compiled_pass(handle: Tensor, length: Tensor, out: Tensor) -> None:
    """A compiled decoder has come to its end; `out` is what it returns, so that this cannot come earlier."""
    cache = layer_of(int(handle)).cache
    cache.end_pass()
    length.copy_(cache.length)  # `length` may be a copy, which the graph then writes over the cache's own


@_compiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _told(
    layer: TieredLayer, query: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor | None, ScoreRule, Tensor | None]:
    """The 2D padding mask, how this layer makes scores, and the logit of its sink."""
    scaling, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    make = ScoreRule if torch.compiler.is_compiling() else _score_rule
    rule = make(scale, kwargs.get("softcap"), layer.window)
    return padding_of(mask, layer.window), rule, None if sinks is None else sinks.detach().float()


_score_rule = cache(ScoreRule)  # a model has a few, and they are asked for in every layer of every token


_RULES = frozenset(("scaling", "softcap", "sliding_window", "s_aux", "dropout"))
"""Keywords that change what a layer computes, and that are answered for."""


def _refuse_call(module: Any, layer: TieredLayer, qkv: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    """Whatever would make the answer another than that of a causal layer with our rules of scores."""
    query, key, value = qkv
    if module.config.num_hidden_layers != layer.num_model_layers:
        raise InputError(
            f"this cache is for a model of {layer.num_model_layers} layers, this one has "
            f"{module.config.num_hidden_layers}"
        )
    if kwargs.get("dropout"):
        raise UnsupportedError("attention dropout with a TieredCache is not supported: call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise UnsupportedError("no gradient flows through a TieredCache: use torch.no_grad(), or train without a cache")
    unknown = sorted(
        name
        for name, value in kwargs.items()
        if name not in _HARMLESS | _RULES and value is not None and value is not False
    )
    if kwargs.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise UnsupportedError(f"{type(module).__name__} passes {', '.join(unknown)}: not supported yet")
    if not query.dtype == key.dtype == value.dtype:
        raise UnsupportedError(
            f"q, k and v must be of one dtype, got {query.dtype}, {key.dtype} and {value.dtype}: instead of "
            "torch.autocast load the model with dtype=torch.bfloat16"
        )


def _stock_attention(stock: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """What the model would call were it not attached: eager attention lives in the model's own file."""
    found: Callable[..., tuple[Tensor, Any]] = sdpa_attention_forward
    if stock == "eager":
        found = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return found
