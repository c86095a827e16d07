"""The next layer's query, foreseen from what enters this one (InfiniGen, 2406.19707).

A decoder layer adds little to the residual stream, so a layer that is run on its predecessor's input asks for nearly
what it will ask for on its own. `adapter.predict_q` runs it; here stands which layer is run when, and on what.
"""

from typing import Any, cast
from weakref import proxy

import torch
from torch import Tensor

from tandemkv.attention import look_ahead
from tandemkv.cache import LayerKV
from tandemkv.errors import UnsupportedError
from tandemkv.integrations.transformers.adapter import Call, Onlooker, predict_q
from tandemkv.select import MAX_SELECT_QUERIES

# What enters the first layer is the embedding: layer 0 changes it too much to foresee layer 1 from it (InfiniGen).
_FIRST_FORESEEN = 2


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
        self._call: Call | None = None  # of the last full-attention layer
        self._x: Tensor | None = None  # what entered the last layer

    def enter(self, place: int, cache: object, call: Call) -> None:
        """Layer `place` is about to run with this call, of which one argument is the cache."""
        call = call.replacing(cache, Onlooker(self._cache))
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
            pages.forget_foreseen()

    def _foresee(self, place: int) -> None:
        """Tell layer `place` its query, from what entered the last layer."""
        if self._call is None or self._x is None or place < _FIRST_FORESEEN or place not in self._pages:
            return
        layer = self._layers[place]
        q = predict_q(layer, self._call.on(self._x))
        if q is None:
            raise UnsupportedError(
                f"the query of a {type(layer).__name__} cannot be foreseen: take another selector, such as 'columns'"
            )
        self._pages[place].foreseen = q
        look_ahead(self._pages[place])


def layers_in(decoder: Any) -> torch.nn.ModuleList | None:
    """The list of a decoder's layers; None where it has none, or more than one of that length."""
    num_layers = decoder.config.get_text_config(decoder=True).num_hidden_layers
    lists = [part for part in decoder.children() if isinstance(part, torch.nn.ModuleList) and len(part) == num_layers]
    return lists[0] if len(lists) == 1 else None
