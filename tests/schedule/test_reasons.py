"""Why a plan is what it is: the sentences say what predictions say, and change with them."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings

from tandemkv.schedule import COSTS, Machine, Plan, Products, Speed, Work, solve
from tandemkv.schedule.costs import Cost
from tandemkv.schedule.reasons import Facts, gather, ms, percent, reasons
from tests.schedule.machines import MACHINES, plain_machine, plain_work, works

WORK = plain_work(28_672, group_size=4, near_tokens=4096)
MACHINE = replace(plain_machine(20, 14, 8, memory_gbps=28.0, handoff_us=30.0), device_attend=Speed(20, 20))


def told(work: Work, machine: Machine, lanes: tuple[str, ...] = tuple(COSTS), plan: Plan | None = None) -> list[str]:
    return reasons(facts_of(work, machine, lanes, plan))


def facts_of(work: Work, machine: Machine, lanes: tuple[str, ...] = tuple(COSTS), plan: Plan | None = None) -> Facts:
    return gather(work, machine, plan or solve(work, machine, lanes).plan, lanes)


def about(lane: str, sentences: list[str]) -> str:
    (found,) = [sentence for sentence in sentences if sentence.startswith(f"{lane} has ")]
    return found


def test_numbers_in_the_words_are_those_of_predictions() -> None:
    facts = facts_of(WORK, MACHINE)
    sentences, now = reasons(facts), facts.solution.prediction
    assert facts.solution == facts.best
    assert sentences[0].startswith(f"The host binds: of {ms(now.seconds)} it works {ms(now.busy['attend']['host'])}")
    assert sentences[1] == "The link up ends within 5 % of it."
    (alone,) = [sentence for sentence in sentences if sentence.startswith("A single lane with all 28,672 far tokens: ")]
    for lane in ("attend", "logits", "stream"):
        seconds = solve(WORK, MACHINE, (lane,)).prediction.seconds
        assert f"{lane} {ms(seconds)} (" in alone
    without = solve(WORK, MACHINE, ("recompute", "logits", "stream")).prediction.seconds
    assert f"{ms(without)}, {percent(without / now.seconds - 1)} more" in about("attend", sentences)


def test_what_steps_were_longer_than_any_resource_is_told() -> None:
    late = replace(MACHINE, mixtures={frozenset(("attend", "stream")): 1.1})
    facts = facts_of(WORK, late, ("attend", "stream"))
    longest = max(facts.solution.prediction.resources.values())
    assert reasons(facts)[0].endswith(f"; steps of these lanes were {ms(0.1 * longest)} longer than that.")
    assert "longer than that" not in reasons(facts_of(WORK, MACHINE, ("attend", "stream")))[0]


def test_what_is_full_keeps_a_lane_out() -> None:
    sentences = told(WORK, MACHINE)
    expected = (
        r"logits has no tokens: with 64 tokens .* more; it would need the host, which attend fills and the link up"
    )
    assert re.match(expected, about("logits", sentences))


def test_too_little_gained_keeps_a_lane_out() -> None:
    work = replace(plain_work(28_672, near_tokens=4096), num_inputs=28_672, inputs_are_near=False)
    machine = replace(MACHINE, products=Products(((1, 1600.0),)))
    expected = r"with \d+ tokens it would save 1\.\d+ %, and a lane more has to be worth 2 %"
    assert re.search(expected, about("recompute", told(work, machine)))


@pytest.mark.parametrize(("group_size", "times"), [(4, "2 times"), (1, "0.5 times")])
def test_inputs_that_are_not_kept(group_size: int, times: str) -> None:
    """Where heads share K and V, an input is larger than these."""
    sentence = about("recompute", told(plain_work(28_672, group_size, near_tokens=4096), MACHINE))
    assert f"no layer inputs are kept, of which one takes {times} the bytes of the K and V it replaces" in sentence
    assert re.search(r"with layer inputs of [\d,]+ tokens kept (far|near, in place of K and V of [\d,]+,)", sentence)


def test_no_layer_inputs_at_all() -> None:
    sentence = about("recompute", told(replace(WORK, hidden=0), MACHINE))
    assert sentence == "recompute has no tokens: there are no layer inputs; not a page of them fits."


def test_only_lanes_of_the_system_are_told_of() -> None:
    sentences = told(WORK, MACHINE, ("stream",))
    assert not any(lane in sentence for sentence in sentences for lane in ("attend", "logits", "recompute"))
    assert about("stream", sentences).endswith("no other lane of this system can take them.")


def test_a_plan_that_is_not_the_best_is_compared_with_it() -> None:
    given_plan = Plan({"attend": 4096, "stream": 24_576}, 1024)
    best = solve(WORK, MACHINE)
    (sentence,) = [each for each in told(WORK, MACHINE, plan=given_plan) if each.startswith("The solver would choose")]
    assert f"{best.plan.summary}: {ms(best.prediction.seconds)}" in sentence
    assert not any(each.startswith("The solver") for each in told(WORK, MACHINE))


def test_nothing_far() -> None:
    assert told(plain_work(0, near_tokens=640), MACHINE) == ["Nothing is far: the device attends to 640 near tokens."]


@pytest.mark.parametrize("lane", ["attend", "stream", "logits"])
def test_one_cost_function_moves_plan_and_words(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """attend and stream have tokens and lose them where they cost 10 times as much; logits gets some for a tenth."""
    before, original = facts_of(WORK, MACHINE), COSTS[lane]
    times = 0.1 if lane == "logits" else 10.0

    def changed(work: Work, machine: Machine, plan: Plan, num_tokens: float) -> Cost:
        cost = original(work, machine, plan, num_tokens)
        before, after = (
            {name: {on: times * s for on, s in wait.items()} for name, wait in waits.items()}
            for waits in (cost.before, cost.after)
        )
        return Cost({name: times * s for name, s in cost.busy.items()}, before, after, cost.near_bytes, cost.launch_s)

    monkeypatch.setitem(COSTS, lane, changed)
    after = facts_of(WORK, MACHINE)
    (less, more) = (before, after) if lane == "logits" else (after, before)
    assert less.solution.plan.tokens.get(lane, 0) < more.solution.plan.tokens.get(lane, 0) / 2
    was, became = reasons(before), reasons(after)
    assert about(lane, was) != about(lane, became)
    (was_alone, is_alone) = (facts.alone[lane].solution for facts in (before, after))
    assert was_alone is not None
    assert is_alone is not None
    assert is_alone == solve(WORK, MACHINE, (lane,))
    ratio = is_alone.prediction.seconds / was_alone.prediction.seconds
    assert ratio > 5 or ratio < 0.2
    (alone,) = [sentence for sentence in became if sentence.startswith("A single lane")]
    assert f"{lane} {ms(is_alone.prediction.seconds)} (" in alone


@settings(max_examples=40, deadline=None)
@given(works(12), MACHINES)
def test_there_are_reasons_for_anything(work: Work, machine: Machine) -> None:
    lanes = ("recompute", "attend", "logits", "stream")
    facts = facts_of(work, machine, lanes)
    sentences = reasons(facts)
    assert all(sentence.endswith(".") for sentence in sentences)
    assert facts.without.keys() | facts.beside.keys() == set(lanes)
    for lane, (solution, _) in facts.beside.items():
        assert about(lane, sentences).startswith(f"{lane} has no tokens: ")
        assert solution is None or solution.plan.tokens[lane] > 0
    for lane, (solution, _) in facts.without.items():
        assert solution is None or lane not in solution.plan.tokens


def test_seconds_and_shares_are_readable() -> None:
    found = [ms(seconds) for seconds in (1.02e-6, 0.000345, 0.01234, 0.0999, 0.09999, 12.3456)]
    assert found == ["1.02 us", "0.345 ms", "12.3 ms", "99.9 ms", "100 ms", "12,346 ms"]
    assert [percent(share) for share in (0.00412, 0.05, 0.123, 12.0)] == ["0.41 %", "5 %", "12 %", "1,200 %"]
