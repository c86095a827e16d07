"""The nouns of attention over pages: a partial result, an arena and what a call reads of it."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.errors import InputError
from tandemkv.layouts import BLOCK_TOKENS, GROUP_DIMS, MAX_HEAD_DIM, Packing, PageLayout

__all__ = [
    "BLOCK_TOKENS",
    "GROUP_DIMS",
    "MAX_HEAD_DIM",
    "AnyArena",
    "Arena",
    "Arenas",
    "Packing",
    "PageLayout",
    "PagedKV",
    "Partial",
    "ScoreRule",
    "format_bytes",
    "is_number",
    "parse_bytes",
]


class Partial(NamedTuple):
    """Attention of some queries over a subset of a sequence's tokens.

    out: float32 `[num_seqs, num_q_heads, q_len, v_head_dim]`, normalised over the subset.
    lse: float32 `[num_seqs, num_q_heads, q_len]`, the **natural** log of the sum of `exp(scale * q.k)`.
    The empty subset is `out = 0, lse = -inf`: the identity of `merge`.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class ScoreRule:
    """How a score follows from q and k, and whom a query sees; the same for every head and token of a call.

    scale: the score is scale * q.k.
    softcap: it becomes softcap * tanh(score / softcap) (Gemma 2, 2408.00118).
    window: a query sees the newest `window` tokens, itself included (Mistral, 2310.06825); None for all.
    Raises InputError for values that cannot be.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        normal = torch.finfo(torch.float32)
        if not is_number(self.scale) or not abs(self.scale) <= normal.max:
            raise InputError(f"scale must be finite, got {self.scale!r}")
        softcap, window = self.softcap, self.window
        if softcap is not None and not (is_number(softcap) and normal.tiny <= softcap <= normal.max):
            raise InputError(f"softcap must be positive and finite, or None, got {softcap!r}")
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise InputError(f"window must be a whole number of tokens, at least 1, or None, got {window!r}")


@dataclass(frozen=True, eq=False)
class Arena:
    """A pair of K and V arenas with equal slots: the same slot in both is one page of one layer.

    k, v: `[num_slots, num_kv_heads, *slice]`, contiguous, where the slice is `layout.k_shape(head_dim)` for k and
        `layout.v_shape(v_head_dim)` for v; in panels the last two are one packed run.
    """

    k: Tensor
    v: Tensor
    layout: PageLayout
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        alike = self.k.shape[:2] == self.v.shape[:2]
        if not alike or not (self.k.is_contiguous() and self.v.is_contiguous()):
            raise InputError(f"k and v arenas must be contiguous and alike, got {self.k.shape} and {self.v.shape}")
        if self.k.device != self.v.device:
            raise InputError(f"k and v arenas must lie on one device, got {self.k.device} and {self.v.device}")
        dtype, k_shape, v_shape = (
            self.layout.stored_dtype,
            *self._slice_shapes(self.layout, self.head_dim, self.v_head_dim),
        )
        if not self.k.dtype == self.v.dtype == dtype:
            raise InputError(f"arena dtypes {self.k.dtype}, {self.v.dtype} do not fit the layout's {dtype}")
        for x, expected in ((self.k, k_shape), (self.v, v_shape)):
            if x.shape[2:] != expected:
                raise InputError(f"arena slices must be {expected} for {self.layout}, got {tuple(x.shape[2:])}")

    @staticmethod
    def _slice_shapes(layout: PageLayout, head_dim: int, v_head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return layout.k_shape(head_dim), layout.v_shape(v_head_dim)

    @staticmethod
    def allocate(
        layout: PageLayout,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        *,
        v_head_dim: int | None = None,
    ) -> "Arena":
        """Uninitialised arenas; v_head_dim is head_dim where it is None.

        Host memory is taken by the first write of a page, as huge pages where the machine allows them.
        """
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        k, v = (
            torch.empty((num_slots, num_kv_heads, *shape), dtype=layout.stored_dtype, device=device)
            for shape in Arena._slice_shapes(layout, head_dim, v_head_dim)
        )
        for x in (k, v):
            if x.device.type == "cpu":
                machine.advise_huge_pages(x.data_ptr(), x.nbytes)
        return Arena(k, v, layout, head_dim, v_head_dim)

    def check_tokens(self, num_seqs: int, k: Tensor, v: Tensor) -> None:
        """InputError unless k is `[num_seqs, num_kv_heads, num_tokens, head_dim]`, v accordingly with v_head_dim."""
        if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
            raise InputError(f"k and v must be tensors, got {type(k).__name__} and {type(v).__name__}")
        num_tokens = k.shape[2] if k.dim() == 4 else "num_tokens"
        for name, x, dim in (("k", k, self.head_dim), ("v", v, self.v_head_dim)):
            expected = (num_seqs, self.num_kv_heads, num_tokens, dim)
            if x.shape != expected or x.dtype != self.layout.dtype or x.device != self.k.device:
                raise InputError(
                    f"{name} must be {self.layout.dtype} [{', '.join(map(str, expected))}] on {self.k.device}, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )

    @property
    def parts(self) -> "tuple[Arena, ...]":
        """Itself, as `Arenas` has them."""
        return (self,)

    @property
    def num_slots(self) -> int:
        """Pages that fit."""
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of every page."""
        return self.k.shape[1]

    def of_heads(self) -> "Arena":
        """The same memory as pages of one head each: head h of a slot is slot * num_kv_heads + h."""
        k, v = (x.flatten(0, 1).unsqueeze(1) for x in (self.k, self.v))
        return Arena(k, v, self.layout, self.head_dim, self.v_head_dim)

    @property
    def num_bytes(self) -> int:
        """Bytes of both arenas."""
        return self.k.nbytes + self.v.nbytes


