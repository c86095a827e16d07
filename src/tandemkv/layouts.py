"""How a page lies in memory: its packing, and where codes, scales and exact channels are in a head's slice."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from tandemkv.errors import InputError, UnsupportedError

BLOCK_TOKENS = 16
"""Tokens of one KV head that are scored, packed and masked together."""

MAX_HEAD_DIM = 256

GROUP_DIMS = 64
"""Dims of V that share a scale in int4 pages; of so many channels of K one is kept as it is."""

Packing = Literal["rows", "panels", "int8", "int4"]


class SliceOfK(NamedTuple):
    """Where things lie in a head's slice of K of a quantised page, in bytes (csrc/attend.h says what they are).

    num_channels: stored ones. num_exact: channels that are kept as they are, of int4; `exact_index` names them, and
    `kept` those that are stored.
    """

    num_channels: int
    num_exact: int
    scales: int
    zeros: int
    exact: int
    kept: int
    exact_index: int
    num_bytes: int


class SliceOfV(NamedTuple):
    """The same of V. num_dims: stored ones; num_groups: of dims that share a scale."""

    num_dims: int
    num_groups: int
    scales: int
    zeros: int
    num_bytes: int


@dataclass(frozen=True)
class PageLayout:
    """How a head's slice of a page lies in memory; a property of a pool and of saved files, not of a processor.

    rows:   `[token][dim]`, as the model wrote it.
    panels: ready for dot products of `pair` neighbours (2 in bf16, 1 in float32 and float16): K as
            `[block of 16 tokens][dim / pair][16][pair]`, V as `[token / pair][dim][pair]`, dim padded to 16 with zeros.
    int8:   codes of 8 bits: K with a scale for each channel, V with one for each token.
    int4:   codes of 4 bits, with a scale and a zero: K for each channel, V for each token and GROUP_DIMS dims; of every
            GROUP_DIMS channels of K one, that of the widest range, is kept as it is (KVQuant, 2401.18079; csrc/attend.h
            has the bytes).
    Quantised pages are filled whole, from rows of `dtype`, and give such rows back.
    num_channels: of K that a quantised page keeps, a multiple of 16; None for all (ThinK, 2407.21018).
    """

    dtype: torch.dtype
    page_size: int = 64
    packing: Packing = "rows"
    num_channels: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"pages hold float32, bfloat16 or float16, got {self.dtype}: load the model with dtype=torch.bfloat16"
            )
        if self.packing not in get_args(Packing):
            raise InputError(f"packing must be one of {get_args(Packing)}, got {self.packing!r}")
        if not isinstance(self.page_size, int) or self.page_size < BLOCK_TOKENS or self.page_size % BLOCK_TOKENS:
            raise InputError(f"page_size must be a multiple of {BLOCK_TOKENS}, got {self.page_size!r}")
        num = self.num_channels
        if num is not None and (not isinstance(num, int) or num < 16 or num % 16 or not self.is_quantised):
            raise InputError(
                f"num_channels must be a multiple of 16, of int8 or int4 pages, got {num!r} of {self.packing}"
            )

    @property
    def is_quantised(self) -> bool:
        """Whether numbers are codes."""
        return self.packing in ("int8", "int4")

    @property
    def pair(self) -> int:
        """Neighbours that panels keep together: bf16 has dot products of two."""
        return 2 if self.dtype == torch.bfloat16 else 1

    def check_dims(self, head_dim: int, v_head_dim: int) -> None:
        """UnsupportedError where this kernel has no such pages."""
        for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise UnsupportedError(f"{name} must be 1 to {MAX_HEAD_DIM}, got {dim}")
            if self.packing == "int4" and dim % GROUP_DIMS:
                raise UnsupportedError(
                    f"int4 pages have a scale for {GROUP_DIMS} dims: {name} must be a multiple of it, got {dim}; use "
                    "int8"
                )
        if self.num_channels is not None and self.num_channels > head_dim:
            raise InputError(
                f"cannot keep {self.num_channels} channels of keys that have {head_dim} "
                f"(far_dtype {self.packing}/{self.num_channels}): at most {head_dim}"
            )

    def stored_dim(self, head_dim: int) -> int:
        """Elements that one token of one head takes, in rows and panels."""
        return head_dim if self.packing == "rows" else round_up(head_dim, 16)

    def k_shape(self, head_dim: int) -> tuple[int, ...]:
        """Of a head's slice of K: `[page_size, stored_dim]` numbers, or where they are codes so many bytes."""
        return (self.slice_of_k(head_dim).num_bytes,) if self.is_quantised else self._rows_shape(head_dim)

    def v_shape(self, v_head_dim: int) -> tuple[int, ...]:
        """The same of V."""
        return (self.slice_of_v(v_head_dim).num_bytes,) if self.is_quantised else self._rows_shape(v_head_dim)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of an arena's tensors."""
        return torch.uint8 if self.is_quantised else self.dtype

    def token_bytes(self, head_dim: int, v_head_dim: int) -> tuple[float, float]:
        """Bytes of K and of V of a token of one head."""
        sizes = (math.prod(self.k_shape(head_dim)), math.prod(self.v_shape(v_head_dim)))
        k_bytes, v_bytes = (size * self.stored_dtype.itemsize / self.page_size for size in sizes)
        return k_bytes, v_bytes

    def page_bytes(self, num_kv_heads: int, head_dim: int, v_head_dim: int) -> int:
        """Bytes of K and V of one page."""
        numbers = math.prod(self.k_shape(head_dim)) + math.prod(self.v_shape(v_head_dim))
        return num_kv_heads * numbers * self.stored_dtype.itemsize

    def _rows_shape(self, dim: int) -> tuple[int, ...]:
        return self.page_size, self.stored_dim(dim)

    def slice_of_k(self, head_dim: int) -> SliceOfK:
        """Of quantised pages."""
        is_int4 = self.packing == "int4"
        num_channels = round_up(self.num_channels or head_dim, 16)
        num_exact = -(-head_dim // GROUP_DIMS) if is_int4 else 0
        scales = self.page_size * num_channels // (2 if is_int4 else 1)
        zeros = scales + 2 * num_channels
        exact = round_up(zeros + (2 * num_channels if is_int4 else 0), 64)
        kept = exact + round_up(num_exact * self.page_size * self.dtype.itemsize, 64)
        exact_index = kept + (0 if self.num_channels is None else round_up(num_channels, 64))
        num_bytes = exact_index + (64 if is_int4 else 0)
        return SliceOfK(num_channels, num_exact, scales, zeros, exact, kept, exact_index, num_bytes)

    def slice_of_v(self, v_head_dim: int) -> SliceOfV:
        """Of quantised pages."""
        is_int4 = self.packing == "int4"
        num_dims, num_groups = round_up(v_head_dim, 16), -(-v_head_dim // GROUP_DIMS) if is_int4 else 1
        scales = self.page_size * num_dims // (2 if is_int4 else 1)
        zeros = scales + 2 * num_groups * self.page_size
        num_bytes = round_up(zeros + (2 * num_groups * self.page_size if is_int4 else 0), 64)
        return SliceOfV(num_dims, num_groups, scales, zeros, num_bytes)


def round_up(num: int, step: int) -> int:
    """The next multiple of step."""
    return -(-num // step) * step
