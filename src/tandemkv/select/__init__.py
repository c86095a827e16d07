"""Which far pages take part in a step. A new selector is a file here and a line in the table.

Selectors see queries and summaries of pages, never places; what is always kept, the budget and the top k are the same
for all of them.
"""

from tandemkv.select.base import MAX_SELECT_QUERIES, Selector, Summaries, choose_pages
from tandemkv.select.sparse import Sparse
from tandemkv.select.table import SELECTORS

__all__ = ["MAX_SELECT_QUERIES", "SELECTORS", "Selector", "Sparse", "Summaries", "choose_pages"]
