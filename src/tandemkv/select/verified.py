"""What is left out, estimated with a known error (vAttention, 2510.05688): the promise, and what came of it."""

from dataclasses import dataclass

from tandemkv.errors import InputError


@dataclass(frozen=True)
class Verified:
    """That the error of a layer's attention, ||estimate - exact|| / ||exact||, exceeds `epsilon` with a probability of
    at most `delta`, for every step, layer and query head. Runs with the same `seed` repeat."""

    epsilon: float
    delta: float
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise InputError(f"{name} must lie between 0 and 1, such as 0.05, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, got {self.seed!r}")
