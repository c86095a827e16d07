"""The processor beside far memory: a thread that drives native workers, one job after the other.

What it is asked most is a call of the kernel, which it makes without Python: a thread that wakes wants Python's lock,
which the device holds while it prepares what it does itself (a step over two lanes of nothing took 0.4 ms longer).
"""

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from tandemkv.lanes.tickets import Ticket, Trace

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import Bell, Call, Job, WorkerPool

T = TypeVar("T")

_SECONDS_TO_SETTLE = 10.0


class Called(Ticket[T]):
    """A call that was handed over. Nobody tells when it is over; whoever wants to know asks."""

    __slots__ = ("_call", "_job", "_over")

    def __init__(self, bell: "Bell", call: "Call[T]", job: "Job", over: Callable[[float, float], float]) -> None:
        """over: is told once from when to when the call was made, and tells when its result is where it is waited
        for."""
        super().__init__(bell)
        self._call, self._job, self._over = call, job, over

    @property
    def has_ended(self) -> bool:
        """Whether nothing is read or written any more."""
        return not math.isinf(self._job.end)

    @property
    def ready_at(self) -> float:
        """See `Ticket`."""
        self.note_end()
        return self._ready_at

    def note_end(self) -> None:
        """Once the call is over, send its result on its way."""
        if self._ready_at == math.inf and not self.is_cancelled and (end := self._job.end) < math.inf:
            self._ready_at = self._over(self._job.begin, end)

    def cancel(self) -> None:
        """See `Ticket`."""
        super().cancel()
        self._job.cancel()

    def result(self) -> T:
        """See `Ticket`."""
        assert self.is_done
        return self._call.result(self._job.status)


_never_freed: list[Called[Any]] = []
"""Calls that a thread which hangs may still be in the middle of."""


class Host:
    """Jobs are done in the order in which they come, whoever asks for them."""

    def __init__(self, pool: "WorkerPool", bell: "Bell", trace: Trace, cpu: int | None = None) -> None:
        """pool: whom the thread drives. cpu: where the thread itself stays; None is anywhere."""
        from tandemkv.kernels.cpu import Driver

        self.pool = pool
        self._bell, self._trace = bell, trace
        self._driver = Driver(bell, -1 if cpu is None else cpu)
        self._called: deque[Called[Any]] = deque()  # what the thread reads and writes has to live so long

    def call(
        self, name: str, call: "Call[T]", not_before: float = 0.0, over: Callable[[float], float] = lambda end: end
    ) -> Ticket[T]:
        """Make this call, with the host's own pool, not before a moment. over: given the moment at which it was over,
        tells the one from which the result is where it is waited for."""

        def traced(begin: float, end: float) -> float:
            self._trace.add("host", name, begin, end)
            return over(end)

        ticket = Called(self._bell, call, self._driver.make(call.native, not_before), traced)
        self._called.append(ticket)
        return ticket

    def note_ended(self) -> None:
        """Results of calls that are over go on their way, in their order, and what they read may be freed."""
        while self._called and self._called[0].has_ended:
            self._called.popleft().note_end()

    def submit(
        self,
        name: str,
        work: Callable[[], T],
        *,
        ticket: Ticket[T] | None = None,
        not_before: float = 0.0,
        then: Callable[[T], None] | None = None,
    ) -> Ticket[T]:
        """Do this in Python on the host's thread, not before a moment.

        The ticket, a new one or the one given, gets what comes of it; where there is a `then`, that gets it, and sets
        the ticket. An error is the ticket's in any case.
        """
        ticket = Ticket(self._bell) if ticket is None else ticket

        def do() -> None:
            if ticket.is_cancelled:
                return
            begin = time.perf_counter()
            try:
                value = work()
                self._trace.add("host", name, begin, time.perf_counter())
                if then is None:
                    ticket.set(lambda: value)
                else:
                    then(value)
            except BaseException as error:  # noqa: BLE001  raised where the ticket is waited for
                ticket.fail(error)

        self._driver.do(do, not_before)
        return ticket

    def settle(self) -> None:
        """Until it reads no page any more; one that hangs is not waited for longer than ten seconds."""
        with suppress(TimeoutError):
            self.submit("settle", lambda: None).wait(_SECONDS_TO_SETTLE)

    def close(self) -> None:
        """Ends the thread after what was submitted."""
        if self._driver.close(_SECONDS_TO_SETTLE):
            self._called.clear()
        _never_freed.extend(self._called)
