"""The blocks that the layer before expects this one to ask for (InfiniGen, 2406.19707; HybridGen, 2604.18529)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels.blocks import BlockCodes
from tandemkv.select.base import Summaries
from tandemkv.select.bounds import Bounds
from tandemkv.select.columns import Basis, Columns
from tandemkv.types import AnyArena

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


@dataclass(frozen=True)
class Lookahead:
    """score = that of `Columns`, or of `Bounds`, for a query foreseen from what entered the layer before.

    The input of a layer is nearly that of the one before, so the query can be had a layer ahead, when there is time to
    fetch what it asks for. Where none was foreseen (the first two layers; without an attached model) it is the query
    itself. `columns`: the share of head_dim that scores look at, InfiniGen's partial keys; None is for bounds instead.

    Not as in the papers: directions come from the keys at hand, not from an offline decomposition of weights; how many
    are kept is the budget's matter, not a distance to the best score.
    """

    columns: float | None = 0.3
    foresees: ClassVar[bool] = True

    def __post_init__(self) -> None:
        columns = self.columns
        is_share = isinstance(columns, float | int) and not isinstance(columns, bool) and 0 < columns <= 1
        if columns is not None and not is_share:
            raise InputError(f"columns must be a share of head_dim, above 0 and at most 1, or None, got {columns!r}")

    def allocate(self, arena: AnyArena) -> BlockCodes:
        """See `Summariser`."""
        return self._codes(arena.head_dim).allocate(arena)

    def begin(self, arena: AnyArena, slots: Tensor, pool: "WorkerPool | None") -> Basis | None:
        """See `Summariser`."""
        return self._codes(arena.head_dim).begin(arena, slots, pool)

    def summarise(
        self, arena: AnyArena, slots: Tensor, basis: Any, into: BlockCodes, pool: "WorkerPool | None"
    ) -> None:
        """See `Summariser`."""
        self._codes(arena.head_dim).summarise(arena, slots, basis, into, pool)

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        q = q if summaries.foreseen is None else summaries.foreseen.to(q.device)
        return self._codes(q.shape[-1]).score(q, summaries)

    def _codes(self, head_dim: int) -> Bounds | Columns:
        if self.columns is None:
            return Bounds()
        return Columns(max(4, -(-int(self.columns * head_dim) // 4) * 4))
