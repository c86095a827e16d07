"""attach(model) and detach(model): the only hooks, on the instance and undone."""

from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, create_masks_for_generate

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.integrations.transformers.adapter import Call
from tandemkv.integrations.transformers.attention import attend, end_compiled_pass
from tandemkv.integrations.transformers.cache import TieredCache
from tandemkv.integrations.transformers.configs import IMPLEMENTATIONS, kv_shape, layers_of
from tandemkv.integrations.transformers.families import refusal_of
from tandemkv.integrations.transformers.foresight import layers_in
from tandemkv.integrations.transformers.masks import make_mask, stock_mask_of
from tandemkv.types import MAX_HEAD_DIM

_STOCK = {name: stock for stock, name in IMPLEMENTATIONS.items()}

MakeCache = Callable[[PreTrainedConfig], TieredCache]


def attach(model: PreTrainedModel, make_cache: MakeCache | None = None) -> PreTrainedModel:
    """Let a model use a `TieredCache`; returns the same model. Undone by `detach`.

    Changes this instance only: its attention implementation, and its `generate`, which reserves the cache before it
    starts; and its decoder tells the cache when a forward pass begins and ends, and which layer comes next.
    The model then refers to itself: after `del model` its memory comes back at the next `gc.collect()`; after
    `detach(model)` at once, as before.
    make_cache: where given, a `generate` that is not handed a cache uses `make_cache(model.config)`, which is how a
    pipeline comes to one.
    Raises UnsupportedError, with the name, for a family, layer type or option not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"attach takes a transformers model, got {type(model).__name__}")
    if make_cache is not None and not callable(make_cache):
        raise InputError(f"make_cache takes a function of a config, such as TieredCache, got {make_cache!r}")
    _refuse_model(model)
    if "_tandem_before" in vars(model):
        detach(model)  # its implementation may have been set to another since
    for stock, name in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, partial(attend, stock))
        AttentionMaskInterface.register(name, partial(make_mask, stock))
    before = model.config._attn_implementation
    if before in _STOCK:  # another model with this config is attached
        before = _STOCK[before]
    else:
        model.set_attn_implementation(IMPLEMENTATIONS[before])
    model._prepare_cache_for_generation = MethodType(partial(_prepare_cache, make_cache), model)
    model.prepare_inputs_for_generation = MethodType(_keeping_cache(type(model).prepare_inputs_for_generation), model)
    stock_masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    model.create_masks_for_generate = partial(_create_masks, stock_masks)
    keeps_stock_layers = any(layers_of(model.config.get_text_config(decoder=True))[0])
    model._tandem_hooks = _hooked(model.get_decoder(), keeps_stock_layers)
    model._tandem_before = before
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; returns the same model. A model that is not attached stays as it is."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"detach takes a transformers model, got {type(model).__name__}")
    if "_tandem_before" in vars(model):
        model.set_attn_implementation(model._tandem_before)
        del model._tandem_before, model._prepare_cache_for_generation
        del model.prepare_inputs_for_generation, model.create_masks_for_generate
        for hook in vars(model).pop("_tandem_hooks", ()):
            hook.remove()
    return model


def _refuse_model(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    why = refusal_of(model.config)
    if why is not None:
        raise UnsupportedError(f"{type(model).__name__} (model_type {config.model_type!r}) is not supported: it {why}")
    attention = model.config._attn_implementation
    if attention not in {*IMPLEMENTATIONS, *_STOCK}:
        raise UnsupportedError(
            f"{type(model).__name__} attends with {attention!r}; attach takes the place of "
            f"{' or '.join(map(repr, IMPLEMENTATIONS))}: load it with attn_implementation='sdpa'"
        )
    num_kv_heads, head_dim = kv_shape(config)
    if head_dim > MAX_HEAD_DIM or config.num_attention_heads % num_kv_heads:
        raise UnsupportedError(
            f"{type(model).__name__} has head_dim {head_dim} and {config.num_attention_heads / num_kv_heads:g} query "
            f"heads per KV head; supported are head_dim up to {MAX_HEAD_DIM} and whole numbers of heads"
        )
    if not hasattr(model, "_prepare_cache_for_generation"):
        raise InputError(
            f"{type(model).__name__} has no generate: attach the model with its head (AutoModelForCausalLM)"
        )


def _hooked(decoder: torch.nn.Module, keeps_stock_layers: bool) -> tuple[RemovableHandle, ...]:
    begin = decoder.register_forward_pre_hook(partial(_begin_pass, keeps_stock_layers), with_kwargs=True)
    end = decoder.register_forward_hook(_end_pass, with_kwargs=True)
    # A layer's hook knows its place, not its neighbours: a deep copy of the model would follow them, one in the other.
    enter = [
        layer.register_forward_pre_hook(partial(_enter_layer, place), with_kwargs=True)
        for place, layer in enumerate(layers_in(decoder) or ())
    ]
    return begin, end, *enter


def _begin_pass(keeps_stock_layers: bool, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        if not keeps_stock_layers:
            return  # the attention of our first layer begins the pass
        torch._dynamo.graph_break(msg="a TieredCache keeps what stock layers were before a pass, outside of the graph")
    for cache in _tiered(args, kwargs):
        cache.refuse_foreign(decoder.config)
        cache.begin_pass()
        if not torch.compiler.is_compiling():
            cache.watch(layers_in(decoder) if cache.watches else None)


def _enter_layer(place: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return  # refused where the layer's attention begins
    for cache in _tiered(args, kwargs):
        cache.enter_layer(place, Call(args, kwargs))


def _end_pass(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    for cache in _tiered(args, kwargs):
        if torch.compiler.is_compiling():
            end_compiled_pass(cache.handle, cache.length, out[0])
        else:
            cache.end_pass()


def _tiered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[TieredCache]:
    """The cache that a decoder was called with."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, TieredCache)]


