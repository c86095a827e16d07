"""The scheduler on machines that are not, or no longer, what the profile says; what a step takes is predicted from the
true machine."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemkv.errors import InputError, LaneError
from tandemkv.schedule import COSTS, Machine, Plan, Products, Scheduler, Solution, Speed, predict, solve
from tandemkv.schedule import scheduler as scheduler_module
from tandemkv.schedule.budget import Budget, BudgetRule
from tandemkv.schedule.feedback import FORGOTTEN, Corrections
from tests.schedule.machines import plain_machine, plain_work

WORK = plain_work(1 << 15, num_inputs=1 << 14, near_tokens=2048)
MACHINE = replace(
    plain_machine(40, 20, 10, memory_gbps=70.0, handoff_us=20.0),
    up=Speed(10, 10),
    device_attend=Speed(30, 40),
    products=Products(((1, 2000.0),)),  # so fast that rebuilding takes part: what nobody uses is not measured
)


def four_times(machine: Machine, resource: str, factor: float) -> Machine:
    """A machine on which one resource is so many times as fast."""

    def times(speed: Speed) -> Speed:
        return Speed(speed.start_us / factor, speed.gbps * factor)

    points = tuple((num, rate * factor) for num, rate in machine.products.points)
    return {
        "device": replace(
            machine,
            device_attend=times(machine.device_attend),
            device_weigh=times(machine.device_weigh),
            products=Products(points),
        ),
        "host": replace(machine, host_attend=times(machine.host_attend), host_logits=times(machine.host_logits)),
        "up": replace(machine, up=times(machine.up)),
        "products": replace(machine, products=Products(points)),
    }[resource]


class Run:
    """A scheduler, and the machine that it really runs on."""

    def __init__(self, profiled: Machine, true: Machine, lanes: tuple[str, ...] = tuple(COSTS)) -> None:
        self.scheduler, self.true = Scheduler(profiled, lanes), true

    def step(self, slow: float = 1.0) -> Solution:
        """One step, in which everything takes `slow` times as long."""
        solution = self.scheduler.plan(WORK)
        took = predict(WORK, self.true, solution.plan)
        measured = {(lane, row): s * slow for lane, rows in took.busy.items() for row, s in rows.items()}
        seen = {key: s for key, s in measured.items() if key[1] != "memory"}
        self.scheduler.observe(solution, seen, took.seconds * slow)
        return solution

    def seconds(self, plan: Plan) -> float:
        return predict(WORK, self.true, plan).seconds


class Clock:
    """Planning takes what it takes on the machine of the docs, whatever else this one is at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(scheduler_module, "time", self)
        for owner, name, seconds in (
            (scheduler_module, "solve", 10e-3),
            (scheduler_module, "rebalance", 2e-3),
            (scheduler_module, "_fitted", 100e-6),
            (Corrections, "corrected", 100e-6),
            (Corrections, "observe", 30e-6),
            (Corrections, "pass_by", 3e-6),
        ):
            monkeypatch.setattr(owner, name, self._taking(seconds, getattr(owner, name)))

    def perf_counter(self) -> float:
        return self.now

    def _taking(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self.now += seconds
            return function(*args)

        return timed


@pytest.mark.parametrize("times", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("resource", ["device", "host", "up", "products"])
def test_after_a_sudden_change_it_converges_within_20_steps_and_stays(
    resource: str, factor: float, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """times: as fast as the machine is. Steps of 0.8, 3 and 30 ms: behind many short ones, few are looked at."""
    Clock(monkeypatch)
    machine = MACHINE
    for each in ("device", "host", "up"):
        machine = four_times(machine, each, times)
    run = Run(machine, machine)
    for _ in range(1000):
        run.step()
    run.true = four_times(machine, resource, factor)
    for _ in range(20):
        run.step()
    plans = [run.step().plan for _ in range(40)]
    best = solve(WORK, run.true).prediction.seconds
    assert run.seconds(plans[0]) <= 1.05 * best
    assert all(plan == plans[0] for plan in plans), "it oscillates"


@pytest.mark.parametrize("size", [0.1, 10.0, 1000.0])
def test_one_outlier_changes_nothing(size: float) -> None:
    run = Run(MACHINE, MACHINE)
    before = [run.step().plan for _ in range(10)][-1]
    run.step(slow=size)
    assert [run.step().plan for _ in range(20)] == [before] * 20
    assert all(factor == pytest.approx(1) for factor in run.scheduler.machine.factors.values())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.9, 1.1), min_size=40, max_size=40))
