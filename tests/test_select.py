"""A layer in sparse mode attends to the blocks that its selector picks, to what is near and to nothing else."""

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
from tandemkv.select import MAX_SELECT_QUERIES, SELECTORS, Selector, Sparse, Summaries
from tandemkv.types import BLOCK_TOKENS, ScoreRule
from tests.dense import random_kv
from tests.sparse import assert_attends_to

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, SCALE = 2, 2, 16, 0.3
SPEC = CacheSpec(
    num_layers=1,
    num_kv_heads=NUM_KV_HEADS,
    head_dim=HEAD_DIM,
    dtype=torch.float32,
    near_tokens=32,
    far_bytes=1 << 22,
    page_size=16,
    chunk_tokens=32,
)
SPECS = {16: SPEC, 64: replace(SPEC, near_tokens=130, page_size=64, chunk_tokens=64)}


class Favourites:
    """Keeps the blocks that a table of scores `[num_kv_heads, many]` likes: every head others."""

    def __init__(self, seed: int) -> None:
        self.liking = torch.rand(NUM_KV_HEADS, 64, generator=torch.Generator().manual_seed(seed))

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        liking = self.liking[:, : summaries.num_blocks]
        return liking.expand(q.shape[0], summaries.num_kv_heads, summaries.num_blocks)


def filled(
    num_seqs: int, num_tokens: int, q_len: int, kv_start: list[int], spec: CacheSpec = SPEC
) -> tuple[LayerKV, Tensor, Tensor, Tensor]:
    """A layer that holds all but the last q_len of num_tokens."""
    k, v = random_kv(num_seqs, NUM_KV_HEADS, num_tokens, HEAD_DIM, torch.float32, seed=num_tokens)
    q, _ = random_kv(num_seqs, NUM_KV_HEADS * GROUP_SIZE, num_tokens, HEAD_DIM, torch.float32, seed=1)
    cache = KVCache(spec, worker_pool())
    cache.reserve(num_seqs, 0)
    layer = cache.layer(0)
    layer.set_kv_start(torch.tensor(kv_start))
    past = num_tokens - q_len
    extend_and_attend(q[:, :, :past], k[:, :, :past], v[:, :, :past], layer, ScoreRule(SCALE))
    return layer, q, k, v


def kept_tokens(layer: LayerKV, sparse: Sparse, liking: Tensor) -> Tensor:
    """bool `[num_seqs, num_kv_heads, num_tokens]`: first blocks, favourites within the budget, near tokens; plainly."""
    near = layer.first_near_token
    num_blocks = near // BLOCK_TOKENS
    room = (sparse.budget_tokens - (layer.seq_len - near)) // BLOCK_TOKENS
    kept = torch.zeros(layer.num_seqs, NUM_KV_HEADS, layer.seq_len, dtype=torch.bool)
    kept[:, :, near:] = True
    for seq, start in enumerate(layer.kv_start.tolist()):
        sinks_end = start + sparse.num_sink_tokens if sparse.num_sink_tokens else 0
        for head in range(NUM_KV_HEADS):
            real = [block for block in range(num_blocks) if (block + 1) * BLOCK_TOKENS > start]
            first = [block for block in real if block * BLOCK_TOKENS < sinks_end]
            others = [block for block in real if block not in first]
            others.sort(key=lambda block: -float(liking[head, block]))
            for block in [*first, *others][:room]:
                kept[seq, head, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS] = True
    return kept


