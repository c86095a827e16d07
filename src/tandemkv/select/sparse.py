"""The sparse mode of a cache: a selector by name, and its budget."""

from dataclasses import dataclass

from tandemkv.errors import InputError
from tandemkv.select.base import MAX_SELECT_QUERIES
from tandemkv.select.table import SELECTORS


@dataclass(frozen=True)
class Sparse:
    """That not everything is attended, but what `selector` picks.

    budget_tokens: what each KV head attends to at most, near, first and new tokens included.
    num_sink_tokens: first tokens that are always kept (StreamingLLM, 2309.17453); their page is kept whole.
    """

    selector: str
    budget_tokens: int
    num_sink_tokens: int = 4

    def __post_init__(self) -> None:
        if self.selector not in SELECTORS:
            raise InputError(f"selector must be one of {', '.join(sorted(SELECTORS))}, got {self.selector!r}")
        for name, least in (("budget_tokens", 1), ("num_sink_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def check(self, near_tokens: int, page_size: int) -> None:
        """InputError unless first and recent tokens fit into the budget."""
        sinks = -(-self.num_sink_tokens // page_size) * page_size
        least = sinks + near_tokens + MAX_SELECT_QUERIES
        if self.budget_tokens < least:
            raise InputError(
                f"budget_tokens must be at least {least}: {sinks} for the pages of the first {self.num_sink_tokens} "
                f"tokens, {near_tokens} near ones and {MAX_SELECT_QUERIES} new ones; got {self.budget_tokens}"
            )
