"""What of a layer takes part in a step, and what is learnt from its attention: selectors meet pages here."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv.cache import Held, LayerKV
from tandemkv.errors import InputError
from tandemkv.kernels import attend, block_mass
from tandemkv.kernels.blocks import ChosenBlocks, choose_blocks
from tandemkv.lanes import FarQuestion, HybridCrew
from tandemkv.select import Observer, Seen, Sparse, Tally, Verified
from tandemkv.systems import SYSTEMS
from tandemkv.types import BLOCK_TOKENS, PagedKV, Partial, ScoreRule
from tandemkv.verification import Rest, Step, attend_rest

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

# A prompt's queries whose attention is looked at, of each chunk: flash kernels give no column sums, and all of a chunk
# of 512 would take eight times as long.
MASS_QUERIES = 64

# Room beyond what is wanted, for a budget that rises.
_SPARE_BLOCKS = 64

# ThinK's window has 32; here it must also outlive a step of one query.
WEIGHED_QUERIES = 64


def sparse_mode(system: str, budget_tokens: int | None) -> Sparse | None:
    """What a cache's `sparse` is for a system of `SYSTEMS`; None where every token is attended.

    InputError for an unknown system, and for one without the budget it needs.
    """
    if system not in SYSTEMS:
        raise InputError(f"unknown system {system!r}: the known ones are {', '.join(SYSTEMS)}")
    selector, promise = SYSTEMS[system].selector, SYSTEMS[system].verified
    if selector is None:
        return None
    if budget_tokens is None:
        raise InputError(f"system {system!r} needs a budget, in tokens per KV head: give budget_tokens")
    return Sparse(selector, budget_tokens, verified=None if promise is None else Verified(*promise))


def taking_part(q: Tensor, layer: LayerKV, held: Held, pool: "WorkerPool", num_new: int = 0) -> tuple[PagedKV, ...]:
    """The far tokens that these queries attend to: all, or what the layer's selector picks within its budget. num_new:
    tokens that will be near then, and are not yet held."""
    sparse = layer.sparse
    if sparse is None or not held.far or looks_at_all(layer, q.shape[2]):
        return held.far
    num_wanted = (sparse.budget_tokens - layer.num_near_tokens - num_new) // BLOCK_TOKENS
    if num_wanted >= layer.num_far_blocks and not _forgets(layer):
        return held.far
    chosen = _choose(q, layer, num_wanted, sparse, pool)
    if sparse.estimator is None or sparse.verified is not None:
        return (chosen.run,)
    return chosen.run, sparse.estimator.estimate(chosen, layer.summaries())


def joins_logits(layer: LayerKV) -> bool:
    """Whether the logits of far tokens join those of near ones, as HybridGen's do (`lanes/hybrid.py`); not for the
    lanes of another crew, which give partial results, and not beside a promise."""
    sparse, crew = layer.sparse, layer.crew
    if sparse is None or sparse.verified is not None or not layer.far_tokens:
        return False
    return getattr(sparse.policy, "joins_logits", False) and (crew is None or isinstance(crew, HybridCrew))


def far_question(q: Tensor, layer: LayerKV, rule: ScoreRule, num_new: int = 0) -> FarQuestion:
    """What the host is asked for a step of a layer that joins logits, of which num_new tokens are not yet held."""
    sparse, crew = layer.sparse, layer.crew
    assert sparse is not None
    budget = crew.budget if isinstance(crew, HybridCrew) else None
    budget_tokens = sparse.budget_tokens if budget is None else max(budget.tokens, sparse.budget_tokens)
    wanted = max(0, budget_tokens - layer.num_near_tokens - num_new) // BLOCK_TOKENS
    num_wanted, far = min(wanted, layer.num_far_blocks), layer.far
    old = None if layer.chosen is None else layer.chosen[1]
    last = None
    if budget is not None and budget.picks_before:
        last = torch.zeros((q.shape[0], far.arena.num_kv_heads, far.num_blocks), dtype=torch.float32, device="cpu")
        last = last if old is None else old.put(last, torch.ones_like(old.blocks, dtype=torch.float32))
    if old is None or old.run.arena is not far.arena or old.capacity < num_wanted:
        room = min(num_wanted + _SPARE_BLOCKS, far.arena.num_slots * far.page_blocks)
        layer.chosen = None, ChosenBlocks.allocate(far.arena, q.shape[0], room)
    assert layer.chosen is not None
    layer.chosen = layer.standing(num_wanted), layer.chosen[1]
    return FarQuestion(q, far, rule, layer.chosen[1], num_wanted, sparse.num_first_tokens, last)


def observer_of(layer: LayerKV) -> Observer | None:
    """Who watches the attention of this layer; a layer whose window has no far tokens is not watched."""
    if layer.sparse is None or layer.window is not None:
        return None
    return layer.sparse.observer


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
    if any(run.stands_in for run in runs):
        columns = mass.split([run.num_blocks for run in runs], -1)
        mass = torch.cat([x for x, run in zip(columns, runs, strict=True) if not run.stands_in], -1)
        runs = tuple(run for run in runs if not run.stands_in)
    q_len, num_listed = mass.shape[2], sum(run.num_blocks for run in runs[:-1])
    mass = mass.unflatten(1, (known.far.shape[1], -1)).amax(2)[..., : num_listed + known.near.shape[2]]
    chosen = _chosen_in(layer, runs)
    if chosen is None:
        listed = known.far[..., :num_listed]  # all far blocks, or none
    elif observer.watches_far:
        listed = known.far.gather(2, chosen.blocks.long())
    else:
        mass, listed, chosen = mass[..., num_listed:], known.far[..., :0], None
    listed_tokens = layer.num_near_tokens + sum(int(run.kv_len.max()) for run in runs[:-1])
    num_tokens = (layer.seq_len - layer.kv_start).clamp(1, listed_tokens)
    seen = Seen(mass, num_tokens, known.num_queries, known.num_decoded)
    numbers = observer.observe(torch.cat([listed, known.near], 2), seen)
    of_far, near = numbers.split([listed.shape[2], known.near.shape[2]], 2)
    if chosen is not None:
        of_far = chosen.put(known.far, of_far)
    layer.knowledge = known._replace(
        far=of_far if of_far.shape[2] else known.far,
        near=near,
        num_queries=known.num_queries + q_len,
        num_decoded=known.num_decoded + q_len * is_decoded,
        epoch=known.epoch + (chosen is None and listed.shape[2] > 0),
    )


def _chosen_in(layer: LayerKV, runs: tuple[PagedKV, ...]) -> ChosenBlocks | None:
    """The choice that is one of these runs."""
    chosen = None if layer.chosen is None else layer.chosen[1]
    return chosen if chosen is not None and runs[0] is chosen.run else None


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


def weigh_channels(q: Tensor, layer: LayerKV) -> None:
    """Let the layer know which channels of K these queries weigh, where its far pages leave some out.

    q: the newest queries, of which the last WEIGHED_QUERIES count: ThinK's observation window (2407.21018). A channel's
    weight is the sum of their squares; those before count less with every new one.
    """
    if not layer.weighs_channels:
        return
    q = q[:, :, -WEIGHED_QUERIES:].float().cpu()
    new = q.square().unflatten(1, (layer.knowledge.far.shape[1], -1)).sum((2, 3))
    old, share = layer.channel_weights, max(0.0, 1 - q.shape[2] / WEIGHED_QUERIES)
    layer.channel_weights = new if old is None or share == 0 else old * share + new


def is_verified(layer: LayerKV) -> bool:
    """Whether what is left out is sampled, with a promise."""
    return layer.sparse is not None and layer.sparse.verified is not None


def verified_rest(step: Step, layer: LayerKV, runs: tuple[PagedKV, ...], exact: Partial) -> list[Partial]:
    """What the far tokens that these runs leave out would add, sampled; nothing where none is left out.

    exact: the attention of the step's queries over these runs, without a sink's logit.
    """
    chosen = _chosen_in(layer, runs)
    rest = None if chosen is None else attend_rest(step, layer, chosen, exact)
    layer.knowledge = layer.knowledge._replace(tally=_tally(layer, rest))
    return [] if rest is None else rest.parts


def _tally(layer: LayerKV, rest: Rest | None) -> Tally:
    """What is known of the errors of a layer, a step later."""
    tally = layer.knowledge.tally
    num_heads = layer.num_seqs * layer.knowledge.far.shape[1]
    num_tokens = int((layer.seq_len - layer.kv_start).sum()) * layer.knowledge.far.shape[1]
    if rest is None:
        return tally.plus(torch.zeros(0, dtype=torch.float32), num_tokens, num_tokens, num_heads, 0)
    num_read = num_heads * layer.num_near_tokens + int(rest.num_read.sum()) * BLOCK_TOKENS
    return tally.plus(rest.error, min(num_read, num_tokens), num_tokens, num_heads, int(rest.is_exact.sum()))


def _forgets(layer: LayerKV) -> bool:
    observer = observer_of(layer)
    return observer is not None and observer.forgets


def _choose(q: Tensor, layer: LayerKV, num_wanted: int, sparse: Sparse, pool: "WorkerPool") -> ChosenBlocks:
    """The blocks that a selector picks for these queries; a choice that stands is not made again."""
    far, policy = layer.far, sparse.policy
    now = layer.standing(num_wanted)
    if layer.chosen is None or layer.chosen[1].run.arena is not far.arena:
        # For the whole budget, so that no number an observer draws depends on what was chosen before; never more than
        # the pool has, so that a huge budget takes no memory.
        room = min(-(-sparse.budget_tokens // BLOCK_TOKENS), far.arena.num_slots * far.page_blocks)
        layer.chosen = None, ChosenBlocks.allocate(far.arena, q.shape[0], room)
    last, chosen = layer.chosen
    if (sparse.stands or (sparse.foresees and layer.foreseen is not None)) and now.is_like(last):
        return chosen
    layer.chosen = None, chosen  # until the new one is there
    scores = policy.score(q.cpu(), layer.summaries())  # far blocks are known on the host
    if not isinstance(scores, Tensor):
        raise InputError(f"score must return a float32 tensor, {type(policy).__name__} gave {type(scores).__name__}")
    scores = scores if scores.dtype == torch.float32 else scores.float()
    choose_blocks(scores, min(num_wanted, chosen.capacity), far, sparse.num_first_tokens, chosen, pool)
    if _forgets(layer):  # what was not chosen once is gone
        known = layer.known()
        gone = torch.full_like(known.far, -torch.inf)
        layer.knowledge = known._replace(far=chosen.put(gone, known.far.gather(2, chosen.blocks.long())))
    layer.chosen = now, chosen
    return chosen
