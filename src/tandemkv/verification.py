"""What a selector left out, estimated from a sample, with an error that is known (vAttention, 2510.05688).

Blocks of 16 tokens are drawn, because one token of a packed block touches all of it. Legend, for a KV head: n blocks
were left out, of which m are the pilot and b of the other n - m the sample, all drawn without replacement.

    pilot    read exactly; how its blocks scatter sizes b
    sample   in NUM_GROUPS groups: together they stand for the n - m blocks; how they scatter tells the error, and
             how many more are drawn where it is too large

Where more than half would have to be read, all n blocks are.

Block j adds S_j = sum exp(score) to the denominator D and N_j = sum exp(score) v to the numerator; out = N / D. To
first order the error of out is the mean of r_j = (N_j - out S_j) / D over the sample, less that over all, times n - m.
It is a vector: the sum of its squares is taken for a chi-square variable of (tr C)^2 / tr(C^2) degrees of freedom, C
the covariance of r_j (Satterthwaite). With one degree that is the normal quantile squared, 3.8 times the variance for
delta 0.05; where errors of 128 channels are independent, 1.2 times.
"""

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandemkv.cache import LayerKV
from tandemkv.kernels import attend, merge
from tandemkv.kernels.blocks import ChosenBlocks
from tandemkv.kernels.sample import collapse, scatter, shuffle_left
from tandemkv.select import Verified
from tandemkv.types import BLOCK_TOKENS, PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

PILOT_BLOCKS = 64
NUM_GROUPS = 16


class Scatter(NamedTuple):
    """How the residuals of drawn blocks or groups scatter, for each `[num_seqs, num_q_heads, q_len]`.

    variance: trace of their covariance. factor: how much larger than its mean the square of an error may be, with
    probability delta.
    """

    variance: Tensor
    factor: Tensor


class Rest(NamedTuple):
    """What was left out. parts: of which the last one is estimated. error: `[num_seqs, num_q_heads, q_len]`, what
    ||estimate - exact|| / ||exact|| exceeds with probability delta; 0 where all was read. num_read: int64 `[num_seqs,
    num_kv_heads]`, blocks. is_exact: bool of the same shape, where the sample was given up."""

    parts: list[Partial]
    error: Tensor
    num_read: Tensor
    is_exact: Tensor


class Step(NamedTuple):
    """What one step asks with. q: `[num_seqs, num_q_heads, q_len, head_dim]`; sink_logit as in `merge`."""

    q: Tensor
    rule: ScoreRule
    pool: "WorkerPool"
    sink_logit: Tensor | None = None


class Draw(NamedTuple):
    """Blocks of each head, `[num_seqs, num_kv_heads]`: from place `first` of its shuffled ones on so many, int64."""

    first: Tensor
    counts: Tensor