@dataclass(frozen=True, eq=False)
class Arenas:
    """Arenas in host memory whose pages differ in their packing alone, as one: their slots are counted on.

    Raises InputError where they differ in more, or are more than 4.
    """

    parts: tuple[Arena, ...]

    def __post_init__(self) -> None:
        shapes = {
            (a.layout.dtype, a.layout.page_size, a.num_kv_heads, a.head_dim, a.v_head_dim, a.k.device)
            for a in self.parts
        }
        if len(shapes) != 1 or len(self.parts) > 4:
            raise InputError(f"1 to 4 arenas that differ in packing alone count their slots on, got {shapes}")

    def check_tokens(self, num_seqs: int, k: Tensor, v: Tensor) -> None:
        """See `Arena`."""
        self.parts[0].check_tokens(num_seqs, k, v)

    def of_heads(self) -> "Arenas":
        """See `Arena`."""
        return Arenas(tuple(part.of_heads() for part in self.parts))

    @property
    def layout(self) -> PageLayout:
        """Of the first; page_size and dtype are those of all."""
        return self.parts[0].layout

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def k(self) -> Tensor:
        """Of the first; the device is that of all."""
        return self.parts[0].k

    @property
    def num_slots(self) -> int:
        """Pages that fit, in all together."""
        return sum(part.num_slots for part in self.parts)

    @property
    def num_kv_heads(self) -> int:
        """Heads of every page."""
        return self.parts[0].num_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of K."""
        return self.parts[0].head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of V."""
        return self.parts[0].v_head_dim


AnyArena = Arena | Arenas

_MAX_PARTS = 256
"""Of a run, that are kept: a plan has some tens, and near tokens have none."""


