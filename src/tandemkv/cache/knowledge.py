"""What was learnt of a layer's blocks beside their keys. Values that are replaced, never changed: a fork shares them,
and a step that is undone takes the old one back."""

from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv.select import Digest, Tally


class Knowledge(NamedTuple):
    """One number for every block, float32 `[num_seqs, num_kv_heads, blocks]`, far blocks and near ones; of those that
    nobody saw it is 0.

    num_queries: seen so far, num_decoded of them outside of prompts. digest: what a `Digester` made of the far blocks.
    epoch: another one where a choice that stood among the same pages no longer does. tally: of estimated errors.
    """

    far: Tensor
    near: Tensor
    num_queries: int = 0
    num_decoded: int = 0
    digest: Digest | None = None
    epoch: int = 0
    tally: Tally = Tally()

    @staticmethod
    def none(num_seqs: int, num_kv_heads: int) -> "Knowledge":
        """Nothing was seen."""
        empty = torch.zeros((num_seqs, num_kv_heads, 0), dtype=torch.float32, device="cpu")
        return Knowledge(empty, empty)

    def fitted(self, num_far: int, num_near: int) -> "Knowledge":
        """For so many far and near blocks: the boundary may have moved, blocks may have come or gone."""
        if self.far.shape[2] == num_far:
            if self.near.shape[2] == num_near:
                return self
            return self._replace(near=_resized(self.near, num_near))
        whole = _resized(torch.cat([self.far, self.near], 2), num_far + num_near)
        return self._replace(far=whole[:, :, :num_far], near=whole[:, :, num_far:])

    def cut(self, num_far: int, num_near: int) -> "Knowledge":
        """After a crop: what is gone may come back with other content."""
        if not num_far + num_near:
            return Knowledge.none(*self.far.shape[:2])
        if not self.num_queries and self.digest is None:
            return self
        digest = None if self.digest is None else self.digest.cut(num_far)
        return self.fitted(num_far, num_near)._replace(digest=digest, epoch=self.epoch + 1)

    def of(self, seqs: Tensor) -> "Knowledge":
        """That of the sequences `seqs`, int64 `[n]`."""
        digest = None if self.digest is None else self.digest.of(seqs)
        return self._replace(far=self.far[seqs], near=self.near[seqs], digest=digest, epoch=self.epoch + 1)


def _resized(x: Tensor, num_blocks: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, num_blocks - x.shape[2]))
