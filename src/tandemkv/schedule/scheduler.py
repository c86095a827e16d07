"""Which plan a layer's next step has: solved anew where something has changed by more than noise."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from tandemkv.errors import InputError, LaneError
from tandemkv.schedule.costs import COSTS, RESOURCES, predict
from tandemkv.schedule.feedback import WINDOW, Corrections
from tandemkv.schedule.solver import Solution, rebalance, solve
from tandemkv.schedule.speeds import Machine
from tandemkv.schedule.work import Plan, Work

MOVED = 0.02
"""An input that moved by so much makes a plan worth solving again."""

WORTH = 0.03
"""A new plan takes the place of another one where it is predicted to be so much shorter: less is noise, and a plan that
changes costs the first steps of every layer 0.3 ms here, because new runs of pages are checked."""

STEPS_TO_CORRECT, SECONDS_TO_CORRECT = 10, 0.02
"""Speeds are corrected after so many observed steps, or when these have taken so long: each time costs 0.1 ms."""

SOLVING_SHARE, CREDIT_S = 0.001, 0.012
"""Of the time of steps, that solving may take again, and seconds that it may take before; as much for balancing lanes
anew, and of both twice as much after a sudden change. A solution takes 7 to 12 ms here, balancing 2 (by hand). First
plans are not counted."""

FOLLOWING_SHARE = 0.003
"""Of the time of steps, that following what was measured may take. Where it has, a step that took as long as the last
one is not looked at: that costs 0.02 to 0.05 ms here (by hand), 2 % of the shortest steps. After a sudden change there
is `CREDIT_S` for that."""

WATCHED = 2 * STEPS_TO_CORRECT
"""Steps after a sudden change that are looked at: speeds are corrected with the tenth, plans follow."""

URGENT = 0.25
"""Where a resource, or the step, takes so much more or less of a step than when its plan was made, that has changed
suddenly; so has a step, or what a lane takes of one, that is so much longer or shorter than the last one was."""

NOTABLE = 0.05
"""Of a step: what is shorter says nothing about the step."""

_WHOLE = ("step", "")


class _Solved(NamedTuple):
    """The last solution for layers of a shape, and what it was solved for."""

    work: Work
    machine: Machine
    solution: Solution
    num_observed: int


class Scheduler:
    """Plans for layers of one machine. Layers of equal shape share a plan."""

    def __init__(self, machine: Machine, lanes: Sequence[str] = tuple(COSTS), frozen: Plan | None = None) -> None:
        """lanes: that may take part. frozen: the plan whose shares every step has, whatever is measured."""
        self.machine = machine
        self.lanes = tuple(lanes)
        self._frozen = frozen
        self._corrections = Corrections()
        self._solved: dict[Work, _Solved] = {}
        self._last: tuple[tuple[Work, Machine], Solution] | None = None
        self._expires = math.inf
        self.num_observed = 0  # steps from which was learnt
        self._stepped_s = self._observed_s = self._first_s = 0.0
        self._solving_s = self._balancing_s = self._following_s = 0.0
        self._last_seen: Mapping[tuple[str, str], float] = {}  # what the last observed step took
        self._num_watched = 0  # steps that are still looked at after a sudden change
        self._corrected_at = 0, 0.0  # how many steps were observed then, and what they had taken

    @property
    def planning_s(self) -> float:
        """All that plans have taken so far: solving first ones and others, following what was measured."""
        return self._first_s + self._solving_s + self._balancing_s + self._following_s

    def plan(self, work: Work) -> Solution:
        """The plan for this step, and what it is predicted to take."""
        now = work, self.machine
        if self._last is None or self._last[0] != now or self.num_observed >= self._expires:
            began, planning_s = time.perf_counter(), self.planning_s
            self._expires = math.inf
            self._last = now, self._planned(work)
            self._following_s += time.perf_counter() - began - (self.planning_s - planning_s)
        return self._last[1]

    def _planned(self, work: Work) -> Solution:
        if self._frozen is not None:
            return _fitted(self._frozen, work, self.machine)
        shape = replace(work, near_tokens=0, far_tokens=0, num_inputs=0)
        last = self._solved.get(shape)
        if last is None:
            began, solution = time.perf_counter(), solve(work, self.machine, self.lanes)
            self._solved[shape] = _Solved(work, self.machine, solution, self.num_observed)
            self._first_s += time.perf_counter() - began
            return solution
        kept = _fitted(last.solution.plan, work, self.machine)
        has_moved = _has_moved(last, work, self.machine)
        if self.num_observed - last.num_observed >= WINDOW:
            is_urgent = _is_urgent(last.solution, kept)
            if has_moved and self._may_take(self._solving_s, is_urgent):
                return self._solve_anew(shape, work, kept)
            if (has_moved or is_urgent) and self._may_take(self._balancing_s, is_urgent):
                return self._rebalance(shape, work, kept)
        if has_moved:  # asked again then
            self._expires = self.num_observed + STEPS_TO_CORRECT
        return kept

    def observe(
        self, solution: Solution, measured: Mapping[tuple[str, str], float], step_s: float | None = None
    ) -> None:
        """What the lanes of a step took: seconds of (lane, resource), `near` among the lanes; and the whole step."""
        began, took_s = time.perf_counter(), solution.prediction.seconds if step_s is None else step_s
        self._stepped_s += took_s
        if step_s is not None and not self._is_worth_observing({**measured, _WHOLE: step_s}, step_s):
            self._corrections.pass_by(solution.prediction)
            self._following_s += time.perf_counter() - began
            return
        self.num_observed += 1
        self._observed_s += took_s
        self._corrections.observe(solution.prediction, self.machine, measured, step_s)
        num, seconds = self.num_observed - self._corrected_at[0], self._observed_s - self._corrected_at[1]
        if num >= STEPS_TO_CORRECT or seconds >= SECONDS_TO_CORRECT:
            self.machine = self._corrections.corrected(self.machine, took_s)
            self._corrected_at = self.num_observed, self._observed_s
        self._following_s += time.perf_counter() - began

    def forget_plans(self) -> None:
        """The next step's plan is solved anew, with what has been measured until then."""
        self._solved.clear()
        self._last = None

    def hold(self, plan: Plan) -> None:
        """Every step has this plan's shares from now on, whatever is measured."""
        self._frozen = plan
        self._last = None

    def drop(self, lane: str) -> None:
        """A lane takes part no more. LaneError where it was the last one."""
        self.lanes = tuple(name for name in self.lanes if name != lane)
        self.forget_plans()
        if not self.lanes:
            raise LaneError(f"the last lane, {lane!r}, has failed: nothing is left that could attend to far tokens")
        if self._frozen is not None:
            kept = {name: num for name, num in self._frozen.tokens.items() if name in self.lanes}
            self._frozen = replace(self._frozen, tokens=kept or {self.lanes[0]: 1})

    def _solve_anew(self, shape: Work, work: Work, kept: Solution) -> Solution:
        """With any lanes."""
        began, solution = time.perf_counter(), _worth_it(solve(work, self.machine, self.lanes), kept)
        self._solved[shape] = _Solved(work, self.machine, solution, self.num_observed)
        self._solving_s += time.perf_counter() - began
        return solution

    def _rebalance(self, shape: Work, work: Work, kept: Solution) -> Solution:
        """With about the same lanes; what has moved since all were tried has still moved."""
        began, last = time.perf_counter(), self._solved[shape]
        solution = _worth_it(rebalance(work, self.machine, self.lanes, kept.plan), kept)
        self._solved[shape] = last._replace(solution=solution, num_observed=self.num_observed)
        self._balancing_s += time.perf_counter() - began
        return solution

    def _may_take(self, taken_s: float, is_urgent: bool) -> bool:
        return taken_s < (1 + is_urgent) * (CREDIT_S + SOLVING_SHARE * self._stepped_s)

    def _is_worth_observing(self, measured: Mapping[tuple[str, str], float], step_s: float) -> bool:
        pairs = [(self._last_seen.get(key, 0.0), seconds) for key, seconds in measured.items()]
        if any(abs(new - old) > max(URGENT * old, NOTABLE * step_s) for old, new in pairs):
            self._num_watched = WATCHED
        credit_s = CREDIT_S if self._num_watched else 0.0
        self._num_watched = max(0, self._num_watched - 1)
        is_worth_it = self._following_s < FOLLOWING_SHARE * self._stepped_s + credit_s
        if is_worth_it:
            self._last_seen = measured
        return is_worth_it


