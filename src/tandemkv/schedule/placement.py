"""How much of the near memory holds layer inputs, that K and V are rebuilt from, and how much holds K and V themselves.

Near memory is what there is, not what it costs: a token's input kept near takes the place of part of a token's K and V,
which then lie far. Of a multi-head layer an input is half as large as K and V, and recomputation may gain; where 4
query heads share K and V it is twice as large, and keeping K and V themselves is always better.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from tandemkv.schedule.costs import COSTS
from tandemkv.schedule.solver import Solution, solve
from tandemkv.schedule.speeds import Machine
from tandemkv.schedule.work import Work

_NUM_TRIES = 16
_MIN_NEAR_PAGES = 2


class Placement(NamedTuple):
    """num_inputs: first tokens whose layer inputs are kept, near or far. near_tokens: whose K and V lie near then."""

    num_inputs: int
    where: Literal["near", "far"]
    near_tokens: int
    solution: Solution


def place(work: Work, machine: Machine, lanes: Sequence[str] = tuple(COSTS)) -> Placement:
    """The placement with the fastest plan, for work as it will be when the text has its full length.

    work: near_tokens say how much near memory there is; what it says of inputs does not count. Inputs are kept of no
    more tokens than the plan rebuilds.
    """
    plain = replace(work, num_inputs=0)
    best = Placement(0, "near", work.near_tokens, solve(plain, machine, lanes)) if set(lanes) != {"recompute"} else None
    if "recompute" not in lanes or not work.hidden or not work.far_tokens:
        assert best is not None, "recompute alone needs inputs"
        return best
    for found in (*_near(work, machine, lanes), _far(work, machine, lanes)):
        if best is None or found.solution.prediction.seconds < 0.98 * best.solution.prediction.seconds:
            best = found
    assert best is not None
    return best


def _near(work: Work, machine: Machine, lanes: Sequence[str]) -> list[Placement]:
    found = [(moved, solve(moved, machine, lanes)) for moved in near_works(work)]
    return [
        Placement(moved.num_inputs, "near", moved.near_tokens, solution)
        for moved, solution in found
        if "recompute" in solution.plan.tokens  # or it would be good for nothing but fewer tokens near
    ]


def near_works(work: Work) -> Iterator[Work]:
    """The same with inputs that share near memory with K and V, in steps of a sixteenth of what would fit."""
    room = work.near_tokens - _MIN_NEAR_PAGES * work.page_size
    most = min(work.far_tokens, int(room * work.near_bytes / work.input_bytes))
    for i in range(1, _NUM_TRIES + 1):
        num_inputs = most * i // _NUM_TRIES // work.page_size * work.page_size
        displaced = -(-num_inputs * work.input_bytes // work.near_bytes)
        pages = int(-(-displaced // work.page_size))
        if not num_inputs or pages * work.page_size > room:
            continue
        yield replace(
            work,
            near_tokens=work.near_tokens - pages * work.page_size,
            far_tokens=work.far_tokens + pages * work.page_size,
            num_inputs=num_inputs,
            inputs_are_near=True,
        )


def _far(work: Work, machine: Machine, lanes: Sequence[str]) -> Placement:
    solution = solve(replace(work, num_inputs=work.far_tokens, inputs_are_near=False), machine, lanes)
    return Placement(solution.plan.tokens.get("recompute", 0), "far", work.near_tokens, solution)
