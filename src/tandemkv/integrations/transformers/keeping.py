"""What enters the layers of a model, told to its cache, and keys and values that are made of it again."""

from typing import Any, NamedTuple, cast
from weakref import proxy

import torch
from torch import Tensor

from tandemkv.cache import LayerKV
from tandemkv.errors import CacheError, UnsupportedError
from tandemkv.integrations.transformers.adapter import Call, CannotRebuildError, RecordedCall, needs_of, rebuild_kv

_PROOF_TOKENS = 64
"""Of a layer's first chunk, made again for comparison: the last ones, but no more than its second half, so that what is
told by token must be told of these."""


class _Entered(NamedTuple):
    """A layer of the cache has been entered, and has not attended yet."""

    layer: int
    x: Tensor
    recorded: RecordedCall
    beside: tuple[Tensor, ...]


class Keeper:
    """Of one cache. Knows the calls of layers, which make keys and values of what the cache keeps."""

    def __init__(self, family: str, places: dict[int, int]) -> None:
        """places: of layers that keep their inputs, among all layers of the model, by their index in the cache."""
        self._family, self._places = family, places
        self._layers: torch.nn.ModuleList | None = None
        self._entered: _Entered | None = None
        self._recorded: dict[int, RecordedCall] = {}
        self._proven: set[int] = set()

    def fork(self) -> "Keeper":
        """For a cache that has the same tokens."""
        twin = Keeper(self._family, self._places)
        twin._layers, twin._recorded, twin._proven = self._layers, dict(self._recorded), set(self._proven)
        return twin

    def begin_pass(self, layers: torch.nn.ModuleList) -> None:
        """These are the decoder's layers; the cache must not keep them alive."""
        self._layers, self._entered = cast(torch.nn.ModuleList, proxy(layers)), None

    def end_pass(self) -> None:
        """Whatever came of it."""
        self._entered = None

    def enter(self, index: int, cache: object, call: Call) -> None:
        """A layer is about to run with this call, of which one argument is the cache."""
        try:
            recorded, beside = RecordedCall.of(call, cache)
        except CannotRebuildError as why:
            raise self._refusal(why) from None
        if not recorded.is_like(self._recorded.get(index, recorded)):
            raise self._refusal(f"layer {self._places[index]} is called in another way than before")
        self._entered = _Entered(index, call.x.detach(), recorded, beside)

    def keep(self, layer: LayerKV) -> None:
        """Before its new tokens are appended: what it was entered with."""
        entered, self._entered = self._entered, None
        if entered is None or entered.layer != layer.index or layer.inputs is None:
            return
        layer.inputs.extend(layer.index, layer.seq_len, entered.x, entered.beside)
        self._recorded[layer.index] = entered.recorded

    def prove(self, layer: LayerKV, begin: int, k: Tensor, v: Tensor) -> None:
        """Once for every layer: keys and values that are made again are those that came, from token `begin` on.

        Shapes as `Cache.update` takes them. UnsupportedError where they differ by more than rounding.
        """
        end = min(begin + k.shape[2], layer.num_inputs)
        if layer.index in self._proven or end <= begin:
            return
        first = max((begin + end) // 2, end - _PROOF_TOKENS)
        tokens, tolerance = slice(first - begin, end - begin), self._tolerance(layer, first)
        for name, old, new in zip(("keys", "values"), (k, v), layer.rebuild(first, end), strict=True):
            off = _error(new, old[:, :, tokens])
            if not off <= tolerance:
                raise self._refusal(
                    f"{name} of layer {self._places[layer.index]} come out {off:.1e} off, rounding accounts for "
                    f"{tolerance:.1e}"
                )
        if end - begin > 1:  # of one token everything has as many values as there are tokens
            self._proven.add(layer.index)

    def rebuild(self, index: int, x: Tensor, beside: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See `tandemkv.cache.Rebuild`."""
        try:
            return rebuild_kv(self._layer(index), self._recorded[index], x, beside)
        except CannotRebuildError as why:
            raise self._refusal(why) from why

    def _tolerance(self, layer: LayerKV, token: int) -> float:
        assert layer.inputs is not None
        x = layer.inputs.x(layer.index, token, token + 1).to(layer.inputs.spec.device)
        beside = layer.inputs.beside(layer.index, token, token + 1)
        module, recorded = self._layer(layer.index), self._recorded[layer.index]
        try:
            return needs_of(module, recorded, x, beside).tolerance(x.dtype, x.device)
        except CannotRebuildError as why:
            raise self._refusal(why) from why

    def _layer(self, index: int) -> torch.nn.Module:
        try:
            return cast(Any, self._layers)[self._places[index]]  # type: ignore[no-any-return]
        except ReferenceError:
            raise CacheError("the model whose layers would make keys and values again is gone") from None

    def _refusal(self, why: object) -> UnsupportedError:
        return UnsupportedError(
            f"keys and values of a {self._family} model cannot be made again from what enters its layers: {why}; keep "
            "nothing of it, cache.keep_inputs(0)"
        )


def _error(new: Tensor, old: Tensor) -> float:
    """The largest difference of a token, `[num_seqs, num_kv_heads, num_tokens, head_dim]` each, relative to its norm;
    infinite for other shapes. Tokens that were never finite do not count."""
    if new.shape != old.shape or new.dtype != old.dtype:
        return float("inf")
    size, off = old.float().norm(dim=(1, 3)), (new.float() - old.float()).norm(dim=(1, 3))
    relative = torch.where(off == 0.0, 0.0, off / size)[size.isfinite()]
    return float(relative.nan_to_num(nan=torch.inf).max()) if len(relative) else 0.0
