"""How fast a machine's processors, memories and links are: what costs are made of. Seconds and bytes, no tensors."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

from tandemkv.errors import InputError


@dataclass(frozen=True)
class Speed:
    """A start-up and a rate: `seconds(num_bytes) = start_us * 1e-6 + num_bytes / (gbps * 1e9)`.

    gbps may be inf. Raises InputError for what no machine has.
    """

    start_us: float
    gbps: float

    def __post_init__(self) -> None:
        if not (0 <= self.start_us < math.inf and self.gbps > 0):  # NaN neither
            got = f"{self.start_us} us and {self.gbps} GB/s"
            raise InputError(f"a speed has a start of 0 us or more and above 0 GB/s, got {got}")

    def seconds(self, num_bytes: float) -> float:
        """What so many bytes take."""
        return self.start_us * 1e-6 + num_bytes / (self.gbps * 1e9)


@dataclass(frozen=True)
class Products:
    """Matrix products of some tokens with a weight, as they were measured: a small one is not at peak speed.

    points: (tokens, GFLOP/s), ascending; in between along straight lines over the logarithm of tokens.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        tokens = [num for num, _ in self.points]
        if not tokens or tokens != sorted(set(tokens)) or tokens[0] < 1 or not all(rate > 0 for _, rate in self.points):
            raise InputError(f"products are (tokens, GFLOP/s) with ascending tokens, got {self.points}")

    def gflops(self, num_tokens: float) -> float:
        """The rate of a product with so many rows."""
        i = bisect_right(self.points, num_tokens, key=lambda point: point[0])
        if i == 0 or i == len(self.points):
            return self.points[min(i, len(self.points) - 1)][1]
        (first, low), (last, high) = self.points[i - 1], self.points[i]
        share = math.log(num_tokens / first) / math.log(last / first)
        return low + share * (high - low)

    def seconds(self, num_tokens: float, flops_per_token: float) -> float:
        """What the products of so many tokens take, done at once."""
        return num_tokens * flops_per_token / (self.gflops(num_tokens) * 1e9) if num_tokens > 0 else 0.0


ANY = "any"
"""In the place of a lane's name."""


@dataclass(frozen=True)
class Machine:
    """The speeds that costs need, of one dtype.

    attend speeds count bytes of K and V; logits speeds bytes of K, weigh speeds bytes of V. memory_gbps: what all
    processors together read of host memory, the device included where it reads there. up, down: a transfer to the
    device, to the host. handoff_us: from a ticket being done to work going on behind it, on another thread.
    """

    device_attend: Speed
    host_attend: Speed
    up: Speed
    down: Speed
    products: Products
    host_logits: Speed
    device_weigh: Speed
    memory_gbps: float = math.inf
    handoff_us: float = 0.0
    # (lane, resource) -> how many times longer than these speeds say it takes, as measured while running; ANY lane's
    # for those that were not
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    # lanes -> how many times longer steps of theirs take than their longest resource, as measured while running:
    # where two resources are equally long, whichever is late makes the step late
    mixtures: Mapping[frozenset[str], float] = field(default_factory=dict)

    def factor(self, lane: str, resource: str) -> float:
        """How many times longer than these speeds say a lane takes of a resource."""
        return self.factors.get((lane, resource), self.factors.get((ANY, resource), 1.0))

    def mixture(self, lanes: frozenset[str]) -> float:
        """How many times longer than their longest resource steps of these lanes take. Several that were not measured
        together are believed to be as late as any that were."""
        if lanes in self.mixtures or len(lanes) < 2:
            return self.mixtures.get(lanes, 1.0)
        return max((factor for others, factor in self.mixtures.items() if len(others) > 1), default=1.0)

    @property
    def handoff_s(self) -> float:
        """handoff_us in seconds."""
        return self.handoff_us * 1e-6
