"""Links between a host and a device that are both processors of this machine.

A link has a bandwidth, a latency and a clock of its own: a transfer takes latency + bytes / bandwidth, and one follows
the other. Small messages wait for nobody: on a real link they go between the packets of a large one. What is handed
over is the sender's memory, by reference, or a copy where the sender's `deliver` makes one: nothing else of a lane is
made up. A thread sleeps until a transfer is over, so that a link costs no core.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

from tandemkv.lanes.tickets import Ticket, Trace
from tandemkv.schedule import Speed

T = TypeVar("T")

SMALL_BYTES = 64 << 10
"""A query and an attention's result are small; a page of 8 heads of 64 is as large."""

_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1000
"""With Linux's 50 us a sleeper woke 80 us late here (median), with 1 us 32."""

_LONGEST_SLEEP_S = 0.05
"""After so long it looks whether somebody still waits."""


@dataclass
class _Transfer(Generic[T]):
    name: str
    num_bytes: int
    deliver: Callable[[], T]
    ticket: Ticket[T]
    sent_at: float
    begin: float = 0.0
    due: float = 0.0
    has_begun: bool = False

    def hand_over(self) -> None:
        try:
            value = self.deliver()
        except BaseException as error:  # noqa: BLE001  raised where the ticket is waited for
            self.ticket.fail(error)
        else:
            self.ticket.set(value)


class Link:
    """One direction between two memories; large transfers are carried in the order they were sent."""

    def __init__(self, row: str, speed: Speed, bell: Condition, trace: Trace) -> None:
        """speed: may be replaced at any time, for the transfers that begin later."""
        self.speed = speed
        self._row, self._bell, self._trace = row, bell, trace
        self._wake = Condition()
        self._large: deque[_Transfer[Any]] = deque()
        self._small: deque[_Transfer[Any]] = deque()
        self._is_free_at = 0.0
        self._is_open = True
        self._thread = Thread(target=self._carry, name=f"tandemkv-{row}", daemon=True)
        self._thread.start()

    def send(self, name: str, num_bytes: int, deliver: Callable[[], T], ticket: Ticket[T] | None = None) -> Ticket[T]:
        """Carry so many bytes. The ticket, a new one or the one given, gets what `deliver` returns when they are there,
        on the link's thread."""
        ticket = Ticket(self._bell) if ticket is None else ticket
        transfer = _Transfer(name, num_bytes, deliver, ticket, time.perf_counter())
        with self._wake:
            (self._small if num_bytes <= SMALL_BYTES else self._large).append(transfer)
            self._wake.notify()
        return ticket

    def close(self) -> None:
        """Ends the thread; what has not arrived never will."""
        with self._wake:
            self._is_open = False
            self._wake.notify()
        self._thread.join()

    def _carry(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)
        while (transfer := self._next()) is not None:
            self._trace.add(self._row, transfer.name, transfer.begin, transfer.due)
            transfer.hand_over()

    def _next(self) -> _Transfer[Any] | None:
        """The next transfer that is over, when it is; None once the link is closed."""
        with self._wake:
            while self._is_open:
                heads = [(head.due, queue) for queue in (self._small, self._large) if (head := self._head(queue))]
                if not heads:
                    self._wake.wait()
                    continue
                due, queue = min(heads, key=itemgetter(0))
                left = due - time.perf_counter()
                if left <= 0:
                    return queue.popleft()
                self._wake.wait(min(left, _LONGEST_SLEEP_S))
            return None

    def _head(self, queue: "deque[_Transfer[Any]]") -> _Transfer[Any] | None:
        """The first of a queue, which has begun; those that nobody waits for are dropped."""
        while queue and queue[0].ticket.is_cancelled:
            if queue.popleft().has_begun and queue is self._large:
                self._is_free_at = time.perf_counter()
        if not queue:
            return None
        head = queue[0]
        if not head.has_begun:
            head.has_begun = True
            # From when the one before was over, not from when this thread woke: every transfer would add its delay.
            head.begin = max(head.sent_at, self._is_free_at) if queue is self._large else head.sent_at
            head.due = head.begin + self.speed.seconds(head.num_bytes)
            if queue is self._large:
                self._is_free_at = head.due
        return head
