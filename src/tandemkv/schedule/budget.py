"""HybridGen's feedback (2604.18529, Algorithm 1): spare time buys far tokens that take part, lack of it sells them.

The paper is silent about the step, the period, smoothing, and whether the selection ever comes back behind the logits.
Here the budget moves by a step at the end of each period, by the medians of its measurements; what was once too much is
not tried again for a while that doubles each time; and Post-QK returns when what it took, as measured, fits again.
"""

from dataclasses import dataclass
from statistics import median

from tandemkv.errors import InputError

FITS = 0.9
"""Of the device's time, that logits over all keys may be expected to take before they come back: noise is 10 %."""


@dataclass(frozen=True)
class BudgetRule:
    """floor_tokens: what the budget never falls below (K_min). most_tokens: what it never exceeds.

    step_tokens: by which it moves, a multiple of 16. period: steps that a decision is made of.
    InputError for values that cannot be.
    """

    floor_tokens: int
    most_tokens: int
    step_tokens: int = 64
    period: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.floor_tokens <= self.most_tokens:
            raise InputError(
                f"a budget lies between its floor and what there is, got {self.floor_tokens} to {self.most_tokens}"
            )
        if self.step_tokens < 1 or self.step_tokens % 16 or self.period < 1:
            raise InputError(
                f"a budget moves by a multiple of 16 tokens, every so many steps, got {self.step_tokens} every "
                f"{self.period}"
            )


class Budget:
    """How many far tokens take part in a step, and whether they are picked behind their logits (Post-QK) or before."""

    def __init__(self, rule: BudgetRule) -> None:
        self.rule = rule
        self.tokens = rule.floor_tokens
        self.picks_before = False
        self._measured: list[tuple[float, float]] = []
        self._post_s = 0.0  # what the lanes took when they last picked behind
        self._ceiling = rule.most_tokens + rule.step_tokens
        self._hold = self._held = 0  # periods for which the ceiling stands, and has stood

    def observe(self, device_s: float, lanes_s: float) -> None:
        """A step: what the device had to do meanwhile (T_gpu), and until the lanes' tokens were up (T_cpu + T_tx)."""
        self._measured.append((device_s, lanes_s))
        if len(self._measured) < self.rule.period:
            return
        device_s, lanes_s = (median(seconds) for seconds in zip(*self._measured, strict=True))
        self._measured = []
        if not self.picks_before:
            self._post_s = lanes_s
        if lanes_s <= device_s:
            self._use(device_s)
        else:
            self._save()

    def _use(self, spare_in_s: float) -> None:
        if self.picks_before:
            self.picks_before = not self._post_s <= FITS * spare_in_s
            if not self.picks_before:
                return
        self._held += 1
        if self._held > self._hold:
            self._ceiling = self.rule.most_tokens + self.rule.step_tokens
        self.tokens = min(
            self.tokens + self.rule.step_tokens, self.rule.most_tokens, self._ceiling - self.rule.step_tokens
        )

    def _save(self) -> None:
        if self.tokens > self.rule.floor_tokens:
            if self.tokens <= self._ceiling:  # too much once more
                self._hold, self._held = max(4, 2 * self._hold), 0
            self._ceiling = self.tokens
            self.tokens = max(self.rule.floor_tokens, self.tokens - self.rule.step_tokens)
        else:
            self.picks_before = True
