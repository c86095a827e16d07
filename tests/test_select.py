"""A layer in sparse mode attends to what its selector picks, to what is near and to nothing else."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv import attention
from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import InputError
from tandemkv.select import MAX_SELECT_QUERIES, SELECTORS, Sparse, Summaries, choose_pages
from tandemkv.types import Partial, ScoreRule
from tests.dense import causal_visible, dense_attention, random_kv
from tests.tolerances import TORCH_FLOAT32, assert_within, attend_bound

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, SCALE = 2, 2, 16, 0.3
PAGE, NEAR = 16, 32
SPEC = CacheSpec(
    num_layers=1,
    num_kv_heads=NUM_KV_HEADS,
    head_dim=HEAD_DIM,
    dtype=torch.float32,
    near_tokens=NEAR,
    far_bytes=1 << 22,
    page_size=PAGE,
    chunk_tokens=32,
)


class Favourites:
    """Keeps the pages that a table of scores `[num_kv_heads, many]` likes: every head others."""

    def __init__(self, seed: int) -> None:
        self.liking = torch.rand(NUM_KV_HEADS, 64, generator=torch.Generator().manual_seed(seed))

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        liking = self.liking[:, : summaries.num_pages]
        return liking.expand(q.shape[0], NUM_KV_HEADS, summaries.num_pages)


def filled(num_seqs: int, num_tokens: int, q_len: int, kv_start: list[int]) -> tuple[LayerKV, Tensor, Tensor, Tensor]:
    """A layer that holds all but the last q_len of num_tokens."""
    k, v = random_kv(num_seqs, NUM_KV_HEADS, num_tokens, HEAD_DIM, torch.float32, seed=num_tokens)
    q, _ = random_kv(num_seqs, NUM_KV_HEADS * GROUP_SIZE, num_tokens, HEAD_DIM, torch.float32, seed=1)
    cache = KVCache(SPEC, worker_pool())
    cache.reserve(num_seqs, 0)
    layer = cache.layer(0)
    layer.set_kv_start(torch.tensor(kv_start))
    past = num_tokens - q_len
    extend_and_attend(q[:, :, :past], k[:, :, :past], v[:, :, :past], layer, ScoreRule(SCALE))
    return layer, q, k, v


def kept_tokens(layer: LayerKV, sparse: Sparse, liking: Tensor, q_len: int) -> Tensor:
    """bool `[num_seqs, num_kv_heads, num_tokens]`: first pages, favourites within the budget, near tokens; plainly."""
    near = layer.first_near_token
    num_pages = near // PAGE
    room = (sparse.budget_tokens - (layer.seq_len - near)) // PAGE
    kept = torch.zeros(layer.num_seqs, NUM_KV_HEADS, layer.seq_len, dtype=torch.bool)
    kept[:, :, near:] = True
    for seq, start in enumerate(layer.kv_start.tolist()):
        for head in range(NUM_KV_HEADS):
            first = [
                page
                for page in range(num_pages)
                if (page + 1) * PAGE > start and page * PAGE < start + sparse.num_sink_tokens
            ]
            others = [page for page in range(num_pages) if page not in first and page * PAGE >= start]
            others.sort(key=lambda page: -float(liking[head, page]))
            for page in [*first, *others][:room]:
                kept[seq, head, page * PAGE : (page + 1) * PAGE] = True
    return kept


def assert_attends_to(kept: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor) -> None:
    q_len = q.shape[2]
    causal = causal_visible(k.shape[2], q_len, kv_start)
    for head in range(NUM_KV_HEADS):
        rows = slice(head * GROUP_SIZE, (head + 1) * GROUP_SIZE)
        visible = causal & kept[:, head, None]
        one_k, one_v = k[:, head : head + 1], v[:, head : head + 1]
        truth = dense_attention(q[:, rows], one_k, one_v, visible, SCALE)
        bound = attend_bound(q[:, rows], one_k, one_v, visible, SCALE, TORCH_FLOAT32, num_merges=4)
        got = Partial(out[:, :, rows].transpose(1, 2), truth.lse.float())
        assert_within(got, truth, bound._replace(lse=torch.full_like(bound.lse, math.inf)))


@settings(max_examples=80, deadline=None)
@given(
    past=st.integers(NEAR + 1, 400),
    q_len=st.integers(1, MAX_SELECT_QUERIES),
    kv_start=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    pages=st.integers(0, 20),
    num_sink_tokens=st.sampled_from([0, 1, 4, 16, 17, 40]),
    name=st.sampled_from(["window", "favourites"]),
)
@example(
    past=81, q_len=16, kv_start=[1], pages=0, num_sink_tokens=16, name="window"
)  # sinks on two pages, room for one
def test_a_step_attends_to_what_is_picked_and_to_nothing_else(
    past: int, q_len: int, kv_start: list[int], pages: int, num_sink_tokens: int, name: str
) -> None:
    """Any length, budget and padding; heads that pick alike and heads that do not."""
    least = -(-num_sink_tokens // PAGE) * PAGE + NEAR + MAX_SELECT_QUERIES
    sparse = Sparse("window", least + pages * PAGE, num_sink_tokens)
    favourites = Favourites(past)
    newest = torch.arange(64.0).expand(NUM_KV_HEADS, -1)
    layer, q, k, v = filled(len(kv_start), past + q_len, q_len, kv_start)
    sparse.check(NEAR, PAGE)
    layer.sparse = sparse
    selectors = {"window": SELECTORS["window"], "favourites": favourites}
    tail = slice(past, past + q_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SELECTORS, "window", selectors[name])
        out = extend_and_attend(q[:, :, tail], k[:, :, tail], v[:, :, tail], layer, ScoreRule(SCALE))
    kept = kept_tokens(layer, sparse, newest if name == "window" else favourites.liking, q_len)
    assert int(kept.sum(-1).max()) <= sparse.budget_tokens
    assert_attends_to(kept, out, q[:, :, tail], k, v, layer.kv_start)


def test_a_prompt_attends_to_everything() -> None:
    """More than MAX_SELECT_QUERIES tokens at once."""
    q_len = MAX_SELECT_QUERIES + 1
    layer, q, k, v = filled(1, 300, q_len, [0])
    layer.sparse = Sparse("window", 80)
    tail = slice(300 - q_len, 300)
    out = extend_and_attend(q[:, :, tail], k[:, :, tail], v[:, :, tail], layer, ScoreRule(SCALE))
    everything = torch.ones(1, NUM_KV_HEADS, 300, dtype=torch.bool)
    assert_attends_to(everything, out, q[:, :, tail], k, v, layer.kv_start)


def test_a_cache_hands_its_mode_to_layers_batches_and_forks() -> None:
    cache = KVCache(SPEC, worker_pool())
    cache.sparse = mode = Sparse("window", 96)
    cache.reserve(2, 100)
    fork = cache.fork()
    cache.select(torch.tensor([1, 0, 0]))
    assert cache.layer(0).sparse is fork.layer(0).sparse is fork.sparse is mode
    fork.sparse = None
    assert fork.layer(0).sparse is None
    assert cache.layer(0).sparse is mode


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Sparse("newest", 100), "selector must be one of window, got 'newest'"),
        (lambda: Sparse("window", 0), "budget_tokens must be a whole number of at least 1, got 0"),
        (lambda: Sparse("window", 100, -1), "num_sink_tokens must be a whole number of at least 0, got -1"),
        (lambda: Sparse("window", True), "budget_tokens must be a whole number of at least 1, got True"),
        (lambda: set_mode(Sparse("window", 63)), "budget_tokens must be at least 64: 16 for the pages of the first 4"),
        (lambda: set_mode("window"), r"sparse is a Sparse\(selector, budget_tokens\) or None, got str"),
    ],
)
def test_refusals(make: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def set_mode(mode: Any) -> None:
    KVCache(SPEC).sparse = mode


def test_the_smallest_budget_is_enough() -> None:
    set_mode(Sparse("window", 64))
    KVCache(replace(SPEC, near_tokens=48)).sparse = Sparse("window", 48 + MAX_SELECT_QUERIES, num_sink_tokens=0)


def test_padding_is_picked_last() -> None:
    summaries = Summaries(num_kv_heads=1, num_pages=5, page_size=16, kv_start=torch.tensor([0, 20, 64]))
    scores = torch.tensor([5.0, 4, 3, 2, 1]).expand(3, 1, 5)
    for num_sink_tokens in (0, 4):
        *chosen, (padding, last) = choose_pages(scores, summaries, num_sink_tokens, 2)[:, 0].tolist()
        assert chosen == [[0, 1], [1, 2]]
        assert padding < 4 == last


def test_on_a_device_every_token_of_a_question_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a step is one token: several at once come one after the other, and none reads what was not picked."""
    monkeypatch.setattr(attention, "_max_step", lambda q, layer: 1)
    monkeypatch.setattr(attention, "decode_step", attention._decode_on_device)
    layer, q, k, v = filled(1, 300, 5, [0])
    layer.sparse = Sparse("window", 80)
    twin = layer.fork()
    out = extend_and_attend(q[:, :, -5:], k[:, :, -5:], v[:, :, -5:], layer, ScoreRule(SCALE))
    steps = [slice(i, i + 1) for i in range(295, 300)]
    alone = [extend_and_attend(q[:, :, i], k[:, :, i], v[:, :, i], twin, ScoreRule(SCALE)) for i in steps]
    assert torch.equal(out, torch.cat(alone, 1))
    layer.sparse = None
    dense, *_ = filled(1, 300, 5, [0])
    everything = extend_and_attend(q[:, :, -5:], k[:, :, -5:], v[:, :, -5:], dense, ScoreRule(SCALE))
    assert not torch.allclose(out, everything, atol=1e-2)
