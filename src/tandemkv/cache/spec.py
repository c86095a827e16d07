"""What a cache must hold and may take: the arithmetic of pages, before anything is allocated."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.types import Packing, PageLayout

FAR_PACKINGS: dict[str, Packing] = {"model": "panels", "int8": "int8", "int4": "int4"}
"""What far tokens may be kept in, by name; "model" is the dtype that the model computes in."""

MAX_LAYOUTS = 4
"""Arenas of the far pool; the first holds what stays in the model's dtype."""


class FarFormat(NamedTuple):
    """How some far tokens are kept. num_tokens: so many, the newest that no format before has; None for all that are
    left. num_channels: of K that are kept (ThinK); None for all."""

    packing: Packing
    num_tokens: int | None = None
    num_channels: int | None = None


class Span(NamedTuple):
    """Far pages [begin, end) of a layer that lie in one part of the far pool."""

    part: int
    begin: int
    end: int


def parse_far_dtype(text: str | None) -> tuple[FarFormat, ...]:
    """`"int8"`: all far tokens; `"int8:8192,int4"`: the newest 8192 far tokens in int8, older ones in int4;
    `"int8/64"`: 64 channels of every key. None, like "model": as the model computes.

    InputError for a format that is not known and for a mixture that leaves tokens out.
    """
    if text is None:
        return ()
    known = ", ".join(FAR_PACKINGS)
    expected = f"expected far_dtype as {known}, or by age as 'int8:8192,int4', channels of keys as 'int8/64'"
    if not isinstance(text, str):
        raise InputError(f"{expected}, got {text!r}")
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)(?:/(\d+))?(?::(\d+))?\s*", part, re.ASCII)
        if match is None or match[1] not in FAR_PACKINGS:
            raise InputError(f"{expected}, got {text!r}")
        channels, tokens = (None if group is None else int(group) for group in (match[2], match[3]))
        if match[1] == "model" and channels is not None:
            raise InputError(f"{expected}: tokens in the model's dtype keep all channels, got {text!r}")
        if channels is not None and (channels < 16 or channels % 16):
            raise InputError(f"{expected}: a multiple of 16 channels, got {text!r}")
        found.append(FarFormat(FAR_PACKINGS[match[1]], tokens, channels))
    if any(each.num_tokens is None for each in found[:-1]) or found[-1].num_tokens is not None:
        raise InputError(f"{expected}: every format but the last has a number of tokens, got {text!r}")
    if len({each[::2] for each in found} | {("panels", None)}) > MAX_LAYOUTS:
        raise InputError(f"{expected}: at most {MAX_LAYOUTS} ways, the model's dtype among them, got {text!r}")
    return () if found == [FarFormat("panels")] else tuple(found)


