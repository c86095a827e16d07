"""The split of far tokens over lanes that makes a step shortest: every set of lanes is balanced, the best is kept.

With the set of lanes fixed, what a step takes of each resource is nearly a straight line in the tokens of each lane
(costs.py), so that the best split is a corner of a linear program: as many of its limits hold with equality as there
are unknowns. All corners are tried, twice: around an even split, then around what was found. In whole pages, pages are
moved from lane to lane as long as that helps, with the costs as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, permutations
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandemkv.errors import InputError
from tandemkv.schedule.costs import COSTS, NUM_SLOTS, RESOURCES, Prediction, predict
from tandemkv.schedule.speeds import Machine
from tandemkv.schedule.work import Plan, Work

MIN_STAGE_TOKENS, MAX_STAGE_TOKENS = 256, 4096

EXTRA_LANE = 0.02
"""A lane more must shorten a step by so much: predictions do not know better, and each may fail."""

_PROMISING, _PROMISING_OF_FEW, _FEW_PAGES = 1.02, 1.3, 64
"""A set of lanes so much slower than the best one may still win when its pages are moved, more so where they are few.
In 4,000 random cases of up to 10 pages plans took at most 2.3 % longer than the best of all splits, which may have a
lane more."""

_Floats = NDArray[np.float64]


class Solution(NamedTuple):
    """A plan, and what it is predicted to take."""

    plan: Plan
    prediction: Prediction


def solve(work: Work, machine: Machine, lanes: Sequence[str] = tuple(COSTS), like: Plan | None = None) -> Solution:
    """The fastest plan over these lanes for all far tokens, whose staging fits `free_near_bytes`.

    like: where the sizes of stages and pieces come from; None chooses stages so that their start-ups and what no
    other stage hides are balanced.
    InputError for an unknown lane, and where no set of lanes can take all tokens.
    """
    usable = _usable(work, lanes)
    if like is not None:
        return _solved(work, machine, usable, like)
    best = _solved(work, machine, usable, Plan(stage_tokens=_stage(work, work.far_tokens / 8)))
    better = _balanced_stage(work, machine, best)
    if better == best.plan.stage_tokens:
        return best
    other = _solved(work, machine, tuple(best.plan.tokens), Plan(stage_tokens=better))
    return min(best, other, key=_price)


def rebalance(work: Work, machine: Machine, lanes: Sequence[str], kept: Plan) -> Solution:
    """The best split over the lanes of a plan, or one lane alone, or where it has one lane over that and another, with
    stages as they are: much less work than `solve`.

    InputError where lanes cannot take all far tokens.
    """
    usable = _usable(work, lanes)
    has = {name for name in usable if kept.tokens.get(name)}
    wanted = [has, *({name} for name in usable), *(has | {name} for name in usable if len(has) == 1)]
    sets = {tuple(name for name in usable if name in each) for each in wanted}
    can_take = [chosen for chosen in _sets(work, usable) if chosen in sets]
    found = [_balanced(work, machine, chosen, kept) for chosen in can_take]
    fitting = [each for each in found if each is not None]
    if not fitting:
        return _solved(work, machine, usable, kept)
    return min(fitting, key=_price)


def solve_with(work: Work, machine: Machine, lane: str, lanes: Sequence[str], like: Plan) -> Solution | None:
    """The fastest plan over these lanes in which one of them has a page at least, be it worth that or not.

    None where it cannot have one. like: where the sizes of pieces come from, and first of stages.
    """
    sets = [chosen for chosen in _sets(work, _usable(work, lanes)) if lane in chosen]

    def best(like: Plan) -> Solution | None:
        found = [_balanced(work, machine, chosen, like) for chosen in sets]
        having = [each for each in found if each is not None and lane in each.plan.tokens]  # pages may be too few
        return min(having, key=_price, default=None)

    found = best(like)
    if found is None:
        return None
    other = best(replace(like, stage_tokens=_balanced_stage(work, machine, found)))
    return found if other is None else min(found, other, key=_price)


def _usable(work: Work, lanes: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in lanes if name not in COSTS]
    if unknown or not lanes:
        raise InputError(f"expected lanes of {', '.join(COSTS)}, got {', '.join(unknown) or 'none'}")
    return tuple(name for name in COSTS if name in lanes and _most(work, name) > 0)


def _most(work: Work, lane: str) -> int:
    """Tokens that a lane can take at most, in whole pages."""
    num = min(work.num_inputs, work.far_tokens) if lane == "recompute" else work.far_tokens
    return num // work.page_size * work.page_size


def _solved(work: Work, machine: Machine, lanes: Sequence[str], like: Plan) -> Solution:
    if not work.far_tokens:
        plan = replace(like, tokens={})
        return Solution(plan, predict(work, machine, plan))
    found = [_balanced(work, machine, chosen, like) for chosen in _sets(work, lanes)]
    fitting = [each for each in found if each is not None]
    if not fitting:
        raise InputError(
            f"no lane can take {work.far_tokens} far tokens: {', '.join(lanes) or 'none'} of {', '.join(COSTS)} may "
            f"take part, layer inputs are kept for {work.num_inputs} tokens, {work.free_near_bytes:.4g} bytes are free "
            f"near for stages of {like.stage_tokens} tokens; allow more lanes, or lower near_tokens"
        )
    promising = _PROMISING_OF_FEW if work.far_tokens < _FEW_PAGES * work.page_size else _PROMISING
    bar = promising * min(map(_price, fitting))
    return min((_improved(work, machine, lanes, each) for each in fitting if _price(each) <= bar), key=_price)


def _sets(work: Work, lanes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every set of lanes that can take all far tokens."""
    for size in range(1, len(lanes) + 1):
        for chosen in combinations(lanes, size):
            if sum(_most(work, name) for name in chosen) >= work.far_tokens // work.page_size * work.page_size:
                yield chosen


