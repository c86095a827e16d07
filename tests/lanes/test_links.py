"""Links keep their time, their order and what they carry; tickets are done once, whoever waits."""

import gc
import time
import weakref
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tandemkv import kernels
from tandemkv.errors import LaneError, LaneWarning
from tandemkv.kernels.cpu import Bell
from tandemkv.lanes import Crew, Rig
from tandemkv.lanes.links import SMALL_BYTES, Link
from tandemkv.lanes.tickets import Trace
from tandemkv.schedule import Plan, Scheduler, Speed
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule
from tests.schedule.machines import plain_machine

LATE_S = 0.05
"""A shared machine may let a thread wait for so long; never may it run early."""


class Bench:
    """One link, with its bell and trace."""

    def __init__(self, start_us: float = 1000.0, gbps: float = 1.0, copies: bool = False) -> None:
        self.bell, self.trace = Bell(), Trace()
        self.link = Link("up", Speed(start_us, gbps), self.bell, self.trace, copies=copies)

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
    """20 of 2 ms each are over after 40 ms: that whoever waits wakes late is not added up."""
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


def test_a_slower_link_is_slower_from_the_next_transfer_on() -> None:
    with Bench(start_us=0, gbps=10) as bench:
        bench.link.send("a", 1_000_000, lambda: None).wait(10)
        bench.link.speed = Speed(0, 1)
        bench.link.send("b", 1_000_000, lambda: None).wait(10)
        fast, slow = (span.end - span.begin for span in bench.trace.take())
    assert [fast, slow] == pytest.approx([1e-4, 1e-3])


def test_what_nobody_waits_for_frees_the_link() -> None:
    with Bench(start_us=0, gbps=1e-6) as bench:
        stuck = bench.link.send("stuck", 1_000_000, lambda: None)  # 1,000 s
        with pytest.raises(TimeoutError, match=r"nothing came within 0\.1 s"):
            stuck.wait(0.1)
        bench.link.speed = Speed(0, 1)
        bench.link.clear()
        assert bench.link.send("next", 100_000, lambda: 1).wait(10) == 1
        assert not stuck.is_done


def test_a_thread_that_waits_costs_no_core() -> None:
    with Bench(start_us=0, gbps=0.01) as bench:
        ticket = bench.link.send("x", 3_000_000, lambda: None)  # 300 ms
        used, begin = time.process_time(), time.perf_counter()
        ticket.wait(10)
        assert time.process_time() - used < 0.2 * (time.perf_counter() - begin)


def test_two_gigabytes_a_second_with_a_real_copy() -> None:
    """Order, overlap and content are real: what arrives is a copy in a staging slot, made while the device computes."""
    layout = PageLayout(torch.bfloat16, 64, "panels")
    arena = Arena.allocate(layout, 128, 8, 128)  # 33.5 MB: 17 ms
    arena.k.normal_()
    arena.v.normal_()
    table = torch.randperm(128).to(torch.int32).expand(1, 8, 128)
    far = PagedKV(arena, table, torch.zeros(1, dtype=torch.int64), torch.full((1,), 128 * 64))
    q, rule = torch.randn(1, 8, 1, 128).bfloat16(), ScoreRule(0.09)
    rig = Rig(Speed(0, 2), Speed(0, 2), copies=True)
    try:
        crew = Crew(rig, Scheduler(plain_machine(), ("stream",), Plan({"stream": 64}, stage_tokens=1024)))
        copied = rig.send_pages("x", far, rig.landing(far, 0)).wait(10)
        assert copied.arena.k.data_ptr() != arena.k.data_ptr()
        begin = time.perf_counter()
        got = crew.attend(q, far.part(0, 0), (far,), rule)
        took = time.perf_counter() - begin
    finally:
        rig.close()
    expected = kernels.attend(q, far, rule=rule)
    assert torch.allclose(got.out, expected.out, atol=1e-5)
    seconds = far.num_bytes / 2e9
    assert seconds <= took <= seconds + 4 * LATE_S


def test_an_error_of_a_copy_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise RuntimeError("lost")

    with Bench(copies=True) as bench:
        ticket = bench.link.send("x", SMALL_BYTES + 1, fail)
        with pytest.raises(RuntimeError, match="lost"):
            ticket.wait(10)
        assert bench.link.send("y", SMALL_BYTES + 1, lambda: 3).wait(10) == 3  # the link goes on


def test_the_host_does_one_job_after_the_other(rig: Rig) -> None:
    seen: list[int] = []
    tickets = [rig.host.submit(str(i), partial(seen.append, i)) for i in range(5)]
    tickets[-1].wait(10)
    assert seen == [0, 1, 2, 3, 4]
    began = time.perf_counter()
    assert rig.host.submit("later", time.perf_counter, not_before=began + 0.02).wait(10) >= began + 0.02


