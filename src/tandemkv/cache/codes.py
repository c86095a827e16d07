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
        self._coded: set[int] = set()  # slots

    def basis(self, layer: int) -> Any:
        """What the codes of a layer were made with."""
        return self._bases[layer]

    def forget(self, slots: list[int]) -> None:
        """These slots have other content."""
        self._coded.difference_update(slots)

    def forget_basis(self, layer: int) -> None:
        """The layer has no far pages any more."""
        self._bases.pop(layer, None)

    def add(self, layer: int, slots: Tensor, is_real: Tensor, pool: "WorkerPool | None") -> None:
        """Make the codes of a layer's pages, which lie in these far slots, where there are none yet.

        slots: int32 `[num_seqs, num_pages]`; is_real: bool of the same shape, false for pages with padding, from which
        nothing is to be learnt where there are others.
        """
        missing = [slot for slot in torch.unique(slots).tolist() if slot not in self._coded or layer not in self._bases]
        if not missing:
            return
        arena = self._far.arena
        if layer not in self._bases:
            telling = slots[is_real] if bool(is_real.any()) else slots.flatten()
            self._bases[layer] = self.summariser.begin(arena, torch.unique(telling)[:_BATCH_PAGES], pool)
        for batch in torch.tensor(missing, dtype=torch.int32, device="cpu").split(_BATCH_PAGES):
            self.summariser.summarise(arena, batch, self._bases[layer], self.codes, pool)
            self._coded.update(batch.tolist())
