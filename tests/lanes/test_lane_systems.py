"""What defines each system with lanes: what crosses the links, who works, and that nothing is left out."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from tandemkv import machine
from tandemkv.crews import crew_for
from tandemkv.lanes import Crew, HybridCrew, Inputs
from tandemkv.schedule import Plan, predict
from tandemkv.schedule.budget import BudgetRule
from tandemkv.systems import SYSTEMS
from tandemkv.types import PagedKV
from tests.lanes.test_crew import SHAPES, Truth, inputs_of, parts_of, true
from tests.schedule.machines import plain_machine
from tests.tolerances import assert_within

SHAPE = replace(SHAPES[0], causal=True)
FAR_TOKENS = 896


class Step(NamedTuple):
    """A step of a system: its crew, what went over the links as (lane, bytes), and who was busy."""

    crew: Crew
    up: list[tuple[str, int]]
    down: list[tuple[str, int]]
    rows: set[str]

    @property
    def up_bytes(self) -> int:
        return sum(num for _, num in self.up)


@pytest.fixture
def truth() -> Truth:
    return true(SHAPE, torch.bfloat16, "panels")


@pytest.fixture
def crews() -> Iterator[list[Crew]]:
    if machine.usable_cpus() < 2:
        pytest.skip("a device and a host need two processors, there is one")
    made: list[Crew] = []
    yield made
    for crew in made:
        crew.close()


def run(
    name: str,
    truth: Truth,
    crews: list[Crew],
    monkeypatch: pytest.MonkeyPatch,
    inputs: Inputs | None = None,
    plan: Plan | None = None,
) -> Step:
    """One step, as `generate --system name` takes it; right within bounds."""
    crew = crew_for(SYSTEMS[name], plain_machine(), plan)
    crews.append(crew)
    links: dict[str, list[tuple[str, int]]] = {"up": [], "down": []}
    for row, found in links.items():
        link = getattr(crew.rig, row)

        def carry(*args: Any, link_carry: Any = link.carry, found: Any = found) -> Any:
            found.append(args[:2])
            return link_carry(*args)

        monkeypatch.setattr(link, "carry", carry)
    rows: set[str] = set()
    observe = crew.scheduler.observe

    def observed(solution: Any, measured: Any, step_s: float) -> None:
        rows.update(row for _, row in measured)
        observe(solution, measured, step_s)

    monkeypatch.setattr(crew.scheduler, "observe", observed)
    far, near = parts_of(truth.case, SHAPE.page_size)
    assert_within(crew.attend(truth.case.q, near, (far,), SHAPE.rule, inputs), truth.part, truth.bound)
    return Step(crew, links["up"], links["down"], rows)


def far_of(truth: Truth) -> PagedKV:
    return parts_of(truth.case, SHAPE.page_size)[0]


@pytest.mark.parametrize("name", ["flexgen", "headinfer"])
def test_flexgen_streams_everything(
    name: str, truth: Truth, crews: list[Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run(name, truth, crews, monkeypatch)
    assert step.up_bytes == far_of(truth).num_bytes
    assert not step.down
    assert "host" not in step.rows
    assert step.crew.stages_heads == (name == "headinfer")


def test_moe_lightning_attends_on_the_host(truth: Truth, crews: list[Crew], monkeypatch: pytest.MonkeyPatch) -> None:
    """What crosses has nothing to do with how much there is."""
    step = run("moe-lightning", truth, crews, monkeypatch)
    assert step.up_bytes == 4 * (truth.part.out.numel() + truth.part.lse.numel())
    assert sum(num for _, num in step.down) == truth.case.q.nbytes
    assert "host" in step.rows


@pytest.mark.parametrize("are_near", [True, False], ids=["row schedule", "column schedule"])
def test_kvpr_rebuilds_the_first_and_streams_the_rest(
    are_near: bool, truth: Truth, crews: list[Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rest, K and V come up; of the first nothing, or their inputs, before anything else."""
    inputs = inputs_of(truth.case, FAR_TOKENS, are_near)
    step = run("kvpr", truth, crews, monkeypatch, inputs, Plan({"recompute": 320, "stream": 576}, stage_tokens=64))
    streamed = far_of(truth).part(320 // 64, FAR_TOKENS // 64).num_bytes
    of_inputs = 0 if are_near else inputs.x(0, 320).nbytes
    assert sum(num for lane, num in step.up if lane == "stream") == streamed
    assert sum(num for lane, num in step.up if lane == "recompute") == of_inputs
    assert step.up[0][0] == ("stream" if are_near else "recompute")
    assert not step.down
    assert "host" not in step.rows


def test_tandem_is_predicted_no_slower_than_any_system_of_one_lane(
    truth: Truth, crews: list[Crew], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run("tandem", truth, crews, monkeypatch, inputs_of(truth.case, FAR_TOKENS, True))
    scheduler = step.crew.scheduler
    assert set(scheduler.lanes) == {"recompute", "attend", "logits", "stream"}
    assert scheduler._last is not None
    (work, speeds), solution = scheduler._last
    for lane in scheduler.lanes:
        alone = predict(work, speeds, Plan({lane: work.far_tokens}, solution.plan.stage_tokens))
        assert solution.prediction.seconds <= 1.001 * alone.seconds


def test_a_plan_keeps_hybridgen_s_budget_at_its_floor(crews: list[Crew]) -> None:
    budget = BudgetRule(256, 4096)
    for plan, most in ((None, 4096), (Plan({"logits": 1}), 256)):
        crew = crew_for(SYSTEMS["hybridgen"], plain_machine(), plan, budget)
        crews.append(crew)
        assert isinstance(crew, HybridCrew)
        assert (crew.budget.tokens, crew.budget.rule.floor_tokens, crew.budget.rule.most_tokens) == (256, 256, most)
