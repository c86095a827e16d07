"""Near memory is a constraint: what it holds of inputs it does not hold of K and V."""

from dataclasses import replace

import pytest

from tandemkv.schedule import Machine, Products, solve
from tandemkv.schedule.placement import place
from tests.schedule.machines import plain_machine, plain_work

LANES = ("recompute", "stream")


def machine(up_gbps: float = 0.1) -> Machine:
    """A link so slow that rebuilding pays wherever memory allows."""
    return replace(plain_machine(400, up_gbps=up_gbps), products=Products(((1, 5000.0),)))


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_no_recomputation_where_heads_share_k_and_v(group_size: int) -> None:
    """An input takes `group_size` half tokens of K and V; though time alone would rebuild."""
    work = plain_work(16384, group_size, near_tokens=4096)
    placed = place(work, machine(), LANES)
    assert (placed.num_inputs, placed.near_tokens) == (0, 4096)
    free = replace(work, num_inputs=16384, inputs_are_near=True)
    assert solve(free, machine(), LANES).plan.tokens["recompute"] > 4096


def test_multi_head_layers_keep_inputs_near() -> None:
    """2 inputs in the place of 1 token's K and V."""
    work = plain_work(16384, near_tokens=12288)
    placed = place(work, machine(), LANES)
    assert placed.where == "near"
    assert placed.num_inputs == pytest.approx(2 * (12288 - placed.near_tokens), abs=128)
    assert placed.num_inputs > 12288
    plain = solve(work, machine(), LANES).prediction.seconds
    assert placed.solution.prediction.seconds < 0.8 * plain


def test_inputs_are_sent_where_near_memory_is_too_small() -> None:
    """KVPR's column schedule: half the bytes of K and V, and twice as many tokens as are rebuilt near."""
    placed = place(plain_work(16384, near_tokens=256), machine(), LANES)
    assert placed.where == "far"
    assert placed.num_inputs == placed.solution.plan.tokens["recompute"] > 8192
    assert placed.near_tokens == 256


def test_sent_inputs_never_pay_where_heads_share_k_and_v() -> None:
    assert place(plain_work(16384, 2, near_tokens=256), machine(), LANES).num_inputs == 0


def test_inputs_that_no_plan_rebuilds_are_not_kept() -> None:
    """Where the device is slower than the host, fewer near tokens are faster: that is no use of inputs."""
    slow = replace(plain_machine(1, host_gbps=40), products=Products(((1, 1.0),)))
    placed = place(plain_work(16384, near_tokens=8192), slow)
    assert placed == (0, "near", 8192, placed.solution)


def test_without_the_lane_nothing_is_kept() -> None:
    assert place(plain_work(16384, near_tokens=4096), machine(), ("attend", "stream")).num_inputs == 0
    assert place(plain_work(0, near_tokens=4096), machine()).num_inputs == 0
