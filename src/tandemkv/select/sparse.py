"""The sparse mode of a cache: a selector, its budget, and whether what it leaves out is estimated."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

from tandemkv.errors import InputError
from tandemkv.select.base import MAX_SELECT_QUERIES, Digester, Estimator, Observer, Selector, Summariser
from tandemkv.select.table import SELECTORS
from tandemkv.select.verified import Verified
from tandemkv.types import BLOCK_TOKENS


@dataclass(frozen=True)
class Sparse:
    """That not everything is attended, but what a selector picks; of the rest nothing, or an estimate.

    selector: a name of `SELECTORS`, or one's own (`examples/custom_selector.py`).
    budget_tokens: what each KV head attends to at most, near, first and new tokens included.
    num_sink_tokens: first tokens that are always kept (StreamingLLM, 2309.17453); their blocks of 16 are kept whole.
    verified: the rest is sampled until the error is as small as this says; what is read for that is not of the budget.
    """

    selector: str | Selector
    budget_tokens: int
    num_sink_tokens: int = 4
    verified: Verified | None = None

    def __post_init__(self) -> None:
        known = ", ".join(sorted(SELECTORS))
        if isinstance(self.selector, str):
            if self.selector not in SELECTORS:
                raise InputError(f"selector must be one of {known}, got {self.selector!r}")
        elif isinstance(self.selector, type) or not isinstance(self.selector, Selector):
            raise InputError(f"selector must be one of {known}, or an object with `score`, got {self.selector!r}")
        for name, least in (("budget_tokens", 1), ("num_sink_tokens", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        try:
            hash(self.policy)
        except TypeError:
            raise InputError(
                f"a selector must be hashable, such as a frozen dataclass, got {self.selector!r}"
            ) from None
        if self.verified is not None and not isinstance(self.verified, Verified):
            raise InputError(f"verified must be a Verified(epsilon, delta) or None, got {self.verified!r}")

    @property
    def policy(self) -> Selector:
        """The selector itself."""
        return SELECTORS[self.selector] if isinstance(self.selector, str) else self.selector

    @cached_property
    def observer(self) -> Observer | None:
        """The selector, where it lives from attention. Asking a protocol takes 20 us, too long for every step."""
        return self.policy if isinstance(self.policy, Observer) else None

    @cached_property
    def summariser(self) -> Summariser | None:
        """The selector, where it scores codes."""
        return self.policy if isinstance(self.policy, Summariser) else None

    @cached_property
    def digester(self) -> Digester | None:
        """The selector, where it groups keys."""
        return self.policy if isinstance(self.policy, Digester) else None

    @cached_property
    def estimator(self) -> Estimator | None:
        """The selector, where it says what it leaves out."""
        return self.policy if isinstance(self.policy, Estimator) else None

    @cached_property
    def stands(self) -> bool:
        """Whether a choice is the same for every query until what is known changes."""
        return self.observer is not None or getattr(self.policy, "is_standing", False)

    @cached_property
    def foresees(self) -> bool:
        """Whether a choice follows from the query that was foreseen, where one was."""
        return getattr(self.policy, "foresees", False)

    @property
    def estimates(self) -> bool:
        """Whether what is left out is not dropped."""
        return self.verified is not None or self.estimator is not None

    @property
    def num_first_tokens(self) -> int:
        """First tokens that are always chosen. An estimate stands for whole blocks, so that the one in which padding
        ends must not be left out."""
        return max(1, self.num_sink_tokens) if self.estimates else self.num_sink_tokens

    def check(self, near_tokens: int) -> None:
        """InputError unless first and recent tokens fit into the budget."""
        sinks = -(-self.num_first_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        least = sinks + near_tokens + MAX_SELECT_QUERIES
        if self.budget_tokens < least:
            raise InputError(
                f"budget_tokens must be at least {least}: {sinks} for the blocks of the first {self.num_first_tokens} "
                f"tokens, {near_tokens} near ones and {MAX_SELECT_QUERIES} new ones; got {self.budget_tokens}"
            )


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