@dataclass(frozen=True, eq=False)
class PagedKV:
    """What one `attend` reads: for every sequence and KV head, a run of tokens behind a page table.

    page_table: int32 `[num_seqs, num_kv_heads, num_pages]` on the CPU, slots of `arena`; heads or sequences may share
        a row (stride 0). Token t of the run lies in page t // page_size. Entries outside `[kv_start, kv_len)` are
        not read.
    kv_start, kv_len: int64 `[num_seqs]` on the CPU: the tokens of the run that exist (padding before, nothing behind).
    of_blocks: entries are not pages but blocks of 16 tokens, `slot * num_kv_heads * blocks of a page + block in the
        page`, and every head has a run of its own: kv_start and kv_len are `[num_seqs, num_kv_heads]`.
    log_counts: float32 `[num_seqs, num_kv_heads, tokens of the table]` on the CPU, contiguous: each token stands for
        several, which are so many; -inf for none, then the token may be NaN in K. It is added to the token's score.
    """

    arena: AnyArena
    page_table: Tensor
    kv_start: Tensor
    kv_len: Tensor
    of_blocks: bool = False
    log_counts: Tensor | None = None
    _parts: dict[tuple[int, ...], "PagedKV"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        tensors = self.page_table, self.kv_start, self.kv_len
        if not isinstance(self.arena, Arena | Arenas) or not all(isinstance(tensor, Tensor) for tensor in tensors):
            got = ", ".join(type(value).__name__ for value in (self.arena, *tensors))
            raise InputError(f"PagedKV takes an Arena and the tensors page_table, kv_start and kv_len, got {got}")
        if not isinstance(self.log_counts, Tensor | None):
            raise InputError(f"log_counts must be a tensor or None, got {type(self.log_counts).__name__}")

    @property
    def entry_tokens(self) -> int:
        """Tokens that an entry of the table stands for."""
        return BLOCK_TOKENS if self.of_blocks else self.arena.layout.page_size

    @property
    def num_blocks(self) -> int:
        """Blocks that the table has room for."""
        return self.page_table.shape[2] * self.entry_tokens // BLOCK_TOKENS

    @property
    def stands_in(self) -> bool:
        """Whether its tokens stand for others."""
        return self.log_counts is not None

    @property
    def num_bytes(self) -> int:
        """K and V of the tokens that exist; of whole pages every page of the table."""
        return self._bytes([part.num_bytes // max(1, part.num_slots) for part in self.arena.parts])

    @property
    def v_bytes(self) -> int:
        """The same of V alone."""
        return self._bytes([part.v.nbytes // max(1, part.num_slots) for part in self.arena.parts])

    def _bytes(self, of_pages: list[int]) -> int:
        """of_pages: bytes of a page, in each part of the arena."""
        num_seqs, _, num_entries = self.page_table.shape
        if not self.of_blocks and len(of_pages) == 1:
            return num_seqs * num_entries * of_pages[0]
        head_blocks = self.arena.num_kv_heads * self.arena.layout.page_size // BLOCK_TOKENS
        slots = self.page_table // head_blocks if self.of_blocks else self.page_table[:, :1]
        ends = torch.tensor([part.num_slots for part in self.arena.parts], device="cpu").cumsum(0)
        places = torch.bucketize(slots, ends, right=True).clamp_(max=len(of_pages) - 1)
        of_entries = torch.tensor(of_pages, device="cpu")[places]
        if not self.of_blocks:
            return int(of_entries.sum())
        begins = torch.arange(num_entries, device="cpu") * BLOCK_TOKENS
        exists = (begins < self.kv_len[..., None]) & (begins + BLOCK_TOKENS > self.kv_start[..., None])
        return int((of_entries * exists).sum()) // head_blocks

    def part(self, begin: int, end: int) -> "PagedKV":
        """The tokens behind entries [begin, end) of the table.

        Of pages the same object when asked again: kernels prepare a run once, and a step asks for what the one before
        asked for.
        """
        tensors = self.page_table, self.kv_start, self.kv_len
        if self.of_blocks or any(x.is_inference() for x in tensors):  # written anew without a trace
            return self._part(begin, end)
        key = begin, end, *(x._version for x in tensors)
        found = self._parts.get(key)
        if found is None:
            if len(self._parts) >= _MAX_PARTS:
                self._parts.clear()
            found = self._parts[key] = self._part(begin, end)
        return found

    def _part(self, begin: int, end: int) -> "PagedKV":
        first, most = begin * self.entry_tokens, (end - begin) * self.entry_tokens
        counts = self.log_counts
        return PagedKV(
            self.arena,
            self.page_table[:, :, begin:end],
            (self.kv_start - first).clamp_(0, most),
            (self.kv_len - first).clamp_(0, most),
            self.of_blocks,
            None if counts is None else counts[:, :, first : first + most].contiguous(),
        )

    def cut(self, num_tokens: int) -> "list[PagedKV]":
        """Pieces of so many tokens, the first one maybe shorter: who waits for it can begin early. At least an entry of
        the table each."""
        step, num = max(1, num_tokens // self.entry_tokens), self.page_table.shape[2]
        return [self.part(max(0, end - step), end) for end in range(num % step or step, num + 1, step)] if num else []


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_bytes(size: int | str) -> int:
    """Bytes of 16 GiB given as `17179869184`, `"16GiB"`, `"16 GB"` (1e9) or `"16G"` (binary, like Linux tools)."""
    if isinstance(size, bool):
        raise InputError(f"expected a size such as '16GiB' or 17179869184, got {size!r}")
    if isinstance(size, int) and size < 0:
        raise InputError(f"a size in bytes cannot be negative, got {size}")
    if isinstance(size, int):
        return _below_8_eib(size)
    text = size if isinstance(size, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?B?)|B?)\s*", text, re.IGNORECASE)
    if match is None:
        raise InputError(f"expected a size such as '16GiB' or 17179869184, got {size!r}")
    number, prefix, unit = match.groups()
    if prefix is None:
        return _below_8_eib(float(number))
    base = 1000 if unit.upper() == "B" else 1024
    return _below_8_eib(float(number) * base ** (1 + "KMGT".index(prefix.upper())))


def _below_8_eib(num_bytes: float) -> int:
    if num_bytes >= 1 << 63:
        raise InputError("expected a size below 8 EiB, such as '16GiB' or 17179869184, got more")
    return int(num_bytes)


def format_bytes(num_bytes: float) -> str:
    """`1610612736` as `'1.50 GiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"
