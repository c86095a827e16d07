"""Which far blocks of 16 tokens take part: scores from int8 codes, and the choice of the highest. Native."""

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.errors import InputError
from tandemkv.kernels import gather
from tandemkv.types import BLOCK_TOKENS, AnyArena, PagedKV

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
        a block's channel minima, then its maxima; columns: `[num_kv_heads, num_slots, blocks, lines, 1, 16 tokens, 4]`.
    steps: float32 `[num_kv_heads, num_slots, 4 x units]` of bounds: what a code of a block counts.
    """

    kind: Literal["bounds", "columns"]
    codes: Tensor
    steps: Tensor | None
    page_blocks: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.codes.nbytes + (0 if self.steps is None else self.steps.nbytes)


def read_keys(arena: AnyArena, slots: Tensor, pool: "WorkerPool | None" = None) -> Tensor:
    """K of pages, float32 `[num_pages, num_kv_heads, page_size, head_dim]`. slots: int32 `[num_pages]`."""
    shape, dtype = (len(slots), arena.num_kv_heads, arena.layout.page_size), arena.layout.dtype
    k = torch.empty((*shape, arena.head_dim), dtype=dtype, device="cpu")
    v = torch.empty((*shape, arena.v_head_dim), dtype=dtype, device="cpu")
    gather(arena, slots[:, None, None].expand(-1, arena.num_kv_heads, 1), 0, k, v, pool)
    return k.float()


@torch.inference_mode(False)  # written again, maybe outside of it
def room_for_codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Uninitialised; memory is taken by the first codes of a slot, as with pages."""
    found = torch.empty(shape, dtype=dtype, device="cpu")
    machine.advise_huge_pages(found.data_ptr(), found.nbytes)
    return found


def make_bounds(into: BlockCodes, arena: AnyArena, slots: Tensor, pool: "WorkerPool | None" = None) -> None:
    """Channel minima and maxima of the blocks of pages, int8 rounded outward. slots: int32 `[num_pages]`."""
    assert into.kind == "bounds" and into.steps is not None
    native, num_lines = _native(), into.codes.shape[3]
    where = into.codes.data_ptr(), into.steps.data_ptr()
    status = native.make_bounds(_pool(pool), _isa(None), _arena(arena), slots.tolist(), num_lines, *where)
    assert status == native.Status.ok, "a far slot lies outside its pool"


class FarPages(NamedTuple):
    """Far pages of a layer. slots: int32 `[num_seqs, num_pages]`; kv_start: int64 `[num_seqs]`, tokens of padding."""

    arena: AnyArena
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

    @property
    def run(self) -> PagedKV:
        """All their tokens, to be attended."""
        table = self.slots[:, None].expand(-1, self.arena.num_kv_heads, -1)
        return PagedKV(self.arena, table, self.kv_start, torch.full_like(self.kv_start, self.num_blocks * BLOCK_TOKENS))


class ChosenBlocks(NamedTuple):
    """Room for a choice, and in it the last one. blocks: int32 `[num_seqs, num_kv_heads, capacity]`, rising positions,
    of which each head has `run.kv_len // 16`; run: the same blocks, to be attended."""

    blocks: Tensor
    run: PagedKV

    @staticmethod
    def allocate(arena: AnyArena, num_seqs: int, capacity: int) -> "ChosenBlocks":
        """Room for `capacity` blocks of every sequence and head; nothing chosen yet."""
        shape = (num_seqs, arena.num_kv_heads)
        with torch.inference_mode(False):  # written again, maybe outside of it
            blocks, entries = (torch.zeros((*shape, capacity), dtype=torch.int32, device="cpu") for _ in range(2))
            kv_start, kv_len = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))
        return ChosenBlocks(blocks, PagedKV(arena, entries, kv_start, kv_len, of_blocks=True))

    @property
    def capacity(self) -> int:
        """Blocks of each head that there is room for."""
        return self.blocks.shape[2]

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


