"""The pages of one layer: which are far, which are near, and how tokens move between them.

The map of a sequence's tokens, the same for all sequences of the batch (they grow together):

    0            far_tokens                        seq_len
    |--- far ---|-------------- near --------------|
     pages [0, num_far_pages)   pages [num_far_pages, num_pages)   the last one open, the others sealed

One table holds the slot of every page, in the far pool left of the boundary and in the near pool right of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.cache.pool import PagePool
from tandemkv.errors import CacheError, InputError
from tandemkv.types import PagedKV

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


class Held(NamedTuple):
    """All tokens of a layer, held. far: a run for every pair of arenas that holds some; all older than near tokens."""

    far: tuple[PagedKV, ...]
    near: PagedKV


class LayerKV:
    """Keys and values of one layer for a batch of sequences of equal length."""

    def __init__(
        self, near: PagePool, far: PagePool, num_seqs: int, near_tokens: int, workers: "WorkerPool | None" = None
    ) -> None:
        """The pools are shared with the other layers; near_tokens is per sequence; workers move pages."""
        self._near, self._far, self._workers = near, far, workers
        self._near_tokens = near_tokens
        self._page_size = near.arena.layout.page_size
        self.num_seqs = num_seqs
        self.seq_len = 0
        self.num_pages = 0  # of each sequence, the open one included
        self._num_far_pages = 0
        self._num_holds = 0
        self._slots = torch.zeros((num_seqs, 16), dtype=torch.int32, device="cpu")
        self._no_padding = self._kv_start = torch.zeros(num_seqs, dtype=torch.int64, device="cpu")
        self._runs: Held | None = None  # views of the tables, kept while pages and padding stay

    @property
    def far_tokens(self) -> int:
        """Tokens of each sequence in the far tier."""
        return self._num_far_pages * self._page_size

    @property
    def num_near_tokens(self) -> int:
        """Tokens of each sequence in the near tier."""
        return self.seq_len - self.far_tokens

    # -- growing -------------------------------------------------------------------------------------------------------

    def pages_to_evict(self) -> int:
        """Pages of each sequence that `evict` would demote."""
        return max(0, -(-(self.num_near_tokens - self._near_tokens) // self._page_size))

    def evict(self) -> None:
        """Demote the oldest pages until at most near_tokens are near. CapacityError, nothing moved, if far is full."""
        num_pages = self.pages_to_evict()
        if num_pages:
            self._demote(num_pages)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens `[num_seqs, num_kv_heads, num_tokens, head_dim]` behind the last one; they become near."""
        self._near.arena.check_tokens(self.num_seqs, k, v)
        with self.extended(k.shape[2]):
            self.write(k, v)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Fill the newest tokens, inside `extended`."""
        near = self._held().near
        kernels.append(near.arena, near.page_table, self.num_near_tokens - k.shape[2], k, v, self._workers)

    @contextmanager
    def extended(self, num_tokens: int) -> Iterator[Held]:
        """Hold every token and as many new ones, which the block writes; none is added where the block fails."""
        self._refuse_while_held("append")
        before = self.seq_len
        num_new = -(-(before + num_tokens) // self._page_size) - self.num_pages
        if num_new > 0:
            self._put_slots(self.num_pages, self._near.allocate(num_new * self.num_seqs))
            self.num_pages += num_new
        self.seq_len = before + num_tokens
        self._num_holds += 1
        try:
            yield self._held()
            self._num_holds -= 1
        except BaseException:
            self._num_holds -= 1
            self.crop(before)
            raise

    def _demote(self, num_pages: int) -> None:
        self._refuse_while_held("demote")
        pages = slice(self._num_far_pages, self._num_far_pages + num_pages)
        assert pages.stop * self._page_size <= self.seq_len, "only sealed pages are demoted"
        from_slots = self._slots[:, pages].flatten().tolist()
        to_slots = self._far.allocate(len(from_slots))
        kernels.move_pages(self._near.arena, self._far.arena, from_slots, to_slots, self._workers)
        self._near.free(from_slots)
        self._num_far_pages = pages.stop
        self._put_slots(pages.start, to_slots)

    # -- shrinking -----------------------------------------------------------------------------------------------------

    def crop(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on. A far page that is cut is reopened near, from its stored values."""
        self._refuse_while_held("crop")
        if not 0 <= seq_len <= self.seq_len:
            raise InputError(f"cannot crop {self.seq_len} tokens to {seq_len}")
        num_pages = -(-seq_len // self._page_size)
        if num_pages <= self._num_far_pages and seq_len % self._page_size:
            self._reopen(num_pages - 1, seq_len % self._page_size)
        far_kept = min(num_pages, self._num_far_pages)
        self._far.free(self._slots[:, far_kept : self._num_far_pages].flatten().tolist())
        self._near.free(self._slots[:, max(num_pages, self._num_far_pages) : self.num_pages].flatten().tolist())
        self._num_far_pages, self.num_pages, self.seq_len, self._runs = far_kept, num_pages, seq_len, None

    def _reopen(self, page: int, num_tokens: int) -> None:
        """Turn the far page `page` into an open near page of `num_tokens`, and drop every page behind it."""
        begin = page * self._page_size
        k, v = self.read(begin, begin + num_tokens)
        slots = self._near.allocate(self.num_seqs)
        dropped = self._slots[:, page : self._num_far_pages].flatten().tolist()
        later = self._slots[:, self._num_far_pages : self.num_pages].flatten().tolist()
        self._far.free(dropped)
        self._near.free(later)
        self._num_far_pages = page
        self._put_slots(page, slots)
        self.num_pages, self.seq_len = page + 1, begin + num_tokens
        kernels.append(self._near.arena, self._table(self._near, page, page + 1), 0, k, v, self._workers)

    def release(self) -> None:
        """Give every page back."""
        self.crop(0)

    # -- reading -------------------------------------------------------------------------------------------------------

    def set_kv_start(self, kv_start: Tensor | None) -> None:
        """Tokens of padding in front of each sequence: int64 `[num_seqs]` on the CPU, or None for none."""
        kv_start = self._no_padding if kv_start is None else kv_start
        if kv_start is not self._kv_start and not torch.equal(kv_start, self._kv_start):
            self._kv_start, self._runs = kv_start, None

    @property
    def kv_start(self) -> Tensor:
        """Tokens of padding in front of each sequence."""
        return self._kv_start

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Every token, on pages that cannot move until the block ends; what it gave is not valid afterwards."""
        self._num_holds += 1
        try:
            yield self._held()
        finally:
            self._num_holds -= 1

    def read(self, begin: int, end: int, seqs: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """K and V of tokens `[begin, end)` of some sequences, `[seqs, num_kv_heads, tokens, head_dim]`, near device."""
        if not 0 <= begin < end <= self.seq_len:
            raise InputError(f"tokens [{begin}, {end}) of {self.seq_len}")
        near = self._near.arena
        shape = (self._slots[seqs].shape[0], near.num_kv_heads, end - begin, near.head_dim)
        k = torch.empty(shape, dtype=near.layout.dtype, device=near.k.device)
        v = torch.empty_like(k)
        middle = min(max(self.far_tokens, begin), end)
        for pool, first, last in ((self._far, begin, middle), (self._near, middle, end)):
            if first < last:
                run = slice(first - begin, last - begin)
                self._read_into(k[:, :, run], v[:, :, run], pool, first, seqs)
        return k, v

    def _read_into(self, k: Tensor, v: Tensor, pool: PagePool, begin: int, seqs: slice) -> None:
        arena, first = pool.arena, begin // self._page_size
        table = self._table(pool, first, -(-(begin + k.shape[2]) // self._page_size))[seqs]
        offset = begin - first * self._page_size
        if k.device == arena.k.device:
            kernels.gather(arena, table, offset, k, v, self._workers)
        else:
            host_k, host_v = torch.empty_like(k, device="cpu"), torch.empty_like(v, device="cpu")
            kernels.gather(arena, table, offset, host_k, host_v, self._workers)
            k.copy_(host_k)
            v.copy_(host_v)

    def _held(self) -> Held:
        if self._runs is None:
            with torch.inference_mode(False):  # as in KVCache._allocate: kv_len is written again
                far = (self._run(self._far, 0, self._num_far_pages),) if self._num_far_pages else ()
                self._runs = Held(far, self._run(self._near, self._num_far_pages, self.num_pages))
        self._runs.near.kv_len.fill_(self.num_near_tokens)
        return self._runs

    def _run(self, pool: PagePool, first: int, last: int) -> PagedKV:
        kv_start = (self._kv_start - first * self._page_size).clamp_(min=0)
        kv_len = torch.full_like(kv_start, (last - first) * self._page_size)
        return PagedKV(pool.arena, self._table(pool, first, last), kv_start, kv_len)

    def _table(self, pool: PagePool, first: int, last: int) -> Tensor:
        heads = pool.arena.num_kv_heads
        return self._slots[:, None, first:last].expand(self.num_seqs, heads, last - first)

    def _put_slots(self, first: int, slots: list[int]) -> None:
        num_pages = len(slots) // self.num_seqs
        if first + num_pages > self._slots.shape[1]:
            with torch.inference_mode(False):  # as in KVCache._allocate
                grown = torch.zeros((self.num_seqs, 2 * (first + num_pages)), dtype=torch.int32, device="cpu")
            grown[:, : self._slots.shape[1]] = self._slots
            self._slots = grown
        self._slots[:, first : first + num_pages] = torch.tensor(slots, dtype=torch.int32, device="cpu").view(
            self.num_seqs, num_pages
        )
        self._runs = None

    def _refuse_while_held(self, verb: str) -> None:
        if self._num_holds:
            raise CacheError(f"cannot {verb}: the layer's pages are held by an attention that is still running")

    # -- counting ------------------------------------------------------------------------------------------------------

    def used_slots(self) -> tuple[list[int], list[int]]:
        """Slots of every near and of every far page, for `check`."""
        near = self._slots[:, self._num_far_pages : self.num_pages].flatten().tolist()
        return near, self._slots[:, : self._num_far_pages].flatten().tolist()
