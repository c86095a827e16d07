"""The pages of one layer: which are far, which are near, and how tokens move between them.

The map of a sequence's tokens, the same for all sequences of the batch (they grow together):

    0            first_near_token                  seq_len
    |--- far ---|-------------- near --------------|
     pages [0, num_older)       pages [num_older, num_pages)   the last one open, the others sealed

One table holds the slot of every page, in the far pool left of the boundary and in the near pool right of it. A layer
with a sliding window has no far pages: what lies left of its boundary is gone. Which part of the far pool, and so which
format, a far page is in follows from its age (`CacheSpec.far_spans`); its slot tells.

The map is a value that is replaced, never changed: a new one takes its references first, then one assignment installs
it, then the old one's are dropped. Wherever an interrupt strikes, the map is whole, and at worst the pools' books list
references that no map has, until they are recounted (`KVCache`). So a fork of a layer is the same map once more.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.cache.inputs import KeptInputs
from tandemkv.cache.knowledge import Knowledge
from tandemkv.cache.pool import PagePool
from tandemkv.cache.spec import CacheSpec
from tandemkv.cache.store import Copied, PageStore
from tandemkv.errors import CacheError, InputError, PrecisionWarning
from tandemkv.kernels.blocks import ChosenBlocks, FarPages
from tandemkv.lanes import Ahead, Crew, DeviceFlags, bring_up
from tandemkv.select import Sparse, Summaries, Tally
from tandemkv.types import BLOCK_TOKENS, PagedKV


class Held(NamedTuple):
    """All tokens of a layer, held. far: a run for every pair of arenas that holds some; all older than near tokens."""

    far: tuple[PagedKV, ...]
    near: PagedKV


class PageMap(NamedTuple):
    """Where a layer's tokens lie. slots: int32 `[num_seqs, num_pages]`; near ones from column `num_older` on.

    owns_open_page: nobody else has the last page, so that it can be written to; where False, it may be so.
    """

    slots: Tensor
    num_older: int
    seq_len: int
    owns_open_page: bool = True

    @property
    def near_slots(self) -> Tensor:
        """`[num_seqs, num_near_pages]`"""
        return self.slots[:, self.num_older :]


class _View(NamedTuple):
    """What kernels read of a map, and what it was made of; kept while pages, padding and the near arena stay."""

    pages: PageMap
    kv_start: Tensor
    held: Held


class Standing(NamedTuple):
    """What a choice was made from. Tensors are replaced, never changed: equal are the same."""

    slots: Tensor
    num_older: int
    kv_start: Tensor
    epoch: int
    num_wanted: int
    foreseen: Tensor | None

    def is_like(self, other: "Standing | None") -> bool:
        """Whether the choice would be the same, where it depends on no query but the foreseen one."""
        return other is not None and all(
            mine is its or _equal(mine, its) for mine, its in zip(self, other, strict=True)
        )


class LayerKV:
    """Keys and values of one layer for a batch of sequences of equal length."""

    def __init__(self, store: PageStore, num_seqs: int, spec: CacheSpec, index: int) -> None:
        """The store is shared with the other layers; `spec` says how many tokens layer `index` keeps near."""
        self._store, self._spec, self.index = store, spec, index
        self.chunk_tokens = spec.chunk_tokens
        self.window = spec.window(index)
        self._near_tokens = spec.kept_tokens(index)
        self._page_size = store.near.arena.layout.page_size
        self._is_held = False
        self._map = PageMap(torch.zeros((num_seqs, 0), dtype=torch.int32, device="cpu"), 0, 0)
        self._no_padding = self._kv_start = torch.zeros(num_seqs, dtype=torch.int64, device="cpu")
        self._sparse: Sparse | None = None
        self.crew: Crew | None = None  # who splits its steps; None: whoever asks attends to all of it
        self.l2_share = 0.0  # of a device's L2, that near pages may take before their turn
        self.flags = DeviceFlags()  # of a step on a device; layers of a cache have one
        self.knowledge = Knowledge.none(num_seqs, spec.num_kv_heads)  # of the blocks, where somebody observes
        self.chosen: tuple[Standing | None, ChosenBlocks] | None = None  # the last choice, and what it was made from
        self.inputs: KeptInputs | None = None  # of the whole cache, where layers like this one keep theirs
        self.foreseen: Tensor | None = None  # the next query, predicted a layer ahead
        self.ahead: Ahead | None = None  # what the host does with it already
        # float32 [num_seqs, num_kv_heads, head_dim]: how much each channel of K mattered to the newest queries
        self.channel_weights: Tensor | None = None

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch."""
        return self._map.slots.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens of each sequence, those that a window has left behind included."""
        return self._map.seq_len

    @property
    def first_near_token(self) -> int:
        """Tokens in front of the near ones: far, or behind the window."""
        return self._map.num_older * self._page_size

    @property
    def first_token(self) -> int:
        """The oldest token that is still there."""
        return 0 if self.window is None else self.first_near_token

    @property
    def num_far_pages(self) -> int:
        """Pages of each sequence in the far tier."""
        return self._map.num_older if self.window is None else 0

    @property
    def far_tokens(self) -> int:
        """Tokens of each sequence in the far tier."""
        return self.num_far_pages * self._page_size

    @property
    def weighs_channels(self) -> bool:
        """Whether far pages leave channels of K out, so that `channel_weights` are of use."""
        return self.window is None and self._spec.weighs_channels

    @property
    def num_near_tokens(self) -> int:
        """Tokens of each sequence in the near tier."""
        return self.seq_len - self.first_near_token

    # -- growing -------------------------------------------------------------------------------------------------------

    def pages_to_evict(self) -> int:
        """Pages of each sequence that `evict` would take out of the near tier."""
        excess = self.num_near_tokens - self._near_tokens
        return max(0, -(-excess // self._page_size) if self.window is None else excess // self._page_size)

    def evict(self) -> None:
        """Demote the oldest pages, or let a window leave them behind, until at most near_tokens (and, with a window,
        less than a page more) are near. CapacityError, none of them moved, if far is full; older pages may have
        become narrower."""
        num_pages = self.pages_to_evict()
        if not num_pages:
            return
        self._refuse_while_held("demote")
        if self.window is None:
            self._narrow(self.num_far_pages + num_pages)
        slots, num_older, seq_len, owns = self._map
        leaving = self._map.near_slots[:, :num_pages]
        assert (num_older + num_pages) * self._page_size <= seq_len, "only sealed pages leave"
        if self.window is None:
            parts = self._spec.far_parts(num_older, num_older + num_pages, num_older + num_pages)
            pages = list(range(num_older, num_older + num_pages))
            far = self._told(self._store.demote(leaving, parts, self.channel_weights), leaving, pages)
            self._code_pages(self._sparse, far, pages)
            slots = torch.cat([slots[:, :num_older], far, slots[:, num_older + num_pages :]], 1)
        self._map = PageMap(slots, num_older + num_pages, seq_len, owns)
        self._store.drop_near(leaving)

    def _narrow(self, num_pages: int) -> None:
        """Where there will be so many far pages, those that are too old for their format take the next one."""
        if len(self._spec.far_formats) < 2:
            return
        spans = zip(self._spec.far_spans(self.num_far_pages), self._spec.far_spans(num_pages), strict=True)
        for before, span in spans:
            ageing = slice(before.end, min(span.end, self.num_far_pages))
            slots = self._map.slots[:, ageing]
            is_wider = self._spec.is_wider(self._store.far.part_of(slots), span.part).any(0)
            if not bool(is_wider.any()):
                continue
            pages = (ageing.start + is_wider.nonzero().flatten()).tolist()
            old, changed = self._map.slots[:, pages], self._map.slots.clone()
            copied = self._store.narrow(old, [span.part] * len(pages), self.channel_weights)
            changed[:, pages] = self._told(copied, old, pages)
            self._code_pages(self._sparse, changed[:, pages], pages)
            self._map = self._map._replace(slots=changed)
            self._store.drop_far(old)

    def _told(self, copied: Copied, slots: Tensor, pages: list[int]) -> Tensor:
        """Its slots, copied from these, which hold `pages`; the user hears of those that cannot be quantised."""
        for slot, token in copied.refused.items():
            seq, column = (slots == slot).nonzero()[0].tolist()
            begin = pages[column] * self._page_size
            warnings.warn(
                f"layer {self.index}, token {begin + token} of sequence {seq}: K or V is not finite, or too large for "
                f"a scale; its page of {self._page_size} tokens stays in {self._spec.dtype}",
                PrecisionWarning,
                stacklevel=2,
            )
        return copied.slots

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens `[num_seqs, num_kv_heads, num_tokens, head_dim]` behind the last one; they become near."""
        self._store.near.arena.check_tokens(self.num_seqs, k, v)
        with self.extended(k.shape[2]):
            self.write(k, v)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Fill the newest tokens, inside `extended`."""
        near = self._held().near
        kernels.append(near.arena, near.page_table, self.num_near_tokens - k.shape[2], k, v, self._store.workers)

    @contextmanager
    def extended(self, num_tokens: int) -> Iterator[Held]:
        """Hold every token and as many new ones, which the block writes; none is added where the block fails."""
        self._refuse_while_held("append")
        before = self.seq_len
        if before % self._page_size and not self._map.owns_open_page:
            self._copy_open_page()
        num_new = -(-(before + num_tokens) // self._page_size) - self._map.slots.shape[1]
        if num_new > 0:
            new = self._store.take_near(self.num_seqs, num_new)
            self._map = self._map._replace(slots=torch.cat([self._map.slots, new], 1), owns_open_page=True)
        self._map = self._map._replace(seq_len=before + num_tokens)
        self._is_held = True
        try:
            yield self._held()
            self._is_held = False
        except GeneratorExit:  # cut off before the block began, and closed whenever the traceback goes: `settle` undoes
            raise
        except BaseException:
            self.let_go()
            self.crop(before)
            raise

    def _copy_open_page(self) -> None:
        """Copy on write: what is appended goes into pages that only one sequence has."""
        shared = self._map.slots[:, -1]
        owned = self._store.own(shared)
        slots = torch.cat([self._map.slots[:, :-1], owned[:, None]], 1)
        self._map = self._map._replace(slots=slots, owns_open_page=True)
        self._store.drop_near(shared[shared != owned])

    # -- shrinking, sharing --------------------------------------------------------------------------------------------

    def can_crop(self, seq_len: int) -> bool:
        """Whether the tokens that the next query would see are still there."""
        return self.window is None or seq_len == 0 or self.first_token <= max(0, seq_len - self.window + 1)

    def crop(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on. A far page that is cut is reopened near, from its stored values."""
        self._refuse_while_held("crop")
        if not 0 <= seq_len <= self.seq_len:
            raise InputError(f"cannot crop {self.seq_len} tokens to {seq_len}")
        if not self.can_crop(seq_len):
            raise CacheError(
                f"cannot crop {self.seq_len} tokens to {seq_len}: a layer with a sliding window of {self.window} "
                f"tokens has left those before {self.first_token} behind; prefill again"
            )
        old, num_pages = self._map, -(-seq_len // self._page_size)
        slots, num_older = old.slots[:, :num_pages], min(old.num_older, num_pages)
        owns = old.owns_open_page and seq_len == old.seq_len  # a page that was sealed may be shared
        if num_pages <= old.num_older and seq_len % self._page_size:
            num_older -= 1
            slots = torch.cat([slots[:, :-1], self._reopened(num_older, seq_len % self._page_size)], 1)
            owns = True
        kept_near = max(num_pages, old.num_older)
        self._map = PageMap(slots, num_older, seq_len, owns)
        if self.inputs is not None:  # cut off in front of this, it is done by `KVCache.settle`
            self.inputs.crop(self.index, seq_len)
        self.knowledge, self.chosen = self.knowledge.cut(self.num_far_blocks, self.num_near_blocks), None
        if self.window is None:
            self._store.drop_far(old.slots[:, num_older : old.num_older])
            if not num_older:
                self._store.forget_basis(self.index)
        self._store.drop_near(old.slots[:, kept_near:])

    def _reopened(self, page: int, num_tokens: int) -> Tensor:
        """Near slots `[num_seqs, 1]` with the first tokens of a far page."""
        k, v = self.read(page * self._page_size, page * self._page_size + num_tokens)
        slots, near = self._store.take_near(self.num_seqs, 1), self._store.near.arena
        kernels.append(near, self._table(near.num_kv_heads, slots), 0, k, v, self._store.workers)
        return slots

    def fork(self, seqs: Tensor | None = None) -> "LayerKV":
        """The same tokens once more, on the same pages; whoever appends first copies the open one.

        seqs: int64 `[num_seqs]`, these sequences instead of all, in that order; one may come several times.
        """
        self._refuse_while_held("fork")
        kv_start, pages = self._kv_start, self._map._replace(owns_open_page=False)
        if seqs is not None:
            kv_start, pages = kv_start[seqs], pages._replace(slots=pages.slots[seqs])
        twin = LayerKV(self._store, pages.slots.shape[0], self._spec, self.index)
        self._share(pages)
        self._map = self._map._replace(owns_open_page=False)
        twin._map, twin._kv_start, twin._sparse, twin.crew = pages, kv_start, self._sparse, self.crew
        twin.flags, twin.l2_share = self.flags, self.l2_share
        weights = self.channel_weights
        twin.channel_weights = weights if weights is None or seqs is None else weights[seqs]
        # A fork is another request, with a report of its own; beams and batches are the same one.
        twin.knowledge = self.knowledge._replace(tally=Tally()) if seqs is None else self.knowledge.of(seqs)
        return twin

    def replace_with(self, other: "LayerKV") -> None:
        """Take over the tokens of a fork, which must not be used any more."""
        old, self._map = self._map, other._map
        self.knowledge = other.knowledge
        self._drop(old)

    def release(self) -> None:
        """Give every page back. What codes are made with stays: others may hold pages that were coded with it."""
        self._refuse_while_held("release")
        old, self._map = self._map, PageMap(self._map.slots[:, :0], 0, 0)
        self._drop(old)

    def _share(self, pages: PageMap) -> None:
        self._store.near.share(pages.near_slots)
        if self.window is None:
            self._store.far.share(pages.slots[:, : pages.num_older])

    def _drop(self, pages: PageMap) -> None:
        self._store.drop_near(pages.near_slots)
        if self.window is None:
            self._store.drop_far(pages.slots[:, : pages.num_older])

    # -- reading -------------------------------------------------------------------------------------------------------

    def set_kv_start(self, kv_start: Tensor | None) -> None:
        """Tokens of padding in front of each sequence: int64 `[num_seqs]` on the CPU, or None for none."""
        kv_start = self._no_padding if kv_start is None else kv_start
        if kv_start is not self._kv_start and not torch.equal(kv_start, self._kv_start):
            self._kv_start = kv_start

    @property
    def kv_start(self) -> Tensor:
        """Tokens of padding in front of each sequence."""
        return self._kv_start

    @contextmanager
    def hold(self) -> Iterator[Held]:
        """Every token, on pages that cannot move until the block ends; what it gave is not valid afterwards."""
        self._is_held = True
        try:
            yield self._held()
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Nobody attends any more."""
        self._is_held = False

    def read(
        self, begin: int, end: int, seqs: slice = slice(None), heads: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """K and V of tokens `[begin, end)` of some sequences and KV heads, `[seqs, heads, tokens, head_dim]`, near
        device."""
        if not self.first_token <= begin < end <= self.seq_len:
            raise InputError(f"tokens [{begin}, {end}) of [{self.first_token}, {self.seq_len})")
        near = self._store.near.arena
        num_heads = len(range(*heads.indices(near.num_kv_heads)))
        shape = (self._map.slots[seqs].shape[0], num_heads, end - begin)
        k = torch.empty((*shape, near.head_dim), dtype=near.layout.dtype, device=near.k.device)
        v = torch.empty((*shape, near.v_head_dim), dtype=near.layout.dtype, device=near.k.device)
        middle = min(max(self.first_near_token, begin), end)
        for pool, first, last in ((self._store.far, begin, middle), (self._store.near, middle, end)):
            if first < last:
                run = slice(first - begin, last - begin)
                self._read_into((k[:, :, run], v[:, :, run]), pool, first, seqs, heads)
        return k, v

    def far_bytes(self, begin: int, end: int, seqs: slice = slice(None)) -> int:
        """Of the pages that far tokens `[begin, end)` of some sequences lie in, all KV heads."""
        pages = slice(begin // self._page_size, -(-end // self._page_size))
        run = self._run(self._store.far, pages.start, pages.stop)
        return PagedKV(run.arena, run.page_table[seqs], run.kv_start[seqs], run.kv_len[seqs]).num_bytes

    @property
    def num_inputs(self) -> int:
        """Tokens [0, num_inputs) are held, and what entered the layer with them is kept."""
        return 0 if self.inputs is None else min(self.inputs.num_tokens(self.index), self.seq_len)

    def rebuild(self, begin: int, end: int, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """K and V of tokens `[begin, end)`, as `read` gives them, made again from what entered the layer with them.

        x: `[num_seqs, tokens, hidden_size]`, a copy of `inputs.x(index, begin, end)` that has come to the near device;
        None: from where they lie. InputError for tokens whose inputs are not kept.
        """
        if self.inputs is None or not 0 <= begin < end <= self.num_inputs:
            raise InputError(f"inputs of tokens [{begin}, {end}) of [0, {self.num_inputs})")
        return self.inputs.kv(self.index, begin, end, x)

    def _read_into(self, kv: tuple[Tensor, Tensor], pool: PagePool, begin: int, seqs: slice, heads: slice) -> None:
        (k, v), arena, first = kv, pool.arena, begin // self._page_size
        last = -(-(begin + k.shape[2]) // self._page_size)
        slots = self._map.slots[seqs, first:last]
        table = self._table(arena.num_kv_heads, slots)
        offset = begin - first * self._page_size
        if heads != slice(None):  # every sequence's every head becomes a sequence of one head
            its = torch.arange(arena.num_kv_heads, dtype=torch.int32, device="cpu")[heads]
            table = (slots[:, None] * arena.num_kv_heads + its[:, None]).flatten(0, 1).unsqueeze(1)
            arena, k, v = arena.of_heads(), _each_head(k), _each_head(v)
        if k.device == arena.k.device:
            kernels.gather(arena, table, offset, k, v, self._store.workers)
        else:
            bring_up(arena, table, offset, k, v, self._store.workers)

    def forget_foreseen(self) -> None:
        """What was foreseen is of no use any more."""
        if self.ahead is not None:
            self.ahead.ticket.cancel()
        self.foreseen = self.ahead = None

    # -- choosing ------------------------------------------------------------------------------------------------------

    @property
    def sparse(self) -> Sparse | None:
        """What picks the far tokens that take part in a step; None: all do."""
        return self._sparse

    @sparse.setter
    def sparse(self, sparse: Sparse | None) -> None:
        """What was learnt for another selector is forgotten; codes of the pages that are far already are made first."""
        self.make_codes(sparse)
        old, self._sparse = self._sparse, sparse
        if sparse is None or old is None or old.policy != sparse.policy:
            self.knowledge = Knowledge.none(self.num_seqs, self._spec.num_kv_heads)
        elif old != sparse and self.knowledge.tally != Tally():
            self.knowledge = self.knowledge._replace(tally=Tally())
        self.chosen = None

    def make_codes(self, sparse: Sparse | None) -> None:
        """Codes of the far pages, where the selector of this mode scores codes."""
        self._code_pages(sparse, self._map.slots[:, : self.num_far_pages], list(range(self.num_far_pages)))

    @property
    def far(self) -> FarPages:
        """The far pages."""
        return FarPages(self._store.far.arena, self._map.slots[:, : self.num_far_pages], self._kv_start)

    def standing(self, num_wanted: int) -> Standing:
        """What a choice of so many blocks would be made from now."""
        pages = self._map
        epoch = self.knowledge.epoch
        return Standing(pages.slots, pages.num_older, self._kv_start, epoch, num_wanted, self.foreseen)

    @property
    def num_far_blocks(self) -> int:
        """Blocks of 16 tokens in the far tier."""
        return self.far_tokens // BLOCK_TOKENS

    @property
    def num_near_blocks(self) -> int:
        """Blocks of 16 tokens that are near, the last one maybe open."""
        return -(-self.num_near_tokens // BLOCK_TOKENS)

    def known(self) -> Knowledge:
        """What was learnt, of as many blocks as there are."""
        return self.knowledge.fitted(self.num_far_blocks, self.num_near_blocks)

    def summaries(self) -> Summaries:
        """What the layer's selector is told of the far blocks."""
        assert self._sparse is not None
        sparse, told = self._sparse, Summaries(self.far, foreseen=self.foreseen, pool=self._store.workers)
        if sparse.observer is not None:
            told = told._replace(observed=self.known().far)
        if sparse.summariser is not None:
            book = self._store.codes_of(sparse.summariser)
            told = told._replace(codes=book.codes, basis=book.basis(self.index))
        if sparse.digester is not None:
            digest = sparse.digester.digest(self.knowledge.digest, told.far, self._read_blocks)
            self.knowledge = self.knowledge._replace(digest=digest)
            told = told._replace(digest=digest)
        return told

    def _code_pages(self, sparse: Sparse | None, slots: Tensor, pages: list[int]) -> None:
        """The same of far slots `[num_seqs, num_pages]` alone, which hold these pages."""
        summariser = None if sparse is None else sparse.summariser
        if slots.numel() and summariser is not None:
            begins = torch.tensor(pages, device="cpu") * self._page_size
            is_real = begins >= self._kv_start[:, None]
            self._store.codes_of(summariser).add(self.index, slots, is_real, self._store.workers)

    def _read_blocks(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        k, v = self.read(first * BLOCK_TOKENS, last * BLOCK_TOKENS)
        return k.float().cpu(), v.float().cpu()

    def _held(self) -> Held:
        views = self._store.near.views
        view: _View | None = views.get(self)
        if view is None or not self._is_of_now(view):
            with torch.inference_mode(False):  # kv_len is written again, maybe outside of it
                has_far = self.window is None and self._map.num_older > 0
                far = (self._run(self._store.far, 0, self._map.num_older),) if has_far else ()
                near = self._run(self._store.near, self._map.num_older, self._map.slots.shape[1])
            view = views[self] = _View(self._map, self._kv_start, Held(far, near))
        view.held.near.kv_len.fill_(self.num_near_tokens)
        return view.held

    def _is_of_now(self, view: _View) -> bool:
        return (
            view.pages.slots is self._map.slots
            and view.pages.num_older == self._map.num_older
            and view.kv_start is self._kv_start
        )

    def _run(self, pool: PagePool, first: int, last: int) -> PagedKV:
        kv_start = self._kv_start
        if first and kv_start is not self._no_padding:
            kv_start = (kv_start - first * self._page_size).clamp_(min=0)
        kv_len = torch.full_like(kv_start, (last - first) * self._page_size)
        return PagedKV(
            pool.arena, self._table(pool.arena.num_kv_heads, self._map.slots[:, first:last]), kv_start, kv_len
        )

    def _table(self, num_kv_heads: int, slots: Tensor) -> Tensor:
        return slots[:, None].expand(slots.shape[0], num_kv_heads, slots.shape[1])

    def _refuse_while_held(self, verb: str) -> None:
        if self._is_held:
            raise CacheError(f"cannot {verb}: the layer's pages are held by an attention that is still running")

    # -- counting ------------------------------------------------------------------------------------------------------

    def num_shared_far(self, begin: int, end: int) -> int:
        """Of the far pages [begin, end) of all sequences, those that somebody else refers to, too."""
        slots, of, times = torch.unique(self._map.slots[:, begin:end], return_inverse=True, return_counts=True)
        is_shared = torch.tensor(self._store.far.counts(slots), device="cpu") > times
        return int(is_shared[of].sum())

    def used_slots(self) -> tuple[Tensor, Tensor]:
        """Slots of every near and of every far page, once for every sequence that has it."""
        far = self._map.slots[:, : self._map.num_older] if self.window is None else self._map.slots[:, :0]
        return self._map.near_slots.flatten(), far.flatten()


def _each_head(x: Tensor) -> Tensor:
    """`[num_seqs, heads, tokens, dim]` as `[num_seqs * heads, 1, tokens, dim]`: the same numbers."""
    return x.view(-1, 1, *x.shape[2:])


def _equal(a: object, b: object) -> bool:
    return isinstance(a, int) and a == b
