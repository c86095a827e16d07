"""Time that a run may take, and what each of its parts gets of it."""

import time
from collections.abc import Callable


class Budget:
    """So many seconds from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left_s(self) -> float:
        """0 once they are spent."""
        return max(0.0, self._end - self._clock())

    def has(self, seconds: float) -> bool:
        """Whether so much can still be begun."""
        return self.left_s >= seconds

    def part(self, share: float) -> "Budget":
        """Such a share of what is left now; what it does not use is left to the others."""
        return Budget(share * self.left_s, self._clock)


class Allowance:
    """Seconds that something may take in all, each time it is used."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._left_s, self._clock, self._longest_s, self._began = seconds, clock, 0.0, 0.0

    @property
    def allows(self) -> bool:
        """Whether once more, which may take as long as the longest time so far, is within it."""
        return self._left_s > 0 and self._left_s >= self._longest_s

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        seconds = self._clock() - self._began
        self._left_s -= seconds
        self._longest_s = max(self._longest_s, seconds)