def test_noise_moves_a_plan_rarely(noise: list[float]) -> None:
    """10 % of a step up or down: no better plan is to be had, and at most one is tried."""
    run = Run(MACHINE, MACHINE)
    plans = [run.step(slow).plan for slow in noise]
    assert sum(a != b for a, b in pairwise(plans)) <= 1


def test_a_wrong_profile_is_corrected() -> None:
    """The host is 3 times slower than it was profiled."""
    true = four_times(MACHINE, "host", 1 / 3)
    run = Run(MACHINE, true, ("attend", "stream"))
    first = run.step().plan
    for _ in range(20):
        last = run.step().plan
    best = solve(WORK, true, ("attend", "stream")).prediction.seconds
    assert run.seconds(first) > 1.3 * best
    assert run.seconds(last) <= 1.05 * best
    solution = run.scheduler.plan(WORK)
    assert solution.prediction.seconds == pytest.approx(run.seconds(last), rel=0.02)


def test_what_a_mixture_takes_beyond_its_longest_resource_is_learnt() -> None:
    """As the second shortest of five, so that steps that were late now and then do not count; nor does what a prompt
    has sent, and what no step of these lanes has shown for long is forgotten."""
    scheduler = Scheduler(MACHINE, ("attend", "stream"))
    solution = scheduler.plan(WORK)
    expected = max(solution.prediction.resources.values())
    for late in (1.2, 9.0, 1.25, 7.0, 8.0) * 2:
        scheduler.observe(solution, {("prefill", "up"): 60.0}, late * expected)
    mixed = frozenset(("attend", "stream"))
    assert scheduler.machine.mixture(mixed) == pytest.approx(1.25)
    assert predict(WORK, scheduler.machine, solution.plan).seconds == pytest.approx(1.25 * expected)
    alone = predict(WORK, scheduler.machine, Plan({"attend": WORK.far_tokens}))
    for _ in range(FORGOTTEN - 10):
        scheduler.observe(Solution(Plan({"attend": WORK.far_tokens}), alone), {}, alone.seconds)
    assert scheduler.machine.mixture(mixed) == pytest.approx(1.25)
    for _ in range(20):
        scheduler.observe(Solution(Plan({"attend": WORK.far_tokens}), alone), {}, alone.seconds)
    assert scheduler.machine.mixture(mixed) == 1


def test_a_lane_that_was_slow_once_is_tried_again() -> None:
    """Nobody measures a lane that has no tokens: after 100 steps it is believed to be as it was profiled."""
    run = Run(MACHINE, four_times(MACHINE, "up", 1 / 400), ("attend", "stream"))
    run.step()
    for _ in range(40):
        solution = run.step()
    assert solution.plan.tokens == {"attend": WORK.far_tokens}
    run.true = MACHINE
    with_stream = [bool(run.step().plan.tokens.get("stream")) for _ in range(FORGOTTEN + 40)]
    assert not any(with_stream[: FORGOTTEN - 50])
    assert with_stream[-1]


def test_a_lane_that_is_worth_it_again_is_tried_as_soon_when_it_was_dropped_again() -> None:
    slow = four_times(MACHINE, "up", 1 / 400)
    run = Run(MACHINE, slow, ("attend", "stream"))
    for _ in range(3):
        run.true = slow
        for _ in range(40):
            solution = run.step()
        assert not solution.plan.tokens.get("stream")
        run.true = MACHINE
        for _ in range(FORGOTTEN + 50):
            solution = run.step()
        assert solution.plan.tokens.get("stream")