def _worth_it(found: Solution, kept: Solution) -> Solution:
    return found if found.prediction.seconds <= (1 - WORTH) * kept.prediction.seconds else kept


def _fitted(plan: Plan, work: Work, machine: Machine) -> Solution:
    """A plan's shares of the far tokens that there are now."""
    if plan.num_tokens != work.far_tokens or plan.tokens.get("recompute", 0) > work.num_inputs:
        plan = plan.scaled(work.far_tokens, work.page_size, {"recompute": work.num_inputs})
        if plan.num_tokens != work.far_tokens:
            raise InputError(
                f"a plan over {', '.join(plan.tokens) or 'no lane'} cannot take {work.far_tokens} far tokens: layer "
                f"inputs are kept for {work.num_inputs}; allow another lane"
            )
    return Solution(plan, predict(work, machine, plan))


def _is_urgent(solved: Solution, kept: Solution) -> bool:
    then, now = solved.prediction, kept.prediction
    seconds = [(then.resources.get(name, 0.0), now.resources.get(name, 0.0)) for name in RESOURCES]
    return any(abs(new - old) > URGENT * then.seconds for old, new in (*seconds, (then.seconds, now.seconds)))


def _has_moved(last: _Solved, work: Work, machine: Machine) -> bool:
    """Whether tokens or speeds have changed by more than noise since a plan was solved."""
    then, before = last.machine, last.work
    tokens = [(before.near_tokens, work.near_tokens), (before.far_tokens, work.far_tokens)]
    keys = then.factors.keys() | machine.factors.keys()
    factors = [(then.factors.get(key, 1.0), machine.factors.get(key, 1.0)) for key in keys]
    lanes = then.mixtures.keys() | machine.mixtures.keys()
    mixtures = [(then.mixtures.get(key, 1.0), machine.mixtures.get(key, 1.0)) for key in lanes]
    return any(abs(new - old) > MOVED * min(old, new) for old, new in (*tokens, *factors, *mixtures))
