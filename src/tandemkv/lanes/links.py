"""Links between a host and a device that are both processors of this machine.

A link has a bandwidth, a latency and a clock of its own: a transfer takes latency + bytes / bandwidth, and one follows
the other. When it will be over is known when it is sent; whoever waits for it sleeps until then, so that a link costs
no core. (With a thread for each link that slept and then told, a step took 0.4 to 0.7 ms more: threads that wake want
Python's lock.) Small messages wait for nobody: on a real link they go between the packets of a large one. What is
handed over is the sender's memory, by reference, or where a link `copies`, a copy that a thread of its own makes
meanwhile: nothing else of a lane is made up.
"""

import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tandemkv.lanes.tickets import Ticket, Trace
from tandemkv.schedule import Speed

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import Bell

T = TypeVar("T")

SMALL_BYTES = 64 << 10
"""A query and an attention's result are small; a page of 8 heads of 64 is as large."""


class _Copy(NamedTuple):
    make: Callable[[], Any]
    ticket: Ticket[Any]
    due: float


class Link:
    """One direction between two memories; large transfers are carried in the order they were sent."""

    def __init__(self, row: str, speed: Speed, bell: "Bell", trace: Trace, *, copies: bool = False) -> None:
        """speed: may be replaced at any time, for what is sent later."""
        self.speed = speed
        self._row, self._bell, self._trace = row, bell, trace
        self._lock = Lock()
        self._is_free_at = 0.0
        self._copies: SimpleQueue[_Copy | None] | None = SimpleQueue() if copies else None
        self._thread = Thread(target=self._copy, name=f"tandemkv-{row}", daemon=True) if copies else None
        if self._thread is not None:
            self._thread.start()

    def send(self, name: str, num_bytes: int, get: Callable[[], T], ticket: Ticket[T] | None = None) -> Ticket[T]:
        """Carry so many bytes. The ticket, a new one or the one given, has what `get` gives when they are there."""
        ticket = Ticket(self._bell) if ticket is None else ticket
        due = self.carry(name, num_bytes)
        if self._copies is None or num_bytes <= SMALL_BYTES:
            ticket.set(get, due)
        else:
            self._copies.put(_Copy(get, ticket, due))
        return ticket

    def carry(self, name: str, num_bytes: int, sent_at: float | None = None) -> float:
        """The moment when so many bytes will have been carried that were sent now, or at a moment before."""
        now, seconds = time.perf_counter() if sent_at is None else sent_at, self.speed.seconds(num_bytes)
        if num_bytes <= SMALL_BYTES:
            begin = now
        else:
            with self._lock:
                begin = max(now, self._is_free_at)
                self._is_free_at = begin + seconds
        self._trace.add(self._row, name, begin, begin + seconds)
        return begin + seconds

    def clear(self) -> None:
        """Nobody waits for what is on its way: the next transfer begins at once."""
        with self._lock:
            self._is_free_at = 0.0

    def close(self) -> None:
        """Ends the thread after the copies that were sent."""
        if self._copies is not None and self._thread is not None:
            self._copies.put(None)
            self._thread.join()

    def _copy(self) -> None:
        assert self._copies is not None
        while (copy := self._copies.get()) is not None:
            if copy.ticket.is_cancelled:
                continue
            try:
                value = copy.make()
            except BaseException as error:  # noqa: BLE001  raised where the ticket is waited for
                copy.ticket.fail(error)
            else:
                copy.ticket.set(partial(_same, value), max(copy.due, time.perf_counter()))


def _same(value: T) -> T:
    return value
