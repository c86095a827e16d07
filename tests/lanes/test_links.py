"""Links keep their time, their order and what they carry; tickets are done once, whoever waits."""

import threading
import time
from functools import partial
from itertools import pairwise
from threading import Condition

import pytest
import torch

from tandemkv.lanes import Rig
from tandemkv.lanes.links import SMALL_BYTES, Link
from tandemkv.lanes.tickets import Ticket, Trace
from tandemkv.schedule import Speed

LATE_S = 0.05
"""A shared machine may let a thread wait for so long; never may it run early."""


class Bench:
    """One link, with its bell and trace."""

    def __init__(self, start_us: float = 1000.0, gbps: float = 1.0) -> None:
        self.bell, self.trace = Condition(), Trace()
        self.link = Link("up", Speed(start_us, gbps), self.bell, self.trace)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()


def test_a_transfer_takes_latency_and_bytes() -> None:
    with Bench(start_us=5000, gbps=1) as bench:
        begin = time.perf_counter()
        assert bench.link.send("x", 20_000_000, lambda: 7).wait(10) == 7
        took = time.perf_counter() - begin
    assert 0.025 <= took <= 0.025 + LATE_S


def test_transfers_follow_each_other_without_drift() -> None:
    """20 of 2 ms each are over after 40 ms: that the thread wakes late is not added up."""
    with Bench(start_us=1000, gbps=1) as bench:
        tickets = [bench.link.send(str(i), 1_000_000, partial(int, i)) for i in range(20)]
        assert [ticket.wait(10) for ticket in tickets] == list(range(20))
        spans = bench.trace.take()
    assert [span.name for span in spans] == [str(i) for i in range(20)]
    assert spans[-1].end - spans[0].begin == pytest.approx(0.040, abs=1e-6)
    for before, after in pairwise(spans):
        assert after.begin == pytest.approx(before.end, abs=1e-9)


def test_what_is_small_waits_for_nobody() -> None:
    with Bench(start_us=0, gbps=0.001) as bench:
        large = bench.link.send("large", SMALL_BYTES + 1, lambda: None)  # 65 ms
        bench.link.send("small", 1000, lambda: None).wait(10)  # 1 ms
        assert not large.is_done
        large.wait(10)
        assert [span.name for span in bench.trace.take()] == ["small", "large"]


def test_a_slower_link_is_slower_from_the_next_transfer_on() -> None:
    with Bench(start_us=0, gbps=10) as bench:
        first = bench.link.send("a", 1_000_000, lambda: None)
        first.wait(10)
        bench.link.speed = Speed(0, 1)
        bench.link.send("b", 1_000_000, lambda: None).wait(10)
        fast, slow = (span.end - span.begin for span in bench.trace.take())
    assert [fast, slow] == pytest.approx([1e-4, 1e-3])


def test_what_nobody_waits_for_frees_the_link() -> None:
    with Bench(start_us=0, gbps=1e-6) as bench:
        stuck = bench.link.send("stuck", 1_000_000, lambda: None)  # 1,000 s
        behind = bench.link.send("behind", 100_000, lambda: 1)
        with pytest.raises(TimeoutError, match=r"nothing came within 0\.1 s"):
            stuck.wait(0.1)
        bench.link.speed = Speed(0, 1)
        stuck.cancel()
        assert behind.wait(10) == 1
        assert not stuck.is_done


def test_two_gigabytes_a_second_with_a_real_copy() -> None:
    """Order, overlap and content are real: what arrives is a copy, made while the device computes."""
    source = torch.arange(16_000_000, dtype=torch.uint8)  # 16 MB: 8 ms
    slots = [torch.empty_like(source), torch.empty_like(source)]
    with Bench(start_us=0, gbps=2) as bench:
        begin = time.perf_counter()
        tickets = [bench.link.send("copy", source.nbytes, partial(slot.copy_, source)) for slot in slots]
        arrived = [ticket.wait(10) for ticket in tickets]
        took = time.perf_counter() - begin
    assert all(torch.equal(slot, source) for slot in arrived)
    assert all(slot.data_ptr() != source.data_ptr() for slot in arrived)
    assert 0.016 <= took <= 0.016 + LATE_S


def test_an_error_of_the_sender_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise RuntimeError("lost")

    with Bench() as bench:
        ticket = bench.link.send("x", 10, fail)
        with pytest.raises(RuntimeError, match="lost"):
            ticket.wait(10)
        assert bench.link.send("y", 10, lambda: 3).wait(10) == 3  # the link goes on


def test_then_runs_once_whether_done_before_or_after() -> None:
    bell, seen = Condition(), []
    ticket: Ticket[int] = Ticket(bell)
    ticket.then(lambda done: seen.append(done.result()))
    ticket.set(4)
    ticket.then(lambda done: seen.append(-done.result()))
    assert seen == [4, -4]


def test_a_sleeping_link_costs_no_core(rig: Rig) -> None:
    rig.up.speed = Speed(0, 0.01)
    ticket = rig.up.send("x", 3_000_000, lambda: None)  # 300 ms
    used, begin = time.process_time(), time.perf_counter()
    ticket.wait(10)
    assert time.process_time() - used < 0.2 * (time.perf_counter() - begin)


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    Rig(Speed(0, 1), Speed(0, 1)).close()
    assert threading.active_count() == before
