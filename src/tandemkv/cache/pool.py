"""A fixed number of equal pages in one arena, with one free list."""

from tandemkv.errors import CapacityError
from tandemkv.types import Arena, format_bytes


class PagePool:
    """Pages of one arena: K and V of a page lie in the same slot of its two halves.

    Slots that were never used are handed out in rising order, so that pages that are filled together lie together;
    slots that came back go first, the last one back first.
    """

    def __init__(self, arena: Arena, name: str, knob: str) -> None:
        """`name` and `knob` are for the error that says what is full and what to turn."""
        self.arena = arena
        self.name = name
        self._knob = knob
        self.num_touched = 0  # slots that were ever handed out: host memory behind the others is not taken yet
        self.num_ever_used = 0
        self._returned: list[int] = []

    @property
    def page_bytes(self) -> int:
        """Bytes of K and V of one page."""
        return 2 * self.arena.layout.page_bytes(self.arena.num_kv_heads, self.arena.head_dim)

    @property
    def num_used(self) -> int:
        """Pages handed out."""
        return self.num_touched - len(self._returned)

    @property
    def num_free(self) -> int:
        """Pages that can still be handed out."""
        return self.arena.num_slots - self.num_used

    def can_allocate(self, num_pages: int) -> bool:
        """Whether `allocate` would succeed."""
        return num_pages <= self.num_free

    def allocate(self, num_pages: int) -> list[int]:
        """Slots of `num_pages` pages; CapacityError, with nothing taken, where the pool has fewer."""
        self.require(num_pages)
        num_again = min(num_pages, len(self._returned))
        slots = [self._returned.pop() for _ in range(num_again)]
        first = self.num_touched
        self.num_touched += num_pages - num_again
        self.num_ever_used += num_pages
        return slots + list(range(first, self.num_touched))

    def require(self, num_pages: int) -> None:
        """Raise the CapacityError that `allocate` would."""
        if not self.can_allocate(num_pages):
            needed, left = num_pages * self.page_bytes, self.num_free * self.page_bytes
            raise CapacityError(
                f"the {self.name} tier is full: {format_bytes(needed)} needed, {format_bytes(left)} of "
                f"{format_bytes(self.arena.num_slots * self.page_bytes)} free; {self._knob}"
            )

    def free(self, slots: list[int]) -> None:
        """Take pages back."""
        self._returned.extend(slots)

    def check(self, used: list[int]) -> None:
        """Assert that exactly these slots are handed out, each once."""
        assert len(set(used)) == len(used), f"{self.name}: a slot is used twice"
        assert not set(used) & set(self._returned), f"{self.name}: a slot is used and free"
        assert len(set(self._returned)) == len(self._returned), f"{self.name}: a slot was freed twice"
        assert len(used) == self.num_used, f"{self.name}: {self.num_used} slots are out, {len(used)} are known"
        assert all(0 <= slot < self.num_touched for slot in used), f"{self.name}: a slot was never handed out"
