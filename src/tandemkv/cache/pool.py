"""Pages in one arena, or in several that count their slots on, with free lists and a count of references to each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandemkv.errors import CapacityError
from tandemkv.types import AnyArena, Arena, format_bytes

_FEW = 64
"""Slots that are counted one by one: each takes 0.1 us, while the 8 operations on tensors take 50 to 140 us in a step
that has just read all of KV, which leaves none of their code in the caches."""


@dataclass
class _Part:
    """The slots of one arena, [first, first + num_slots). num_touched: those that were ever handed out: host memory
    behind the others is not taken yet."""

    first: int
    num_slots: int
    page_bytes: int
    num_touched: int = 0
    returned: list[int] = field(default_factory=list)

    @property
    def num_used(self) -> int:
        return self.num_touched - len(self.returned)

    def take(self, num_pages: int) -> list[int]:
        num_again = min(num_pages, len(self.returned))
        begin = self.first + self.num_touched
        self.num_touched += num_pages - num_again
        slots = [self.returned.pop() for _ in range(num_again)]
        return [*slots, *range(begin, self.first + self.num_touched)]


class PagePool:
    """Counted pages: K and V of a page lie in the same slot of the two halves of an arena.

    A part is one of the arenas; they share the pool's bytes. Slots that were never used are handed out in rising order,
    so that pages that are filled together lie together; slots that came back go first, the last one back first. Slots
    are int32 tensors on the CPU.
    """

    def __init__(self, arena: AnyArena, name: str, knob: str, max_bytes: int | None = None) -> None:
        """`name` and `knob` are for the error that says what is full and what to turn. max_bytes: of all pages; None
        for what the arena holds."""
        self.arena = arena
        self.name = name
        self._knob = knob
        self._parts: list[_Part] = []
        for one in arena.parts:
            page_bytes = one.layout.page_bytes(one.num_kv_heads, one.head_dim, one.v_head_dim)
            self._parts.append(_Part(sum(part.num_slots for part in self._parts), one.num_slots, page_bytes))
        self.capacity_bytes = arena.num_slots * self._parts[0].page_bytes if max_bytes is None else max_bytes
        self.moved_bytes = 0  # of every page that ever came from the tier above
        self.views: WeakKeyDictionary[object, Any] = WeakKeyDictionary()  # of this arena, kept for those who read it
        self._keep(torch.zeros(arena.num_slots, dtype=torch.int32, device="cpu"))

    @property
    def held_bytes(self) -> int:
        """What the pages may take without growing."""
        return min(self.capacity_bytes, sum(part.num_slots * part.page_bytes for part in self._parts))

    @property
    def used_bytes(self) -> int:
        """Of the pages that are handed out."""
        return sum(part.num_used * part.page_bytes for part in self._parts)

    @property
    def num_used(self) -> tuple[int, ...]:
        """Pages handed out, of each part."""
        return tuple(part.num_used for part in self._parts)

    def untouched_bytes(self, num_pages: Sequence[int] | None = None) -> int:
        """Of so many more pages of each part (None for all that are free, where there is one), those behind which no
        host memory is taken yet."""
        if num_pages is None:
            free = (self.capacity_bytes - self.used_bytes) // self._parts[0].page_bytes
            num_pages = [free]
        lacking = (max(0, num - len(part.returned)) for num, part in zip(num_pages, self._parts, strict=True))
        return sum(num * part.page_bytes for num, part in zip(lacking, self._parts, strict=True))

    def limit(self, num_slots: int) -> None:
        """Let the pool grow to so many slots, which the near tier of a cache and its forks may need."""
        self.capacity_bytes = max(num_slots, self.arena.num_slots) * self._parts[0].page_bytes

    def take(self, num_pages: int, part: int = 0) -> list[int]:
        """So many slots, one reference to each; CapacityError, with nothing taken, where there are fewer."""
        wanted = [0] * len(self._parts)
        wanted[part] = num_pages
        self.require(wanted)
        taking = self._parts[part]
        num_touched = taking.num_touched + max(0, num_pages - len(taking.returned))
        if num_touched > taking.num_slots:
            self._grow(num_touched)
        taken = taking.take(num_pages)
        if num_pages <= _FEW:
            for slot in taken:
                self._count_of[slot] = 1
        else:
            self._counts[torch.tensor(taken, device="cpu")] = 1
        return taken

    def bytes_of(self, slots: Iterable[int]) -> int:
        """Of pages in these slots."""
        return sum(self._part_with(slot).page_bytes for slot in slots)

    def has(self, num_pages: Sequence[int]) -> bool:
        """Whether so many pages of each part are free."""
        needed = sum(num * part.page_bytes for num, part in zip(num_pages, self._parts, strict=True))
        return not needed or self.used_bytes + needed <= self.capacity_bytes

    def require(self, num_pages: Sequence[int]) -> None:
        """Raise the CapacityError that `take` would."""
        if not self.has(num_pages):
            needed = sum(num * part.page_bytes for num, part in zip(num_pages, self._parts, strict=True))
            raise CapacityError(
                f"the {self.name} tier is full: {format_bytes(needed)} needed, "
                f"{format_bytes(self.capacity_bytes - self.used_bytes)} of {format_bytes(self.capacity_bytes)} free; "
                f"{self._knob}"
            )

    def part_of(self, slots: Tensor) -> Tensor:
        """Which part each slot belongs to, int64 of the same shape."""
        ends = torch.tensor([part.first + part.num_slots for part in self._parts], device="cpu")
        return torch.bucketize(slots.contiguous(), ends, right=True)

    def share(self, slots: Tensor) -> None:
        """One more reference for every time a slot appears."""
        slots = slots.flatten()
        self._counts.index_add_(0, slots, torch.ones_like(slots))

    def drop(self, slots: Tensor) -> list[int]:
        """One reference less for every time a slot appears; returns the slots that nobody refers to any more."""
        slots = slots.flatten()
        freed = self._drop_few(slots.tolist()) if len(slots) <= _FEW else self._drop_many(slots)
        for slot in freed:
            self._part_with(slot).returned.append(slot)
        return freed

    def _drop_few(self, slots: list[int]) -> list[int]:
        freed = []
        for slot in slots:
            self._count_of[slot] -= 1
            if self._count_of[slot] == 0:
                freed.append(slot)
        return sorted(freed)

    def _drop_many(self, slots: Tensor) -> list[int]:
        self._counts.index_add_(0, slots, torch.full_like(slots, -1))
        freed: list[int] = torch.unique(slots[self._counts[slots] == 0]).tolist()
        return freed

    def _part_with(self, slot: int) -> _Part:
        return next(part for part in self._parts if slot < part.first + part.num_slots)

    def are_owned(self, slots: list[int]) -> bool:
        """Whether nobody shares any of them."""
        return all(self._count_of[slot] <= 1 for slot in slots)

    def counts(self, slots: Tensor) -> list[int]:
        """References to each slot."""
        return [self._count_of[slot] for slot in slots.tolist()]

    def _keep(self, counts: Tensor) -> None:
        """References to every slot, int32; also as plain numbers, for the few slots of a step of decode."""
        self._counts, self._count_of = counts, counts.numpy().data

    @torch.inference_mode(False)
    def recount(self, used: Tensor) -> None:
        """Make the books say that exactly these references exist, one for every time a slot appears."""
        counts = torch.bincount(used.flatten(), minlength=self.arena.num_slots)
        self._keep(counts.to(torch.int32))  # their length too: `_grow` may have been cut off
        for part in self._parts:
            part.returned = [part.first + slot for slot in _unused(self._touched(self._counts, part))[::-1]]

    def check(self, used: Tensor) -> None:
        """Assert that exactly these references exist, one for every time a slot appears."""
        found = torch.bincount(used.flatten(), minlength=self.arena.num_slots)
        wrong = (found != self._counts).nonzero().flatten().tolist()
        assert not wrong, f"{self.name}: references to slots {wrong[:8]} are miscounted"
        for part in self._parts:
            behind = found[part.first + part.num_touched : part.first + part.num_slots]
            assert not behind.any(), f"{self.name}: a slot was never handed out"
            free = [part.first + slot for slot in _unused(self._touched(found, part))]
            assert sorted(part.returned) == free, f"{self.name}: free list"

    @staticmethod
    def _touched(counts: Tensor, part: _Part) -> Tensor:
        return counts[part.first : part.first + part.num_touched]

    @torch.inference_mode(False)  # tensors made inside inference mode could not be written outside it
    def _grow(self, num_slots: int) -> None:
        """Move to an arena of at least num_slots, whole before it takes the other's place; a pool of one part.

        Doubling, so that a page is moved once on average.
        """
        old, (part,) = self.arena, self._parts
        assert isinstance(old, Arena)
        num_slots = min(max(num_slots, 2 * old.num_slots), self.capacity_bytes // part.page_bytes)
        new = Arena.allocate(
            old.layout, num_slots, old.num_kv_heads, old.head_dim, old.k.device, v_head_dim=old.v_head_dim
        )
        new.k[: part.num_touched] = old.k[: part.num_touched]
        new.v[: part.num_touched] = old.v[: part.num_touched]
        counts = torch.zeros(num_slots, dtype=torch.int32, device="cpu")
        counts[: len(self._counts)] = self._counts
        self.arena, self.views = new, WeakKeyDictionary()
        self._keep(counts)
        part.num_slots = num_slots


def _unused(counts: Tensor) -> list[int]:
    found: list[int] = (counts == 0).nonzero().flatten().tolist()
    return found
