"""What of a layer takes part in a step, and what is learnt from its attention: selectors meet pages here."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv.cache import Held, LayerKV
from tandemkv.kernels import attend, block_mass
from tandemkv.kernels.blocks import ChosenBlocks, choose_blocks
from tandemkv.select import Estimator, Observer, Seen, Sparse, is_standing
from tandemkv.types import BLOCK_TOKENS, PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

# A prompt's queries whose attention is looked at, of each chunk: flash kernels give no column sums, and all of a chunk
# of 512 would take eight times as long.
MASS_QUERIES = 64


def taking_part(q: Tensor, layer: LayerKV, held: Held, pool: "WorkerPool") -> tuple[PagedKV, ...]:
    """The far tokens that these queries attend to: all, or what the layer's selector picks within its budget."""
    sparse = layer.sparse
    if sparse is None or not held.far or looks_at_all(layer, q.shape[2]):
        return held.far
    num_wanted = (sparse.budget_tokens - layer.num_near_tokens) // BLOCK_TOKENS
    if num_wanted >= layer.num_far_blocks and not _forgets(layer):
        return held.far
    return (_choose(q, layer, num_wanted, sparse, pool).run,)


def observer_of(layer: LayerKV) -> Observer | None:
    """Who watches the attention of this layer; a layer whose window has no far tokens is not watched."""
    if layer.sparse is None or layer.window is not None:
        return None
    return layer.sparse.policy if isinstance(layer.sparse.policy, Observer) else None


def looks_at_all(layer: LayerKV, q_len: int) -> bool:
    """Whether an observer must see everything first: it has seen nothing yet, or several tokens are new (HGCA)."""
    observer = observer_of(layer)
    if observer is None:
        return False
    return layer.knowledge.num_queries == 0 or (q_len > 1 and not observer.forgets)


def learn(layer: LayerKV, mass: Tensor, runs: tuple[PagedKV, ...], *, is_decoded: bool) -> None:
    """Let the layer's observer know what each block of these runs, far ones and then near, got.

    mass: `[num_seqs, num_q_heads, q_len, num_blocks]`, of `block_mass`.
    """
    observer, known = observer_of(layer), layer.known()
    assert observer is not None
    num_seqs, num_heads, q_len, _ = mass.shape
    grouped = mass.unflatten(1, (known.far.shape[1], -1)).amax(2)
    num_listed = sum(run.num_blocks for run in runs[:-1])
    near_mass = grouped[..., num_listed : num_listed + known.near.shape[2]]
    seen = Seen(near_mass, layer.seq_len, known.num_queries, known.num_decoded)
    chosen = layer.chosen[1] if layer.chosen is not None and runs[0] is layer.chosen[1].run else None
    num_listed_all = num_listed == known.far.shape[2] and chosen is None
    if num_listed == 0 or (chosen is not None and not observer.watches_far):
        near, far = observer.observe(known.near, seen), known.far
    elif num_listed_all:
        whole = observer.observe(
            torch.cat([known.far, known.near], 2), seen._replace(mass=grouped[..., : num_listed + known.near.shape[2]])
        )
        far, near = whole[..., :num_listed], whole[..., num_listed:]
    else:
        assert chosen is not None
        listed = known.far.gather(2, chosen.blocks.long())
        whole = observer.observe(
            torch.cat([listed, known.near], 2), seen._replace(mass=grouped[..., : num_listed + known.near.shape[2]])
        )
        far, near = chosen.put(known.far, whole[..., :num_listed]), whole[..., num_listed:]
    layer.knowledge = known._replace(
        far=far,
        near=near,
        num_queries=known.num_queries + q_len,
        num_decoded=known.num_decoded + q_len * is_decoded,
        epoch=known.epoch + (num_listed_all and num_listed > 0),
    )


def observe_chunk(q: Tensor, layer: LayerKV, rule: ScoreRule, pool: "WorkerPool", *, is_last: bool) -> None:
    """After a prompt's chunk was appended: what its last queries attend to, of near blocks, at its end of all.

    q: the chunk's queries. A pass of their own, because torch's kernels give no column sums.
    """
    if observer_of(layer) is None:
        return
    q = q[:, :, -MASS_QUERIES:]
    with layer.hold() as held:
        runs = (*held.far, held.near) if is_last else (held.near,)
        mass = block_mass(q, *runs)
        attend(q, *runs, rule=rule, causal=True, mass=mass, pool=pool)
        learn(layer, mass, runs, is_decoded=False)


def estimates(layer: LayerKV) -> bool:
    """Whether what is left out is not dropped."""
    sparse = layer.sparse
    return sparse is not None and (sparse.verified is not None or isinstance(sparse.policy, Estimator))


def estimate_rest(q: Tensor, layer: LayerKV, chosen: ChosenBlocks, rule: ScoreRule) -> Partial:
    """What the far blocks that were not chosen would add, as the selector estimates it."""
    assert layer.sparse is not None
    estimator, summaries = layer.sparse.policy, layer.summaries()
    assert isinstance(estimator, Estimator)
    shape = (q.shape[0], summaries.num_kv_heads, summaries.num_blocks)
    is_chosen = chosen.mark(torch.zeros(shape, dtype=torch.float32, device="cpu"), 1.0) > 0
    return estimator.estimate(q, ~(is_chosen | summaries.is_padding), summaries, rule)


def _forgets(layer: LayerKV) -> bool:
    observer = observer_of(layer)
    return observer is not None and observer.forgets


def _choose(q: Tensor, layer: LayerKV, num_wanted: int, sparse: Sparse, pool: "WorkerPool") -> ChosenBlocks:
    """The blocks that a selector picks for these queries; a choice that stands is not made again."""
    far, policy = layer.far, sparse.policy
    room = -(-sparse.budget_tokens // BLOCK_TOKENS)
    now, known = layer.standing(num_wanted), layer.known()
    if layer.chosen is None or layer.chosen[1].run.arena is not far.arena:
        layer.chosen = None, ChosenBlocks.allocate(far.arena, q.shape[0], room)
    last, chosen = layer.chosen
    if is_standing(policy) and now.is_like(last):
        return chosen
    layer.chosen = None, chosen  # until the new one is there
    scores = policy.score(q, layer.summaries()).to(torch.float32)
    shape = (q.shape[0], far.arena.num_kv_heads)
    wanted = torch.full(shape, max(0, num_wanted), dtype=torch.int64, device="cpu")
    choose_blocks(scores, wanted, far, sparse.num_sink_tokens, chosen, pool)
    if _forgets(layer):  # what was not chosen once is gone
        gone = torch.full_like(known.far, -torch.inf)
        layer.knowledge = known._replace(far=chosen.put(gone, known.far.gather(2, chosen.blocks.long())))
    layer.chosen = now, chosen
    return chosen
