"""A decoder layer's own code, run for a part of what it makes: for its query, or for its keys and values.

The layer is run as it is, with its norms, biases, RoPE and whatever its family has, on a stream that need not be its
turn's. What stands for the cache meanwhile stores nothing. For the query it marks the keys, and the attention function
that finds the mark throws the query back; keys and values it throws back itself, since they are complete when a layer
updates its cache. Nothing is changed that would have to be put back, wherever an interrupt strikes.

Keys and values are made without the products that only a query needs: in multi-head attention those would be half as
much work again. Which they are no name tells. In a trial every product in front of `update` is zeros, of which one
block is NaN; where neither keys nor values become NaN, they do not depend on that block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from math import gcd, sqrt
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from tandemkv.integrations.transformers.masks import is_stand_in

WANTS_QUERY = "_tandem_wants_query"
"""The attribute of keys that are attended for the sake of the query alone."""

_TRIAL_TOKENS = 3
"""Of a trial without NaN: more than one, so that a shape that fits by accident is not taken for one that fits."""


class CannotRebuildError(Exception):
    """Why keys and values cannot be made again from what entered a layer."""


class _Caught(BaseException):
    """Tensors on their way out of a layer. No Exception: those a model may catch."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.tensors = tensors


class QueryCaught(_Caught):
    """A query, as attention functions take it."""


class _KVCaught(_Caught):
    """Keys and values, as `Cache.update` takes them."""


class Onlooker:
    """Stands for a cache while a layer is run ahead: knows what the cache knows, and takes no tokens."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Mark the keys; nothing is stored."""
        marked = key_states.view_as(key_states)
        setattr(marked, WANTS_QUERY, True)
        return marked, value_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Catcher:
    """Stands for a cache while keys and values are made again. It knows nothing more: what a cache could be asked is of
    now, not of when those tokens came."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Throw them back."""
        raise _KVCaught(key_states, value_states)


class Call(NamedTuple):
    """What a decoder layer is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def x(self) -> Tensor:
        """The residual stream that enters the layer, `[num_seqs, q_len, hidden_size]`."""
        return cast(Tensor, self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0])

    def on(self, x: Tensor) -> "Call":
        """The same call on another stream."""
        if "hidden_states" in self.kwargs:
            return Call(self.args, {**self.kwargs, "hidden_states": x})
        return Call((x, *self.args[1:]), self.kwargs)

    def replacing(self, old: object, new: object) -> "Call":
        """The same call with another object in the place of one."""
        return self.mapped(lambda value: new if value is old else value)

    def mapped(self, leaf: Callable[[Any], Any]) -> "Call":
        """The same call with `leaf(value)` for every value, also inside of tuples, lists and dicts."""
        return Call(_mapped(self.args, leaf), _mapped(dict(self.kwargs), leaf))


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if type(value) in {tuple, list}:
        return type(value)(_mapped(each, leaf) for each in value)
    return {key: _mapped(each, leaf) for key, each in value.items()} if type(value) is dict else leaf(value)


def predict_q(layer: torch.nn.Module, call: Call) -> Tensor | None:
    """The query `[num_seqs, num_q_heads, q_len, head_dim]` of a layer for the call's stream; an `Onlooker` is in the
    place of its cache. None where the layer comes to no attention function of ours."""
    found = _run(layer, call, QueryCaught)
    return None if found is None else found[0]


def _run(layer: torch.nn.Module, call: Call, wanted: type[_Caught]) -> tuple[Tensor, ...] | None:
    """What is caught on its way out; None where the layer comes to its end."""
    try:
        layer.forward(*call.args, **call.kwargs)  # not `layer(...)`: nobody's hooks are to see it, ours neither
    except wanted as caught:
        return caught.tensors
    return None


# -- what a call was, for other tokens ---------------------------------------------------------------------------------


class _Blank(Enum):
    """What a recorded call leaves open."""

    STREAM = 0
    CACHE = 1


@dataclass(frozen=True)
class _Beside:
    """The same for a tensor with a value per token, by its place among those."""

    place: int


class RecordedCall(NamedTuple):
    """A call without what differs from token to token, without mask and cache. Filled in with other tokens, it makes
    their keys and values at the positions that they have."""

    call: Call

    @staticmethod
    def of(call: Call, cache: object) -> "tuple[RecordedCall, tuple[Tensor, ...]]":
        """What stays of a call, and its tensors of a value per token, `[1 or num_seqs, num_tokens, ...]`.

        CannotRebuildError for a tensor that is neither that nor a mask.
        """
        x, beside = call.x, []

        def leaf(value: Any) -> Any:
            if value is x or value is cache:
                return _Blank.STREAM if value is x else _Blank.CACHE
            if not isinstance(value, Tensor):
                return value
            if is_stand_in(value):
                return None
            if value.dim() < 2 or value.shape[0] not in {1, x.shape[0]} or value.shape[1] != x.shape[1]:
                raise CannotRebuildError(f"it takes a tensor {list(value.shape)}, which is no value per token")
            beside.append(value)
            return _Beside(len(beside) - 1)

        return RecordedCall(call.mapped(leaf)), tuple(beside)

    def is_like(self, other: "RecordedCall") -> bool:
        """Whether both leave the same open, and tell the layer the same numbers."""
        return self._told() == other._told()

    def _told(self) -> list[Any]:
        found: list[Any] = []
        self.call.mapped(found.append)
        numbers = [value for value in found if not isinstance(value, bool)]
        return [value for value in numbers if isinstance(value, (_Blank, _Beside, int, float))]

    def filled(self, x: Tensor, beside: tuple[Tensor, ...]) -> Call:
        """The call for a stream `[num_seqs, num_tokens, hidden_size]` and what came beside these tokens."""

        def leaf(value: Any) -> Any:
            if isinstance(value, _Beside):
                return beside[value.place]
            return {_Blank.STREAM: x, _Blank.CACHE: _Catcher()}[value] if isinstance(value, _Blank) else value

        return self.call.mapped(leaf)


# -- keys and values ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def rebuild_kv(
    layer: torch.nn.Module, recorded: RecordedCall, x: Tensor, beside: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Keys and values as the layer hands them to `Cache.update`, `[num_seqs, num_kv_heads, num_tokens, head_dim]`.

    x: what entered the layer, `[num_seqs, num_tokens, hidden_size]`; beside: what came with it, as `RecordedCall.of`
    gave it.
    CannotRebuildError where the layer cannot be run so.
    """
    return _kv(layer, recorded.filled(x, beside), _Sparing(layer, needs_of(layer, recorded, x, beside).parts))


