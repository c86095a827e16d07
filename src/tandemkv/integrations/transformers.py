"""Stock transformers models over a tiered cache: attach(model), TieredCache, detach(model).

    import tandemkv.integrations.transformers as tandem
    model = tandem.attach(AutoModelForCausalLM.from_pretrained(path))
    cache = tandem.TieredCache(model.config, near_tokens=4096, far_bytes="16GiB")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=256)

How the parts meet: the model calls `Cache.update`, which only marks the new keys with the layer they belong to; then it
calls the attention function, which finds the layer on the keys, appends them and attends. transformers does not hand
the cache to the attention function, so the mark is the only way; a model that changes keys after `update` (MLA) loses
it and is refused. Without a mark (another cache, no cache, training) an attached model behaves as stock with sdpa.
"""

from collections.abc import Callable
from functools import cache as memoize
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    create_masks_for_generate,
    sdpa_mask,
)

from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache, TierUse
from tandemkv.errors import CacheError, InputError, UnsupportedError
from tandemkv.types import MAX_HEAD_DIM, ScoreRule, parse_bytes

IMPLEMENTATION = "tandem"
"""The name under which transformers knows our attention function and mask."""

FAMILIES = ("llama", "opt", "qwen2", "qwen3")
"""`model_type` of every family that is tested; others are refused until a test row exists for them."""

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

_UPDATE_KEYWORDS = {"cache_kwargs", "cache_position", "cos", "sin"}
"""What models tell `Cache.update` beside keys and values: positions, which a cache of all tokens does not need."""


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model use a `TieredCache`; returns the same model. Undone by `detach`.

    Changes this instance only: its attention implementation becomes "tandem", and its `generate` reserves the cache
    before it starts. Raises UnsupportedError, with the name, for a family, layer type or option not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"attach takes a transformers model, got {type(model).__name__}")
    config = model.config
    if config.model_type not in FAMILIES:
        name = f"{type(model).__name__} (model_type {config.model_type!r})"
        raise UnsupportedError(f"{name} is not supported yet; supported: {', '.join(FAMILIES)}")
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other_layers or getattr(config, "use_sliding_window", False):
        raise UnsupportedError(
            f"{type(model).__name__} has {sorted(other_layers) or 'sliding'} layers: not supported yet"
        )
    num_kv_heads, head_dim = _kv_shape(config)
    if head_dim > MAX_HEAD_DIM or config.num_attention_heads % num_kv_heads:
        raise UnsupportedError(
            f"{type(model).__name__} has head_dim {head_dim} and "
            f"{config.num_attention_heads / num_kv_heads:g} query heads per KV head; supported are up to "
            f"{MAX_HEAD_DIM} and whole numbers"
        )
    if not hasattr(model, "_prepare_cache_for_generation"):
        raise InputError(
            f"{type(model).__name__} has no generate: attach the model with its head (AutoModelForCausalLM)"
        )
    if "_tandem_before" in vars(model):
        model.set_attn_implementation(IMPLEMENTATION)  # it may have been set to another since
        return model
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    before = config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    stock = model._prepare_cache_for_generation
    model._prepare_cache_for_generation = MethodType(partial(_prepare_cache, stock), model)
    stock_masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    model.create_masks_for_generate = partial(_create_masks, stock_masks)
    model._tandem_before = before
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; returns the same model. A model that is not attached stays as it is."""
    if "_tandem_before" in vars(model):
        model.set_attn_implementation(model._tandem_before)
        del model._tandem_before, model._prepare_cache_for_generation, model.create_masks_for_generate
    return model


def _kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """KV heads and head_dim, which older families leave to be derived."""
    heads: int = config.num_attention_heads
    num_kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return num_kv_heads, head_dim


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    """The model's dtype; `save_pretrained` turns it into its name, and a fresh config has none."""
    found = config.dtype or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


