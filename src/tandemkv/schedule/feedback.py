"""What steps took, measured, corrects what they are predicted to take. Numbers only."""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TypeVar

from tandemkv.schedule.costs import Prediction
from tandemkv.schedule.speeds import ANY, Machine

K = TypeVar("K")

WINDOW = 5
"""Measurements that tell a change: one or two slow ones move nothing, it is believed after three."""

MEMORY = 25
"""Measurements that tell what is usual. Memory that is shared with strangers is 10 % faster or slower from step to
step: following that costs more than it gains, since a new split is a new run of pages in every layer."""

CHANGED = 0.25
"""What has become so much longer or shorter than usual has changed."""

NOTICED = 0.01
"""Of a factor: what moved less is not worth a new machine."""

_REMEMBERED = 0.995

_SHORTEST_S = 20e-6
"""Shorter ones say more about the clock than about the machine."""


class Corrections:
    """How many times longer each lane takes of each resource than the machine's speeds say."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))
        self._of_mixtures: dict[frozenset[str], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))

    def observe(
        self,
        predicted: Prediction,
        machine: Machine,
        measured: Mapping[tuple[str, str], float],
        step_s: float | None = None,
    ) -> None:
        """measured: seconds of (lane, resource); step_s: of the whole step. predicted with this machine, corrections of
        it included."""
        if step_s is not None:
            spans = dict(predicted.resources)  # as they were, so that what a resource takes longer is not counted twice
            for (lane, resource), seconds in measured.items():
                if resource in spans and lane in predicted.busy:  # not what a prompt before it, or a sample, has sent
                    spans[resource] += seconds - predicted.busy[lane].get(resource, 0.0)
            used = frozenset(predicted.busy) - {"near"}
            self._of_mixtures[used].append(step_s / max(spans.values()))
            self._forget_unused(used)
        for (lane, resource), seconds in measured.items():
            expected = predicted.busy.get(lane, {}).get(resource, 0.0)
            if min(expected, seconds) >= _SHORTEST_S:
                self._ratios[lane, resource].append(seconds / expected * machine.factor(lane, resource))

    def _forget_unused(self, used: frozenset[str]) -> None:
        """What was late once may not be for ever: the lateness of other mixtures halves in 140 steps."""
        for lanes, ratios in self._of_mixtures.items():
            if lanes != used:
                for i, ratio in enumerate(ratios):
                    ratios[i] = 1 + (ratio - 1) * _REMEMBERED

    def corrected(self, machine: Machine) -> Machine:
        """The machine as it was measured; what was measured less than three times is believed as it was.

        The same object where nothing has moved by `NOTICED`.
        """
        believed = {key: _usual(ratios, median) for key, ratios in self._ratios.items() if len(ratios) > WINDOW // 2}
        for resource in {resource for _, resource in believed}:  # a slow device is slow for other lanes, too
            believed[ANY, resource] = median(factor for (_, its), factor in believed.items() if its == resource)
        late = self._of_mixtures.items()
        mixtures = {lanes: _usual(ratios, _second_of_five) for lanes, ratios in late if len(ratios) >= WINDOW}
        if _are_alike(believed, machine.factors) and _are_alike(mixtures, machine.mixtures):
            return machine
        return replace(machine, factors=believed, mixtures=mixtures)


def _usual(ratios: Sequence[float], middle: Callable[[Sequence[float]], float]) -> float:
    """What they are most of the time, or now, where that has changed."""
    usual, now = middle(ratios), middle(list(ratios)[-WINDOW:])
    return now if abs(now - usual) > CHANGED * usual else usual


def _second_of_five(ratios: Sequence[float]) -> float:
    """Near the shortest: what makes a step late now and then is no mark of its lanes."""
    return sorted(ratios)[len(ratios) // WINDOW]


def _are_alike(some: Mapping[K, float], others: Mapping[K, float]) -> bool:
    return all(abs(some.get(key, 1.0) - others.get(key, 1.0)) <= NOTICED for key in some.keys() | others.keys())