def test_a_lane_in_use_is_not_forgotten_where_few_steps_are_looked_at() -> None:
    run = Run(MACHINE, four_times(MACHINE, "host", 1 / 3))
    for _ in range(20):
        run.step()
    scheduler = run.scheduler
    believed = scheduler.machine.factors["attend", "host"]
    scheduler._following_s = 1e9  # no time for it
    for _ in range(2 * FORGOTTEN):
        solution = scheduler.plan(WORK)
        scheduler.observe(solution, {}, solution.prediction.seconds)
    scheduler._following_s = 0.0
    for _ in range(20):
        solution = scheduler.plan(WORK)
        scheduler.observe(solution, {}, solution.prediction.seconds)
    assert believed == pytest.approx(3)
    assert scheduler.machine.factors["attend", "host"] == pytest.approx(3)


def test_a_lane_that_is_slow_for_ever_costs_little() -> None:
    """Streaming over a link that is 50 times slower than profiled: tried again after 100 steps, then 200, 400 ..."""
    run = Run(MACHINE, four_times(MACHINE, "up", 1 / 400), ("attend", "stream"))
    alone = run.seconds(Plan({"attend": WORK.far_tokens}))
    for _ in range(20):
        run.step()
    plans = [run.step().plan for _ in range(3000)]
    slow = [plan for plan in plans if plan.tokens.get("stream")]
    assert 0 < len(slow) <= 60  # four times until it is believed, which is ten steps and what stays in flight
    assert alone < run.seconds(slow[0])


def test_the_best_single_lane_where_mixing_loses() -> None:
    """The host alone reads all that memory gives: whoever else reads takes it away."""
    machine = replace(MACHINE, memory_gbps=20.0)
    assert Scheduler(machine, ("attend", "stream")).plan(WORK).plan.tokens == {"attend": WORK.far_tokens}


def test_layers_of_equal_shape_share_a_plan_until_their_tokens_moved() -> None:
    scheduler = Scheduler(MACHINE)
    first = scheduler.plan(WORK)
    assert scheduler.plan(WORK) == first
    longer = replace(WORK, far_tokens=WORK.far_tokens + 256)
    scaled = scheduler.plan(longer).plan
    assert scaled.num_tokens == longer.far_tokens
    shares = [scaled.tokens[name] / longer.far_tokens for name in scaled.tokens]
    assert shares == pytest.approx([first.plan.tokens[name] / WORK.far_tokens for name in scaled.tokens], abs=0.01)


@given(
    st.dictionaries(st.sampled_from(list(COSTS)), st.integers(1, 50), min_size=1),
    st.integers(0, 200),
    st.integers(0, 200),
)
def test_a_scaled_plan_takes_all_tokens_in_whole_pages(shares: dict[str, int], far: int, inputs: int) -> None:
    plan = Plan({name: num * 64 for name, num in shares.items()}).scaled(far * 64, 64, {"recompute": inputs * 64})
    assert all(num > 0 and num % 64 == 0 for num in plan.tokens.values())
    assert plan.tokens.get("recompute", 0) <= inputs * 64
    assert plan.num_tokens == (min(far, inputs) if set(shares) == {"recompute"} else far) * 64