def score_blocks(
    codes: BlockCodes,
    rows: Tensor,
    far: FarPages,
    directions: Tensor | None = None,
    pool: "WorkerPool | None" = None,
    isa: str | None = None,
) -> Tensor:
    """float32 `[num_seqs, num_kv_heads, num_blocks]`: of the best row; by bounds an upper one of q.k, else q.k.

    rows: float32 or bfloat16 `[num_seqs, num_kv_heads, rows, head_dim]`, queries. directions: of columns, float32
    `[num_kv_heads, head_dim, num_columns]`, contiguous: a query's weight of each code. Weights are rounded to 8 bits.
    """
    native, rows = _native(), rows.contiguous()
    num_seqs, num_kv_heads, _, head_dim = rows.shape
    shape = None if directions is None else (num_kv_heads, head_dim, 4 * codes.codes.shape[3])
    fits = (codes.kind == "columns") == (directions is not None) and rows.dtype in (torch.float32, torch.bfloat16)
    if not fits or (directions is not None and (directions.shape != shape or not directions.is_contiguous())):
        got = None if directions is None else (list(directions.shape), directions.is_contiguous())
        raise InputError(
            f"rows must be float32 or bfloat16 and directions contiguous {shape} for codes of columns, None for "
            f"bounds; got {rows.dtype} and {got} for {codes.kind}"
        )
    scores = torch.empty((num_seqs, num_kv_heads, far.num_blocks), dtype=torch.float32, device="cpu")
    steps = 0 if codes.steps is None else codes.steps.data_ptr()
    of_slots = native.BlockCodes(
        native.Codes[codes.kind], codes.codes.data_ptr(), steps, num_kv_heads, codes.codes.shape[1], codes.page_blocks
    )
    along = (0, 0) if directions is None else (directions.data_ptr(), directions.shape[2])
    where = far.slots.data_ptr(), far.slots.stride(0), far.slots.shape[1], scores.data_ptr()
    dtype = native.DType.bfloat16 if rows.dtype == torch.bfloat16 else native.DType.float32
    status = native.score_blocks(_pool(pool), _isa(isa), of_slots, rows.data_ptr(), dtype, rows.shape, *along, *where)
    assert status == native.Status.ok, "a far slot lies outside its pool"
    return scores


def choose_blocks(
    scores: Tensor,
    num_wanted: int,
    far: FarPages,
    num_sink_tokens: int,
    into: ChosenBlocks,
    pool: "WorkerPool | None" = None,
    isa: str | None = None,
) -> None:
    """The blocks of the highest scores of each head, of equal ones the earliest, in the order of their positions.

    scores: float32 `[num_seqs, num_kv_heads, num_blocks]`; -inf is never chosen, NaN before all, so that it is seen.
    num_wanted: of every head, cut at the room there is. Blocks of the first num_sink_tokens tokens behind the padding
    come first of all, blocks of padding alone never.
    """
    shape = (far.slots.shape[0], far.arena.num_kv_heads, far.num_blocks)
    fits = scores.dtype == torch.float32 and scores.shape == shape and scores.device.type == "cpu"
    if not fits or (shape[2] > 1 and scores.stride(2) != 1):
        raise InputError(
            f"scores must be float32 {list(shape)} (num_seqs, num_kv_heads, num_blocks) on the CPU, contiguous along "
            f"blocks, got {scores.dtype} {list(scores.shape)} with strides {scores.stride()} on {scores.device}"
        )
    run = into.run
    _native().choose_blocks(
        _pool(pool),
        _isa(isa),
        scores.data_ptr(),
        scores.stride()[:2],
        shape,
        far.kv_start.data_ptr(),
        num_wanted,
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


def _native() -> ModuleType:
    from tandemkv.kernels import cpu  # says why where there is none

    return cpu.native


def _arena(arena: AnyArena) -> Any:
    from tandemkv.kernels import cpu

    return cpu.native_arena(arena)


def _isa(name: str | None) -> str:
    from tandemkv.kernels import cpu

    return cpu.resolve_isa(name)


def _pool(pool: "WorkerPool | None") -> "WorkerPool":
    from tandemkv.kernels import cpu

    return cpu.single_thread() if pool is None else pool
