"""Which far blocks take part in a step. A new selector is a file here and a line in the table.

Selectors see queries and summaries of blocks, never places; what is always kept, the budget and the top k are the same
for all of them.
"""

from tandemkv.select.base import (
    MAX_SELECT_QUERIES,
    Digest,
    Digester,
    Estimator,
    Observer,
    Seen,
    Selector,
    Summaries,
    Summariser,
)
from tandemkv.select.sparse import Sparse
from tandemkv.select.table import SELECTORS
from tandemkv.select.verified import Tally, Verified

__all__ = [
    "MAX_SELECT_QUERIES",
    "SELECTORS",
    "Digest",
    "Digester",
    "Estimator",
    "Observer",
    "Seen",
    "Selector",
    "Sparse",
    "Summaries",
    "Summariser",
    "Tally",
    "Verified",
]
