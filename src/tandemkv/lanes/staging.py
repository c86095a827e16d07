"""Loads that come up one after the other into staging slots: one is filled while the device reads the other."""

from collections.abc import Generator, Sequence

from tandemkv.lanes.rig import Rig
from tandemkv.lanes.tickets import Ticket
from tandemkv.schedule.costs import NUM_SLOTS


class Staging:
    """What is to come up, in this order; the first NUM_SLOTS loads are on their way at once."""

    def __init__(self, rig: Rig, name: str, num_bytes: Sequence[int]) -> None:
        """num_bytes: of each load. name: under which they stand in the trace."""
        self._rig, self._name, self._num_bytes = rig, name, num_bytes
        self._tickets: list[Ticket[None]] = []
        for _ in range(NUM_SLOTS):
            self._send_next()

    def loads(self) -> Generator[int, None, None]:
        """Number after number, each when it is there. Who asks for the next has read this one: its slot is free."""
        try:
            for i in range(len(self._num_bytes)):
                self._tickets[i].wait()
                yield i
                self._send_next()
        finally:
            for ticket in self._tickets:
                ticket.cancel()

    def _send_next(self) -> None:
        if len(self._tickets) < len(self._num_bytes):
            num_bytes = self._num_bytes[len(self._tickets)]
            self._tickets.append(self._rig.send_up(self._name, num_bytes, lambda: None))
