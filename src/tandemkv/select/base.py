"""What every selector is, what it may do besides, and what it is told.

A selector has one method, `score`. What else it has, it is asked for: `observe` (it lives from attention mass),
`summarise` (it scores int8 codes of blocks), `digest` and `estimate` (it groups keys, and says what it leaves out).
First and recent tokens, the top k and the budget are done once for all of them, by `choose_blocks`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tandemkv.kernels.blocks import BlockCodes, ChosenBlocks, FarPages, score_blocks
from tandemkv.types import BLOCK_TOKENS, AnyArena, PagedKV

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

# One selection serves all queries of a call up to this many; longer runs are prompts and attend to everything.
MAX_SELECT_QUERIES = 16


class Summaries(NamedTuple):
    """What a selector knows of the far blocks of a layer; what nobody made for it is None.

    far: the blocks, for the kernels. codes: what its `summarise` made. basis: what its `begin` made for this layer.
    observed: float32 `[num_seqs, num_kv_heads, num_blocks]`, what its `observe` last said of them. digest: what its
    `digest` made. foreseen: a query as `score` takes it, predicted a layer ahead.
    """

    far: FarPages
    codes: BlockCodes | None = None
    basis: Any = None
    observed: Tensor | None = None
    digest: Any = None
    foreseen: Tensor | None = None
    pool: "WorkerPool | None" = None

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.far.arena.num_kv_heads

    @property
    def num_blocks(self) -> int:
        """Far blocks of every sequence and head, those of padding included."""
        return self.far.num_blocks

    @property
    def is_padding(self) -> Tensor:
        """bool `[num_seqs, 1, num_blocks]`: blocks of padding alone, which are never chosen."""
        ends = torch.arange(1, self.num_blocks + 1, device="cpu") * BLOCK_TOKENS
        return ends <= self.far.kv_start[:, None, None]

    def score_codes(self, q: Tensor, directions: Tensor | None = None) -> Tensor:
        """Scores of all blocks by their codes, float32 `[num_seqs, num_kv_heads, num_blocks]`; see `score_blocks`."""
        assert self.codes is not None
        rows = group_rows(q.float() if q.dtype == torch.float16 else q, self.num_kv_heads)
        return score_blocks(self.codes, rows, self.far, directions, self.pool)


@runtime_checkable
class Selector(Protocol):
    """Scores far blocks; sees what is asked for, never where it lies."""

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """float32 `[num_seqs, num_kv_heads, num_blocks]`, higher = keep, -inf = out even if budget remains.

        q: `[num_seqs, num_q_heads, q_len, head_dim]`, the queries of one step, q_len at most MAX_SELECT_QUERIES. The
        query heads of a group, and all queries, share a choice.
        """


class Seen(NamedTuple):
    """What the attention of a step or of a prompt's end says of some blocks.

    mass: float32 `[num_seqs, num_kv_heads, q_len, num_blocks]`, the share of a query's attention that each block has,
        the largest of the query heads of a group. num_tokens: int64 `[num_seqs]`, that were attended to. num_queries:
        how many were seen before, and num_decoded: of them, outside of prompts.
    """

    mass: Tensor
    num_tokens: Tensor
    num_queries: int
    num_decoded: int


@runtime_checkable
class Observer(Selector, Protocol):
    """Keeps a number about every block. Its score depends on nothing else, so that a choice stands until it changes.

    watches_far: it observes the far blocks that take part, too, not only near ones.
    forgets: what it did not choose once is gone for good.
    """

    watches_far: bool
    forgets: bool

    def observe(self, known: Tensor, seen: Seen) -> Tensor:
        """The new numbers, float32 `[num_seqs, num_kv_heads, num_blocks]` like `known`, which starts at 0."""


@runtime_checkable
class Summariser(Selector, Protocol):
    """Scores codes of blocks, which are made when pages become far."""

    def allocate(self, arena: AnyArena) -> BlockCodes:
        """Room for the codes of every slot."""

    def begin(self, arena: AnyArena, slots: Tensor, pool: "WorkerPool | None") -> Any:
        """What all codes of a layer are made with, from its first far pages. slots: int32 `[num_pages]`."""

    def summarise(
        self, arena: AnyArena, slots: Tensor, basis: Any, into: BlockCodes, pool: "WorkerPool | None"
    ) -> None:
        """Make the codes of the pages in these slots."""


class Digest(Protocol):
    """What a `Digester` made of far blocks: a value."""

    def of(self, seqs: Tensor) -> "Digest":
        """That of the sequences `seqs`, int64 `[n]`."""

    def cut(self, num_blocks: int) -> "Digest":
        """What it says of blocks `[0, num_blocks)` alone: the others are gone, or will be others."""


@runtime_checkable
class Digester(Selector, Protocol):
    """Groups far keys and values."""

    def digest(self, old: Any, far: FarPages, read: Callable[[int, int], tuple[Tensor, Tensor]]) -> Digest:
        """What is known of blocks `[0, far.num_blocks)`, from what was known of no more of them (None at first).

        read: `(first block, last) -> K, V`, float32 `[num_seqs, num_kv_heads, num_tokens, head_dim]`.
        """


@runtime_checkable
class Estimator(Selector, Protocol):
    """Says what the blocks that were left out would have added."""

    def estimate(self, chosen: ChosenBlocks, summaries: Summaries) -> PagedKV:
        """Tokens that stand for all blocks but these: a run with `log_counts`, attended beside them in one call.

        The run may be the last call's, written anew.
        """


def group_rows(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[num_seqs, num_q_heads, q_len, ...]` -> `[num_seqs, num_kv_heads, group_size * q_len, ...]`."""
    return x.reshape(x.shape[0], num_kv_heads, -1, *x.shape[3:])
