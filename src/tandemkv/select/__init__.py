"""Which far pages take part in a step. A new selector is a file here and a line in the table.

Selectors see queries and summaries of pages, never places; what is always kept, the budget and the top k are the same
for all of them and lie in `base`.
"""

from tandemkv.select.base import MAX_SELECT_QUERIES, Selector, Sparse, Summaries, choose_pages
from tandemkv.select.window import Window

SELECTORS: dict[str, Selector] = {"window": Window()}

__all__ = ["MAX_SELECT_QUERIES", "SELECTORS", "Selector", "Sparse", "Summaries", "choose_pages"]
