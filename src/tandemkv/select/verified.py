"""What is left out, estimated with a known error (vAttention, 2510.05688): the promise, and what came of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.types import is_number


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
            if not is_number(value) or not 0 < value < 1 or 1 - value == 1:  # 1e-17 is as good as 0
                raise InputError(f"{name} must lie between 0 and 1, such as 0.05, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed must be a whole number of at least 0, got {self.seed!r}")


class Tally(NamedTuple):
    """What came of the promise, over steps, sequences and heads. num_rows: of query heads and queries whose error was
    estimated. Tokens are counted for every KV head; num_steps counts those too, and num_fallbacks those that were read
    whole because a sample would not have been enough. max_share_read and max_share_fallbacks: of one step's."""

    num_rows: int = 0
    error_sum: float = 0.0
    max_error: float = 0.0
    num_read: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    num_fallbacks: int = 0
    max_share_read: float = 0.0
    max_share_fallbacks: float = 0.0

    def plus(self, error: Tensor, num_read: int, num_tokens: int, num_steps: int, num_fallbacks: int) -> "Tally":
        """One more step. error: float32 of any shape, the estimate of each row."""
        return Tally(
            self.num_rows + error.numel(),
            self.error_sum + float(error.sum()),
            max(self.max_error, float(error.max()) if error.numel() else 0.0),
            self.num_read + num_read,
            self.num_tokens + num_tokens,
            self.num_steps + num_steps,
            self.num_fallbacks + num_fallbacks,
            max(self.max_share_read, num_read / max(1, num_tokens)),
            max(self.max_share_fallbacks, num_fallbacks / max(1, num_steps)),
        )

    @staticmethod
    def of(tallies: "list[Tally]") -> "Tally":
        """Several layers together."""
        whole = Tally()
        for one in tallies:
            whole = Tally(
                whole.num_rows + one.num_rows,
                whole.error_sum + one.error_sum,
                max(whole.max_error, one.max_error),
                whole.num_read + one.num_read,
                whole.num_tokens + one.num_tokens,
                whole.num_steps + one.num_steps,
                whole.num_fallbacks + one.num_fallbacks,
                max(whole.max_share_read, one.max_share_read),
                max(whole.max_share_fallbacks, one.max_share_fallbacks),
            )
        return whole

    @property
    def summary(self) -> str:
        """One line for people."""
        found = self.to_dict()
        return (
            f"{found['estimated_error_mean']:.1%} on average, {found['estimated_error_max']:.1%} at most; "
            f"{found['share_read']:.1%} of far and near tokens read (in a step at most {found['share_read_max']:.1%}), "
            f"{found['share_fallbacks']:.1%} of heads exactly ({found['share_fallbacks_max']:.1%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For people and programs: estimated errors, and shares of tokens read and of fallbacks, of all steps together
        and of the one with most."""
        return {
            "estimated_error_mean": self.error_sum / max(1, self.num_rows),
            "estimated_error_max": self.max_error,
            "share_read": self.num_read / max(1, self.num_tokens),
            "share_read_max": self.max_share_read,
            "share_fallbacks": self.num_fallbacks / max(1, self.num_steps),
            "share_fallbacks_max": self.max_share_fallbacks,
        }