class TieredCache(Cache):  # type: ignore[misc]
    """A transformers cache whose recent tokens lie near, on the model's device, and older ones in host memory.

    Exact: every token is attended. Serves one batch at a time; `reset` makes it ready for another.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        near_tokens: int = 4096,
        far_bytes: int | str = "16GiB",
        *,
        page_size: int = 64,
        chunk_tokens: int = 512,
    ) -> None:
        """Nothing is allocated until the first use.

        config: of an attached model. near_tokens: per sequence and layer, at least two pages. far_bytes: capacity in
        host memory for all layers and sequences, such as "16GiB"; memory is taken as it fills. chunk_tokens: a prompt
        is worked through in runs of this many tokens.
        Raises InputError for values that cannot be, CapacityError where far_bytes exceeds the machine.
        """
        if not isinstance(config, PreTrainedConfig):
            raise InputError(
                f"TieredCache takes the config of an attached model, model.config, got {type(config).__name__}"
            )
        config = config.get_text_config(decoder=True)
        _refuse_detached(config)
        num_kv_heads, head_dim = _kv_shape(config)
        spec = CacheSpec(
            num_layers=config.num_hidden_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=_dtype(config),
            near_tokens=near_tokens,
            far_bytes=parse_bytes(far_bytes),
            page_size=page_size,
            chunk_tokens=chunk_tokens,
        )
        self._config = config
        self.kv = KVCache(spec, worker_pool())
        self.max_positions: int = config.max_position_embeddings
        self.pending: TieredLayer | None = None  # was updated, but has not attended yet
        self._step_begin = 0  # tokens held when the forward pass under way began
        self._padding: tuple[Tensor, Tensor] | None = None
        super().__init__(layers=[TieredLayer(self, index) for index in range(spec.num_layers)])

    def reserve(self, num_seqs: int, num_tokens: int) -> None:
        """Refuse now, with the arithmetic, what could not be held later; `generate` of an attached model calls this."""
        if num_tokens > self.max_positions:
            raise InputError(
                f"{num_tokens} tokens (prompt and new ones) exceed the model's {self.max_positions} positions; "
                "shorten the prompt or lower max_new_tokens"
            )
        self.kv.reserve(num_seqs, num_tokens)

    def use(self) -> list[TierUse]:
        """Counters of each tier, near first; empty before the first use."""
        return self.kv.use()

    def check(self) -> None:
        """Recount every page; AssertionError where the books are wrong."""
        self.kv.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        raise UnsupportedError("copying a TieredCache is not supported yet: prefill a new one")

    def __reduce__(self) -> Any:
        raise UnsupportedError("a TieredCache cannot be saved yet: its pages live in this process; prefill a new one")

    def close(self) -> None:
        """Give every byte back; the cache cannot be used again."""
        self.kv.close()

    def reset(self) -> None:
        """Forget everything and give every byte back; the next batch may have another size."""
        self.kv.reset()
        self._step_begin = 0
        self.pending = self._padding = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove `-tokens_to_remove` tokens from the end; a positive number is the length to keep (as in 5.17)."""
        if not isinstance(tokens_to_remove, int):
            raise InputError(f"crop takes a whole number of tokens, got {tokens_to_remove!r}")
        self.pending = None
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, self.kv.seq_len + tokens_to_remove)
        self.kv.crop(keep)

    def begin_layer(self, layer: "TieredLayer") -> None:
        """A layer was updated; its attention must come before the next update."""
        if self.pending is not None:
            self.pending = None
            self.undo_step()
            raise CacheError(
                "the last update of this cache was never attended: the model is not attached, or it changes keys after "
                "Cache.update (MLA), which is not supported; that forward pass is undone"
            )
        if layer.index == 0:
            _refuse_detached(self._config)
            self._step_begin = self.kv.seq_len
        self.pending = layer

    def require_room(self, k: Tensor) -> None:
        """Before the first layer of a forward pass appends k: refuse what any layer could not take."""
        num_tokens = self.kv.seq_len + k.shape[2]
        if num_tokens > self.max_positions:
            raise InputError(
                f"{num_tokens} tokens exceed the model's {self.max_positions} positions; shorten the prompt"
            )
        self.kv.adapt(k.dtype, k.device)
        self.kv.require_room(k.shape[0], k.shape[2])

    def undo_step(self) -> None:
        """Where a layer fails, none keeps tokens of the forward pass under way."""
        self.kv.crop(self._step_begin)

    def padding(self, mask: Tensor | None) -> Tensor | None:
        """kv_start `[num_seqs]` of a 2D bool mask `[num_seqs, kv_len]`; None without padding; only left is allowed.

        One mask serves all layers of a forward pass: the last answer is kept.
        """
        if mask is None:
            return None
        if self._padding is None or self._padding[0] is not mask:
            # A row of padding alone is the first piece of a prompt that is prefilled in pieces.
            if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
                raise UnsupportedError("only left padding is supported: set tokenizer.padding_side = 'left'")
            self._padding = mask, mask.logical_not().sum(-1).cpu()
        return self._padding[1]