def _kv(layer: torch.nn.Module, call: Call, mode: TorchFunctionMode) -> tuple[Tensor, Tensor]:
    with mode:
        found = _run(layer, call, _KVCaught)
    if found is None:
        raise CannotRebuildError(f"a {type(layer).__name__} does not update its cache")
    k, v = found
    return k, v


class _Product(NamedTuple):
    """x times a weight. weight: the parameter itself; rows: the same as `[num_outputs, num_inputs]`."""

    x: Tensor
    weight: Tensor
    rows: Tensor
    bias: Tensor | None

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Product | None":
        """Where that is what a function is called for. GPT-2 has its weights transposed."""
        if func is linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
            return _Product(named["input"], named["weight"], named["weight"], named.get("bias"))
        if func is torch.addmm and len(args) == 3 and not kwargs:
            return _Product(args[1], args[2], args[2].T, args[0])
        return None

    def zeros(self, width: int) -> Tensor:
        """In the place of so many outputs."""
        return self.x.new_zeros((*self.x.shape[:-1], width))


class _Part(NamedTuple):
    """Of a product's outputs, those that keys and values depend on: `blocks` of `unit` outputs, rising. shape: of the
    weight; width: of what stands for the product; with no blocks it may be less than it has."""

    shape: torch.Size
    width: int
    unit: int
    blocks: tuple[int, ...]

    def of(self, product: _Product) -> Tensor:
        """The product, with zeros for what is not needed."""
        if not self.blocks:
            return product.zeros(self.width)
        first, last = self.blocks[0], self.blocks[-1] + 1
        if last - first == len(self.blocks):
            begin, end = first * self.unit, last * self.unit
            bias = None if product.bias is None else product.bias[begin:end]
            out = product.x.new_empty((*product.x.shape[:-1], self.width))
            out[..., :begin] = out[..., end:] = 0.0
            out[..., begin:end] = linear(product.x, product.rows[begin:end], bias)
            return out
        places, blocks = list(self.blocks), (-1, self.unit)
        rows = product.rows.unflatten(0, blocks)[places].flatten(0, 1)
        bias = None if product.bias is None else product.bias.unflatten(0, blocks)[places].flatten()
        out = product.zeros(self.width)
        out.unflatten(-1, blocks)[..., places, :] = linear(product.x, rows, bias).unflatten(-1, blocks)
        return out


class Needs(NamedTuple):
    """What of a layer's products keys and values need. parts: of those that are not needed whole, by the names of their
    weights. num_roundings: results that the layer rounds on its way, and num_inputs: of its widest product."""

    parts: dict[str, _Part]
    num_roundings: int
    num_inputs: int

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """How far two ways to sum up the same products may lie apart, relative to the norm of a token's keys.

        Each rounding is off by u / sqrt(3) in the mean square, u the unit roundoff of the dtype (of float32 in sums of
        products), and they are independent; sqrt(2) for two results, and three times that.
        """
        is_tf32 = device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"
        u_sum = 2.0**-11 if is_tf32 else 2.0**-24
        u = max(torch.finfo(dtype).eps / 2, u_sum)
        return 3 * sqrt(2 / 3 * (self.num_roundings * u**2 + self.num_inputs * u_sum**2))


_NEEDS: "WeakKeyDictionary[torch.nn.Module, Needs]" = WeakKeyDictionary()
"""Of layers that were tried."""


def needs_of(layer: torch.nn.Module, recorded: RecordedCall, x: Tensor, beside: tuple[Tensor, ...]) -> Needs:
    """Found in a few trials, once in a layer's life, of some milliseconds each."""
    if layer not in _NEEDS:
        _NEEDS[layer] = _Trial(layer, recorded, x, beside).needs()
    return _NEEDS[layer]