@settings(max_examples=80, deadline=None)
@given(
    page_size=st.sampled_from([16, 64]),
    more=st.integers(1, 400),
    q_len=st.integers(1, MAX_SELECT_QUERIES),
    kv_start=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    spare=st.integers(0, 320),
    num_sink_tokens=st.sampled_from([0, 1, 4, 16, 17, 40]),
    name=st.sampled_from(["window", "favourites"]),
)
@example(
    page_size=16, more=49, q_len=16, kv_start=[1], spare=0, num_sink_tokens=16, name="window"
)  # sinks in two blocks, room for one
def test_a_step_attends_to_what_is_picked_and_to_nothing_else(
    page_size: int, more: int, q_len: int, kv_start: list[int], spare: int, num_sink_tokens: int, name: str
) -> None:
    """Any length, budget and padding; heads that pick alike and heads that do not."""
    spec = SPECS[page_size]
    past = spec.near_tokens + more
    least = -(-num_sink_tokens // BLOCK_TOKENS) * BLOCK_TOKENS + spec.near_tokens + MAX_SELECT_QUERIES
    favourites, newest = Favourites(past), torch.arange(64.0).expand(NUM_KV_HEADS, -1)
    selector: str | Selector = "window" if name == "window" else favourites
    sparse = Sparse(selector, least + spare, num_sink_tokens)
    sparse.check(spec.near_tokens)
    layer, q, k, v = filled(len(kv_start), past + q_len, q_len, kv_start, spec)
    layer.sparse = sparse
    tail = slice(past, past + q_len)
    out = extend_and_attend(q[:, :, tail], k[:, :, tail], v[:, :, tail], layer, ScoreRule(SCALE))
    assert layer.far_tokens > 0
    kept = kept_tokens(layer, sparse, newest if name == "window" else favourites.liking)
    assert int(kept.sum(-1).max()) <= sparse.budget_tokens
    assert_attends_to(kept, out, q[:, :, tail], k, v, layer.kv_start, SCALE)


@pytest.mark.parametrize("page_size", SPECS)
def test_a_prompt_attends_to_everything(page_size: int) -> None:
    """More than MAX_SELECT_QUERIES tokens at once."""
    q_len, spec = MAX_SELECT_QUERIES + 1, SPECS[page_size]
    layer, q, k, v = filled(1, 400, q_len, [0], spec)
    layer.sparse = Sparse("window", spec.near_tokens + 48)
    tail = slice(400 - q_len, 400)
    out = extend_and_attend(q[:, :, tail], k[:, :, tail], v[:, :, tail], layer, ScoreRule(SCALE))
    everything = torch.ones(1, NUM_KV_HEADS, 400, dtype=torch.bool)
    assert_attends_to(everything, out, q[:, :, tail], k, v, layer.kv_start, SCALE)


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


class Unscored:
    """No selector."""


KNOWN = ", ".join(sorted(SELECTORS))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Sparse("newest", 100), f"selector must be one of {KNOWN}, got 'newest'"),
        (lambda: Sparse(Favourites, 100), f"selector must be one of {KNOWN}, or an object with `score`, got <class"),  # type: ignore[arg-type]
        (lambda: Sparse(Unscored(), 100), f"selector must be one of {KNOWN}, or an object with `score`, got <"),  # type: ignore[arg-type]
        (lambda: Sparse("window", 0), "budget_tokens must be a whole number of at least 1, got 0"),
        (lambda: Sparse("window", 100, -1), "num_sink_tokens must be a whole number of at least 0, got -1"),
        (lambda: Sparse("window", True), "budget_tokens must be a whole number of at least 1, got True"),
        (
            lambda: Sparse("window", 100, verified=0.1),  # type: ignore[arg-type]
            r"verified must be a Verified\(epsilon, delta\) or None, got 0.1",
        ),
        (
            lambda: set_mode(Sparse("window", 63)),
            "budget_tokens must be at least 64: 16 for the blocks of the first 4 tokens, 32 near ones and 16 new ones; "
            "got 63",
        ),
        (lambda: set_mode(Sparse(Favourites(0), 79, 17)), "budget_tokens must be at least 80: 32 for the blocks of"),
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
    set_mode(Sparse(Favourites(0), 80, 17))
    KVCache(replace(SPEC, near_tokens=48)).sparse = Sparse("window", 48 + MAX_SELECT_QUERIES, num_sink_tokens=0)


class Wrong:
    """Gives scores of another shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        return torch.zeros(self.shape)


@pytest.mark.parametrize("shape", [(2, NUM_KV_HEADS, 3), (2, NUM_KV_HEADS), (1, NUM_KV_HEADS, 17), (2, 1, 17)], ids=str)
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """Of one's own selector; and no token is added."""
    layer, q, k, v = filled(2, 301, 1, [0, 0])
    layer.sparse = Sparse(Wrong(*shape), 96)
    with pytest.raises(InputError, match=r"scores must be float32 \[.*17\]"):
        extend_and_attend(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], layer, ScoreRule(SCALE))
    assert (layer.seq_len, layer.num_far_blocks) == (300, 17)


def test_on_a_device_a_question_picks_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One choice for its tokens, and nothing is read that was not picked."""
    layer, q, k, v = filled(1, 300, 5, [0])
    layer.sparse = Sparse("window", 80)
    twin, dense = layer.fork(), filled(1, 300, 5, [0])[0]
    question = q[:, :, -5:], k[:, :, -5:], v[:, :, -5:]
    expected, everything = (extend_and_attend(*question, each, ScoreRule(SCALE)) for each in (twin, dense))
    monkeypatch.setattr(attention, "decode_step", attention._decode_on_device)
    out = extend_and_attend(*question, layer, ScoreRule(SCALE))
    assert torch.allclose(out, expected, atol=1e-5)
    assert not torch.allclose(out, everything, atol=1e-2)
