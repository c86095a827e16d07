"""Clusters of far blocks: what is known of them, how they score, and what is estimated of those left out."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import InputError
from tandemkv.kernels import attend
from tandemkv.kernels.blocks import ChosenBlocks, FarPages
from tandemkv.select import SELECTORS, Digester, Estimator, Sparse, Summaries
from tandemkv.select.clusters import MIN_SEGMENT_BLOCKS, Clustered, Clusters, _k_means
from tandemkv.types import BLOCK_TOKENS, Arena, PageLayout, Partial, ScoreRule
from tests.dense import random_kv
from tests.tolerances import Rounding, U, assert_within, attend_bound, sum_error

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, SCALE = 2, 2, 16, 0.3
ARENA = Arena.allocate(PageLayout(torch.float32, BLOCK_TOKENS), 1, NUM_KV_HEADS, HEAD_DIM)
KV = tuple[Tensor, Tensor]
SMALL = Clusters(cluster_blocks=4, segment_blocks=96)
# Means of up to 512 blocks of 16 tokens stand for keys and values: relative to the largest, they are off by this.
MEAN = sum_error(BLOCK_TOKENS) + sum_error(512) + 4 * U
ROUNDING = Rounding(query=MEAN, exp=8 * U, out=2 * U + MEAN)


class Text:
    """Far keys and values of blocks, behind padding that is NaN."""

    def __init__(self, k: Tensor, v: Tensor, kv_start: list[int]) -> None:
        self.k, self.v, self.kv_start = k.clone(), v.clone(), torch.tensor(kv_start)
        for seq, start in enumerate(kv_start):
            self.k[seq, :, :start] = self.v[seq, :, :start] = math.nan

    def far(self, num_blocks: int) -> FarPages:
        slots = torch.zeros(len(self.kv_start), num_blocks, dtype=torch.int32)
        return FarPages(ARENA, slots, self.kv_start)

    def read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        tokens = slice(first * BLOCK_TOKENS, last * BLOCK_TOKENS)
        return self.k[:, :, tokens], self.v[:, :, tokens]

    def of(self, seqs: list[int]) -> "Text":
        return Text(self.k[seqs], self.v[seqs], self.kv_start[seqs].tolist())

    def digest(self, policy: Clusters, num_blocks: int, old: Clustered | None = None) -> Clustered:
        return policy.digest(old, self.far(num_blocks), self.read)

    def summaries(self, known: Clustered) -> Summaries:
        return Summaries(self.far(known.num_blocks), digest=known)

    def is_real(self, num_blocks: int) -> Tensor:
        """bool `[num_seqs, num_blocks, BLOCK_TOKENS]`"""
        token = torch.arange(num_blocks * BLOCK_TOKENS)
        is_real: Tensor = (token >= self.kv_start[:, None]).unflatten(1, (-1, BLOCK_TOKENS))
        return is_real


def random_text(num_blocks: int, kv_start: list[int], seed: int = 0) -> Text:
    """Every token another."""
    kv = random_kv(len(kv_start), NUM_KV_HEADS, num_blocks * BLOCK_TOKENS, HEAD_DIM, torch.float32, seed)
    return Text(*kv, kv_start)


def repeated_kv(num_blocks: int, kv_start: list[int], run: int) -> tuple[Tensor, Tensor]:
    """Runs of at least so many blocks, behind the padding, in which all tokens are the same: what k-means that starts
    in each run cannot mix up."""
    num_kinds = max(1, num_blocks // run)
    k, v = random_kv(len(kv_start), NUM_KV_HEADS, num_kinds, HEAD_DIM, torch.float32)
    first = -(-(torch.tensor(kv_start) // BLOCK_TOKENS) // run)[:, None]  # a run that padding cuts joins the next one
    kinds = torch.maximum(torch.arange(num_blocks) // run, first).clamp(max=num_kinds - 1)
    index = kinds.repeat_interleave(BLOCK_TOKENS, 1)[:, None, :, None].expand(-1, NUM_KV_HEADS, -1, HEAD_DIM)
    return k.gather(2, index), v.gather(2, index)


def queries(num_seqs: int, q_len: int, seed: int = 3) -> Tensor:
    q, _ = random_kv(num_seqs, NUM_KV_HEADS * GROUP_SIZE, q_len, HEAD_DIM, torch.float32, seed)
    return q


def left_out(text: Text, num_blocks: int, share: float, seed: int = 5) -> Tensor:
    """bool `[num_seqs, num_kv_heads, num_blocks]`, other blocks for every head; none of padding alone."""
    drawn = torch.rand(len(text.kv_start), NUM_KV_HEADS, num_blocks, generator=torch.Generator().manual_seed(seed))
    return (drawn < share) & text.is_real(num_blocks).any(-1)[:, None]


def estimated(
    policy: Clusters, q: Tensor, is_left: Tensor, summaries: Summaries, rule: ScoreRule | None = None
) -> Partial:
    """Attention over what stands for these blocks: all others are chosen."""
    chosen = ChosenBlocks.allocate(ARENA, q.shape[0], max(1, is_left.shape[2]))
    for seq, head in product(range(q.shape[0]), range(NUM_KV_HEADS)):
        blocks = (~is_left[seq, head]).nonzero()[:, 0]
        chosen.blocks[seq, head, : len(blocks)] = blocks
        chosen.run.kv_len[seq, head] = BLOCK_TOKENS * len(blocks)
    if not is_left.shape[2]:  # no selector is asked where nothing is far
        return Partial(torch.zeros(q.shape), torch.full(q.shape[:3], -math.inf))
    run = policy.estimate(chosen, summaries)
    return attend(q, run, rule=ScoreRule(SCALE) if rule is None else rule, pool=worker_pool())


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rule: ScoreRule) -> Partial:
    """One KV head in float64; visible: `[num_seqs, num_tokens]`."""
    scores = rule.scale * (q.double() @ k.double().mT)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~visible[:, None, None], -math.inf)
    return Partial(torch.softmax(scores, -1).nan_to_num(0.0) @ v.double(), torch.logsumexp(scores, -1))


def assert_sound(known: Clustered, text: Text, policy: Clusters) -> None:
    """Groups hold the means of their tokens, computed plainly; segments are no smaller or larger than they may be."""
    ends = [0, *(segment.num_blocks for segment in known.segments)]
    assert all(MIN_SEGMENT_BLOCKS <= end - begin <= policy.segment_blocks for begin, end in pairwise(ends))
    assert known.num_blocks - ends[-1] == known.num_alone < MIN_SEGMENT_BLOCKS
    num_groups = known.in_segments.num_clusters + known.num_alone
    if not known.num_blocks:
        assert known.keys.shape[2] == known.values.shape[2] == 0
        return
    is_real = text.is_real(known.num_blocks)
    members = torch.nn.functional.one_hot(known.labels, num_groups).double().mT  # refuses labels out of range
    counts = (members * is_real.sum(-1)[:, None, None]).sum(-1, keepdim=True).clamp(min=1)
    for means, x in ((known.keys, text.k), (known.values, text.v)):
        blocks = x[:, :, : known.num_blocks * BLOCK_TOKENS].unflatten(2, (-1, BLOCK_TOKENS)).double()
        blocks = blocks.masked_fill(~is_real[:, None, ..., None], 0.0)
        expected, magnitude = (members @ y.sum(3) / counts for y in (blocks, blocks.abs()))
        assert means.shape == expected.shape
        assert bool(((means - expected).abs() <= MEAN * magnitude).all())


@settings(max_examples=40, deadline=None)
@given(
    num_runs=st.integers(0, 30),
    more=st.integers(0, 3),
    kv_start=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    q_len=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    softcap=st.sampled_from([None, 0.8]),
)
@example(num_runs=8, more=0, kv_start=[0], q_len=1, share=1.0, softcap=None)  # one segment, nothing alone
@example(num_runs=16, more=0, kv_start=[2048], q_len=1, share=1.0, softcap=None)  # a text of padding
@example(num_runs=0, more=0, kv_start=[0], q_len=1, share=1.0, softcap=None)
def test_what_is_alike_is_estimated_exactly(
    num_runs: int, more: int, kv_start: list[int], q_len: int, share: float, softcap: float | None
) -> None:
    """Runs of 8 equal blocks, clusters of 4 on average: each is of one kind, whatever part of it is left out. The
    reference attends to the tokens left out, in float64; padding is NaN, a block may be padding in part."""
    num_blocks = num_runs * 8 + more
    text, rule = Text(*repeated_kv(num_blocks, kv_start, run=8), kv_start), ScoreRule(SCALE, softcap)
    policy, q = Clusters(cluster_blocks=4, segment_blocks=128), queries(len(kv_start), q_len)
    known, is_left = text.digest(policy, num_blocks), left_out(text, num_blocks, share)
    found = estimated(policy, q, is_left, text.summaries(known), rule)
    visible = (is_left[..., None] & text.is_real(num_blocks)[:, None]).flatten(2)
    k, v = text.k.nan_to_num(), text.v.nan_to_num()
    for head in range(NUM_KV_HEADS):
        rows, one = slice(head * GROUP_SIZE, (head + 1) * GROUP_SIZE), slice(head, head + 1)
        expected = attention(q[:, rows], k[:, one], v[:, one], visible[:, head], rule)
        seen = visible[:, head, None].expand(-1, q_len, -1)
        bound = attend_bound(q[:, rows], k[:, one], v[:, one], seen, rule, ROUNDING)
        assert_within(Partial(found.out[:, rows], found.lse[:, rows]), expected, bound)


@pytest.mark.parametrize("kv_start", [[0], [0, 37, 1600]])
def test_without_a_question_every_token_left_out_counts_as_one(kv_start: list[int]) -> None:
    """q = 0: lse is the logarithm of their number, and with everything left out, out is the mean of all values."""
    num_blocks = 300
    text = random_text(num_blocks, kv_start)
    known, q = text.digest(SMALL, num_blocks), torch.zeros(len(kv_start), NUM_KV_HEADS * GROUP_SIZE, 2, HEAD_DIM)
    is_real = text.is_real(num_blocks)
    for share in (0.3, 1.0):
        is_left = left_out(text, num_blocks, share)
        found = estimated(SMALL, q, is_left, text.summaries(known))
        num_tokens = (is_left * is_real.sum(-1)[:, None]).sum(-1).repeat_interleave(GROUP_SIZE, 1)
        torch.testing.assert_close(found.lse, num_tokens.log()[..., None].expand(-1, -1, 2), rtol=1e-6, atol=0)
    values = text.v.nan_to_num().double().sum(2) / is_real.sum((1, 2))[:, None, None]
    expected = values.repeat_interleave(GROUP_SIZE, 1)[:, :, None].expand(-1, -1, 2, -1)
    torch.testing.assert_close(found.out.double(), expected, rtol=0, atol=1e-6)


def test_a_block_that_is_alone_counts_with_its_own_means() -> None:
    num_blocks = 100  # a segment of 96 and 4 blocks
    text = random_text(num_blocks, [0])
    known, q = text.digest(SMALL, num_blocks), queries(1, 1)
    assert known.num_alone == 4
    is_left = torch.zeros(1, NUM_KV_HEADS, num_blocks, dtype=torch.bool)
    is_left[:, :, 97] = True
    found = estimated(SMALL, q, is_left, text.summaries(known))
    k, v = (x.mean(2, keepdim=True).repeat_interleave(GROUP_SIZE, 1) for x in text.read(97, 98))
    torch.testing.assert_close(found.out, v)
    torch.testing.assert_close(found.lse, SCALE * (q * k).sum(-1) + math.log(BLOCK_TOKENS))


def test_blocks_score_as_their_cluster_and_those_alone_by_themselves() -> None:
    num_blocks = 200  # segments of 96 and 96, 8 blocks
    text, q = random_text(num_blocks, [0, 20]), queries(2, 3)
    known = text.digest(SMALL, num_blocks)
    scores = SMALL.score(q, text.summaries(known))
    assert scores.shape == (2, NUM_KV_HEADS, num_blocks)
    alone = text.read(192, 200)[0].unflatten(2, (-1, BLOCK_TOKENS)).mean(3)
    for head in range(NUM_KV_HEADS):
        rows = q[:, head * GROUP_SIZE : (head + 1) * GROUP_SIZE].flatten(1, 2)
        best = (rows @ known.keys[:, head].mT).amax(1)
        torch.testing.assert_close(scores[:, head, :192], best.gather(1, known.labels[:, head, :192]))
        torch.testing.assert_close(scores[:, head, 192:], (rows @ alone[:, head].mT).amax(1))
    assert len(known.labels[0, 0, :192].unique()) > 40  # of 48: few are empty


def test_alike_keys_are_in_one_cluster() -> None:
    """64 blocks of 4 kinds in any order, 4 clusters: no cluster has two kinds unless a kind has none of its own, and
    a kind is never split."""
    kinds = torch.randint(0, 4, (64,), generator=torch.Generator().manual_seed(0))
    k, v = random_kv(1, NUM_KV_HEADS, 4, HEAD_DIM, torch.float32)
    k, v = (x[:, :, kinds].repeat_interleave(BLOCK_TOKENS, 2) for x in (k, v))
    known = Text(k, v, [0]).digest(Clusters(), 64)
    assert known.segments == ((64, 4),)
    for head in range(NUM_KV_HEADS):
        for kind in range(4):
            assert len(known.labels[0, head, kinds == kind].unique()) == 1


@settings(max_examples=25, deadline=None)
@given(
    ops=st.lists(
        st.one_of(
            st.tuples(st.just("grow"), st.integers(1, 150)),
            st.tuples(st.just("cut"), st.integers(0, 250)),
            st.tuples(st.just("of"), st.sampled_from([[0], [1, 0], [1, 1]])),
        ),
        max_size=6,
    )
)
@example(ops=[("grow", 150), ("cut", 97), ("grow", 10)])  # into what is alone
@example(ops=[("grow", 150), ("cut", 95), ("grow", 1)])  # into a segment
def test_what_is_known_stays_sound(ops: list[tuple[str, Any]]) -> None:
    """Growing, cropping and picking sequences, in any order; what was cut away comes back with other content."""
    text, num_blocks = random_text(400, [0, 37]), 0
    known = text.digest(SMALL, 0)
    for number, (verb, value) in enumerate(ops):
        if verb == "grow":
            num_blocks = min(400, num_blocks + value)
            old, known = known, text.digest(SMALL, num_blocks, known)
            kept = old.in_segments.num_blocks
            assert torch.equal(known.labels[..., :kept], old.labels[..., :kept])
            assert_sound(known, text, SMALL)
        elif verb == "cut":
            num_blocks = min(num_blocks, value)
            old, known = known, known.cut(num_blocks)
            is_whole = old.in_segments.num_blocks <= num_blocks  # then nothing has to be read again
            assert known.num_blocks <= num_blocks and (
                not is_whole or known.num_blocks == min(num_blocks, old.num_blocks)
            )
            assert all(segment.num_blocks <= num_blocks for segment in known.segments)
            other = random_text(400, [0, 0], seed=number + 1)
            seqs = text.kv_start.tolist()
            cut_at = num_blocks * BLOCK_TOKENS
            k, v = (
                torch.cat([x[:, :, :cut_at], y[:, :, cut_at:]], 2) for x, y in ((text.k, other.k), (text.v, other.v))
            )
            text = Text(k, v, seqs)
        else:
            known, text = known.of(torch.tensor((value * 2)[:2])), text.of((value * 2)[:2])
    assert_sound(text.digest(SMALL, num_blocks, known), text, SMALL)


def test_padding_moves_no_centre() -> None:
    keys, _ = random_kv(1, NUM_KV_HEADS, 96, HEAD_DIM, torch.float32)
    is_real = torch.arange(96)[None] >= 30
    other = keys.clone()
    other[:, :, :30] = 5.0
    found = [_k_means(x, is_real, 24)[..., 30:] for x in (keys, other)]
    assert torch.equal(*found)


def test_nothing_new_costs_nothing_and_the_same_again_is_the_same() -> None:
    text = random_text(200, [0, 37])
    known = text.digest(SMALL, 200)
    assert text.digest(SMALL, 200, known) is known
    again = text.digest(SMALL, 200)
    assert all(torch.equal(getattr(known, x), getattr(again, x)) for x in ("labels", "keys", "values", "kv_start"))


def test_other_padding_is_another_text() -> None:
    text = random_text(150, [300])
    known = text.digest(SMALL, 150, random_text(150, [0]).digest(SMALL, 150))
    assert_sound(known, text, SMALL)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_key_is_seen_and_spoils_its_cluster_alone(bad: float) -> None:
    text, q = random_text(96, [0]), queries(1, 1)
    text.k[0, 0, 40 * BLOCK_TOKENS + 3, 5] = bad
    known = text.digest(SMALL, 96)
    scores = SMALL.score(q, text.summaries(known))
    is_spoilt = known.labels[0, 0] == known.labels[0, 0, 40]
    assert not scores[0, 0, is_spoilt].isfinite().any()
    assert scores[0, 0, ~is_spoilt].isfinite().all()
    assert scores[0, 1].isfinite().all()
    found = estimated(SMALL, q, ~is_spoilt.expand(1, NUM_KV_HEADS, -1), text.summaries(known))
    assert found.out.isfinite().all()


def filled(policy: Clusters, budget_tokens: int, num_tokens: int, kv_start: list[int]) -> tuple[LayerKV, KV]:
    """A layer of equal blocks that holds num_tokens, and all keys and values, those to come too."""
    spec = CacheSpec(
        num_layers=1,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        near_tokens=32,
        far_bytes=1 << 22,
        page_size=16,
    )
    cache = KVCache(spec, worker_pool())
    cache.sparse = Sparse(policy, budget_tokens)
    cache.reserve(len(kv_start), 0)
    layer = cache.layer(0)
    layer.set_kv_start(torch.tensor(kv_start))
    k, v = repeated_kv(num_tokens // BLOCK_TOKENS + 4, kv_start, run=8)
    prompt = slice(num_tokens)
    q = queries(len(kv_start), num_tokens)
    extend_and_attend(q, k[:, :, prompt], v[:, :, prompt], layer, ScoreRule(SCALE))
    return layer, (k, v)


def attend_next(layer: LayerKV, kv: KV, q: Tensor) -> Tensor:
    """Append as many tokens as there are queries. `[num_seqs, num_q_heads, q_len, head_dim]`."""
    new = slice(layer.seq_len, layer.seq_len + q.shape[2])
    k, v = (x[:, :, new] for x in kv)
    return extend_and_attend(q, k, v, layer, ScoreRule(SCALE)).transpose(1, 2)


@pytest.mark.parametrize("kv_start", [[0], [5, 300]])
def test_a_layer_of_like_blocks_answers_as_if_all_were_attended(kv_start: list[int]) -> None:
    """1500 tokens, a budget of 96: what the budget leaves out is estimated, and here that is exact; after a crop,
    too, and in a fork."""
    policy = Clusters(cluster_blocks=4, segment_blocks=64)
    layer, kv = filled(policy, 96, 1504, kv_start)
    dense, _ = filled(policy, 1 << 20, 1504, kv_start)
    for q in (queries(len(kv_start), 1), queries(len(kv_start), 5), queries(len(kv_start), 1, seed=4)):
        found, expected = attend_next(layer, kv, q), attend_next(dense, kv, q)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert isinstance(layer.knowledge.digest, Clustered)
    assert len(layer.knowledge.digest.segments) == 1
    for one in (layer, dense):
        one.crop(1200)
    assert layer.knowledge.digest.num_blocks <= layer.num_far_blocks
    q = queries(len(kv_start), 2, seed=6)
    twin = layer.fork()
    found, expected = attend_next(layer, kv, q), attend_next(dense, kv, q)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(attend_next(twin, kv, q), found)


def test_the_budget_is_kept() -> None:
    """Whole clusters are taken while they fit; the earliest blocks of the next one fill what is left."""
    policy = Clusters(cluster_blocks=4, segment_blocks=64)
    layer, kv = filled(policy, 600, 2048 + 32, [0])
    attend_next(layer, kv, queries(1, 1))
    assert layer.chosen is not None
    chosen = layer.chosen[1]
    near = layer.num_near_tokens
    assert int((chosen.counts * BLOCK_TOKENS).max()) + near <= 600
    assert int(chosen.counts.min()) == (600 - near) // BLOCK_TOKENS


def test_it_is_in_the_table() -> None:
    assert isinstance(SELECTORS["clusters"], Digester)
    assert isinstance(SELECTORS["clusters"], Estimator)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cluster_blocks": 0}, "cluster_blocks must be a whole number, at least 1, got 0"),
        ({"cluster_blocks": 2.5}, "cluster_blocks must be a whole number, at least 1, got 2.5"),
        ({"segment_blocks": 63}, "segment_blocks must be a whole number, at least 64, got 63"),
        ({"segment_blocks": True}, "segment_blocks must be a whole number, at least 64, got True"),
    ],
)
def test_refusals(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Clusters(**options)
