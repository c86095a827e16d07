"""The pages of a cache and of its forks: a near and a far pool, and which near pages have a far copy already.

Who may refer to what, counted once for every time it does:

    near slot   the table of every layer and sequence, of every cache of the family
    far slot    the same tables, and the record of the near page that it is a copy of

A page that several sequences share is demoted when the first of them does; the others find the copy in the record and
switch their own tables when their window passes. The record ends with the last reference to the near page, or where
nobody's table has the copy any more and the far tier lacks room or is recounted.
"""

from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.cache.codes import CodeBook
from tandemkv.cache.pool import PagePool
from tandemkv.select import Summariser

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


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

    def demote(self, slots: Tensor) -> Tensor:
        """Far slots with the content of these near slots, referred to as often; the near ones are still referred to.

        CapacityError, nothing moved, where the far pool lacks room.
        """
        wanted = slots.flatten().tolist()
        fresh = [slot for slot in dict.fromkeys(wanted) if slot not in self._far_copies]
        taken = self.far.take(len(fresh))
        for book in self._books.values():
            book.forget(taken)
        kernels.move_pages(self.near.arena, self.far.arena, fresh, taken.tolist(), self.workers)
        if len(fresh) == len(wanted) and max(self.near.counts(slots.flatten()), default=1) == 1:
            return taken.view(slots.shape)  # nobody else has any of them
        copies = self._far_copies | dict(zip(fresh, taken.tolist(), strict=True))
        found = torch.tensor([copies[slot] for slot in wanted], dtype=torch.int32, device="cpu").view(slots.shape)
        self._far_copies = copies  # the reference that `take` counted is the record's
        self.far.share(found)
        return found

    def require_far(self, num_pages: int) -> None:
        """CapacityError where so many pages cannot be demoted."""
        if num_pages > self.far.num_free:
            self._forget_idle_copies()
        self.far.require(num_pages)

    def drop_near(self, slots: Tensor) -> None:
        """One reference less to each; with the last one, the record of a far copy goes too."""
        freed = self.near.drop(slots)
        if self._far_copies:
            self._forget_copies(freed)

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
            owned[copied] = self.near.take(len(copied))
            arena = self.near.arena
            kernels.move_pages(arena, arena, slots[copied].tolist(), owned[copied].tolist(), self.workers)
        if self._far_copies:  # what is written to is no copy of anything
            self._forget_copies(owned.tolist())
        return owned

    def recount(self, num_members: int, near: Tensor, far: Tensor) -> None:
        """These references of so many members exist, one for every time a slot appears, and no others."""
        live = set(near.flatten().tolist())
        self._far_copies = {slot: copy for slot, copy in self._far_copies.items() if slot in live}
        self.near.recount(near)
        self.far.recount(self._with_records(far))
        self._forget_idle_copies()
        self._num_counted = num_members

    def check(self, near: Tensor, far: Tensor) -> None:
        """Assert that exactly these references exist."""
        self.near.check(near)
        self.far.check(self._with_records(far))
        assert set(self._far_copies) <= set(near.flatten().tolist()), "a record of a far copy outlived its near page"

    def _with_records(self, far: Tensor) -> Tensor:
        return torch.cat([far.flatten(), self._copies()])

    def _copies(self) -> Tensor:
        return torch.tensor(list(self._far_copies.values()), dtype=torch.int32, device="cpu")

    def _forget_idle_copies(self) -> None:
        """Give back the far copies that no table refers to."""
        counts = self.far.counts(self._copies())
        self._forget_copies([slot for slot, count in zip(self._far_copies, counts, strict=True) if count == 1])

    def _forget_copies(self, slots: list[int]) -> None:
        copies = [self._far_copies.pop(slot) for slot in slots if slot in self._far_copies]
        self.far.drop(torch.tensor(copies, dtype=torch.int32, device="cpu"))
