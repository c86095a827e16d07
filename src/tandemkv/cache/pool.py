"""Equal pages in one arena, with one free list and a count of references to each."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandemkv.errors import CapacityError
from tandemkv.types import Arena, format_bytes


class PagePool:
    """Pages of one arena: K and V of a page lie in the same slot of its two halves.

    Slots that were never used are handed out in rising order, so that pages that are filled together lie together;
    slots that came back go first, the last one back first. Slots are int32 tensors on the CPU.
    """

    def __init__(self, arena: Arena, name: str, knob: str) -> None:
        """`name` and `knob` are for the error that says what is full and what to turn."""
        self.arena = arena
        self.max_slots = arena.num_slots  # how far the pool may grow
        self.name = name
        self._knob = knob
        self.num_touched = 0  # slots that were ever handed out: host memory behind the others is not taken yet
        self.num_ever_used = 0
        self.views: WeakKeyDictionary[object, Any] = WeakKeyDictionary()  # of this arena, kept for those who read it
        self._returned: list[int] = []
        self._counts = torch.zeros(arena.num_slots, dtype=torch.int32, device="cpu")

    @property
    def page_bytes(self) -> int:
        """Bytes of K and V of one page."""
        return self.arena.num_bytes // self.arena.num_slots if self.arena.num_slots else 0

    @property
    def num_used(self) -> int:
        """Pages handed out."""
        return self.num_touched - len(self._returned)

    @property
    def num_free(self) -> int:
        """Pages that can still be handed out."""
        return self.max_slots - self.num_used

    def num_untouched(self, num_pages: int | None = None) -> int:
        """Of so many more pages (None for all that are free), those behind which no host memory is taken yet."""
        return max(0, (self.num_free if num_pages is None else num_pages) - len(self._returned))

    def limit(self, num_slots: int) -> None:
        """Let the pool grow to so many slots, which the near tier of a cache and its forks may need."""
        self.max_slots = max(num_slots, self.arena.num_slots)

    def take(self, num_pages: int) -> Tensor:
        """Slots `[num_pages]`, one reference to each; CapacityError, with nothing taken, where the pool has fewer."""
        self.require(num_pages)
        num_again = min(num_pages, len(self._returned))
        num_fresh = num_pages - num_again
        if self.num_touched + num_fresh > self.arena.num_slots:
            self._grow(self.num_touched + num_fresh)
        slots = [self._returned.pop() for _ in range(num_again)]
        slots += range(self.num_touched, self.num_touched + num_fresh)
        self.num_touched += num_fresh
        self.num_ever_used += num_pages
        taken = torch.tensor(slots, dtype=torch.int32, device="cpu")
        self._counts[taken] = 1
        return taken

    def require(self, num_pages: int) -> None:
        """Raise the CapacityError that `take` would."""
        if num_pages > self.num_free:
            needed, left = num_pages * self.page_bytes, self.num_free * self.page_bytes
            raise CapacityError(
                f"the {self.name} tier is full: {format_bytes(needed)} needed, {format_bytes(left)} of "
                f"{format_bytes(self.max_slots * self.page_bytes)} free; {self._knob}"
            )

    def share(self, slots: Tensor) -> None:
        """One more reference for every time a slot appears."""
        slots = slots.flatten()
        self._counts.index_add_(0, slots, torch.ones_like(slots))

    def drop(self, slots: Tensor) -> list[int]:
        """One reference less for every time a slot appears; returns the slots that nobody refers to any more."""
        slots = slots.flatten()
        self._counts.index_add_(0, slots, torch.full_like(slots, -1))
        freed: list[int] = torch.unique(slots[self._counts[slots] == 0]).tolist()
        self._returned += freed
        return freed

    def counts(self, slots: Tensor) -> list[int]:
        """References to each slot."""
        counts: list[int] = self._counts[slots].tolist()
        return counts

    @torch.inference_mode(False)
    def recount(self, used: Tensor) -> None:
        """Make the books say that exactly these references exist, one for every time a slot appears."""
        counts = torch.bincount(used.flatten(), minlength=self.arena.num_slots)
        self._counts = counts.to(torch.int32)  # their length too: `_grow` may have been cut off
        self._returned = (self._counts[: self.num_touched] == 0).nonzero().flatten().flip(0).tolist()

    def check(self, used: Tensor) -> None:
        """Assert that exactly these references exist, one for every time a slot appears."""
        found = torch.bincount(used.flatten(), minlength=self.arena.num_slots)
        wrong = (found != self._counts).nonzero().flatten().tolist()
        assert not wrong, f"{self.name}: references to slots {wrong[:8]} are miscounted"
        assert not found[self.num_touched :].any(), f"{self.name}: a slot was never handed out"
        free = sorted(self._returned)
        assert free == (found[: self.num_touched] == 0).nonzero().flatten().tolist(), f"{self.name}: free list"

    @torch.inference_mode(False)  # tensors made inside inference mode could not be written outside it
    def _grow(self, num_slots: int) -> None:
        """Move to an arena of at least num_slots, whole before it takes the other's place.

        Doubling, so that a page is moved once on average.
        """
        num_slots = min(max(num_slots, 2 * self.arena.num_slots), self.max_slots)
        old = self.arena
        new = Arena.allocate(
            old.layout, num_slots, old.num_kv_heads, old.head_dim, old.k.device, v_head_dim=old.v_head_dim
        )
        new.k[: self.num_touched] = old.k[: self.num_touched]
        new.v[: self.num_touched] = old.v[: self.num_touched]
        counts = torch.zeros(num_slots, dtype=torch.int32, device="cpu")
        counts[: len(self._counts)] = self._counts
        self.arena, self._counts, self.views = new, counts, WeakKeyDictionary()
