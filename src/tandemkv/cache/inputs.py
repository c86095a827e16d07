"""What entered a cache's layers with its first tokens, kept so that their keys and values can be made again (KVPR).

    rows of a buffer     what a cache and its forks share; who of them writes, and is not alone with it, copies it first
    [0, num_tokens)      of a layer: kept. They are valid as far as the layer holds these tokens: `LayerKV.num_inputs`
    [num_tokens, ...)    up to the capacity: free, whatever a pass that was undone has left there

What came beside the tokens (angles of RoPE, positions) is the same for all layers of a kind, and kept once for them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol, get_args
from weakref import WeakSet

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.cache.spec import CacheSpec
from tandemkv.errors import CacheError, CapacityError, InputError
from tandemkv.types import format_bytes

Tier = Literal["near", "far"]


class Rebuild(Protocol):
    """How keys and values are made of inputs; whoever knows the model hands it in."""

    def __call__(self, index: int, x: Tensor, beside: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """K and V `[num_seqs, num_kv_heads, num_tokens, head_dim]` of layer `index`, on the near device.

        x: what entered the layer, `[num_seqs, num_tokens, hidden_size]`; beside: what came with it.
        """


@dataclass(frozen=True)
class InputsSpec:
    """What is kept: the inputs of the first num_tokens of every sequence, on the near device or in host memory."""

    num_tokens: int = 0
    where: Tier = "near"

    def __post_init__(self) -> None:
        if not isinstance(self.num_tokens, int) or isinstance(self.num_tokens, bool) or self.num_tokens < 0:
            raise InputError(f"inputs are kept of a number of tokens, 0 or more, got {self.num_tokens!r}")
        if self.where not in get_args(Tier):
            raise InputError(f"inputs are kept 'near' or 'far', got {self.where!r}")

    def x_bytes(self, spec: CacheSpec, num_seqs: int) -> int:
        """Of what entered all layers without a window."""
        num_rows = num_seqs * self.num_tokens * spec.num_full_layers
        return num_rows * (spec.hidden_size or 0) * spec.dtype.itemsize

    def beside_bytes(self, spec: CacheSpec, num_seqs: int) -> int:
        """Of what came beside, always near: two angles for every channel, and a position, for one kind of layer."""
        return num_seqs * self.num_tokens * (2 * spec.head_dim * spec.dtype.itemsize + 8)

    def device(self, spec: CacheSpec) -> torch.device:
        """Where x lies."""
        return spec.device if self.where == "near" else torch.device("cpu")

    def require(
        self, spec: CacheSpec, num_seqs: int, page_bytes: Mapping[torch.device, int] = MappingProxyType({})
    ) -> None:
        """CapacityError, with the arithmetic, where a device has no room for inputs beside so many bytes of pages."""
        x_bytes, beside_bytes = self.x_bytes(spec, num_seqs), self.beside_bytes(spec, num_seqs)
        needed = Counter(page_bytes)
        needed[spec.device] += beside_bytes
        needed[self.device(spec)] += x_bytes
        for device, num_bytes in needed.items():
            found = _available(device)
            if found is not None and num_bytes > found.num_bytes:
                raise CapacityError(
                    f"{format_bytes(num_bytes)} needed on {device}, {format_bytes(found.num_bytes)} available "
                    f"({found.limit}): inputs of {num_seqs} x {self.num_tokens} tokens x {spec.num_full_layers} layers "
                    f"x {spec.hidden_size} x {spec.dtype.itemsize} bytes are {format_bytes(x_bytes)}, their positions "
                    f"{format_bytes(beside_bytes)}; keep_inputs of fewer tokens, lower the batch, or free memory"
                )


def _available(device: torch.device) -> machine.Available | None:
    """None where nobody tells."""
    if device.type == "cpu":
        return machine.available_bytes()
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return machine.Available(torch.cuda.mem_get_info(device)[0] + unused, "device memory")
    return None


class _Rows:
    """Buffers that a cache and its forks share. x: `[num_layers, num_rows, capacity, hidden_size]`, of layers without a
    window; beside: `[num_rows, capacity, ...]` each, by the first layer of a kind."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.beside: dict[int, tuple[Tensor, ...]] = {}
        self.holders: WeakSet[KeptInputs] = WeakSet()

    @torch.inference_mode(False)  # written to, maybe outside of it
    def copied(self, rows: Tensor | None, num_tokens: int) -> "_Rows":
        """Buffers of these rows, None for all, that hold the first tokens of them."""
        place = slice(None) if rows is None else rows
        num_rows = self.x.shape[1] if rows is None else len(rows)
        new = _Rows(self.x.new_empty((self.x.shape[0], num_rows, *self.x.shape[2:]), pin_memory=self.x.is_pinned()))
        new.x[:, :, :num_tokens] = self.x[:, place, :num_tokens]
        for kind, buffers in self.beside.items():
            new.beside[kind] = tuple(old.new_empty((num_rows, *old.shape[1:])) for old in buffers)
            for buffer, old in zip(new.beside[kind], buffers, strict=True):
                buffer[:, :num_tokens] = old[place, :num_tokens]
        return new


