"""Groups of far blocks with keys alike (RetroInfer, 2505.02922): the best are attended, the others are estimated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels import append
from tandemkv.kernels.blocks import ChosenBlocks, FarPages
from tandemkv.select.base import Summaries, group_rows
from tandemkv.types import BLOCK_TOKENS, Arena, PagedKV, PageLayout

# Fewer blocks than this are not worth a segment.
MIN_SEGMENT_BLOCKS = 64

# The mean cosine to the own centre, with random keys and with clustered ones, is 0.3385 and 0.7787 after 4 as after 20.
_ROUNDS = 4

# Groups of a page of those that stand for tokens: as many as a tile of the kernel.
_PAGE_GROUPS = 64


class Segment(NamedTuple):
    """Where a segment ends: blocks and clusters up to there."""

    num_blocks: int
    num_clusters: int


class StandIns(NamedTuple):
    """A token for every group, its means. run: the tokens, whose `log_counts` every step writes; num_tokens: float32
    `[num_seqs, num_kv_heads, tokens of the run]`, those that each stands for where nothing is chosen."""

    run: PagedKV
    num_tokens: Tensor


@dataclass(frozen=True, eq=False)
class Clustered:
    """What is known of blocks `[0, num_blocks)`: the group of each. A `Digest`.

    The map of a head's blocks, and of its groups:

        0                    num_clustered           num_blocks
        |------ segments ------|-------- alone --------|
         groups [0, num_clusters)   groups from num_clusters on, one for each block, in order

    labels: int64 `[num_seqs, num_kv_heads, num_blocks]`, a block's group. keys, values: float32
    `[num_seqs, num_kv_heads, num_groups, head_dim and v_head_dim]`, the means of a group's tokens without padding, 0
    where it has none. kv_start: int64 `[num_seqs]`, what counted as padding. dtype: of the model. segments: in order.
    """

    labels: Tensor
    keys: Tensor
    values: Tensor
    kv_start: Tensor
    dtype: torch.dtype
    segments: tuple[Segment, ...] = ()

    @staticmethod
    def none(far: FarPages) -> "Clustered":
        """Of no blocks."""
        shape = far.slots.shape[0], far.arena.num_kv_heads, 0
        keys, values = (
            torch.zeros((*shape, dim), dtype=torch.float32, device="cpu")
            for dim in (far.arena.head_dim, far.arena.v_head_dim)
        )
        labels = torch.zeros(shape, dtype=torch.int64, device="cpu")
        return Clustered(labels, keys, values, far.kv_start, far.arena.layout.dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks of every sequence and head."""
        return self.labels.shape[2]

    @property
    def in_segments(self) -> Segment:
        """Blocks that are in segments, and all clusters."""
        return self.segments[-1] if self.segments else Segment(0, 0)

    @property
    def num_alone(self) -> int:
        """Blocks that are in no segment yet."""
        return self.num_blocks - self.in_segments.num_blocks

    def of(self, seqs: Tensor) -> "Clustered":
        """See `Digest`."""
        labels, keys, values = (x[seqs] for x in (self.labels, self.keys, self.values))
        return replace(self, labels=labels, keys=keys, values=values, kv_start=self.kv_start[seqs])

    def cut(self, num_blocks: int) -> "Clustered":
        """See `Digest`: a segment that reaches beyond is gone, and what comes behind it."""
        if num_blocks >= self.num_blocks:  # what was packed stays packed
            return self
        kept = tuple(segment for segment in self.segments if segment.num_blocks <= num_blocks)
        last = kept[-1] if kept else Segment(0, 0)
        end = min(num_blocks, self.num_blocks) if last == self.in_segments else last.num_blocks
        groups = slice(last.num_clusters + end - last.num_blocks)
        keys, values = self.keys[:, :, groups], self.values[:, :, groups]
        return replace(self, labels=self.labels[..., :end], keys=keys, values=values, segments=kept)

    def followed_by(self, keys: Tensor, values: Tensor) -> "Clustered":
        """With more blocks, each alone, of these means."""
        new = torch.arange(keys.shape[2], device="cpu") + self.keys.shape[2]
        labels = torch.cat([self.labels, new.expand(*keys.shape[:2], -1)], 2)
        keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        return replace(self, labels=labels, keys=keys, values=values)

    def with_segment(self, num_blocks: int, num_clusters: int) -> "Clustered":
        """The first so many blocks that are alone become a segment."""
        first, old = self.in_segments
        blocks = slice(old, old + num_blocks)  # the groups of those blocks, one for each
        num_tokens = _real_tokens(self.kv_start, first, first + num_blocks)
        labels = _k_means(self.keys[:, :, blocks], num_tokens > 0, num_clusters)
        keys, values = (
            _group_means(x[:, :, blocks], labels, num_tokens, num_clusters) for x in (self.keys, self.values)
        )
        end = Segment(first + num_blocks, old + num_clusters)
        alone = self.labels[..., end.num_blocks :] + (num_clusters - num_blocks)
        return replace(
            self,
            labels=torch.cat([self.labels[..., :first], labels + old, alone], 2),
            keys=torch.cat([self.keys[:, :, :old], keys, self.keys[:, :, blocks.stop :]], 2),
            values=torch.cat([self.values[:, :, :old], values, self.values[:, :, blocks.stop :]], 2),
            segments=(*self.segments, end),
        )

    @cached_property
    def block_tokens(self) -> Tensor:
        """float32 `[num_seqs, num_blocks]`: tokens of each block that are no padding."""
        return _real_tokens(self.kv_start, 0, self.num_blocks)

    @cached_property
    def stand_ins(self) -> StandIns:
        """A token for every group, in pages that the kernel attends to. NaN and infinities stay what they are."""
        num_seqs, num_kv_heads, num_groups, head_dim = self.keys.shape
        num_pages, spare = -(-num_groups // _PAGE_GROUPS), -num_groups % _PAGE_GROUPS
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, spare)).to(self.dtype) for x in (self.keys, self.values))
        layout = PageLayout(self.dtype, _PAGE_GROUPS, "panels")
        counts = torch.zeros(k.shape[:3], dtype=torch.float32, device="cpu")
        counts.scatter_add_(2, self.labels, self.block_tokens[:, None].expand(self.labels.shape))
        with torch.inference_mode(False):  # written again, maybe outside of it
            arena = Arena.allocate(layout, num_seqs * num_pages, num_kv_heads, head_dim, v_head_dim=v.shape[3])
            table = torch.arange(num_seqs * num_pages, dtype=torch.int32, device="cpu").view(num_seqs, 1, num_pages)
            kv_start = torch.zeros(num_seqs, dtype=torch.int64, device="cpu")
            run = PagedKV(
                arena,
                table.expand(-1, num_kv_heads, -1),
                kv_start,
                torch.full_like(kv_start, num_groups + spare),
                log_counts=torch.empty(k.shape[:3], dtype=torch.float32, device="cpu"),
            )
        append(arena, run.page_table, 0, k, v)
        return StandIns(run, counts)