def _balanced(work: Work, machine: Machine, chosen: tuple[str, ...], like: Plan) -> Solution | None:
    """The best split over these lanes, each with a page at least; None where what comes up does not fit."""
    most = np.array([_most(work, name) for name in chosen]) / work.far_tokens
    shares = np.minimum(most, 1 / len(chosen))
    if len(chosen) > 1:
        for _ in range(2):
            shares = _best_corner(_lines(work, machine, chosen, like, shares), work.page_size / work.far_tokens, most)
    pages = _in_pages(work, shares, most)
    plan = replace(like, tokens={name: num * work.page_size for name, num in zip(chosen, pages, strict=True) if num})
    solution = Solution(plan, predict(work, machine, plan))
    return solution if solution.prediction.near_bytes <= work.free_near_bytes else None


class _Lines(NamedTuple):
    """What shares of the far tokens take: `start + slopes @ shares`. The rows are the seconds of every resource and of
    every lane's way to the device, in seconds of an even split, and last what comes up, as a part of what is free near.

    The device is as long as its work or the longest way, which is no straight line: they have rows of their own.
    """

    start: _Floats
    slopes: _Floats


def _lines(work: Work, machine: Machine, chosen: tuple[str, ...], like: Plan, at: _Floats) -> _Lines:
    def takes(shares: _Floats) -> _Floats:
        tokens = dict(zip(chosen, (shares * work.far_tokens).tolist(), strict=True))
        found = predict(work, machine, replace(like, tokens=tokens))
        busy = sum(each.get("device", 0.0) for each in found.busy.values())
        seconds = [busy if name == "device" else found.resources.get(name, 0.0) for name in RESOURCES]
        ways = [found.ways.get(name, 0.0) for name in COSTS]
        return np.array([*seconds, *ways, found.near_bytes / work.free_near_bytes])

    here, step = takes(at), 1 / 64
    slopes = np.stack([(takes(at + step * unit) - here) / step for unit in np.eye(len(at))], 1)
    scale = np.append(np.full(len(here) - 1, here[:-1].max()), 1.0)
    return _Lines((here - slopes @ at) / scale, slopes / scale[:, None])


def _best_corner(lines: _Lines, least: float, most: _Floats) -> _Floats:
    """The shares, each in [least, most], that make the longest resource shortest."""
    num, num_seconds = len(most), len(lines.start) - 1
    # Unknowns are the shares and the seconds; a row is a limit: row @ unknowns <= right.
    seconds = np.append(-np.ones(num_seconds), 0.0)[:, None]
    rows = np.vstack([np.hstack([lines.slopes, seconds]), -np.eye(num, num + 1), np.eye(num, num + 1)])
    right = np.concatenate([np.append(np.zeros(num_seconds), 1.0) - lines.start, np.full(num, -least), most])
    may_bind = np.concatenate([lines.slopes.any(1), np.ones(num, bool), most < 1])
    rows, right = rows[may_bind], right[may_bind]
    whole = np.append(np.ones(num), 0.0)
    active = _choices(len(rows), num)
    systems = np.concatenate([rows[active], np.broadcast_to(whole, (len(active), 1, num + 1))], 1)
    values = np.concatenate([right[active], np.ones((len(active), 1))], 1)
    is_corner = np.abs(np.linalg.det(systems)) > 1e-9
    corners = np.linalg.solve(systems[is_corner], values[is_corner][..., None])[..., 0]
    fits = corners[(corners @ rows.T <= right + 1e-7).all(1)]
    if not len(fits):  # what comes up does not fit, however it is split
        return np.minimum(most, 1 / num)
    best: _Floats = fits[fits[:, -1].argmin(), :-1]
    return best


