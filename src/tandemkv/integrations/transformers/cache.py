"""TieredCache and its layers: what transformers sees of the pages."""

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any, cast
from weakref import WeakValueDictionary, proxy

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from tandemkv import machine
from tandemkv.attention import extend_and_attend, pull_ahead, stream_ahead, worker_pool
from tandemkv.cache import CacheSpec, KVCache, Moment, Tier, TierUse, parse_far_dtype
from tandemkv.errors import CacheError, InputError, UnsupportedError
from tandemkv.integrations.transformers.adapter import Call
from tandemkv.integrations.transformers.configs import dtype_of, kv_shape, layers_of, refuse_detached
from tandemkv.integrations.transformers.foresight import Foresight
from tandemkv.integrations.transformers.keeping import Keeper
from tandemkv.integrations.transformers.stock import cropped
from tandemkv.types import ScoreRule, parse_bytes

LAYER_OF_KEYS = "_tandem_layer"
"""The attribute of updated keys that holds their `TieredLayer` and their dtype."""

_SEALED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtype as which a compiled graph sees updated keys, by their bytes."""

_ATTACH = "call tandemkv.integrations.transformers.attach(model) first"

_UPDATE_KEYWORDS = {"cache_kwargs", "cache_position", "cos", "sin"}
"""What models tell `Cache.update` beside keys and values: positions, which a cache of all tokens does not need."""


class TieredCache(Cache):
    """A transformers cache whose recent tokens lie near, on the model's device, and older ones in host memory.

    Exact unless `kv.sparse` says otherwise: every token is attended. Layers with a sliding window stay near; layers
    without keys and values (linear attention) stay as transformers has them. Serves one batch at a time; `reset` makes
    it ready for another.
    `copy.deepcopy` gives a fork: the same tokens on the same pages, until one of the two writes to them.
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        near_tokens: int = 4096,
        far_bytes: int | str | None = None,
        *,
        far_dtype: str | None = None,
        page_size: int = 64,
        chunk_tokens: int = 512,
    ) -> None:
        """Nothing is allocated until the first use.

        config: of an attached model, always needed. near_tokens: per sequence and layer, at least two pages. far_bytes:
        capacity in host memory for all layers and sequences, and for forks, such as "16GiB", which is what None stands
        for, or all that the machine has where that is less. Memory is taken as it fills.
        far_dtype: how far tokens are kept: "int8" and "int4" hold 1.9 and 3.4 times as many as bf16 in the same bytes;
        by age, "int8:8192,int4" keeps the newest 8192 far tokens in int8 and older ones in int4; "int8/64" keeps 64
        channels of every key (ThinK, 2407.21018). None, or "model": in the model's dtype.
        chunk_tokens: a prompt is worked through in runs of this many tokens.
        Raises InputError for values that cannot be, CapacityError where far_bytes exceeds the machine.
        """
        if not isinstance(config, PreTrainedConfig):
            raise InputError(
                f"TieredCache takes the config of an attached model, config=model.config, got {type(config).__name__}"
            )
        self._config = config = config.get_text_config(decoder=True)
        refuse_detached(config)
        self.num_model_layers: int = config.num_hidden_layers
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        layers, windows = layers_of(config)
        num_kv_heads, head_dim = kv_shape(config)
        spec = CacheSpec(
            num_layers=len(windows),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype_of(config),
            near_tokens=near_tokens,
            far_bytes=_default_far_bytes() if far_bytes is None else parse_bytes(far_bytes),
            page_size=page_size,
            chunk_tokens=chunk_tokens,
            windows=windows if any(windows) else (),
            far_formats=parse_far_dtype(far_dtype),
            hidden_size=config.hidden_size,
        )
        self._become(layers, KVCache(spec, worker_pool()))

    def _become(self, layers: list[Any], kv: KVCache) -> None:
        """Stock layers as they are; where None stands, layers of our own, in the order of `kv`."""
        self.kv = kv
        with torch.inference_mode(False):  # it is written to, maybe outside of it
            self.length = torch.tensor(kv.seq_len, device="cpu")  # tokens held, for compiled models: see TieredLayer
        self.pending: TieredLayer | None = None  # was updated, but has not attended yet
        self.foresight: Foresight | None = None  # of the pass under way, where the selector wants one
        self.keeper: Keeper | None = None  # where inputs of layers are kept
        self._padding: tuple[Tensor, Tensor | None] | None = None
        ours = iter(range(kv.spec.num_layers))
        super().__init__(layers=[TieredLayer(self, next(ours)) if layer is None else layer for layer in layers])
        self.handle = next(layer.handle for layer in self.layers if isinstance(layer, TieredLayer))
        self._stock_at: tuple[Moment, dict[int, Any]] | None = None  # see `_settle`
        self._has_stock_layers = any(layer is not None for layer in layers)
        self._is_spoiled = False  # a model that is not attached has moved stock layers on

    def reserve(self, num_seqs: int, num_tokens: int) -> None:
        """Refuse now, with the arithmetic, what could not be held later; `generate` of an attached model calls this."""
        if self.max_positions is not None and isinstance(num_tokens, int) and num_tokens > self.max_positions:
            raise InputError(
                f"{num_tokens} tokens (prompt and new ones) exceed the model's {self.max_positions} positions; "
                "shorten the prompt or lower max_new_tokens"
            )
        self._settle()
        self.kv.reserve(num_seqs, num_tokens)

    def keep_inputs(self, num_tokens: int, where: Tier = "near") -> None:
        """Keep what enters the full-attention layers with the first num_tokens of each sequence, near or in host memory
        (beside far_bytes), so that their keys and values can be made again. 0, as at first, keeps nothing.

        Before the first token; the first pass proves that they come out right, or raises UnsupportedError.
        """
        self._settle()
        self.kv.keep_inputs(num_tokens, where)

    def use(self) -> list[TierUse]:
        """Counters of each tier, near first, forks included; empty before the first use."""
        return self.kv.use()

    def check(self) -> None:
        """Undo what was cut off, then recount every page; AssertionError where the books are wrong."""
        self._settle()
        self.kv.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        """A fork: costs no memory until one of the two grows. One thread at a time for a cache and its forks."""
        self._settle()
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin._config, twin.num_model_layers = self._config, self.num_model_layers
        twin.max_positions = self.max_positions
        layers = [None if isinstance(layer, TieredLayer) else copy.deepcopy(layer, memo) for layer in self.layers]
        twin._become(layers, self.kv.fork())
        if self.keeper is not None:
            twin._keep_with(self.keeper.fork())
        return twin

    def __reduce__(self) -> Any:
        raise UnsupportedError("a TieredCache cannot be saved yet: its pages live in this process; prefill a new one")

    def close(self) -> None:
        """Give every byte back; the cache cannot be used again."""
        self.reset()
        self.kv.close()

    def reset(self) -> None:
        """Forget everything and give every byte back; the next batch may have another size."""
        fresh, _ = layers_of(self._config)
        self._stock_at = Moment(self.kv.moment.num_selections, 0), {i: fresh[i] for i in self._stock_layers()}
        self.kv.reset()
        self.pending, self._padding, self._is_spoiled = None, None, False
        self._settle()

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove `-tokens_to_remove` tokens from the end; a positive number is the length to keep (as in 5.17).

        CacheError, with nothing changed, where a layer cannot go back so far: a window has moved on, or a layer of
        linear attention keeps a state instead of tokens.
        """
        tokens_to_remove = _whole_number(tokens_to_remove)
        self._settle()
        self.pending = None
        now = self.kv.moment
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, now.seq_len + tokens_to_remove)
        keep = min(keep, now.seq_len)
        layers = cropped(self._stock_layers(), now.seq_len, keep)
        self._stock_at = now._replace(seq_len=keep), layers
        self.kv.crop(keep)
        self._settle()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i becomes a copy of `beam_idx[i]`, by reference."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence several times, one behind the other, by reference."""
        if not isinstance(repeats, int) or repeats < 1:
            raise InputError(f"a sequence is repeated a whole number of times, at least once, got {repeats!r}")
        self.batch_select_indices(torch.arange(self.kv.num_seqs, device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences, in this order."""
        indices = self._checked_indices(indices)
        self._settle()
        layers = copy.deepcopy(self._stock_layers())
        for layer in layers.values():
            layer.reorder_cache(indices)
        now = self.kv.moment
        self._stock_at = now._replace(num_selections=now.num_selections + 1), layers
        self.kv.select(indices.to(device="cpu", dtype=torch.int64))
        self._settle()

    def _checked_indices(self, indices: Tensor) -> Tensor:
        """As torch reads them: places, or a bool for every sequence."""
        num_seqs = self.kv.num_seqs
        if not isinstance(indices, (Tensor, list, tuple)):
            raise InputError(f"expected places of sequences, each from 0 to {num_seqs - 1}, got {indices!r}")
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool and indices.shape == (num_seqs,):
            indices = indices.nonzero().flatten()
        is_list = indices.dim() == 1 and not indices.is_floating_point() and indices.dtype != torch.bool
        if not is_list or (num_seqs and (len(indices) == 0 or not bool(((indices >= 0) & (indices < num_seqs)).all()))):
            raise InputError(f"expected places of sequences, each from 0 to {num_seqs - 1}, got {indices.tolist()}")
        return indices

    # -- layers that stay stock ----------------------------------------------------------------------------------------

    def _stock_layers(self) -> dict[int, Any]:
        """Linear attention and convolutions, by their place; what they hold cannot be undone, so it is copied."""
        return {index: layer for index, layer in enumerate(self.layers) if not isinstance(layer, TieredLayer)}

    def _settle(self) -> None:
        """Undo what was cut off. Pages know what has happened, and stock layers follow them.

        `_stock_at` is set before a change: if the pages turn out to be at that moment, the stock layers are these.
        For a forward pass it is the moment before, for a crop or a selection the one after.
        """
        self.kv.settle()
        self._end_watch()
        if self._stock_at is not None:
            moment, layers = self._stock_at
            if self.kv.moment == moment:
                for index, layer in layers.items():
                    self.layers[index] = layer
            self.pending = self._stock_at = None
        self.length.fill_(self.kv.seq_len)

    def begin_pass(self) -> None:
        """Before the first layer of a model: what is cut off from here on is undone."""
        self._refuse_spoiled()
        self._settle()
        self.pending = None
        self._stock_at = self.kv.moment, copy.deepcopy(self._stock_layers())

    def refuse_foreign(self, config: PreTrainedConfig) -> None:
        """InputError for a model of another family, where layers stay stock: those cannot tell it themselves."""
        model_type = config.get_text_config(decoder=True).model_type
        if self._has_stock_layers and model_type != self._config.model_type:
            raise InputError(f"this cache is for a model of type {self._config.model_type!r}, this is a {model_type!r}")

    def _refuse_spoiled(self) -> None:
        if self._is_spoiled:
            raise CacheError(
                "a model that is not attached has used this cache, and its layers of linear attention or convolution "
                "cannot be taken back: reset() the cache and prefill again"
            )

    def end_pass(self) -> None:
        """Every layer has grown: from here on the new tokens count."""
        self.kv.end_step()
        self._end_watch()
        self._stock_at = None
        self.length.fill_(self.kv.seq_len)

    @property
    def foresees(self) -> bool:
        """Whether the selector scores with queries that are predicted a layer ahead."""
        return self.kv.sparse is not None and getattr(self.kv.sparse.policy, "foresees", False)

    def foresee(self, layers: torch.nn.ModuleList | None) -> None:
        """Let the pass that has begun predict queries; `layers` are those of the decoder."""
        if not self.foresees or not self.kv.seq_len:
            return
        if layers is None:
            raise UnsupportedError(
                f"the layers of a {self._config.model_type} model were not found, whose queries the selector wants to "
                "foresee: take another selector, such as 'columns'"
            )
        pages = {place: self.kv.layer(layer.index) for place, layer in self._full().items()}
        if any(layer.num_far_pages for layer in pages.values()):
            self.foresight = Foresight(layers, self, pages)

    @property
    def watches(self) -> bool:
        """Whether the cache is to be told what enters which layer."""
        return self.kv.num_kept_inputs > 0 or self.foresees

    def watch(self, layers: torch.nn.ModuleList | None) -> None:
        """Let the pass that has begun tell it: `layers` are those of the decoder."""
        self.foresee(layers)
        if not self.kv.num_kept_inputs:
            self.keeper = None
            return
        if layers is None:
            raise UnsupportedError(
                f"the layers of a {self._config.model_type} model were not found, whose inputs the cache is to keep: "
                "keep nothing, cache.keep_inputs(0)"
            )
        if self.keeper is None:
            self._keep_with(Keeper(self._config.model_type, {its.index: place for place, its in self._full().items()}))
        assert self.keeper is not None
        self.keeper.begin_pass(layers)

    def _keep_with(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self.kv.rebuild_with(keeper.rebuild)

    def _full(self) -> "dict[int, TieredLayer]":
        """Layers with far tokens, by their place among all."""
        return {i: each for i, each in enumerate(self.layers) if isinstance(each, TieredLayer) and not each.window}

    def enter_layer(self, place: int, call: Call) -> None:
        """The model's layer `place` is about to run with this call, in which the cache is an argument."""
        if self.foresight is not None:
            self.foresight.enter(place, self, call)
        if self.keeper is not None and self.kv.seq_len < self.kv.num_kept_inputs:
            layer = self.layers[place]
            if isinstance(layer, TieredLayer) and not layer.window:
                self.keeper.enter(layer.index, self, call)

    def _end_watch(self) -> None:
        if self.keeper is not None:
            self.keeper.end_pass()
        if self.foresight is not None:
            self.foresight.end()
            self.foresight = None

    # -- a forward pass ------------------------------------------------------------------------------------------------

    def begin_layer(self, layer: "TieredLayer") -> None:
        """A layer was updated; its attention must come before the next update."""
        if self._stock_at is None:
            self._is_spoiled |= self._has_stock_layers
            self._refuse_spoiled()
            raise CacheError(
                f"the model that uses this cache is not attached: {_ATTACH}; or else the cache was reset, cropped, "
                "forked, checked or used by another thread in the middle of a forward pass"
            )
        if self.pending is not None:
            self.pending = None
            self.kv.settle()
            raise CacheError(
                "the last update of this cache was never attended: the model was detached meanwhile, or changes keys "
                "after Cache.update, which is not supported; that forward pass is undone"
            )
        if layer.index == 0:
            refuse_detached(self._config)
        self.pending = layer

    def begin_compiled_layer(self, layer: "TieredLayer") -> None:
        """The same in a compiled graph, where the first of our layers begins the pass. Layers that stay stock may have
        moved on before it: where there are any, graphs break, and the pass has announced itself."""
        if self.foresees:
            raise UnsupportedError(
                "a selector that foresees queries, such as 'lookahead', is not supported under torch.compile, which "
                "leaves no place to do so: do not compile the model, or set cache.kv.sparse to another selector, such "
                "as Sparse('columns', ...)"
            )
        if self.kv.num_kept_inputs:
            raise UnsupportedError(
                "torch.compile leaves no place to keep what enters the layers: do not compile the model, or keep "
                "nothing, cache.keep_inputs(0)"
            )
        if layer.index == 0 and not self._has_stock_layers:
            self.begin_pass()
        self.begin_layer(layer)

    def begin_step(self, k: Tensor, v: Tensor) -> None:
        """Before the first layer of a forward pass appends k: refuse what any layer could not take."""
        num_tokens = self.kv.seq_len + k.shape[2]
        if self.max_positions is not None and num_tokens > self.max_positions:
            raise InputError(
                f"{num_tokens} tokens exceed the model's {self.max_positions} positions; shorten the prompt"
            )
        self._adapt_to(k, v)
        self._padding = None  # the same mask, longer than the tokens so far, may come with every piece of a prompt
        self.kv.begin_step(k.shape[0], k.shape[2])

    def adapt(self, dtype: torch.dtype, device: torch.device) -> None:
        """Take the dtype and device of a model; InputError once tokens are held in others."""
        self.kv.adapt(replace(self.kv.spec, dtype=dtype, device=device))

    def _adapt_to(self, k: Tensor, v: Tensor) -> None:
        spec, (_, num_kv_heads, _, head_dim), v_head_dim = self.kv.spec, k.shape, v.shape[3]
        known = (spec.dtype, spec.device, spec.num_kv_heads, spec.head_dim, spec.v_width)
        if known != (k.dtype, k.device, num_kv_heads, head_dim, v_head_dim):
            found = replace(spec, dtype=k.dtype, device=k.device, num_kv_heads=num_kv_heads, head_dim=head_dim)
            self.kv.adapt(replace(found, v_head_dim=v_head_dim))

    def padding(self, mask: Tensor | None) -> Tensor | None:
        """kv_start `[num_seqs]` of a 2D bool mask `[num_seqs, kv_len]`; None without padding; only left is allowed.

        One mask serves all layers of a forward pass: the answer is kept until the next one begins.
        """
        if mask is None:
            return None
        if self._padding is None or self._padding[0] is not mask:
            self._padding = mask, self._kv_start_of(mask)
        return self._padding[1]

    def _kv_start_of(self, mask: Tensor) -> Tensor | None:
        expected = [self.kv.num_seqs, self.kv.step_end]
        if mask.shape[0] != expected[0] or mask.shape[1] < expected[1]:
            raise InputError(
                f"attention_mask must cover all tokens, those in the cache too: expected {expected}, "
                f"got {list(mask.shape)}"
            )
        if mask.all():
            return None
        mask = mask[:, : expected[1]]
        # A row of padding alone is the first piece of a prompt that is prefilled in pieces.
        if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
            raise UnsupportedError(
                "only left padding is supported: set tokenizer.padding_side = 'left', or pass attention_mask where a "
                "padding token stands inside a prompt"
            )
        return mask.logical_not().sum(-1).cpu()


_LAYERS: WeakValueDictionary[int, "TieredLayer"] = WeakValueDictionary()
_ids = count()


class TieredLayer(CacheLayerMixin):
    """What transformers sees of one layer; the pages are in `KVCache`.

    In a compiled model a layer is a number in a tensor, `handle`, and the tokens held are another, `length`: what is
    read from a tensor is an input of the graph, where a Python number or object would be compiled in.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: TieredCache, index: int) -> None:
        super().__init__()
        # No cycle of references: the last one to a cache gives its memory back at once.
        self.cache = cast(TieredCache, proxy(cache))
        self.index, self.length = index, cache.length
        self.num_model_layers = cache.num_model_layers
        self.handle = torch.tensor(next(_ids), device="cpu")
        _LAYERS[int(self.handle)] = self
        self.window = cache.kv.spec.window(index)
        self.is_sliding = self.window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Pages are made by the first append."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Mark the new keys with this layer and hand them on; the attention function appends them."""
        unknown = kwargs.keys() - _UPDATE_KEYWORDS
        if unknown:
            raise UnsupportedError(f"the model passes {', '.join(sorted(unknown))} to Cache.update: not supported yet")
        if torch.compiler.is_compiling():  # whoever attends to these without us fails: no product takes them
            marked = key_states.view(_SEALED[key_states.dtype.itemsize])
        else:
            self.cache.begin_layer(self)
            marked = key_states.view_as(key_states)
        setattr(marked, LAYER_OF_KEYS, (self, key_states.dtype))
        return marked, value_states

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The attention that the last update waited for; where it fails, the whole forward pass is undone."""
        self.cache.pending = None
        try:
            yield
        except GeneratorExit:  # cut off before the block began, and closed whenever the traceback goes
            raise
        except BaseException:
            self.cache.kv.settle()
            raise

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, rule: ScoreRule, sink_logit: Tensor | None
    ) -> Tensor:
        """Append k and v, attend from q. `[num_seqs, q_len, num_q_heads, v_head_dim]`, contiguous."""
        cache, kv = self.cache, self.cache.kv
        if self.index == 0:
            cache.begin_step(k, v)
        else:
            kv.refuse_out_of_turn(self.index)
        if k.device != kv.spec.device:
            raise UnsupportedError(
                f"layer {self.index} is on {k.device}, the cache's near tier on {kv.spec.device}: "
                "load the model on one device"
            )
        layer = kv.layer(self.index)
        layer.set_kv_start(cache.padding(padding))
        begin = layer.seq_len
        if cache.keeper is not None:
            cache.keeper.keep(layer)
        out = extend_and_attend(q, k, v, layer, rule, sink_logit)
        if cache.keeper is not None:
            cache.keeper.prove(layer, begin, k, v)
        if self.index + 1 < kv.spec.num_layers:
            following = kv.layer(self.index + 1)
            if kv.crew is not None:
                stream_ahead(following, q.shape[2])
            if kv.l2_share:
                pull_ahead(following, q)
        return out

    def get_seq_length(self) -> int | Tensor:
        """Tokens held, near and far; a tensor while a model is compiled, as in stock's static cache."""
        if torch.compiler.is_compiling():
            return self.length.clone()
        return self.cache.kv.seq_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The whole length and offset 0, although `update` returns new keys only."""
        if torch.compiler.is_compiling():  # ours needs no size, and a Python number would be compiled in
            return query_length, 0
        return self.cache.kv.seq_len + query_length, 0

    def get_max_length(self) -> int:
        """No fixed maximum; `reserve` answers for bytes."""
        return -1


def layer_of(handle: int) -> TieredLayer:
    """The layer that a compiled graph knows by its number."""
    return _LAYERS[handle]


def _default_far_bytes() -> int:
    return min(16 << 30, machine.memory().whole.num_bytes)


def _whole_number(num_tokens: int | Tensor) -> int:
    """transformers 5.17 hands over a tensor."""
    try:
        if not isinstance(num_tokens, bool):
            return operator.index(num_tokens)
    except TypeError:
        pass
    raise InputError(f"crop takes a whole number of tokens, got {num_tokens!r}")
