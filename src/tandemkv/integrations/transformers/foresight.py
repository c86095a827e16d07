"""The next layer's query, foreseen from what enters this one (InfiniGen, 2406.19707).

A decoder layer adds little to the residual stream, so a layer that is run on its predecessor's input asks for nearly
what it will ask for on its own. It is run as it is, with its norms, biases, RoPE and whatever its family has, up to the
attention function, which finds the keys marked and throws the query back. What stands for the cache meanwhile stores
nothing, and the flag is on the keys alone: nothing is changed that would have to be put back, wherever an interrupt
strikes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast
from weakref import proxy

import torch
from torch import Tensor

from tandemkv.cache import LayerKV
from tandemkv.errors import UnsupportedError
from tandemkv.select import MAX_SELECT_QUERIES

WANTS_QUERY = "_tandem_wants_query"
"""The attribute of keys that are attended for the sake of the query alone."""

# What enters the first layer is the embedding: layer 0 changes it too much to foresee layer 1 from it (InfiniGen).
_FIRST_FORESEEN = 2


class QueryCaught(BaseException):
    """A query on its way from the attention function out of the layer; `q` as attention functions take it.

    No Exception: those a model may catch.
    """

    def __init__(self, q: Tensor) -> None:
        super().__init__()
        self.q = q


class _Onlooker:
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


class _Call(NamedTuple):
    """What a decoder layer was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def x(self) -> Tensor:
        """The residual stream that enters the layer, `[num_seqs, q_len, hidden_size]`."""
        return cast(Tensor, self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0])

    def on(self, x: Tensor) -> "_Call":
        """The same call on another stream."""
        if "hidden_states" in self.kwargs:
            return _Call(self.args, {**self.kwargs, "hidden_states": x})
        return _Call((x, *self.args[1:]), self.kwargs)

    def replacing(self, old: object, new: object) -> "_Call":
        """The same call with another object in the place of one."""
        args = tuple(new if value is old else value for value in self.args)
        return _Call(args, {name: new if value is old else value for name, value in self.kwargs.items()})


class Foresight:
    """One forward pass. Tells layers of pages what they will be asked, `LayerKV.foreseen`, until `end`.

    A layer is called with what the last full-attention layer was called with, since masks and RoPE may differ for
    layers of other kinds. The first one behind others is therefore foreseen only when its own call comes.
    """

    def __init__(self, layers: torch.nn.ModuleList, cache: Any, pages: dict[int, LayerKV]) -> None:
        """layers: of the decoder. pages: those of layers with full attention, by their place among all layers."""
        # A pass that failed lies in its cache until the next one: it must not keep model or cache alive.
        self._layers, self._cache = cast(torch.nn.ModuleList, proxy(layers)), proxy(cache)
        self._pages = pages
        self._call: _Call | None = None  # of the last full-attention layer
        self._x: Tensor | None = None  # what entered the last layer

    def enter(self, place: int, cache: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Layer `place` is about to run with these arguments, of which one is the cache."""
        call = _Call(args, kwargs).replacing(cache, _Onlooker(self._cache))
        if call.x.shape[1] > MAX_SELECT_QUERIES:
            return  # a prompt attends to everything
        if place in self._pages:
            self._call = call
            if self._pages[place].foreseen is None:
                self._foresee(place)
        self._x = call.x
        self._foresee(place + 1)

    def end(self) -> None:
        """Predictions are of no use any more."""
        for pages in self._pages.values():
            pages.foreseen = None

    def _foresee(self, place: int) -> None:
        """Tell layer `place` its query, from what entered the last layer."""
        if self._call is None or self._x is None or place < _FIRST_FORESEEN or place not in self._pages:
            return
        call, layer = self._call.on(self._x), self._layers[place]
        try:
            layer.forward(*call.args, **call.kwargs)  # not `layer(...)`: nobody's hooks are to see it, ours neither
        except QueryCaught as caught:
            self._pages[place].foreseen = caught.q
            return
        raise UnsupportedError(
            f"the query of a {type(layer).__name__} cannot be foreseen: take another selector, such as 'columns'"
        )


def layers_in(decoder: Any) -> torch.nn.ModuleList | None:
    """The list of a decoder's layers; None where it has none, or more than one of that length."""
    num_layers = decoder.config.get_text_config(decoder=True).num_hidden_layers
    lists = [part for part in decoder.children() if isinstance(part, torch.nn.ModuleList) and len(part) == num_layers]
    return lists[0] if len(lists) == 1 else None