def test_closing_ends_the_threads() -> None:
    """Native ones, which Python does not count, too."""

    def num_threads() -> int:
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    Rig(Speed(0, 1), Speed(0, 1), copies=True).close()  # torch's own have begun
    before = num_threads()
    rig = Rig(Speed(0, 1), Speed(0, 1), copies=True)
    assert num_threads() >= before + 2
    rig.close()
    assert num_threads() == before


# -- calls without Python ----------------------------------------------------------------------------------------------


def nothing_but(num_pages: int = 2) -> tuple[torch.Tensor, PagedKV]:
    """A query, and pages of numbers."""
    arena = Arena.allocate(PageLayout(torch.bfloat16, 64, "panels"), num_pages, 2, 64)
    arena.k.normal_()
    arena.v.normal_()
    table = torch.arange(num_pages, dtype=torch.int32).expand(1, 2, num_pages)
    run = PagedKV(arena, table, torch.zeros(1).long(), torch.full((1,), num_pages * 64))
    return torch.randn(1, 4, 1, 64).bfloat16(), run


def test_a_call_is_made_though_nobody_holds_what_it_reads(rig: Rig) -> None:
    """The thread begins when all but the ticket is gone; afterwards nothing is kept alive."""
    q, run = nothing_but()
    expected = kernels.attend(q, run, rule=ScoreRule(0.1))
    arena = weakref.ref(run.arena)
    ticket = rig.host.call(
        "late", kernels.prepare_attend(q, run, rule=ScoreRule(0.1)), not_before=time.perf_counter() + 0.05
    )
    del q, run
    gc.collect()
    assert arena() is not None
    assert torch.equal(ticket.wait(10).out, expected.out)
    del ticket
    rig.host.note_ended()
    gc.collect()
    assert arena() is None


def test_a_call_that_is_cancelled_while_it_waits_is_not_made(rig: Rig) -> None:
    q, run = nothing_but()
    call = kernels.prepare_attend(q, run, rule=ScoreRule(0.1))
    call.value.out.fill_(7)
    ticket = rig.host.call("late", call, not_before=time.perf_counter() + 0.2)
    ticket.cancel()
    rig.host.settle()
    assert (call.value.out == 7).all()
    assert not ticket.is_done


def test_what_the_host_had_ready_goes_up_first(rig: Rig) -> None:
    """Though nobody had asked for it yet."""
    q, run = nothing_but()
    rig.up.speed = Speed(0, 0.01)
    ready = partial(rig.up.carry, "answer", SMALL_BYTES + 1)
    rig.host.call("answer", kernels.prepare_attend(q, run, rule=ScoreRule(0.1)), over=ready)
    rig.host.settle()
    rig.send_up("stream", SMALL_BYTES + 1, lambda: None)
    names = [span.name for span in rig.trace.take() if span.row == "up"]
    assert names == ["answer", "stream"]


# -- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_runs_that_are_streamed_beside_each_other_have_slots_of_their_own(
    copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of the second run are not what was sent ahead of the first, and do not lie where it does."""
    q, whole = nothing_but(14)
    runs, expected = (whole.part(0, 8), whole.part(8, 14)), kernels.attend(q, whole, rule=ScoreRule(0.1))
    rig = Rig(Speed(10, 20), Speed(10, 20), copies=copies)
    sent: list[int] = []
    carry = rig.up.carry

    def logged(name: str, num_bytes: int, *at: float) -> float:
        sent.append(num_bytes)
        return carry(name, num_bytes, *at)

    monkeypatch.setattr(rig.up, "carry", logged)
    try:
        crew = Crew(rig, Scheduler(plain_machine(), ("stream",), Plan({"stream": 64}, stage_tokens=256)))
        for is_ahead in (False, True):
            sent.clear()
            if is_ahead:
                crew.send_ahead(runs)
            got = crew.attend(q, whole.part(0, 0), runs, ScoreRule(0.1))
            assert torch.allclose(got.out, expected.out, atol=1e-5)
            assert sum(sent) == whole.num_bytes
    finally:
        rig.close()


@pytest.mark.parametrize("stage_tokens", [64, 256], ids=["small", "large"])
def test_a_stage_that_could_not_be_copied_is_not_read(stage_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are copied where they are used, large ones by the link's thread."""
    q, whole = nothing_but(14)
    assert (stage_tokens == 64) == (whole.part(0, stage_tokens // 64).num_bytes <= SMALL_BYTES)

    def lost(*_: object) -> None:
        raise RuntimeError("lost")

    rig = Rig(Speed(10, 20), Speed(10, 20), copies=True)
    try:
        crew = Crew(rig, Scheduler(plain_machine(), ("stream",), Plan({"stream": 64}, stage_tokens=stage_tokens)))
        monkeypatch.setattr(kernels, "move_pages", lost)
        with pytest.warns(LaneWarning, match="lost"), pytest.raises(LaneError, match="the last lane, 'stream'"):
            crew.attend(q, whole.part(0, 0), (whole,), ScoreRule(0.1))
    finally:
        rig.close()