@cache
def _choices(num: int, size: int) -> NDArray[np.int64]:
    return np.array(list(combinations(range(num), size)), dtype=np.int64)


def _in_pages(work: Work, shares: _Floats, most: _Floats) -> list[int]:
    """Whole pages of each lane, all far pages together: rounded down, what is left to the largest remainders."""
    num_pages, room = work.far_tokens // work.page_size, np.floor(most * work.far_tokens / work.page_size + 1e-9)
    pages = np.minimum(np.maximum(np.floor(shares * num_pages + 1e-9), 0), room)
    while (left := int(num_pages - pages.sum())) > 0:
        lacking = np.where(pages < room, pages - shares * num_pages, np.inf)
        pages[np.argsort(lacking, kind="stable")[: min(left, (pages < room).sum())]] += 1
    return [int(num) for num in pages]


def _improved(work: Work, machine: Machine, lanes: Sequence[str], found: Solution) -> Solution:
    """Pages moved from lane to lane while that helps: costs have steps that straight lines do not know."""
    step = 8 * work.page_size
    while step >= work.page_size:
        tried = [_moved(work, machine, found, giver, taker, step) for giver, taker in permutations(lanes, 2)]
        best = min((each for each in tried if each is not None), key=_price, default=found)
        if _price(best) < _price(found):
            found = best
        else:
            step //= 2
    return found


def _moved(work: Work, machine: Machine, found: Solution, giver: str, taker: str, num: int) -> Solution | None:
    """The same with so many tokens of one lane given to another; None where that cannot be."""
    tokens = {name: found.plan.tokens.get(name, 0) for name in COSTS}
    tokens[giver] -= num
    tokens[taker] += num
    if tokens[giver] < 0 or tokens[taker] > _most(work, taker):
        return None
    plan = replace(found.plan, tokens={name: num for name, num in tokens.items() if num})
    solution = Solution(plan, predict(work, machine, plan))
    return solution if solution.prediction.near_bytes <= work.free_near_bytes else None


def _balanced_stage(work: Work, machine: Machine, found: Solution) -> int:
    """Tokens of a stage, so that what all their start-ups take is what the first and the last one's time is: nothing
    hides either. n stages of T seconds cost n * start + T / n: least with n = sqrt(T / start).

    Where the device rebuilds beside it, slots must not be full before it has done a piece: the link would stand still.
    """
    names = [name for name in ("stream", "logits") if found.plan.tokens.get(name)]
    if not names:
        return found.plan.stage_tokens
    busy, name = found.prediction.busy, names[0]
    up_s = sum(busy[each].get("up", 0.0) for each in names)
    hidden_by_none = up_s + sum(busy[each].get("device", 0.0) for each in names)
    up, device = machine.up.start_us * machine.factor(name, "up"), machine.device_attend.start_us
    start = (up + device * machine.factor(name, "device")) * 1e-6 + machine.handoff_s
    tokens = sum(found.plan.tokens[each] for each in names)
    stage = tokens / max(1.0, sqrt(hidden_by_none / start)) if start else found.plan.stage_tokens
    num_rebuilt = found.plan.tokens.get("recompute", 0)
    if num_rebuilt and up_s:
        piece_s = busy["recompute"]["device"] * min(1.0, found.plan.piece_tokens / num_rebuilt)
        stage = max(stage, piece_s / NUM_SLOTS * tokens / up_s)
    return _stage(work, stage)


def _stage(work: Work, num_tokens: float) -> int:
    """So many tokens as whole pages within bounds, and of which NUM_SLOTS fit near."""
    room = work.free_near_bytes / (NUM_SLOTS * work.num_seqs * work.kv_bytes)
    num = min(max(num_tokens, MIN_STAGE_TOKENS), MAX_STAGE_TOKENS, room)
    return max(1, int(num // work.page_size)) * work.page_size


def _price(solution: Solution) -> float:
    return solution.prediction.seconds * (1 + EXTRA_LANE * max(0, len(solution.plan.tokens) - 1))