class Tail:
    """The far blocks that one step leaves out, and the draws from them: shuffled once, and taken from the front."""

    def __init__(self, step: Step, layer: LayerKV, chosen: ChosenBlocks, seed: int) -> None:
        """`chosen` is attended exactly already; it has the block in which padding ends. The order is another one for
        every seed, layer, step, sequence and head."""
        self._step, self._far = step, layer.far
        num_real = (self._far.num_blocks - self._far.kv_start // BLOCK_TOKENS).clamp(min=0)
        self.num_real = num_real[:, None].expand(chosen.counts.shape)
        self.num_left = self.num_real - chosen.counts
        self._num_drawn = torch.zeros_like(self.num_left)
        of_step = ((seed * 1_000_003 + layer.index) * 1_000_003 + layer.seq_len) % 2**64
        self._order = shuffle_left(self._far, chosen, of_step, step.pool)

    @property
    def pool(self) -> "WorkerPool":
        """Threads of the step."""
        return self._step.pool

    def affordable(self, wanted: Tensor, num_left: Tensor) -> Tensor:
        """So many blocks of each head, or all that are left where more than half would have to be read."""
        num_read = self.num_real - num_left + wanted
        return torch.where(num_read > self.num_real // 2, num_left, wanted)

    def draw(self, num_wanted: Tensor) -> Draw:
        """So many blocks of each head, `[num_seqs, num_kv_heads]`, which cannot be drawn again."""
        drawn = Draw(self._num_drawn, num_wanted)
        self._num_drawn = self._num_drawn + num_wanted
        return drawn

    def attend_groups(self, drawn: Draw, num_groups: int) -> Partial:
        """Attention over groups of the drawn blocks, dealt out one by one: out `[num_seqs, num_groups, ...]`."""
        group = torch.arange(num_groups, device="cpu")[:, None]
        sizes = (drawn.counts[:, None] - group + num_groups - 1).div(num_groups, rounding_mode="floor").clamp_(min=0)
        most = max(1, int(sizes.max()))
        places = drawn.first[:, None, :, None] + (group[..., None] + num_groups * torch.arange(most, device="cpu"))
        order = self._order[:, None].expand(-1, num_groups, -1, -1)
        table = order.gather(3, places.clamp_(max=order.shape[3] - 1)).flatten(0, 1)
        kv_len = (sizes * BLOCK_TOKENS).flatten(0, 1).contiguous()
        run = PagedKV(self._far.arena, table, torch.zeros_like(kv_len), kv_len, of_blocks=True)
        q = self._step.q[:, None].expand(-1, num_groups, *self._step.q.shape[1:]).flatten(0, 1)
        part = attend(q, run, rule=self._step.rule, pool=self._step.pool)
        return Partial(*(x.unflatten(0, (-1, num_groups)) for x in part))


def attend_rest(step: Step, layer: LayerKV, chosen: ChosenBlocks, exact: Partial) -> Rest:
    """The far blocks that were not chosen, so that the error of the whole keeps the layer's promise.

    exact: attention over the chosen and the near tokens.
    """
    assert layer.sparse is not None and layer.sparse.verified is not None
    promise = layer.sparse.verified
    tail = Tail(step, layer, chosen, promise.seed)
    pilot = tail.draw(tail.num_left.clamp(max=PILOT_BLOCKS))
    each = tail.attend_groups(pilot, max(1, int(pilot.counts.max())))
    together = collapse(each, step.pool)
    exact = merge([exact, together], step.pool, sink_logit=step.sink_logit)  # of whose whole errors are shares
    num_left, num_known = tail.num_left - pilot.counts, chosen.counts + pilot.counts
    wanted = sample_size(exact, each, pilot.counts, num_left, promise, step.pool)
    rest = estimate_rest(tail, exact, num_left, wanted, promise)
    num_read = num_known + rest.num_read
    is_exact = (num_read == tail.num_real) & (tail.num_left > 0)
    return Rest([together, *rest.parts], rest.error, num_read, is_exact)


def estimate_rest(tail: Tail, exact: Partial, num_left: Tensor, wanted: Tensor, promise: Verified) -> Rest:
    """Of `num_left` blocks of each head `wanted` are drawn and stand for all; how they scatter may ask for more."""
    drawn, pool = tail.affordable(wanted, num_left), tail.pool
    groups = tail.attend_groups(tail.draw(drawn), NUM_GROUPS)
    wanted = torch.maximum(drawn, sample_size(exact, groups, drawn, num_left, promise, pool))
    more = tail.affordable(wanted, num_left) - drawn
    if bool(more.any()):
        others = tail.attend_groups(tail.draw(more), NUM_GROUPS)
        flat = [Partial(*(x.flatten(0, 1) for x in part)) for part in (groups, others)]
        groups = Partial(*(x.unflatten(0, (-1, NUM_GROUPS)) for x in merge(flat, pool)))
    drawn = drawn + more
    error = error_of(groups, exact, num_left, drawn, promise, pool)
    return Rest([scaled(collapse(groups, pool), num_left, drawn)], error, drawn, drawn == num_left)


def error_of(
    groups: Partial,
    exact: Partial,
    num_left: Tensor,
    num_wanted: Tensor,
    promise: Verified,
    pool: "WorkerPool | None" = None,
) -> Tensor:
    """See `Rest.error`, from how the groups of the sample scatter."""
    sample = scaled(groups, num_left, num_wanted)
    whole = merge([exact, collapse(sample, pool)], pool)
    scatter = scatter_of(sample, whole, promise.delta, pool)
    unread = 1 - by_q_head(num_wanted.double() / num_left.clamp(min=1), exact.out.shape[1])
    squares = scatter.factor * scatter.variance * NUM_GROUPS * unread.clamp_(min=0)
    error: Tensor = squares.sqrt().float() / whole.out.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return error


def scaled(part: Partial, num_left: Tensor, num_drawn: Tensor) -> Partial:
    """That of num_drawn blocks as that of num_left. part: lse `[num_seqs, num_q_heads, q_len]`, or groups on axis 1."""
    ratio = num_left.double() / num_drawn.clamp(min=1)  # whatever torch's default dtype is
    times = by_q_head(ratio.clamp(min=1).log().float(), part.lse.shape[-2])
    return Partial(part.out, part.lse + (times if part.lse.dim() == 3 else times[:, None]))


def sample_size(
    exact: Partial,
    parts: Partial,
    num_drawn: Tensor,
    num_left: Tensor,
    promise: Verified,
    pool: "WorkerPool | None" = None,
) -> Tensor:
    """int64 `[num_seqs, num_kv_heads]`: blocks to draw of num_left, so that the error is as small as promised.

    exact: attention over what does not stand for others. parts: on axis 1 equal shares of num_drawn blocks, from whose
    scatter that of single blocks follows.
    """
    num_heads, num_parts = exact.out.shape[1], parts.lse.shape[1]
    whole = merge([exact, scaled(collapse(parts, pool), num_left, num_drawn)], pool)
    scatter = scatter_of(parts, whole, promise.delta, pool)
    left, part_blocks = by_q_head(num_left.double(), num_heads), by_q_head(num_drawn.double() / num_parts, num_heads)
    squares = scatter.factor * scatter.variance / part_blocks.clamp(min=1e-9) * left.square()
    allowed = (promise.epsilon * whole.out.norm(dim=-1)).double().square()
    needed = (1 / (1 / left + allowed / squares.clamp(min=1e-300))).nan_to_num(math.inf)
    needed = needed.where(squares > 0, 0.0)  # a row of padding needs nothing
    wanted = by_kv_head(needed, num_left.shape[1]).ceil().clamp(NUM_GROUPS, 2.0**31).long()
    return torch.minimum(wanted, num_left)


def scatter_of(parts: Partial, whole: Partial, delta: float, pool: "WorkerPool | None" = None) -> Scatter:
    """How the residuals r_j of the parts on axis 1 scatter about their mean."""
    variance, products = scatter(parts, whole, pool)
    freedom = (variance.square() / products.clamp(min=1e-300)).clamp(1.0, float(whole.out.shape[-1]))
    spread = 2 / (9 * freedom)  # Wilson and Hilferty (1931): the cube root of a chi-square variable is nearly normal
    factor = (1 - spread + NormalDist().inv_cdf(1 - delta) * spread.sqrt()).clamp(min=0) ** 3
    return Scatter(variance, factor)


def by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """The largest of a group and of all queries: `[num_seqs, num_q_heads, q_len]` -> `[num_seqs, num_kv_heads]`."""
    most: Tensor = x.unflatten(1, (num_kv_heads, -1)).flatten(2).amax(2)
    return most


def by_q_head(x: Tensor, num_q_heads: int) -> Tensor:
    """`[num_seqs, num_kv_heads]` -> `[num_seqs, num_q_heads, 1]`."""
    wide: Tensor = x.repeat_interleave(num_q_heads // x.shape[1], 1)[..., None]
    return wide
