"""The best blocks exactly, and the means of the others: nothing is dropped, and nothing is promised."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tandemkv.kernels.blocks import ChosenBlocks, FarPages
from tandemkv.select.base import Summaries
from tandemkv.select.clusters import Clustered, Clusters
from tandemkv.select.columns import Columns
from tandemkv.types import PagedKV


@dataclass(frozen=True)
class Tandem(Columns):
    """`Columns` choose, because a needle must be found; `Clusters` of 4 blocks say what the rest would have added.

    Where attention is flat, what is left out is most of it, and to drop it costs more than to misjudge it a little.
    """

    cluster_blocks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._clusters  # noqa: B018  refuses a size that cannot be

    @property
    def _clusters(self) -> Clusters:
        return Clusters(self.cluster_blocks)

    def digest(
        self, old: Clustered | None, far: FarPages, read: Callable[[int, int], tuple[Tensor, Tensor]]
    ) -> Clustered:
        """See `Digester`."""
        return self._clusters.digest(old, far, read)

    def estimate(self, chosen: ChosenBlocks, summaries: Summaries) -> PagedKV:
        """See `Estimator`."""
        return self._clusters.estimate(chosen, summaries)