class TieredLayer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers sees of one layer; the pages are in `KVCache`."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, cache: TieredCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages are made by the first append."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # traced, its mark and the native writes would be lost
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mark the new keys with this layer and hand them on; the attention function appends them."""
        unknown = kwargs.keys() - _UPDATE_KEYWORDS
        if unknown:
            raise UnsupportedError(f"the model passes {', '.join(sorted(unknown))} to Cache.update: not supported yet")
        self.cache.begin_layer(self)
        marked = key_states.view_as(key_states)
        marked._tandem_layer = self  # type: ignore[attr-defined]
        return marked, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Append k and v, attend from q. `[num_seqs, q_len, num_q_heads, head_dim]`, contiguous."""
        cache, kv = self.cache, self.cache.kv
        if self.index == 0:
            cache.require_room(k)
        layer = kv.layer(self.index, k.shape[0])
        layer.set_kv_start(cache.padding(mask))
        return extend_and_attend(q, k, v, layer, rule=ScoreRule(scale), chunk_tokens=kv.spec.chunk_tokens)

    def get_seq_length(self) -> int:
        """Tokens held, near and far."""
        return self.cache.kv.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole length and offset 0, although `update` returns new keys only."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No fixed maximum; `reserve` answers for bytes."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beams come with shared pages."""
        raise UnsupportedError("beam search is not supported yet with a TieredCache: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as above."""
        raise UnsupportedError("repeating a TieredCache along the batch is not supported yet")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused, as above."""
        raise UnsupportedError("selecting sequences of a TieredCache is not supported yet")


def _refuse_detached(config: PreTrainedConfig) -> None:
    if config._attn_implementation != IMPLEMENTATION:
        raise CacheError(
            "this config's model is not attached; call tandemkv.integrations.transformers.attach(model) first"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; see the top of the file."""
    layer: TieredLayer | None = getattr(key, "_tandem_layer", None)
    if layer is None:
        mask = _stock_mask_of(attention_mask)
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return out, None
    layer.cache.pending = None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    try:
        _refuse_unsupported(module, layer.cache, query, {**kwargs, "dropout": dropout or None})
        if not query.dtype == key.dtype == value.dtype:
            raise UnsupportedError(
                f"q, k and v must be of one dtype, got {query.dtype}, {key.dtype} and {value.dtype}: instead of "
                "torch.autocast load the model with dtype=torch.bfloat16"
            )
        return layer.attend(query, key, value, _padding_of(attention_mask), scale), None
    except BaseException:
        layer.cache.undo_step()
        raise


