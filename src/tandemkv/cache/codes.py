"""Codes of far blocks, by slot: made when a page becomes far, shared by all whose tables have the slot."""

from typing import Any

import torch
from torch import Tensor

from tandemkv import kernels, machine
from tandemkv.cache.pool import PagePool
from tandemkv.kernels.blocks import BlockCodes
from tandemkv.select import Summariser

# Pages that are read and summarised at once: 64 of 8 heads of 128 are 17 MB in float32.
_BATCH_PAGES = 64


class CodeBook:
    """The codes that one summariser makes of the pages of a far pool."""

    def __init__(self, far: PagePool, summariser: Summariser) -> None:
        """Memory is taken by the first codes of a slot, as with pages."""
        self.summariser, self._far = summariser, far
        self._bases: dict[int, Any] = {}  # of every layer
        self.codes: BlockCodes | None = None

    def basis(self, layer: int) -> Any:
        """What the codes of a layer were made with."""
        return self._bases[layer]

    def add(self, layer: int, slots: Tensor, pool: Any) -> None:
        """Make the codes of a layer's pages, which lie in these far slots, int32 of any shape."""
        slots = torch.unique(slots.flatten())
        for batch in slots.split(_BATCH_PAGES):
            k = self._read(batch, pool)
            if layer not in self._bases:
                self._bases[layer] = self.summariser.begin(k.transpose(0, 1).flatten(1, 2))
            made = self.summariser.summarise(k, self._bases[layer])
            self.codes = self.codes or self._allocate(made)
            self.codes.codes[:, batch.long()] = made.codes
            if made.steps is not None and self.codes.steps is not None:
                self.codes.steps[:, batch.long()] = made.steps

    def _read(self, slots: Tensor, pool: Any) -> Tensor:
        """K of pages, float32 `[num_pages, num_kv_heads, page_size, head_dim]`."""
        arena = self._far.arena
        shape, dtype = (len(slots), arena.num_kv_heads, arena.layout.page_size), arena.layout.dtype
        k = torch.empty((*shape, arena.head_dim), dtype=dtype, device="cpu")
        v = torch.empty((*shape, arena.v_head_dim), dtype=dtype, device="cpu")
        table = slots[:, None, None].expand(-1, arena.num_kv_heads, 1)
        kernels.gather(arena, table, 0, k, v, pool)
        return k.float()

    @torch.inference_mode(False)  # written again, maybe outside of it
    def _allocate(self, like: BlockCodes) -> BlockCodes:
        def room(x: Tensor) -> Tensor:
            shape = (x.shape[0], self._far.arena.num_slots, *x.shape[2:])
            found = torch.empty(shape, dtype=x.dtype, device="cpu")
            machine.advise_huge_pages(found.data_ptr(), found.nbytes)
            return found

        return BlockCodes(
            like.kind, room(like.codes), None if like.steps is None else room(like.steps), like.page_blocks
        )
