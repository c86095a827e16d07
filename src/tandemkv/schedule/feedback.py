"""What steps took, measured, corrects what they are predicted to take. Numbers only."""

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from tandemkv.schedule.costs import Prediction
from tandemkv.schedule.speeds import ANY, Machine

WINDOW = 5
"""Measurements that a median is taken of: one or two slow ones move nothing, a change is believed after three."""

NOTICED = 0.01
"""Of a factor: what moved less is not worth a new machine."""

_SHORTEST_S = 20e-6
"""Shorter ones say more about the clock than about the machine."""


class Corrections:
    """How many times longer each lane takes of each resource than the machine's speeds say."""

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def observe(self, predicted: Prediction, machine: Machine, measured: Mapping[tuple[str, str], float]) -> None:
        """measured: seconds of (lane, resource); predicted with this machine, corrections of it included."""
        for (lane, resource), seconds in measured.items():
            expected = predicted.busy.get(lane, {}).get(resource, 0.0)
            if min(expected, seconds) >= _SHORTEST_S:
                self._ratios[lane, resource].append(seconds / expected * machine.factor(lane, resource))

    def corrected(self, machine: Machine) -> Machine:
        """The machine as it was measured; what was measured less than three times is believed as it was. The same
        object where nothing has moved by `NOTICED`."""
        believed = {key: median(ratios) for key, ratios in self._ratios.items() if len(ratios) > WINDOW // 2}
        for resource in {resource for _, resource in believed}:  # a slow device is slow for other lanes, too
            believed[ANY, resource] = median(factor for (_, its), factor in believed.items() if its == resource)
        keys = believed.keys() | machine.factors.keys()
        if all(abs(believed.get(key, 1.0) - machine.factors.get(key, 1.0)) <= NOTICED for key in keys):
            return machine
        return replace(machine, factors=believed)
