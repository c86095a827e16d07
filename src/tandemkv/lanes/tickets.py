"""What one processor waits for from another, and what each of them was busy with."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import Bell

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
        """One span; its end may be known before it has come."""
        self.spans.append(Span(row, name, begin, end))

    def take(self) -> list[Span]:
        """What was recorded since the last time."""
        spans, self.spans = self.spans, []
        return spans


class Ticket(Generic[T]):
    """A value that somebody else is at work on. It is done from a moment on that is known when it is set.

    Tickets that one thread waits for share a bell, which rings when something has come of one, so that it can wait for
    the first of many.
    """

    __slots__ = ("_bell", "_error", "_get", "_ready_at", "is_cancelled", "is_patient")

    def __init__(self, bell: "Bell", *, is_patient: bool = False) -> None:
        """is_patient: no link stands still until this is used; what else is there goes first."""
        self.is_patient = is_patient
        self._bell = bell
        self._get: Callable[[], T] | None = None
        self._ready_at = math.inf
        self._error: BaseException | None = None
        self.is_cancelled = False

    @property
    def ready_at(self) -> float:
        """The moment from which it is done; inf as long as nobody knows."""
        return self._ready_at

    @property
    def is_done(self) -> bool:
        """Whether the moment has come."""
        return time.perf_counter() >= self.ready_at

    def set(self, get: Callable[[], T], ready_at: float = 0.0) -> None:
        """It will be what `get` gives, from then on."""
        self._get = get
        self._ready_at = ready_at
        self._bell.ring()

    def fail(self, error: BaseException) -> None:
        """It will never come: `result` raises this."""
        self._error = error
        self._ready_at = 0.0
        self._bell.ring()

    def cancel(self) -> None:
        """Nobody waits any more: who has not begun need not."""
        self.is_cancelled = True

    def result(self) -> T:
        """The value of a ticket that is done; raises what the work raised."""
        assert self.is_done
        if self._error is not None:
            raise self._error
        assert self._get is not None
        return self._get()

    def wait(self, seconds: float = 3600.0) -> T:
        """`result`, when it is done. TimeoutError where it is not done after so long."""
        deadline = time.perf_counter() + seconds
        while True:
            num_rung = self._bell.num_rung  # before it is asked: what comes meanwhile is not slept through
            now, ready_at = time.perf_counter(), self.ready_at
            if now >= ready_at:
                return self.result()
            if now >= deadline:
                raise TimeoutError(f"nothing came within {seconds:g} s")
            self._bell.wait(num_rung, min(ready_at, deadline, now + LONGEST_WAIT_S))


LONGEST_WAIT_S = 0.1
"""A bell is waited for outside of Python, which looks after signals, such as Ctrl-C, in between."""