@dataclass(frozen=True)
class CacheSpec:
    """What a cache must hold, and what it may take.

    v_head_dim: where it is not head_dim, the width of values (MLA).
    near_tokens: per sequence and layer, on the device; at least two pages.
    far_bytes: capacity of the far tier in host memory, all layers and sequences together.
    chunk_tokens: the longest run of tokens that is appended at once.
    windows: one per layer, tokens that its queries see, or None for all; none at all where every layer is full.
        Layers with a window have no far tokens, and near_tokens does not concern them.
    hidden_size: width of what enters a layer, where that may be kept (`KVCache.keep_inputs`).
    far_formats: how far tokens are kept, the newest first, see `parse_far_dtype`; none: in `dtype`. The first page,
        which attention sinks are in (behind no padding), is kept in `dtype` whatever they say, and so is a page that
        cannot be quantised; `reserve` does not foresee these.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    near_tokens: int
    far_bytes: int
    page_size: int = 64
    chunk_tokens: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    v_head_dim: int | None = None
    windows: tuple[int | None, ...] = ()
    far_formats: tuple[FarFormat, ...] = ()
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        for layout in (self.near_layout, *self.far_layouts):
            layout.check_dims(self.head_dim, self.v_width)
        if len(self.far_layouts) > MAX_LAYOUTS:
            ways = f"{MAX_LAYOUTS} ways, the model's dtype among them"
            raise InputError(f"far tokens may be kept in {ways}, got {self.far_formats}")
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise InputError(
                f"a cache is for at least one layer and KV head, got {self.num_layers} layers of {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise InputError(f"expected a window or None for each of {self.num_layers} layers, got {self.windows}")
        for name in ("near_tokens", "chunk_tokens"):
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{name} is a whole number, got {getattr(self, name)!r}")
        if self.near_tokens < 2 * self.page_size:
            raise InputError(f"near_tokens must be at least two pages, {2 * self.page_size}, got {self.near_tokens}")
        if self.chunk_tokens < self.page_size or self.chunk_tokens % self.page_size:
            raise InputError(f"chunk_tokens must be a multiple of page_size {self.page_size}, got {self.chunk_tokens}")

    @property
    def v_width(self) -> int:
        """Width of values."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def content(self) -> str:
        """What a token of a layer is, for messages."""
        return f"{self.num_kv_heads} heads of {self.head_dim} and {self.v_width} {self.dtype} on {self.device}"

    @property
    def near_layout(self) -> PageLayout:
        """Rows, as the model writes them and a GPU's kernels read them; panels where the CPU kernel attends."""
        return PageLayout(self.dtype, self.page_size, "panels" if self.device.type == "cpu" else "rows")

    @cached_property
    def far_layouts(self) -> tuple[PageLayout, ...]:
        """Of each part of the far pool: panels, as the CPU kernel reads them, then every other format."""
        packed = [(each.packing, each.num_channels) for each in self.far_formats]
        kinds = dict.fromkeys([("panels", None), *packed])
        return tuple(PageLayout(self.dtype, self.page_size, *kind) for kind in kinds)

    @property
    def near_page_bytes(self) -> int:
        """K and V of one near page."""
        return self._page_bytes(self.near_layout)

    @cached_property
    def far_page_sizes(self) -> tuple[int, ...]:
        """Bytes of K and V of one page in each part of the far pool."""
        return tuple(self._page_bytes(layout) for layout in self.far_layouts)

    @property
    def far_page_bytes(self) -> int:
        """K and V of one far page in the model's dtype."""
        return self.far_page_sizes[0]

    @property
    def num_far_slots(self) -> tuple[int, ...]:
        """Pages of each part that far_bytes would buy alone."""
        return tuple(self.far_bytes // size for size in self.far_page_sizes)

    def far_spans(self, num_pages: int) -> tuple[Span, ...]:
        """Which of a layer's far pages belong in which part, the oldest first; as many spans for any number."""
        if not self.far_formats:
            return (Span(0, 0, num_pages),)
        spans, end = [], num_pages
        for part, each in zip(self._parts, self.far_formats, strict=True):
            begin = min(end, 1 if each.num_tokens is None else max(1, end - each.num_tokens // self.page_size))
            spans.append(Span(part, begin, end))
            end = begin
        return Span(0, 0, end), *reversed(spans)

    def far_parts(self, begin: int, end: int, num_pages: int) -> list[int]:
        """The part that each of the far pages [begin, end) of num_pages belongs in."""
        found = []
        for part, first, last in self.far_spans(num_pages):
            found += [part] * max(0, min(last, end) - max(first, begin))
        return found

    @property
    def weighs_channels(self) -> bool:
        """Whether some far pages leave channels of K out."""
        return any(each.num_channels is not None for each in self.far_formats)

    def is_wider(self, parts: Tensor, part: int) -> Tensor:
        """Whether pages of these parts are younger, by their format, than those of `part`."""
        order = [
            len(self._parts) if p not in self._parts else self._parts.index(p) for p in range(len(self.far_layouts))
        ]
        if 0 not in self._parts:
            order[0] = -1  # pages that could not be quantised
        return torch.tensor(order, device="cpu")[parts] < order[part]

    @cached_property
    def _parts(self) -> list[int]:
        """Of each format."""
        kinds = [(layout.packing, layout.num_channels) for layout in self.far_layouts]
        return [kinds.index((each.packing, each.num_channels)) for each in self.far_formats]

    def window(self, layer: int) -> int | None:
        """Tokens that queries of a layer see; None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def num_full_layers(self) -> int:
        """Layers that see everything: those with far pages."""
        return self.windows.count(None) if self.windows else self.num_layers

    def kept_tokens(self, layer: int) -> int:
        """What `LayerKV.evict` leaves near. A window keeps a page more than queries see: room for `crop`."""
        window = self.window(layer)
        return self.near_tokens if window is None else window - 1 + self.page_size

    def num_near_slots(self, num_seqs: int) -> int:
        """Near pages that never overflow: what is kept and a chunk, the open page, and one that `crop` may reopen.

        A layer with a window needs what it keeps twice: a prompt of many chunks that fails must be undone.
        """
        pages = 0
        for layer in range(self.num_layers):
            kept, twice = self.kept_tokens(layer), self.window(layer) is not None
            pages += -(-(kept + self.chunk_tokens) // self.page_size) + 2 + twice * (kept // self.page_size + 2)
        return num_seqs * pages

    def num_far_pages(self, num_seqs: int, num_tokens: int) -> tuple[int, ...]:
        """Pages in each part of the far pool of sequences that grew to num_tokens."""
        found = [0] * len(self.far_layouts)
        for part, begin, end in self.far_spans(max(0, -(-(num_tokens - self.near_tokens) // self.page_size))):
            found[part] += num_seqs * self.num_full_layers * (end - begin)
        return tuple(found)

    def far_bytes_of(self, num_pages: tuple[int, ...]) -> int:
        """Bytes of so many pages in each part."""
        return sum(num * size for num, size in zip(num_pages, self.far_page_sizes, strict=True))

    def _page_bytes(self, layout: PageLayout) -> int:
        return layout.page_bytes(self.num_kv_heads, self.head_dim, self.v_width)
