"""Why a plan is what it is, in words made of predictions: of the plan, and of what else could be done."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from tandemkv.errors import InputError
from tandemkv.schedule.costs import COSTS, Prediction, predict
from tandemkv.schedule.placement import near_works
from tandemkv.schedule.solver import EXTRA_LANE, Solution, solve, solve_with
from tandemkv.schedule.speeds import Machine
from tandemkv.schedule.work import Plan, Work

NAMES = {
    "device": "the device",
    "host": "the host",
    "memory": "the host's memory",
    "up": "the link up",
    "down": "the link down",
}
"""Of the resources, in sentences."""

FULL = 0.9
"""Of a step: a resource that is needed for so long has no room for another lane."""

BALANCED = 0.95
"""Of a step: resources that are needed for so long end together."""


class Choice(NamedTuple):
    """What else could be done, and on what condition; None where it cannot be."""

    solution: Solution | None
    condition: str = ""


class Facts(NamedTuple):
    """A plan and the alternatives to it, all predicted with the same speeds.

    best: what the solver chooses. alone: a lane with all far tokens. without: the best without a lane of the plan.
    beside: the best plan that uses a lane, by lanes that the plan leaves out.
    """

    work: Work
    lanes: tuple[str, ...]
    solution: Solution
    best: Solution
    alone: Mapping[str, Choice]
    without: Mapping[str, Choice]
    beside: Mapping[str, Choice]


def gather(work: Work, machine: Machine, plan: Plan, lanes: Sequence[str]) -> Facts:
    """What a plan and the alternatives to it take on this machine; lanes: that may take part."""
    solution = Solution(plan, predict(work, machine, plan))
    known = tuple(name for name in COSTS if name in lanes)
    used = [name for name in known if plan.tokens.get(name)]
    others = [name for name in known if name not in used] if work.far_tokens else []
    return Facts(
        work,
        known,
        solution,
        _solved(work, machine, known).solution or solution,
        {name: _alone(work, machine, name) for name in (known if work.far_tokens else ())},
        {name: _solved(work, machine, [each for each in known if each != name]) for name in used},
        {name: _beside(work, machine, name, known, plan) for name in others},
    )


def reasons(facts: Facts) -> list[str]:
    """Sentences: what binds, what each lane alone would take, what each is worth, why the others have nothing to do."""
    if not facts.work.far_tokens:
        return [f"Nothing is far: the device attends to {facts.work.near_tokens:,} near tokens."]
    sentences = [_binds(facts.solution.prediction), *_spare(facts.solution.prediction), *_alone_told(facts)]
    sentences += [_worth(facts, name, choice) for name, choice in facts.without.items()]
    sentences += [_left_out(facts, name, choice) for name, choice in facts.beside.items()]
    return [*sentences, *_other_plan(facts)]


def ms(seconds: float) -> str:
    """`0.01234` as `'12.3 ms'`, below a hundredth of one as `'1.02 us'`."""
    number = 1e3 * seconds
    if number < 0.00995:
        return f"{1e3 * number:.3g} us"
    return f"{number:,.0f} ms" if number >= 99.95 else f"{number:.3g} ms"


def percent(share: float) -> str:
    """`0.123` as `'12 %'`, `0.00412` as `'0.41 %'`."""
    return f"{100 * share:,.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def loads_of(prediction: Prediction, resource: str) -> list[tuple[str, float]]:
    """Who keeps a resource busy, and for how many seconds; the longest first."""
    loads = [(name, busy[resource]) for name, busy in prediction.busy.items() if busy.get(resource, 0.0) > 0]
    return sorted(loads, key=lambda load: -load[1])


def _solved(work: Work, machine: Machine, lanes: Sequence[str]) -> Choice:
    try:
        return Choice(solve(work, machine, lanes))
    except InputError:  # no such lanes can take all tokens
        return Choice(None)


def _alone(work: Work, machine: Machine, lane: str) -> Choice:
    if lane != "recompute" or work.num_inputs >= work.far_tokens or not work.hidden:
        return _solved(work, machine, [lane])
    supposed = replace(work, num_inputs=work.far_tokens, inputs_are_near=False)
    return _solved(supposed, machine, [lane])._replace(condition="if all layer inputs were kept, far")


def _beside(work: Work, machine: Machine, lane: str, lanes: Sequence[str], like: Plan) -> Choice:
    """The best plan that uses a lane. Where it has no layer inputs: as if they were kept, far or near."""
    if lane != "recompute" or work.num_inputs or not work.hidden:
        return Choice(solve_with(work, machine, lane, lanes, like))
    supposed = [replace(work, num_inputs=work.far_tokens, inputs_are_near=False), *near_works(work)]
    found = []
    for each in supposed:
        solution = solve_with(each, machine, lane, lanes, like)
        if solution is not None:
            found.append(Choice(solution, _kept(work, each, solution)))
    return min(found, key=_seconds, default=Choice(None))


def _kept(work: Work, supposed: Work, solution: Solution) -> str:
    """Which layer inputs are supposed to be kept."""
    if not supposed.inputs_are_near:
        return f"with layer inputs of {solution.plan.tokens['recompute']:,} tokens kept far"
    displaced = work.near_tokens - supposed.near_tokens
    return f"with layer inputs of {supposed.num_inputs:,} tokens kept near, in place of K and V of {displaced:,},"


def _seconds(choice: Choice) -> float:
    assert choice.solution is not None
    return choice.solution.prediction.seconds


def _binds(prediction: Prediction) -> str:
    binds = prediction.binds
    loads = " and ".join(f"{name} {ms(seconds)}" for name, seconds in loads_of(prediction, binds))
    busy = sum(seconds for _, seconds in loads_of(prediction, binds))
    waits = prediction.resources[binds] - busy
    told = f", {ms(waits)} of it before and after its work" if waits > 0.01 * prediction.seconds else ""
    late = prediction.seconds - prediction.resources[binds]
    if late > 0.01 * prediction.seconds:
        told += f"; steps of these lanes were {ms(late)} longer than that"
    return f"{_capital(NAMES[binds])} binds: of {ms(prediction.seconds)} it works {ms(busy)} ({loads}){told}."


def _spare(prediction: Prediction) -> Iterator[str]:
    """What of the other resources is left."""
    parts = {name: seconds / prediction.seconds for name, seconds in prediction.resources.items() if seconds > 0}
    others = {name: part for name, part in parts.items() if name != prediction.binds}
    together = [NAMES[name] for name, part in others.items() if part >= BALANCED]
    if together:
        yield f"{_capital(_listed(together))} end{'s' if len(together) == 1 else ''} within 5 % of it."
    spare = [f"{NAMES[name]} {percent(1 - part)}" for name, part in others.items() if 0.005 < part < BALANCED]
    if spare:
        yield f"To spare: {_listed(spare)} of the step."


def _alone_told(facts: Facts) -> Iterator[str]:
    told, possible = [], {}
    for name, (solution, condition) in facts.alone.items():
        if solution is None:
            told.append(f"{name} cannot take all tokens")
            continue
        seconds, binds = solution.prediction.seconds, NAMES[solution.prediction.binds]
        told.append(f"{name} {ms(seconds)} ({binds} would bind{f', {condition}' if condition else ''})")
        if not condition:
            possible[name] = seconds
    yield f"A single lane with all {facts.work.far_tokens:,} far tokens: {'; '.join(told)}."
    if len(facts.solution.plan.tokens) > 1 and possible:
        best, now = min(possible, key=lambda name: possible[name]), facts.solution.prediction.seconds
        if possible[best] >= now:
            yield f"The split is {possible[best] / now:.2f} times as fast as the best of them, {best}."
        else:
            yield f"{_capital(best)} alone would be {now / possible[best]:.2f} times as fast as the split."


def _worth(facts: Facts, lane: str, choice: Choice) -> str:
    """What a step would take without a lane of the plan."""
    num = facts.solution.plan.tokens[lane]
    start = f"{lane} has {num:,} tokens, {percent(num / facts.work.far_tokens)} of the far ones"
    if choice.solution is None:
        return f"{start}: no other lane of this system can take them."
    return (
        f"{start}: without it a step would take {_compared(facts, choice.solution)} ({choice.solution.plan.summary})."
    )


def _left_out(facts: Facts, lane: str, choice: Choice) -> str:
    """Why a lane has no tokens."""
    found, change = choice.solution, 0.0
    start = f"{lane} has no tokens: "
    if lane == "recompute" and not facts.work.num_inputs:
        start += _no_inputs(facts.work)
    if found is None:
        return f"{start}not a page of them fits."
    change = found.prediction.seconds / facts.solution.prediction.seconds - 1
    if -EXTRA_LANE < change < 0:
        told = f"it would save {percent(-change)}, and a lane more has to be worth {percent(EXTRA_LANE)}"
    else:
        told = f"a step would take {_compared(facts, found)}{_crowded(facts, lane, found)}"
    condition = choice.condition or f"with {found.plan.tokens[lane]:,} tokens"
    return f"{start}{condition} {told}."


def _no_inputs(work: Work) -> str:
    if not work.hidden:
        return "there are no layer inputs; "
    near, far = (work.input_bytes / num_bytes for num_bytes in (work.near_bytes, work.kv_bytes))
    sizes = f"{near:.2g} times" if abs(near - far) < 0.05 * near else f"near {near:.2g} times, far {far:.2g} times"
    return f"no layer inputs are kept, of which one takes {sizes} the bytes of the K and V it replaces; "


def _crowded(facts: Facts, lane: str, found: Solution) -> str:
    """What a lane would need that is full already, and of what."""
    now, needs = facts.solution.prediction, found.prediction.busy[lane]
    full = [name for name, s in needs.items() if s > 0 and now.resources.get(name, 0.0) >= FULL * now.seconds]
    told = [f"{NAMES[name]}, which {_filling(now, name)}" for name in full]
    if told:
        return f"; it would need {' and '.join(told)}"
    return f"; {NAMES[found.prediction.binds]} would bind"


def _filling(now: Prediction, resource: str) -> str:
    lanes = [lane for lane, _ in loads_of(now, resource)]
    return f"{_listed(lanes)} fill{'s' if len(lanes) == 1 else ''}"


def _other_plan(facts: Facts) -> Iterator[str]:
    """Where the plan is not the one that the solver chooses."""
    if facts.best.prediction.seconds < facts.solution.prediction.seconds:
        yield f"The solver would choose {facts.best.plan.summary}: {_compared(facts, facts.best)}."


def _compared(facts: Facts, other: Solution) -> str:
    """`"12.3 ms, 18 % more"`; from twice as long, `"24.6 ms, 2.36 times as long"`."""
    now, then = facts.solution.prediction.seconds, other.prediction.seconds
    change = then / now - 1
    if abs(change) < 5e-4:
        return f"{ms(then)}, as much"
    if change >= 1:
        return f"{ms(then)}, {then / now:.3g} times as long"
    return f"{ms(then)}, {percent(abs(change))} {'more' if change > 0 else 'less'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
