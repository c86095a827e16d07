"""Codes of far blocks, by slot: made when a page becomes far, shared by all whose tables have the slot."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tandemkv.cache.pool import PagePool
from tandemkv.kernels.blocks import BlockCodes
from tandemkv.select import Summariser

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

# Pages that are read and summarised at once: 64 of 8 heads of 128 are 17 MB in float32.
_BATCH_PAGES = 64


class CodeBook:
    """The codes that one summariser makes of the pages of a far pool."""

    def __init__(self, far: PagePool, summariser: Summariser) -> None:
        """Memory is taken by the first codes of a slot, as with pages."""
        self.summariser, self._far = summariser, far
        self.codes: BlockCodes = summariser.allocate(far.arena)
        self._bases: dict[int, Any] = {}  # of every layer

    def basis(self, layer: int) -> Any:
        """What the codes of a layer were made with."""
        return self._bases[layer]

    def add(self, layer: int, slots: Tensor, pool: "WorkerPool | None") -> None:
        """Make the codes of a layer's pages, which lie in these far slots, int32 of any shape."""
        for batch in torch.unique(slots.flatten()).split(_BATCH_PAGES):
            if layer not in self._bases:
                self._bases[layer] = self.summariser.begin(self._far.arena, batch, pool)
            self.summariser.summarise(self._far.arena, batch, self._bases[layer], self.codes, pool)
