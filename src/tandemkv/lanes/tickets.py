"""What one processor waits for from another, and what each of them was busy with."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import Generic, NamedTuple, TypeVar, cast

T = TypeVar("T")


class Span(NamedTuple):
    """What a row (device, host, up, down) was busy with; seconds of `time.perf_counter`."""

    row: str
    name: str
    begin: float
    end: float


class Trace:
    """Spans of a step or a run, from every thread: a list takes appends from all of them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, row: str, name: str, begin: float, end: float) -> None:
        """A span that is over."""
        self.spans.append(Span(row, name, begin, end))

    @contextmanager
    def span(self, row: str, name: str) -> Iterator[None]:
        """The time that the block takes, however it ends."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(row, name, begin, time.perf_counter())

    def take(self) -> list[Span]:
        """What was recorded since the last time."""
        spans, self.spans = self.spans, []
        return spans


class Ticket(Generic[T]):
    """A value that somebody else is at work on: set once, by whoever has it, or failed.

    Tickets that one thread waits for share a bell, which rings for each, so that it can wait for the first of many.
    """

    def __init__(self, bell: Condition) -> None:
        self._bell = bell
        self._value: T | None = None
        self._acts: list[Callable[[Ticket[T]], None]] = []
        self.error: BaseException | None = None
        self.is_done = False
        self.is_cancelled = False

    def set(self, value: T) -> None:
        """Here it is."""
        self._value = value
        self._ring()

    def fail(self, error: BaseException) -> None:
        """It will never come: `result` raises this."""
        self.error = error
        self._ring()

    def cancel(self) -> None:
        """Nobody waits any more: who has not begun need not."""
        self.is_cancelled = True

    def then(self, act: "Callable[[Ticket[T]], None]") -> None:
        """Do this when it is done, on the thread of whoever is done with it; at once where it is done already."""
        with self._bell:
            if not self.is_done:
                self._acts.append(act)
                return
        act(self)

    def result(self) -> T:
        """The value of a ticket that is done; raises what the work raised."""
        assert self.is_done
        if self.error is not None:
            raise self.error
        return cast(T, self._value)

    def wait(self, seconds: float | None = None) -> T:
        """`result`, when it is done. TimeoutError where it is not done after so long."""
        with self._bell:
            if not self._bell.wait_for(lambda: self.is_done, seconds):
                raise TimeoutError(f"nothing came within {seconds:g} s")
        return self.result()

    def _ring(self) -> None:
        with self._bell:
            self.is_done = True
            self._bell.notify_all()
        for act in self._acts:
            act(self)