class _Sparing(TorchFunctionMode):
    """Makes the needed parts of products; others, and those with weights that no trial has seen, are made whole."""

    def __init__(self, layer: torch.nn.Module, parts: dict[str, _Part]) -> None:
        super().__init__()
        found = ((_parameter(layer, name), part) for name, part in parts.items())
        self._part_of = {
            id(weight): part for weight, part in found if weight is not None and weight.shape == part.shape
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _Product.of(func, args, kwargs or {})
        part = None if product is None else self._part_of.get(id(product.weight))
        return func(*args, **(kwargs or {})) if product is None or part is None else part.of(product)


def _parameter(layer: torch.nn.Module, name: str) -> Tensor | None:
    """None where a layer has changed since it was tried: adapters (LoRA) wrap modules, and give weights other names."""
    try:
        return layer.get_parameter(name)
    except AttributeError:
        return None


class _Zeros(TorchFunctionMode):
    """Puts zeros in the place of products, or NaN in the place of one block for every token, and notes what it sees."""

    def __init__(self, widths: Mapping[int, int] | None = None, poisoned: tuple[int, int] = (0, 1)) -> None:
        """widths: of what stands for a product, by the id of its weight; else as wide as it is. poisoned: the id of the
        weight whose block i, of so many outputs, is NaN for token i."""
        super().__init__()
        self._widths, (self._poisoned, self._unit) = widths or {}, poisoned
        self.seen: dict[int, _Product] = {}
        self.num_roundings = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _Product.of(func, args, kwargs or {})
        out = func(*args, **(kwargs or {})) if product is None else self._stand_in(product)
        self.num_roundings += isinstance(out, Tensor) and out.is_floating_point()
        return out

    def _stand_in(self, product: _Product) -> Tensor:
        place = id(product.weight)
        self.seen[place] = product
        out = product.zeros(self._widths.get(place, product.rows.shape[0]))
        if place == self._poisoned:
            blocks = out.view(-1, out.shape[-1] // self._unit, self._unit)  # a row per token, as many as blocks
            each = torch.arange(len(blocks)) if len(blocks) == blocks.shape[1] else slice(None)
            blocks[each, each] = torch.nan
        return out


class _Trial:
    """A layer, run on the first token again and again, its products being zeros."""

    def __init__(self, layer: torch.nn.Module, recorded: RecordedCall, x: Tensor, beside: tuple[Tensor, ...]) -> None:
        self._layer, self._recorded = layer, recorded
        self._first = [each[:1, :1] for each in (x, *beside)]

    def needs(self) -> Needs:
        """By one trial without NaN, one for every weight, and one or two for those that are not needed at all."""
        zeros = _Zeros()
        k, v = self._kv(zeros, _TRIAL_TOKENS)
        sizes = Needs({}, zeros.num_roundings, max((seen.rows.shape[1] for seen in zeros.seen.values()), default=0))
        if not bool(k.isfinite().all() & v.isfinite().all()):
            return sizes  # NaN would tell nothing: all is needed
        names = {id(weight): name for name, weight in self._layer.named_parameters()}
        for place, product in zeros.seen.items():
            if place in names:
                part = self._part(product, gcd(product.rows.shape[0], k.shape[3], v.shape[3]))
                if len(part.blocks) * part.unit < part.width:
                    sizes.parts[names[place]] = part if part.blocks else self._narrowed(part, product, (k, v))
        return sizes

    def _part(self, product: _Product, unit: int) -> _Part:
        """Which blocks are needed."""
        width = product.rows.shape[0]
        k, v = self._kv(_Zeros(poisoned=(id(product.weight), unit)), width // unit)
        is_needed = k.isnan().any(3).any(1)[0] | v.isnan().any(3).any(1)[0]
        return _Part(product.weight.shape, width, unit, tuple(is_needed.nonzero().flatten().tolist()))

    def _narrowed(self, part: _Part, product: _Product, kv: tuple[Tensor, Tensor]) -> _Part:
        """One head's width, or two (a query and its gate), where the layer's code takes so many for all there are: so
        norms and RoPE of queries cost next to nothing."""
        for width in (kv[0].shape[3], 2 * kv[0].shape[3]):
            try:
                found = self._kv(_Zeros({id(product.weight): width}), _TRIAL_TOKENS)
            except CannotRebuildError:
                continue  # it wants all heads
            if width < part.width and all(x.shape == y.shape for x, y in zip(found, kv, strict=True)):
                return part._replace(width=width)
        return part

    @torch.no_grad()
    def _kv(self, mode: _Zeros, num_tokens: int) -> tuple[Tensor, Tensor]:
        x, *beside = (each.expand(1, num_tokens, *each.shape[2:]) for each in self._first)
        try:
            return _kv(self._layer, self._recorded.filled(x, tuple(beside)), mode)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            name = type(self._layer).__name__
            raise CannotRebuildError(f"a {name} cannot be run for its keys and values alone: {error}") from error
