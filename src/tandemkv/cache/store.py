"""The pages of a cache and of its forks: a near and a far pool, and which pages have a copy further away already.

Who may refer to what, counted once for every time it does:

    near slot   the table of every layer and sequence, of every cache of the family
    far slot    the same tables, and the record of the near page, or of the far page in a wider format, that it is a
                copy of

A page that several sequences share is demoted when the first of them does, and so it is quantised further; the others
find the copy in the record and switch their own tables when their window passes. The record ends with the last
reference to the page, or where nobody's table has the copy any more and the far tier lacks room or is recounted.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.cache.codes import CodeBook
from tandemkv.cache.pool import PagePool
from tandemkv.select import Summariser

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


class Copied(NamedTuple):
    """slots: far slots, in the shape of those that were copied. refused: pages that could not be quantised and are kept
    in full precision, by their old slot, with their first token that is not finite."""

    slots: Tensor
    refused: dict[int, int]


class PageStore:
    """Two pools and the books between them. Tables are the truth: `recount` rebuilds the books from them."""

    def __init__(self, near: PagePool, far: PagePool, workers: "WorkerPool | None" = None) -> None:
        """`workers` move pages."""
        self.near, self.far, self.workers = near, far, workers
        self.members: WeakSet[object] = WeakSet()  # whose tables refer to pages
        self.is_busy = False  # a change is under way, or was cut off
        self._books: dict[Summariser, CodeBook] = {}
        self._num_counted = 0  # members whose references the books have
        self._far_copies: dict[int, int] = {}  # near slot -> far slot
        self._narrower: dict[int, int] = {}  # far slot -> far slot of another part

    def codes_of(self, summariser: Summariser) -> CodeBook:
        """The codes that it makes of far pages."""
        if summariser not in self._books:
            self._books[summariser] = CodeBook(self.far, summariser)
        return self._books[summariser]

    def keep_codes(self, summarisers: set[Summariser | None]) -> None:
        """Give back the codes that others make."""
        self._books = {summariser: book for summariser, book in self._books.items() if summariser in summarisers}

    def forget_basis(self, layer: int) -> None:
        """A layer's next far page begins another text, unless others have pages of it."""
        if len(self.members) == 1:
            for book in self._books.values():
                book.forget_basis(layer)

    @property
    def has_lost_members(self) -> bool:
        """One has left or was collected as garbage: its references are still in the books."""
        return len(self.members) != self._num_counted

    def join(self, member: object) -> None:
        """Its references are in the books already."""
        self.members.add(member)
        self._num_counted += 1

    def leave(self, member: object) -> None:
        """The references of a member that uses this store no longer go with the next recount."""
        self.members.discard(member)

    def demote(self, slots: Tensor, parts: Sequence[int], weights: Tensor | None = None) -> Copied:
        """Far slots with the content of these near slots, referred to as often; the near ones are still referred to.

        slots: `[num_seqs, num_pages]`; parts: of the far pool, for every page. weights: float32 `[num_seqs,
        num_kv_heads, head_dim]`, by which channels of K are kept where a part leaves some out.
        CapacityError, nothing moved, where the far pool lacks room. Only where a page cannot be quantised may it come
        after some were: then the books list pages that no table has, until they are recounted.
        """
        return self._copy(self.near, slots, parts, weights, self._far_copies)

    def narrow(self, slots: Tensor, parts: Sequence[int], weights: Tensor | None = None) -> Copied:
        """The same of far slots, into other parts."""
        return self._copy(self.far, slots, parts, weights, self._narrower)

    def _copy(
        self, source: PagePool, slots: Tensor, parts: Sequence[int], weights: Tensor | None, records: dict[int, int]
    ) -> Copied:
        wanted: list[int] = slots.flatten().tolist()
        part_of = dict(zip(wanted, [*parts] * slots.shape[0], strict=True))
        fresh = [slot for slot in part_of if slot not in records]
        if weights is not None:
            seq_of = {slot: i // slots.shape[1] for i, slot in enumerate(wanted)}
            weights = weights[[seq_of[slot] for slot in fresh]]
        taken, refused = self._write(source, fresh, [part_of[slot] for slot in fresh], weights)
        if source is self.near:
            self.far.moved_bytes += self.far.bytes_of(taken)
        if len(fresh) == len(wanted) and source.are_owned(wanted):
            return Copied(_tensor(taken).view(slots.shape), refused)
        copies = records | dict(zip(fresh, taken, strict=True))
        found = _tensor(copies[slot] for slot in wanted).view(slots.shape)
        records.update(copies)  # the reference that `take` counted is the record's
        self.far.share(found)
        return Copied(found, refused)

    def _write(
        self, source: PagePool, slots: list[int], parts: list[int], weights: Tensor | None
    ) -> tuple[list[int], dict[int, int]]:
        """Far slots that pages were written to, and which were refused; these are in the first part."""
        if self.workers is not None:
            self.workers.rouse()  # they wake while this thread makes room
        self.far.require([parts.count(part) for part in range(len(self.far.num_used))])
        taken = [0] * len(slots)
        for part in set(parts):
            places = [i for i, its in enumerate(parts) if its == part]
            for place, slot in zip(places, self.far.take(len(places), part), strict=True):
                taken[place] = slot
        self._forget_codes(taken)
        refused = kernels.move_pages(source.arena, self.far.arena, slots, taken, self.workers, weights)
        if refused:
            exact = self.far.take(len(refused))
            self.far.drop(_tensor(taken[i] for i in refused))
            for place, slot in zip(refused, exact, strict=True):
                taken[place] = slot
            self._forget_codes(exact)
            kernels.move_pages(source.arena, self.far.arena, [slots[i] for i in refused], exact, self.workers)
        return taken, {slots[i]: token for i, token in refused.items()}

    def _forget_codes(self, slots: list[int]) -> None:
        for book in self._books.values():
            book.forget(slots)

    def require_far(self, num_pages: Sequence[int]) -> None:
        """CapacityError where so many pages of each part cannot be taken."""
        if not self.far.has(num_pages):
            self._forget_idle_copies()
        self.far.require(num_pages)

    def take_near(self, num_seqs: int, num_pages: int) -> Tensor:
        """Near slots `[num_seqs, num_pages]`, one reference to each."""
        return _tensor(self.near.take(num_seqs * num_pages)).view(num_seqs, num_pages)

    def drop_near(self, slots: Tensor) -> None:
        """One reference less to each; with the last one, the record of a far copy goes too."""
        freed = self.near.drop(slots)
        if self._far_copies:
            self._forget_copies(self._far_copies, freed)

    def drop_far(self, slots: Tensor) -> None:
        """The same of far slots, and of the records of their narrower copies."""
        freed = self.far.drop(slots)
        if self._narrower:
            self._forget_copies(self._narrower, freed)

    def own(self, slots: Tensor) -> Tensor:
        """Near slots `[num_seqs]` with the same content that nobody else refers to, to be written to.

        Those that were shared are copied; the references to the ones they replace are still there.
        """
        references = dict(zip(slots.tolist(), self.near.counts(slots), strict=True))
        copied = []
        for seq, slot in enumerate(slots.tolist()):
            if references[slot] > 1:  # the last of those who share a page keeps it
                references[slot] -= 1
                copied.append(seq)
        owned = slots.clone()
        if copied:
            owned[copied] = _tensor(self.near.take(len(copied)))
            arena = self.near.arena
            kernels.move_pages(arena, arena, slots[copied].tolist(), owned[copied].tolist(), self.workers)
        if self._far_copies:  # what is written to is no copy of anything
            self._forget_copies(self._far_copies, owned.tolist())
        return owned

    def recount(self, num_members: int, near: Tensor, far: Tensor) -> None:
        """These references of so many members exist, one for every time a slot appears, and no others."""
        live = set(near.flatten().tolist())
        self._far_copies = {slot: copy for slot, copy in self._far_copies.items() if slot in live}
        live_far = {*far.flatten().tolist(), *self._far_copies.values()}
        kept: dict[int, int] = {}
        while more := {slot: copy for slot, copy in self._narrower.items() if slot in live_far and slot not in kept}:
            kept |= more
            live_far.update(more.values())
        self._narrower = kept
        self.near.recount(near)
        self.far.recount(self._with_records(far))
        self._forget_idle_copies()
        self._num_counted = num_members

    def check(self, near: Tensor, far: Tensor) -> None:
        """Assert that exactly these references exist."""
        self.near.check(near)
        self.far.check(self._with_records(far))
        assert set(self._far_copies) <= set(near.flatten().tolist()), "a record of a far copy outlived its near page"
        pages = set(self._with_records(far).tolist())
        assert set(self._narrower) <= pages, "a record of a narrower copy outlived its page"

    def _with_records(self, far: Tensor) -> Tensor:
        return torch.cat([far.flatten(), _tensor(self._far_copies.values()), _tensor(self._narrower.values())])

    def _forget_idle_copies(self) -> None:
        """Give back the far copies that no table refers to."""
        for records in (self._far_copies, self._narrower):
            counts = self.far.counts(_tensor(records.values()))
            idle = [slot for slot, count in zip(records, counts, strict=True) if count == 1]
            self._forget_copies(records, idle)

    def _forget_copies(self, records: dict[int, int], slots: list[int]) -> None:
        copies = [records.pop(slot) for slot in slots if slot in records]
        if copies:
            self.drop_far(_tensor(copies))


def _tensor(slots: Iterable[int]) -> Tensor:
    return torch.tensor(list(slots), dtype=torch.int32, device="cpu")