class _Place(NamedTuple):
    """rows: int64 `[num_seqs]`, that of each sequence; None where sequence i has row i. One assignment moves it."""

    shared: _Rows | None
    rows: Tensor | None = None


class KeptInputs:
    """Of one cache. Layers are numbered as in the cache; nothing is allocated before the first tokens come."""

    def __init__(self, spec: CacheSpec, asked: InputsSpec, num_seqs: int) -> None:
        self.spec, self.asked, self.num_seqs = spec, asked, num_seqs
        self.rebuild: Rebuild | None = None
        full = [index for index in range(spec.num_layers) if spec.window(index) is None]
        self._slice_of = {index: place for place, index in enumerate(full)}
        self._num_tokens = dict.fromkeys(full, 0)
        self._kinds: dict[int, int] = {}  # the first layer of each layer's kind
        self._written: dict[int, tuple[Tensor, ...]] = {}  # by kind, in the pass under way: of these tensors
        self._place = _Place(None)

    def num_tokens(self, index: int) -> int:
        """Whose inputs of a layer are kept: the first ones."""
        return self._num_tokens[index]

    @property
    def is_allocated(self) -> bool:
        """Whether its memory is taken."""
        return self._place.shared is not None

    def buffers(self, tier: Tier) -> list[Tensor]:
        """What it holds in a tier, maybe with others."""
        shared = self._place.shared
        if shared is None:
            return []
        beside = [each for buffers in shared.beside.values() for each in buffers]
        return [shared.x] * (tier == self.asked.where) + beside * (tier == "near")

    # -- growing -------------------------------------------------------------------------------------------------------

    def end_pass(self) -> None:
        """What comes beside the next tokens is to be written again."""
        self._written = {}

    def extend(self, index: int, begin: int, x: Tensor, beside: tuple[Tensor, ...] = ()) -> None:
        """Keep what entered layer `index` with tokens from `begin` on: x `[num_seqs, tokens, hidden_size]`.

        beside: `[1 or num_seqs, tokens, ...]` each, of the same shapes every time. Whatever was kept from `begin` on is
        written over; tokens behind a gap, or beyond the capacity, are not kept. InputError for what does not fit.
        """
        end = min(begin + x.shape[1], self.asked.num_tokens)
        if begin > self._num_tokens[index] or begin >= end:
            return
        self._refuse_misfit(x)
        self._num_tokens[index] = begin
        shared = self._owned()
        kind, num_new = self._kind_of(index, beside), end - begin
        if kind not in self._written:
            self._write_beside(shared, kind, slice(begin, end), beside)
        shared.x[self._slice_of[index], :, begin:end] = x[:, :num_new]
        self._num_tokens[index] = end

    def _refuse_misfit(self, x: Tensor) -> None:
        shape = [self.num_seqs, x.shape[1], self.spec.hidden_size]
        if [*x.shape] != shape or x.dtype != self.spec.dtype:
            raise InputError(
                f"inputs of a layer must be {shape} in {self.spec.dtype}, got {[*x.shape]} in {x.dtype}; keep none of "
                "them, keep_inputs(0)"
            )

    def _kind_of(self, index: int, beside: tuple[Tensor, ...]) -> int:
        """That of the layers to which the same tensors came, when first some did."""
        if index not in self._kinds:
            same = [kind for kind, its in self._written.items() if _are_one(its, beside)]
            self._kinds[index] = same[0] if same else index
        kind = self._kinds[index]
        known = self._written.get(kind)
        if known is not None and not _are_one(known, beside) and not _are_equal(known, beside):
            raise InputError(f"layers {kind} and {index} were told the same about tokens, and no longer are")
        return kind

    def _write_beside(self, shared: _Rows, kind: int, tokens: slice, beside: tuple[Tensor, ...]) -> None:
        if kind not in shared.beside:
            shape = (self.num_seqs, self.asked.num_tokens)
            with torch.inference_mode(False):
                shared.beside[kind] = tuple(each.new_empty((*shape, *each.shape[2:])) for each in beside)
        buffers = shared.beside[kind]
        if [(each.shape[2:], each.dtype) for each in beside] != [(each.shape[2:], each.dtype) for each in buffers]:
            raise InputError(f"layer {kind} was told something else about tokens than before")
        for buffer, each in zip(buffers, beside, strict=True):
            buffer[:, tokens] = each[:, : tokens.stop - tokens.start]
        self._written[kind] = beside

    def _owned(self) -> _Rows:
        """Buffers that nobody else has, a row for every sequence."""
        shared, rows = self._place
        if shared is not None and rows is None and len(shared.holders) == 1:
            return shared
        self.asked.require(self.spec, self.num_seqs)
        new = self._allocated() if shared is None else shared.copied(rows, max(self._num_tokens.values()))
        new.holders.add(self)
        self._place = _Place(new)
        if shared is not None:
            shared.holders.discard(self)
        return new

    @torch.inference_mode(False)
    def _allocated(self) -> _Rows:
        spec, device = self.spec, self.asked.device(self.spec)
        assert spec.hidden_size is not None
        shape = (len(self._slice_of), self.num_seqs, self.asked.num_tokens, spec.hidden_size)
        pinned = device.type == "cpu" and spec.device.type == "cuda"  # or the link would wait for a copy in host memory
        x = torch.empty(shape, dtype=spec.dtype, device=device, pin_memory=pinned)
        if device.type == "cpu":
            machine.advise_huge_pages(x.data_ptr(), x.nbytes)
        return _Rows(x)

    # -- shrinking, sharing --------------------------------------------------------------------------------------------

    def crop(self, index: int, seq_len: int) -> None:
        """Forget those of a layer from `seq_len` on."""
        self._num_tokens[index] = min(self._num_tokens[index], seq_len)

    def fork(self, seqs: Tensor | None = None) -> "KeptInputs":
        """The same once more, by reference; seqs: int64 `[num_seqs]`, these sequences in that order.

        Where at most half of the rows are left, they are copied, so that the others' memory goes.
        """
        shared, rows = self._place
        twin = KeptInputs(self.spec, self.asked, self.num_seqs if seqs is None else len(seqs))
        twin.rebuild, twin._kinds, twin._num_tokens = self.rebuild, dict(self._kinds), dict(self._num_tokens)
        if shared is None:
            return twin
        if seqs is not None:
            rows = seqs if rows is None else rows[seqs]
            used, places = torch.unique(rows, return_inverse=True)
            if 2 * len(used) <= shared.x.shape[1]:
                shared, rows = shared.copied(used, max(self._num_tokens.values())), places
            if torch.equal(rows, torch.arange(shared.x.shape[1], device="cpu")):
                rows = None
        shared.holders.add(twin)
        twin._place = _Place(shared, rows)
        return twin

    def release(self) -> None:
        """Forget everything."""
        shared, self._place = self._place.shared, _Place(None)
        self._num_tokens, self._written = dict.fromkeys(self._num_tokens, 0), {}
        if shared is not None:
            shared.holders.discard(self)

    # -- reading -------------------------------------------------------------------------------------------------------

    def x(self, index: int, begin: int, end: int) -> Tensor:
        """What entered a layer with tokens `[begin, end)`, `[num_seqs, tokens, hidden_size]`, where it lies; a view
        unless sequences have changed places."""
        self._refuse_missing(index, begin, end)
        shared, rows = self._place
        assert shared is not None
        x = shared.x[self._slice_of[index], :, begin:end]
        return x if rows is None else x[rows.to(x.device)]

    def beside(self, index: int, begin: int, end: int) -> tuple[Tensor, ...]:
        """What came beside, on the near device, `[num_seqs, tokens, ...]` each."""
        self._refuse_missing(index, begin, end)
        shared, rows = self._place
        assert shared is not None
        found = [each[:, begin:end] for each in shared.beside[self._kinds[index]]]
        return tuple(found if rows is None else (each[rows.to(each.device)] for each in found))

    def kv(self, index: int, begin: int, end: int, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's tokens `[begin, end)`, made again; x: a copy of these inputs."""
        if self.rebuild is None:
            raise CacheError("nobody has told this cache how keys and values are made of inputs")
        x = self.x(index, begin, end) if x is None else x
        expected = [self.num_seqs, end - begin, self.spec.hidden_size]
        if [*x.shape] != expected:
            raise InputError(f"inputs of tokens [{begin}, {end}) are {expected}, got {[*x.shape]}")
        return self.rebuild(index, x.to(self.spec.device), self.beside(index, begin, end))

    def _refuse_missing(self, index: int, begin: int, end: int) -> None:
        if not 0 <= begin < end <= self._num_tokens[index]:
            raise InputError(f"inputs of tokens [{begin}, {end}) of [0, {self._num_tokens[index]}) in layer {index}")


def _are_one(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _are_equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
