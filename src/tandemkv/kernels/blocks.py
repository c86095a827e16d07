"""Which far blocks of 16 tokens take part: scores from int8 codes, and the choice of the highest. Native."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.types import BLOCK_TOKENS, Arena, PagedKV

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

LINE_BYTES = 64
"""Codes lie in lines of so many bytes: 16 words of 4 neighbouring codes."""

LANE_BLOCKS = 4
"""Blocks whose bounds share lines."""


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """What is known of the blocks of every slot of a pool.

    codes: uint8, 128 is 0. bounds: `[num_kv_heads, num_slots, units, lines, 4 words, 4 blocks, 4]`, where the words are
        the channel minima of a block, then its maxima; columns: `[num_kv_heads, num_slots, blocks, lines, 16 tokens, 4]`.
    steps: float32 `[num_kv_heads, num_slots, 4 x units]` of bounds: what a code of a block counts.
    """

    kind: Literal["bounds", "columns"]
    codes: Tensor
    steps: Tensor | None
    page_blocks: int


class CodeQueries(NamedTuple):
    """Queries as weights of codes.

    weights: int8 `[num_seqs, num_kv_heads, rows, lines, ...]` in the order of codes; a head's score is that of its best
        row. offsets: int32, 128 times the sum of the weights of one lane. scales: float32, what a weight counts.
    """

    weights: Tensor
    offsets: Tensor
    scales: Tensor


class FarPages(NamedTuple):
    """Far pages of a layer. slots: int32 `[num_seqs, num_pages]`; kv_start: int64 `[num_seqs]`, tokens of padding."""

    arena: Arena
    slots: Tensor
    kv_start: Tensor

    @property
    def page_blocks(self) -> int:
        """Blocks of a page."""
        return self.arena.layout.page_size // BLOCK_TOKENS

    @property
    def num_blocks(self) -> int:
        """Blocks of every sequence and KV head."""
        return self.slots.shape[1] * self.page_blocks


class ChosenBlocks(NamedTuple):
    """Room for a choice, and in it the last one. blocks: int32 `[num_seqs, num_kv_heads, capacity]`, rising positions,
    of which each head has `run.kv_len // 16`; run: the same blocks, to be attended."""

    blocks: Tensor
    run: PagedKV

    @staticmethod
    def allocate(arena: Arena, num_seqs: int, capacity: int) -> "ChosenBlocks":
        """Room for `capacity` blocks of every sequence and head; nothing chosen yet."""
        shape = (num_seqs, arena.num_kv_heads)
        with torch.inference_mode(False):  # written again, maybe outside of it
            blocks, entries = (torch.zeros((*shape, capacity), dtype=torch.int32, device="cpu") for _ in range(2))
            kv_start, kv_len = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))
        return ChosenBlocks(blocks, PagedKV(arena, entries, kv_start, kv_len, of_blocks=True))

    @property
    def counts(self) -> Tensor:
        """int64 `[num_seqs, num_kv_heads]`, blocks chosen."""
        return self.run.kv_len // BLOCK_TOKENS

    @property
    def is_chosen(self) -> Tensor:
        """bool `[num_seqs, num_kv_heads, capacity]`: which of `blocks` are of the choice."""
        return torch.arange(self.blocks.shape[2], device="cpu") < self.counts[..., None]

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """A copy of `x [num_seqs, num_kv_heads, num_blocks]` with `values [..., capacity]` at the chosen blocks."""
        index = torch.where(self.is_chosen, self.blocks, x.shape[2])  # what is not chosen goes into a column of its own
        return torch.nn.functional.pad(x, (0, 1)).scatter_(2, index.long(), values)[..., :-1]

    def mark(self, x: Tensor, value: float) -> Tensor:
        """The same with one value."""
        return self.put(x, torch.full(self.blocks.shape, value, dtype=x.dtype, device="cpu"))


def score_blocks(
    codes: BlockCodes, q: CodeQueries, far: FarPages, pool: "WorkerPool | None" = None, isa: str | None = None
) -> Tensor:
    """float32 `[num_seqs, num_kv_heads, num_blocks]`: of bounds the upper one of q.k of the best row, of columns q.k."""
    from tandemkv.kernels import cpu

    num_seqs, num_kv_heads, rows = q.scales.shape
    num_pages, num_lines = far.slots.shape[1], q.weights.shape[3]
    scores = torch.empty((num_seqs, num_kv_heads, far.num_blocks), dtype=torch.float32, device="cpu")
    steps = 0 if codes.steps is None else codes.steps.data_ptr()
    native = cpu._native  # noqa: SLF001
    kind = native.Codes[codes.kind]
    of_slots = native.BlockCodes(
        kind, codes.codes.data_ptr(), steps, num_kv_heads, codes.codes.shape[1], codes.page_blocks
    )
    of_rows = native.CodeQueries(*(x.data_ptr() for x in q), rows, num_lines)
    where = far.slots.data_ptr(), far.slots.stride(0), num_seqs, num_pages
    status = native.score_blocks(_pool(pool), cpu.resolve_isa(isa), of_slots, of_rows, *where, scores.data_ptr())
    assert status == native.Status.ok, "a far slot lies outside its pool"
    return scores


def choose_blocks(
    scores: Tensor,
    num_wanted: Tensor,
    far: FarPages,
    num_sink_tokens: int,
    into: ChosenBlocks,
    pool: "WorkerPool | None" = None,
) -> None:
    """The blocks of the highest scores of each head, of equal ones the earliest, in the order of their positions.

    scores: float32 `[num_seqs, num_kv_heads, num_blocks]`; -inf is never chosen, NaN before all, so that it is seen.
    num_wanted: int64 `[num_seqs, num_kv_heads]`, cut at the room there is. Blocks of the first num_sink_tokens tokens
    behind the padding come first of all, blocks of padding alone never.
    """
    from tandemkv.kernels import cpu

    num_seqs, num_kv_heads, num_blocks = scores.shape
    if scores.dtype != torch.float32 or scores.stride(2) != 1 or num_blocks != far.num_blocks:
        raise InputError(
            f"scores must be float32 [num_seqs, num_kv_heads, {far.num_blocks}], contiguous along blocks, got "
            f"{scores.dtype} {list(scores.shape)} with strides {scores.stride()}"
        )
    num_wanted, run = num_wanted.contiguous(), into.run
    cpu._native.choose_blocks(  # noqa: SLF001
        _pool(pool),
        scores.data_ptr(),
        scores.stride()[:2],
        (num_seqs, num_kv_heads, num_blocks),
        far.kv_start.data_ptr(),
        num_wanted.data_ptr(),
        num_sink_tokens,
        far.slots.data_ptr(),
        far.slots.stride(0),
        far.page_blocks,
        into.blocks.data_ptr(),
        run.page_table.data_ptr(),
        into.blocks.shape[2],
        run.kv_start.data_ptr(),
        run.kv_len.data_ptr(),
    )


def _pool(pool: "WorkerPool | None") -> "WorkerPool":
    from tandemkv.kernels import cpu

    return cpu.single_thread() if pool is None else pool