def _create_masks(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` makes masks ahead, and copies them, for static caches only: a stand-in would not survive that."""
    masks = stock(*args, **kwargs)
    if isinstance(masks, dict):
        return {name: stock_mask_of(mask) for name, mask in masks.items()}
    return stock_mask_of(masks)


def _prepare_cache(
    make_cache: MakeCache | None,
    model: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """`generate` calls this before the first forward pass: the place to refuse what could not be finished."""
    wants_default = generation_config.use_cache and generation_config.cache_implementation is None
    if make_cache is not None and wants_default and model_kwargs.get("past_key_values") is None:
        made: object = make_cache(model.config)
        if not isinstance(made, TieredCache):
            raise InputError(f"make_cache must return a TieredCache, got {type(made).__name__}")
        model_kwargs["past_key_values"] = made
    stock = type(model)._prepare_cache_for_generation  # not a bound one: a deep copy of the model would keep it
    stock(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, TieredCache):
        return
    if model_kwargs.get("use_cache") is False or generation_config.use_cache is False:
        raise InputError("use_cache=False and a TieredCache contradict each other: leave one out")
    _refuse_many_devices(model)
    cache.adapt(model.dtype, model.device)
    num_seqs = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    cache.reserve(num_seqs, max_cache_length)


def _keeping_cache(stock: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Phi-3 leaves its cache behind where RoPE changes from short to long factors, and reads the whole text again, into
    a cache of its own making: into ours, then, from the first token on."""

    @wraps(stock)
    def prepare_inputs(model: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = stock(model, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if isinstance(cache, TieredCache) and inputs.get("past_key_values") is None:
            cache.reset()
            inputs["past_key_values"] = cache
        return inputs

    return prepare_inputs


def _refuse_many_devices(model: PreTrainedModel) -> None:
    """A cache has one near tier. Weights that are offloaded come back to the one device that computes."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        raise UnsupportedError(
            f"the model's device_map spreads it over {', '.join(sorted(devices))}: a TieredCache has one near tier; "
            "load it on one device"
        )
