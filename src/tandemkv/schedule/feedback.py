"""What steps took, measured, corrects what they are predicted to take. Numbers only."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TypeVar

from tandemkv.schedule.costs import Prediction
from tandemkv.schedule.speeds import ANY, Machine

K = TypeVar("K")

WINDOW = 5
"""Measurements that tell a change: one or two slow ones move nothing, three do when speeds are corrected next."""

MEMORY, MEMORY_S = 25, 0.25
"""Measurements that tell what is usual, at most, and of steps of how many seconds. Memory that is shared with strangers
is 10 % faster or slower from step to step: following that costs short steps more than it gains, since a new split is a
new run of pages in every layer."""

CHANGED = 0.25
"""What has become so much longer or shorter than usual has changed."""

NOTICED = 0.01
"""Of a factor: what moved less is not worth a new machine."""

FORGOTTEN = 100
"""Steps after which a lane or a mixture that took no part is believed to be as it was profiled, or as its resources are
for others: what was slow once may not be for ever, and nobody would find out. Each time it takes twice as many, until
it has been kept for `MEMORY` measurements: what is slow for ever is tried less and less."""

_SHORTEST_S = 20e-6
"""Shorter ones say more about the clock than about the machine."""


class Corrections:
    """How many times longer each lane takes of each resource than the machine's speeds say."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))
        self._of_mixtures: dict[frozenset[str], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))
        self._num_steps = 0
        self._last: Prediction | None = None  # the last step's
        self._last_seen: dict[str | frozenset[str], int] = {}  # of lanes and mixtures
        self._patience: dict[str | frozenset[str], int] = defaultdict(lambda: FORGOTTEN)

    def pass_by(self, predicted: Prediction) -> None:
        """A step that is not looked at: this is called a thousand times a second."""
        self._num_steps += 1
        self._last = predicted

    def observe(
        self,
        predicted: Prediction,
        machine: Machine,
        measured: Mapping[tuple[str, str], float],
        step_s: float | None = None,
    ) -> None:
        """measured: seconds of (lane, resource); step_s: of the whole step. predicted with this machine, corrections of
        it included."""
        self.pass_by(predicted)
        self._note_use()
        used = _used(predicted)
        if step_s is not None:
            spans = dict(predicted.resources)  # as they were, so that what a resource takes longer is not counted twice
            for (lane, resource), seconds in measured.items():
                if resource in spans and lane in predicted.busy:  # not what a prompt before it, or a sample, has sent
                    spans[resource] += seconds - predicted.busy[lane].get(resource, 0.0)
            self._of_mixtures[used].append(step_s / max(spans.values()))
        for (lane, resource), seconds in measured.items():
            expected = predicted.busy.get(lane, {}).get(resource, 0.0)
            if min(expected, seconds) >= _SHORTEST_S:
                self._ratios[lane, resource].append(seconds / expected * machine.factor(lane, resource))
        self._calm_down()

    def corrected(self, machine: Machine, step_s: float) -> Machine:
        """The machine as steps of about so long have measured it; what was measured less than three times, or long ago,
        is believed as it was. The same object where nothing has moved by `NOTICED`."""
        self._forget_unused()
        num = max(WINDOW, min(MEMORY, round(MEMORY_S / step_s)))
        measured = {key: list(each)[-num:] for key, each in self._ratios.items() if len(each) > WINDOW // 2}
        believed = {key: _usual(ratios) for key, ratios in measured.items()}
        for resource in {resource for _, resource in believed}:  # a slow device is slow for other lanes, too
            believed[ANY, resource] = median(factor for (_, its), factor in believed.items() if its == resource)
        # Near the shortest: what makes a step late now and then is no mark of its lanes.
        late = {lanes: sorted(list(each)[-num:]) for lanes, each in self._of_mixtures.items() if len(each) >= WINDOW}
        mixtures = {lanes: ratios[len(ratios) // WINDOW] for lanes, ratios in late.items()}
        if _are_alike(believed, machine.factors) and _are_alike(mixtures, machine.mixtures):
            return machine
        return replace(machine, factors=believed, mixtures=mixtures)

    def _calm_down(self) -> None:
        """Who has been kept for long is tried again as soon as any other, should it be dropped."""
        kept: set[str | frozenset[str]] = {key[0] for key, ratios in self._ratios.items() if len(ratios) == MEMORY}
        kept |= {lanes for lanes, ratios in self._of_mixtures.items() if len(ratios) == MEMORY}
        for seen in kept & self._patience.keys():
            del self._patience[seen]

    def _note_use(self) -> None:
        """Of lanes and mixtures, until the last step."""
        if self._last is not None:
            self._last_seen.update(dict.fromkeys((*self._last.busy, _used(self._last)), self._num_steps))

    def _forget_unused(self) -> None:
        self._note_use()
        gone = {seen for seen, at in self._last_seen.items() if self._num_steps - at >= self._patience[seen]}
        for seen in gone:
            del self._last_seen[seen]
            self._patience[seen] *= 2
        for lanes in [lanes for lanes in self._of_mixtures if lanes in gone]:
            del self._of_mixtures[lanes]
        for key in [key for key in self._ratios if key[0] in gone]:
            del self._ratios[key]


def _used(predicted: Prediction) -> frozenset[str]:
    return frozenset(predicted.busy) - {"near"}


def _usual(ratios: Sequence[float]) -> float:
    """What they are most of the time, or now, where that has changed."""
    usual, now = median(ratios), median(ratios[-WINDOW:])
    return now if abs(now - usual) > CHANGED * usual else usual


def _are_alike(some: Mapping[K, float], others: Mapping[K, float]) -> bool:
    return all(abs(some.get(key, 1.0) - others.get(key, 1.0)) <= NOTICED for key in some.keys() | others.keys())