def _refuse_unsupported(module: Any, cache: TieredCache, query: Tensor, kwargs: dict[str, Any]) -> None:
    """Whatever would make the answer another than that of a plain causal layer."""
    num_layers = module.config.num_hidden_layers
    if num_layers != len(cache.layers):
        raise InputError(f"this cache is for a model of {len(cache.layers)} layers, this one has {num_layers}")
    if kwargs["dropout"]:
        raise UnsupportedError("attention dropout with a TieredCache is not supported: call model.eval()")
    if torch.is_grad_enabled() and query.requires_grad:
        raise UnsupportedError("no gradient flows through a TieredCache: use torch.no_grad(), or train without a cache")
    unknown = sorted(
        name for name, value in kwargs.items() if name not in _HARMLESS and value is not None and value is not False
    )
    if kwargs.get("is_causal") is False:
        unknown.append("is_causal=False")
    if unknown:
        raise UnsupportedError(f"{type(module).__name__} passes {', '.join(unknown)}: not supported yet")


def _padding_of(attention_mask: Any) -> Tensor | None:
    """The 2D padding that `_mask` put on its stand-in; None without padding."""
    if attention_mask is None:
        return None
    if not hasattr(attention_mask, "_tandem_stock_mask"):
        raise UnsupportedError("a TieredCache takes 2D attention masks (left padding), not ready-made 4D masks")
    if attention_mask._tandem_other_rule:
        raise UnsupportedError("only causal masks with left padding are supported: no packed sequences, no overlays")
    padding: Tensor | None = attention_mask._tandem_padding
    if padding is not None and padding.shape != attention_mask.shape:
        raise InputError(
            f"attention_mask must cover all tokens, those in the cache too: expected {list(attention_mask.shape)}, "
            f"got {list(padding.shape)}"
        )
    return padding


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function that transformers calls once a forward pass: padding for us, and how to make the stock mask.

    The cache is not handed over, so both are prepared: a stand-in tensor carries the 2D padding and the recipe of the
    4D mask, which is followed only if the attention turns out to be a stock one.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError(f"attention_mask must be [num_seqs, kv_len], got {list(attention_mask.shape)}")
    # On the meta device: whoever takes it for a mask, its attributes lost, fails instead of attending to everything.
    stand_in = torch.empty((batch_size, kv_length), dtype=torch.bool, device="meta")
    stock = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    is_full = attention_mask is None or (attention_mask.shape[1] >= kv_length and bool(attention_mask.all()))
    padding = None if is_full else attention_mask[:, :kv_length]  # type: ignore[index]
    other_rule = mask_function is not causal_mask_function or bool(kwargs.get("use_vmap"))
    # Made once for all layers, as stock does.
    stand_in._tandem_stock_mask = memoize(stock)  # type: ignore[attr-defined]
    stand_in._tandem_padding, stand_in._tandem_other_rule = padding, other_rule  # type: ignore[attr-defined]
    return stand_in


def _stock_mask_of(mask: Tensor | None) -> Tensor | None:
    """What stock would have made where the mask is a stand-in; any other mask as it is."""
    make = getattr(mask, "_tandem_stock_mask", None)
    return mask if make is None else make()


def _create_masks(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate` makes masks ahead, and copies them, for static caches only: a stand-in would not survive that."""
    masks = stock(*args, **kwargs)
    if isinstance(masks, dict):
        return {name: _stock_mask_of(mask) for name, mask in masks.items()}
    return _stock_mask_of(masks)


def _prepare_cache(
    stock: Callable[..., Any],
    model: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """`generate` calls this before the first forward pass: the place to refuse what could not be finished."""
    stock(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, TieredCache):
        return
    if model_kwargs.get("use_cache") is False or generation_config.use_cache is False:
        raise InputError("use_cache=False and a TieredCache contradict each other: leave one out")
    if generation_mode not in ("greedy_search", "sample"):
        raise UnsupportedError(
            f"{generation_mode.value} is not supported yet with a TieredCache: only greedy and sampling are"
        )
    cache.kv.adapt(model.dtype, model.device)
    cache.reserve(batch_size * generation_config.num_return_sequences, max_cache_length)