def test_a_frozen_plan_stays() -> None:
    frozen = Plan({"attend": 3 * 64, "stream": 64}, stage_tokens=256)
    scheduler = Scheduler(MACHINE, ("attend", "stream"), frozen)
    for far in (256, 2560, 1 << 15):
        plan = scheduler.plan(replace(WORK, far_tokens=far)).plan
        assert plan == Plan({"attend": far * 3 // 4, "stream": far // 4}, stage_tokens=256)
        scheduler.observe(scheduler.plan(replace(WORK, far_tokens=far)), {("attend", "host"): 100.0})
    rebuilds = Scheduler(MACHINE, frozen=Plan({"recompute": 64}))
    with pytest.raises(InputError, match="a plan over recompute cannot take"):
        rebuilds.plan(replace(WORK, num_inputs=64))


def test_a_plan_that_is_held_stays_and_one_that_is_forgotten_is_solved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandemkv.schedule.scheduler.CREDIT_S", 0.0)
    monkeypatch.setattr("tandemkv.schedule.scheduler.SOLVING_SHARE", 0.0)
    monkeypatch.setattr("tandemkv.schedule.scheduler.FOLLOWING_SHARE", 1.0)
    run = Run(MACHINE, four_times(MACHINE, "host", 1 / 1.15), ("attend", "stream"))  # too little to be urgent
    first = [run.step().plan for _ in range(10)][-1]
    run.scheduler.forget_plans()
    second = run.step().plan
    assert second.tokens["attend"] < first.tokens["attend"]
    run.scheduler.hold(first)
    assert [run.step().plan for _ in range(10)] == [first] * 10


def test_a_dropped_lane_has_no_tokens() -> None:
    for frozen in (None, Plan({"attend": 64, "stream": 64})):
        scheduler = Scheduler(MACHINE, ("attend", "stream"), frozen)
        scheduler.plan(WORK)
        scheduler.drop("attend")
        assert scheduler.plan(WORK).plan.tokens == {"stream": WORK.far_tokens}
        with pytest.raises(LaneError, match="the last lane, 'stream'"):
            scheduler.drop("stream")


# -- HybridGen's budget ------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What lanes take: `us` a token that takes part, and with Post-QK `post_us` more; the device takes `device_us`."""

    device_us: float
    us: float
    post_us: float

    def seconds(self, budget: Budget) -> tuple[float, float]:
        return self.device_us * 1e-6, (budget.tokens * self.us + (0 if budget.picks_before else self.post_us)) * 1e-6


def run_budget(budget: Budget, stage: Stage, num_steps: int) -> list[int]:
    """The tokens of every step."""
    seen = []
    for _ in range(num_steps):
        seen.append(budget.tokens)
        budget.observe(*stage.seconds(budget))
    return seen


RULE = BudgetRule(floor_tokens=128, most_tokens=4096)


def test_spare_time_raises_the_budget_to_what_fits() -> None:
    budget = Budget(RULE)
    seen = run_budget(budget, Stage(1000, 1, 0), 400)
    assert 1000 - 2 * RULE.step_tokens <= budget.tokens <= 1000
    assert max(seen) <= 1000 + RULE.step_tokens
    late = seen[200:]
    too_much = sum(num > 1000 for num in late)
    assert too_much <= 2 * RULE.period, "what was too much is tried ever more rarely"


def test_lack_of_time_lowers_it_to_the_floor_and_picks_before() -> None:
    budget = Budget(RULE)
    run_budget(budget, Stage(1000, 1, 0), 100)
    assert budget.tokens > 900
    run_budget(budget, Stage(100, 1, 400), 100)
    assert budget.tokens == RULE.floor_tokens
    assert budget.picks_before


def test_post_qk_returns_when_it_fits_again() -> None:
    budget = Budget(RULE)
    run_budget(budget, Stage(200, 1, 400), 20)
    assert budget.picks_before
    run_budget(budget, Stage(500, 1, 400), 20)  # 528 would be needed: not yet
    assert budget.picks_before
    run_budget(budget, Stage(700, 1, 400), RULE.period * 2)
    assert not budget.picks_before


def test_it_never_leaves_its_bounds() -> None:
    budget = Budget(BudgetRule(100, 300))
    assert set(run_budget(budget, Stage(1e6, 1, 0), 100)) == {100, 164, 228, 292, 300}
    assert min(run_budget(budget, Stage(0, 1, 0), 100)) == 100


def test_an_outlier_within_a_period_decides_nothing() -> None:
    budget = Budget(RULE)
    for i in range(40):
        budget.observe(1e-3, 1.0 if i % RULE.period == 1 else 1e-5)
    assert budget.tokens == RULE.floor_tokens + 10 * RULE.step_tokens


@pytest.mark.parametrize("wrong", [(5, 4, 64, 4), (-1, 4, 64, 4), (0, 64, 10, 4), (0, 64, 0, 4), (0, 64, 64, 0)])
def test_budgets_that_cannot_be(wrong: tuple[int, int, int, int]) -> None:
    with pytest.raises(InputError, match="a budget"):
        BudgetRule(*wrong)


def test_what_solving_takes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time of steps, but for the first plan, however much machines change: 0.012 s and 0.1 % of it, twice that
    after sudden changes, and one solution more that was begun in time."""
    Clock(monkeypatch)
    run = Run(MACHINE, MACHINE)
    run.step()
    scheduler = run.scheduler
    before = scheduler.planning_s
    for i in range(400):
        run.true = four_times(MACHINE, ("host", "up", "device")[i // 7 % 3], 4.0 if i % 14 < 7 else 0.25)
        run.step()
    limit = 0.012 + 0.001 * scheduler._stepped_s
    assert limit + 0.010 < scheduler._solving_s <= 2 * limit + 0.010
    assert limit + 0.002 < scheduler._balancing_s <= 2 * limit + 0.002
    assert scheduler.planning_s > before


def test_a_plan_that_is_hardly_better_is_not_taken() -> None:
    true = four_times(MACHINE, "up", 1 / 1.04)
    run = Run(MACHINE, true, ("attend", "stream"))
    first = run.step().plan
    gain = 1 - solve(WORK, true, ("attend", "stream")).prediction.seconds / run.seconds(first)
    assert 0.01 < gain < 0.03
    assert [run.step().plan for _ in range(100)] == [first] * 100


def test_speeds_are_corrected_by_ten_steps_or_20_ms_of_them() -> None:
    for times, expected in ((4.0, 10), (1.0, 4)):  # steps of 1.3 and 5.3 ms
        machine = MACHINE
        for each in ("device", "host", "up"):
            machine = four_times(machine, each, times)
        run = Run(machine, four_times(machine, "host", 1 / 1.2))
        seen = []
        while run.scheduler.machine is machine:
            run.step()
            seen.append(run.scheduler.num_observed)
        assert seen[-1] == expected


def test_of_long_steps_few_are_enough() -> None:
    """What they took a quarter of a second ago is long ago: a change that is no sudden one is believed by five."""
    machine = MACHINE
    for each in ("device", "host", "up"):
        machine = four_times(machine, each, 0.02)
    run = Run(machine, machine)
    for _ in range(30):
        run.step()
    run.true = four_times(machine, "host", 1 / 1.15)
    for _ in range(5):
        run.step()
    assert run.scheduler.machine.factors["attend", "host"] == pytest.approx(1.15, rel=0.02)


@pytest.mark.parametrize(("spent", "calm", "sudden"), [(-0.001, 50, 50), (0.001, 0, 20), (0.013, 0, 0)])
def test_what_following_takes_is_limited_and_a_sudden_change_has_credit(spent: float, calm: int, sudden: int) -> None:
    """spent: seconds beyond 0.3 % of the time of steps. Then 20 steps are looked at after a change, no others."""
    run = Run(MACHINE, MACHINE)
    scheduler = run.scheduler

    def num_observed(times: float) -> int:
        before, solution = scheduler.num_observed, scheduler.plan(WORK)
        for _ in range(50):
            scheduler._following_s = 0.003 * scheduler._stepped_s + spent
            scheduler.observe(solution, {}, times * solution.prediction.seconds)
        return scheduler.num_observed - before

    for _ in range(30):
        scheduler.observe(scheduler.plan(WORK), {}, scheduler.plan(WORK).prediction.seconds)
    assert num_observed(1.0) == calm
    assert num_observed(2.0) == sudden


def test_a_plan_rebuilds_no_more_than_inputs_are_kept_of() -> None:
    """A crew goes on to a cache that keeps fewer: the shape is the same, and so are the tokens."""
    work = replace(WORK, num_inputs=WORK.far_tokens)
    machine = replace(MACHINE, products=Products(((1, 50_000.0),)))
    scheduler = Scheduler(machine, ("recompute", "stream"))
    assert scheduler.plan(work).plan.tokens["recompute"] > 512
    plan = scheduler.plan(replace(work, num_inputs=512)).plan
    assert plan.tokens["recompute"] <= 512
    assert plan.num_tokens == work.far_tokens
