"""The nouns of attention over pages: a partial result, a page layout, an arena and what a call reads of it."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.errors import InputError

BLOCK_TOKENS = 16
"""Tokens of one KV head that are scored, packed and masked together."""

MAX_HEAD_DIM = 256

Packing = Literal["rows", "panels"]


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


@dataclass(frozen=True)
class PageLayout:
    """How a head's slice of a page lies in memory; a property of a pool and of saved files, not of a processor.

    rows:   `[token][dim]`, as the model wrote it.
    panels: ready for dot products of `pair` neighbours (2 in bf16, 1 in float32 and float16): K as
            `[block of 16 tokens][dim / pair][16][pair]`, V as `[token / pair][dim][pair]`, dim padded to 16 with zeros.
    """

    dtype: torch.dtype
    page_size: int = 64
    packing: Packing = "rows"

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(
                f"pages hold float32, bfloat16 or float16, got {self.dtype}: load the model with dtype=torch.bfloat16"
            )
        if self.packing not in get_args(Packing):
            raise InputError(f"packing must be one of {get_args(Packing)}, got {self.packing!r}")
        if not isinstance(self.page_size, int) or self.page_size < BLOCK_TOKENS or self.page_size % BLOCK_TOKENS:
            raise InputError(f"page_size must be a multiple of {BLOCK_TOKENS}, got {self.page_size!r}")

    @property
    def pair(self) -> int:
        """Neighbours that panels keep together: bf16 has dot products of two."""
        return 2 if self.dtype == torch.bfloat16 else 1

    def stored_dim(self, head_dim: int) -> int:
        """Elements that one token of one head takes."""
        return head_dim if self.packing == "rows" else -(-head_dim // 16) * 16

    def page_bytes(self, num_kv_heads: int, head_dim: int) -> int:
        """Bytes of one page of K or of V whose rows have this many elements."""
        return num_kv_heads * self.page_size * self.stored_dim(head_dim) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Arena:
    """A pair of K and V arenas with equal slots: the same slot in both is one page of one layer.

    k, v: `[num_slots, num_kv_heads, page_size, stored_dim]`, contiguous, where stored_dim is that of head_dim for k
        and of v_head_dim for v; in panels the last two are one packed run.
    """

    k: Tensor
    v: Tensor
    layout: PageLayout
    head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        alike = self.k.shape[:-1] == self.v.shape[:-1]
        if not alike or not (self.k.is_contiguous() and self.v.is_contiguous()):
            raise InputError(f"k and v arenas must be contiguous and alike, got {self.k.shape} and {self.v.shape}")
        if self.k.device != self.v.device:
            raise InputError(f"k and v arenas must lie on one device, got {self.k.device} and {self.v.device}")
        if not self.k.dtype == self.v.dtype == self.layout.dtype:
            raise InputError(f"arena dtypes {self.k.dtype}, {self.v.dtype} do not fit the layout's {self.layout.dtype}")
        for x, dim in ((self.k, self.head_dim), (self.v, self.v_head_dim)):
            expected = (self.layout.page_size, self.layout.stored_dim(dim))
            if x.shape[2:] != expected:
                raise InputError(f"arena slices must be {expected} for {self.layout}, got {tuple(x.shape[2:])}")

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
        shape = (num_slots, num_kv_heads, layout.page_size)
        k, v = (
            torch.empty((*shape, layout.stored_dim(dim)), dtype=layout.dtype, device=device)
            for dim in (head_dim, v_head_dim)
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
    def num_slots(self) -> int:
        """Pages that fit."""
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Heads of every page."""
        return self.k.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of both arenas."""
        return self.k.nbytes + self.v.nbytes


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

    arena: Arena
    page_table: Tensor
    kv_start: Tensor
    kv_len: Tensor
    of_blocks: bool = False
    log_counts: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = self.page_table, self.kv_start, self.kv_len
        if not isinstance(self.arena, Arena) or not all(isinstance(tensor, Tensor) for tensor in tensors):
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
