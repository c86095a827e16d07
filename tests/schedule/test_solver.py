"""The solver against brute force, and the known results that must come out of it as corners."""

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemkv.errors import InputError
from tandemkv.schedule import COSTS, Machine, Plan, Products, Solution, Speed, Work, predict, solve
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.schedule.solver import EXTRA_LANE, _in_pages, solve_with
from tests.schedule.machines import INF, MACHINES, PLANS, plain_machine, plain_work, works

WHOLE = 1 << 30
"""Pieces so large that a lane rebuilds all its tokens at once, as KVPR does."""


WORSE = 0.03
"""What whole pages may cost more than the best of all: moved one by one, they may stop on the wrong side of a start-up.
Of 4,000 random cases the worst was 2.3 % off (by hand)."""


def shares(num_pages: int, num_lanes: int) -> Iterator[tuple[int, ...]]:
    if num_lanes == 1:
        yield (num_pages,)
        return
    for first in range(num_pages + 1):
        for rest in shares(num_pages - first, num_lanes - 1):
            yield (first, *rest)


def price(num_lanes: int) -> float:
    return 1 + EXTRA_LANE * (num_lanes - 1)


def best_of_all(work: Work, machine: Machine, like: Plan) -> float:
    """Seconds of the best split in whole pages, each lane but one dearer; inf where none fits."""
    best = INF
    for pages in shares(work.far_tokens // work.page_size, len(COSTS)):
        tokens = {name: num * work.page_size for name, num in zip(COSTS, pages, strict=True) if num}
        if tokens.get("recompute", 0) > work.num_inputs:
            continue
        found = predict(work, machine, replace(like, tokens=tokens))
        if found.near_bytes <= work.free_near_bytes:
            best = min(best, found.seconds * price(len(tokens)))
    return best


@settings(max_examples=150, deadline=None)
@given(works(12), MACHINES, PLANS)
def test_no_split_in_whole_pages_is_much_faster(work: Work, machine: Machine, like: Plan) -> None:
    best = best_of_all(work, machine, like)
    if best == INF:
        with pytest.raises(InputError, match="no lane can take"):
            solve(work, machine, like=like)
        return
    found = solve(work, machine, like=like)
    assert found.plan.num_tokens == work.far_tokens
    assert found.prediction.seconds * price(len(found.plan.tokens)) <= best * (1 + WORSE)
    assert found.prediction.near_bytes <= work.free_near_bytes


def kvpr(far_tokens: int, up_gbps: float, gflops: float, inputs_are_near: bool) -> Solution:
    """KVPR's own model: rebuilding and the link alone take time."""
    work = plain_work(far_tokens, page_size=1, num_inputs=far_tokens, inputs_are_near=inputs_are_near)
    machine = replace(plain_machine(1e9, up_gbps=up_gbps), products=Products(((1, gflops),)))
    return solve(work, machine, ("recompute", "stream"), Plan(stage_tokens=WHOLE, piece_tokens=WHOLE))


@pytest.mark.parametrize("inputs_are_near", [True, False], ids=["row", "column"])
@pytest.mark.parametrize(("gflops", "up_gbps"), [(80, 0.1), (80, 0.02), (312e3, 32), (312e3, 200), (1e3, 8)])
def test_kvpr_comes_out_as_a_corner(gflops: float, up_gbps: float, inputs_are_near: bool) -> None:
    """l* = s' p v_gpu / (p v_gpu + 2 h v_com), for both schedules (2411.17089, Eq. 10)."""
    s, h, p = 4096, 1024, 2
    expected = s * p * gflops / (p * gflops + 2 * h * up_gbps)
    found = kvpr(s, up_gbps, gflops, inputs_are_near)
    assert found.plan.tokens.get("recompute", 0) == pytest.approx(expected, abs=1)
    left = (s - expected) * 2 * h * p / (up_gbps * 1e9)
    sent = 0.0 if inputs_are_near else expected * h * p / (up_gbps * 1e9)
    assert found.prediction.seconds == pytest.approx(sent + left, rel=2e-3)


def test_kvpr_figure_12() -> None:
    """A prompt of 256 on an A100 with a link of 32 GB/s: 181 to 182 of 257 tokens are rebuilt."""
    work = plain_work(257, num_kv_heads=32, page_size=1, num_inputs=257, inputs_are_near=True)
    machine = replace(plain_machine(1e9, up_gbps=32), products=Products(((1, 312e3),)))
    found = solve(work, machine, ("recompute", "stream"), Plan(stage_tokens=WHOLE, piece_tokens=WHOLE))
    assert 180 <= found.plan.tokens["recompute"] <= 182


@settings(max_examples=50, deadline=None)
@given(works(12), MACHINES, PLANS)
def test_a_plan_with_a_lane_has_it_and_is_no_better_than_the_best(work: Work, machine: Machine, like: Plan) -> None:
    best = best_of_all(work, machine, like)
    for lane in COSTS:
        found = solve_with(work, machine, lane, tuple(COSTS), like)
        if found is None:
            assert lane == "recompute" or work.free_near_bytes < INF
            continue
        assert found.plan.tokens[lane] > 0
        assert found.plan.num_tokens == work.far_tokens
        if found.plan.stage_tokens == like.stage_tokens:
            assert found.prediction.seconds * price(len(found.plan.tokens)) >= best * (1 - 1e-9)


def test_all_on_the_host_where_the_link_is_slow() -> None:
    found = solve(plain_work(8192), plain_machine(up_gbps=1e-3))
    assert found.plan.tokens == {"attend": 8192}
    assert found.prediction.binds == "host"


def test_all_streamed_where_the_host_is_slow() -> None:
    found = solve(plain_work(8192), plain_machine(host_gbps=1e-3, up_gbps=1000))
    assert found.plan.tokens == {"stream": 8192}
    assert found.prediction.binds == "device"


def test_two_lanes_take_as_their_speeds_are() -> None:
    """Link 10, host 20 GB/s: a third is streamed."""
    found = solve(plain_work(30 * 64), plain_machine(), ("attend", "stream"), Plan(stage_tokens=64))
    assert found.plan.tokens == {"attend": 20 * 64, "stream": 10 * 64}


def test_logits_halve_what_a_slow_link_carries() -> None:
    """K stays with the host: of a link that binds, logits ask half as much (and 4 bytes a query head)."""
    machine = plain_machine(up_gbps=1, host_gbps=1e3)
    whole, half = (solve(plain_work(8192), machine, (lane,)).prediction.busy for lane in ("stream", "logits"))
    assert half["logits"]["up"] == pytest.approx(whole["stream"]["up"] / 2 * (1 + 4 / 256))


def test_memory_binds_where_processors_share_it() -> None:
    found = solve(plain_work(8192), plain_machine(40, 40, 40, memory_gbps=30), ("attend", "stream"))
    assert found.prediction.binds == "memory"


def test_staging_beyond_the_room_near_is_not_planned() -> None:
    machine = plain_machine(host_gbps=1)
    assert "stream" in solve(plain_work(8192), machine).plan.tokens
    tight = plain_work(8192, free_near_bytes=1000.0)
    assert solve(tight, machine).plan.tokens == {"attend": 8192}
    with pytest.raises(InputError, match="1000 bytes are free"):
        solve(tight, machine, ("stream",))


def test_no_far_token_needs_no_lane() -> None:
    found = solve(plain_work(0, near_tokens=640), plain_machine())
    assert found.plan.tokens == {}
    assert found.prediction.seconds == pytest.approx(640 * 4096 / 40e9)


@pytest.mark.parametrize("lanes", [("attend", "teleport"), ()])
def test_unknown_lanes_are_refused(lanes: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="expected lanes of recompute, attend, logits, stream"):
        solve(plain_work(64), plain_machine(), lanes)


def test_recompute_alone_needs_all_inputs() -> None:
    with pytest.raises(InputError, match="layer inputs are kept for 64 tokens"):
        solve(plain_work(128, num_inputs=64), plain_machine(), ("recompute",))


def test_stages_balance_start_ups_and_what_is_not_hidden() -> None:
    """Large starts want few stages, small ones many."""
    slow, quick = (
        replace(plain_machine(host_gbps=0.1), up=Speed(start, 10), device_attend=Speed(start, 40)) for start in (300, 3)
    )
    few, many = (solve(plain_work(65536), machine, ("stream",)).plan.stage_tokens for machine in (slow, quick))
    assert few > 2 * many


def test_planning_is_quick() -> None:
    """Measured 13 ms here beside other work, for all four lanes; a step of 128K tokens takes 100 ms and more, and is
    planned anew every 2,600 tokens."""
    work = plain_work(1 << 17, num_inputs=1 << 16)
    machine = plain_machine()
    solve(work, machine)
    begin = time.perf_counter()
    solve(work, machine)
    assert time.perf_counter() - begin < 0.5


def test_slots_are_not_full_while_the_device_rebuilds() -> None:
    """Pieces of 256 tokens, each longer than two stages, would let the link stand still: stages become longer."""
    work = plain_work(4096, num_inputs=4096, inputs_are_near=True)
    machine = replace(plain_machine(1e9, up_gbps=0.1), products=Products(((1, 48.0),)))

    def times(plan: Plan) -> tuple[float, float, float]:
        """Seconds of a piece, of filling all slots, and for which the link carries nothing."""
        found = predict(work, machine, plan)
        up_s = found.busy["stream"]["up"]
        piece_s = found.busy["recompute"]["device"] * plan.piece_tokens / plan.tokens["recompute"]
        slots_s = NUM_SLOTS * up_s * plan.stage_tokens / plan.tokens["stream"]
        return piece_s, slots_s, found.resources["up"] - up_s

    plan = solve(work, machine, ("recompute", "stream")).plan
    piece_s, slots_s, idle_s = times(plan)
    assert piece_s <= slots_s
    assert idle_s == pytest.approx(0, abs=1e-6)
    piece_s, slots_s, idle_s = times(replace(plan, stage_tokens=128))
    assert idle_s == pytest.approx(plan.tokens["recompute"] / 256 * (piece_s - slots_s), rel=1e-6)
    assert idle_s > 0.01


def test_a_link_may_be_infinitely_fast() -> None:
    """Nothing stands still there, however long a piece takes."""
    work = plain_work(4096, num_inputs=4096, inputs_are_near=True)
    machine = replace(plain_machine(), up=Speed(0, INF))
    found = solve_with(work, machine, "recompute", ("recompute", "stream"), Plan())
    assert found is not None
    assert found.plan.tokens["recompute"] > 0


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30)), min_size=1, max_size=4), st.integers(1, 30))
def test_shares_become_whole_pages_that_fit(lanes: list[tuple[float, int]], num_pages: int) -> None:
    """Whatever is left to whom, where some are full and shares are too small for all pages together."""
    room = [num_pages, *(min(num, num_pages) for _, num in lanes[1:])]
    most = np.array(room) / num_pages
    shares = np.minimum(np.array([share for share, _ in lanes]) / len(lanes), most)
    pages = _in_pages(plain_work(num_pages * 64), shares, most)
    assert sum(pages) == num_pages
    assert all(int(share * num_pages) <= num <= most for share, num, most in zip(shares, pages, room, strict=True))