@dataclass(frozen=True)
class Clusters:
    """score = q.centroid of the block's cluster, so that whole clusters are taken; what is left out is estimated.

    Segments of far blocks, up to `segment_blocks` of them, are clustered once by spherical k-means of their mean keys,
    less the segment's mean; a cluster has `cluster_blocks` blocks on average. The newest far blocks, too few for a
    segment, are clusters of one. What is left out of a cluster counts as so many tokens, all with the cluster's mean
    key and mean value.

    Not as in the paper: the unit is a block of 16 tokens, not a token; there is no cache of clusters on a GPU; the
    budget is in tokens, and a cluster that it cuts is attended in part, its earliest blocks, and estimated in part.
    """

    cluster_blocks: int = 16
    segment_blocks: int = 512

    def __post_init__(self) -> None:
        for name, least in (("cluster_blocks", 1), ("segment_blocks", MIN_SEGMENT_BLOCKS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")

    def digest(
        self, old: Clustered | None, far: FarPages, read: Callable[[int, int], tuple[Tensor, Tensor]]
    ) -> Clustered:
        """See `Digester`. Other padding than before is another text: everything is read again."""
        is_same = old is not None and (old.kv_start is far.kv_start or torch.equal(old.kv_start, far.kv_start))
        known = old if old is not None and is_same else Clustered.none(far)
        for first in range(known.num_blocks, far.num_blocks, self.segment_blocks):
            last = min(first + self.segment_blocks, far.num_blocks)
            num_tokens = _real_tokens(far.kv_start, first, last)
            known = known.followed_by(*(_block_means(x, num_tokens) for x in read(first, last)))
            while known.num_alone >= MIN_SEGMENT_BLOCKS:
                num_blocks = min(known.num_alone, self.segment_blocks)
                known = known.with_segment(num_blocks, -(-num_blocks // self.cluster_blocks))
        return known

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        """See `Selector`."""
        known: Clustered = summaries.digest
        rows = group_rows(q.float(), summaries.num_kv_heads)
        return (rows @ known.keys.mT).amax(2).gather(2, known.labels)

    def estimate(self, chosen: ChosenBlocks, summaries: Summaries) -> PagedKV:
        """See `Estimator`. A block that is in no segment counts with its own means."""
        known: Clustered = summaries.digest
        blocks, stand_ins = chosen.blocks.long(), known.stand_ins
        taken = known.block_tokens[:, None].expand(-1, blocks.shape[1], -1).gather(2, blocks) * chosen.is_chosen
        left = stand_ins.num_tokens.scatter_add(2, known.labels.gather(2, blocks), -taken)
        assert stand_ins.run.log_counts is not None
        torch.log(left, out=stand_ins.run.log_counts)
        return stand_ins.run


def _real_tokens(kv_start: Tensor, first: int, last: int) -> Tensor:
    """float32 `[num_seqs, last - first]`: tokens that are no padding, of each of these blocks."""
    ends = torch.arange(first + 1, last + 1, device="cpu") * BLOCK_TOKENS
    return torch.clamp(ends - kv_start[:, None], 0, BLOCK_TOKENS).float()


def _block_means(x: Tensor, num_tokens: Tensor) -> Tensor:
    """Of `[num_seqs, num_kv_heads, tokens, dim]`, per block; padding, of which there may be NaN, is left out."""
    blocks = x.unflatten(2, (-1, BLOCK_TOKENS))
    is_padding = torch.arange(BLOCK_TOKENS, device="cpu") < BLOCK_TOKENS - num_tokens[..., None]  # it comes first
    total: Tensor = blocks.masked_fill(is_padding[:, None, ..., None], 0.0).sum(3)
    return total / num_tokens.clamp(min=1)[:, None, :, None]


def _group_means(means: Tensor, labels: Tensor, num_tokens: Tensor, num_groups: int) -> Tensor:
    """`[num_seqs, num_kv_heads, num_groups, dim]` of block means `[..., blocks, dim]` and labels `[..., blocks]`.

    Added one by one: in a matrix product, one block's NaN would be everybody's.
    """
    weights = num_tokens[:, None].expand(labels.shape)
    counts = weights.new_zeros((*labels.shape[:2], num_groups)).scatter_add_(2, labels, weights)
    totals = means.new_zeros((*counts.shape, means.shape[3]))
    totals.scatter_add_(2, labels[..., None].expand(means.shape), means * weights[..., None])
    return totals / counts.clamp(min=1)[..., None]


def _k_means(keys: Tensor, is_real: Tensor, num_clusters: int) -> Tensor:
    """int64 `[num_seqs, num_kv_heads, num_blocks]`: the cluster of each block, by the cosine of keys less their mean.

    keys: `[..., num_blocks, head_dim]`; is_real: bool `[num_seqs, num_blocks]`, false for blocks of padding, which come
    first and move no centre. It starts at blocks evenly spread over the text: neighbours are alike, and nothing is
    drawn, so that the same keys always give the same clusters.
    """
    weights = is_real[:, None, :, None].float()
    keys = keys.nan_to_num(0.0, 0.0, 0.0)
    mean = (keys * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True).clamp(min=1)
    units = torch.nn.functional.normalize(keys - mean, dim=-1) * weights
    num_blocks, first = keys.shape[2], (~is_real).sum(-1, keepdim=True)
    spread = (torch.arange(num_clusters, dtype=torch.float32, device="cpu") + 0.5) / num_clusters
    starts = (first + (spread * (num_blocks - first)).long()).clamp(max=num_blocks - 1)  # [num_seqs, num_clusters]
    centres = units.gather(2, starts[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]))
    for _ in range(_ROUNDS):
        members = torch.nn.functional.one_hot((units @ centres.mT).argmax(-1), num_clusters).float()
        totals = members.mT @ units
        is_moved = totals.norm(dim=-1, keepdim=True) > 0  # one without members stays
        centres = torch.where(is_moved, torch.nn.functional.normalize(totals, dim=-1), centres)
    labels: Tensor = (units @ centres.mT).argmax(-1)
    return labels
