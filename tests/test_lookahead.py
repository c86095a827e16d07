"""Lookahead scores what was foreseen, by columns or by bounds; integrations/test_foresight.py foresees."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import InputError
from tandemkv.select import SELECTORS, Selector, Sparse
from tandemkv.select.bounds import Bounds
from tandemkv.select.columns import Columns
from tandemkv.select.lookahead import Lookahead
from tandemkv.types import ScoreRule
from tests.dense import random_kv

NUM_KV_HEADS, GROUP_SIZE, NUM_TOKENS = 2, 2, 300


def filled(selector: Selector, head_dim: int) -> LayerKV:
    """A layer of random tokens, most of them far."""
    spec = CacheSpec(
        num_layers=1,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        dtype=torch.float32,
        near_tokens=32,
        far_bytes=1 << 22,
        page_size=16,
        chunk_tokens=32,
    )
    cache = KVCache(spec, worker_pool())
    cache.sparse = Sparse(selector, 96)
    cache.reserve(1, 0)
    layer = cache.layer(0)
    k, v = random_kv(1, NUM_KV_HEADS, NUM_TOKENS, head_dim, torch.float32)
    extend_and_attend(queries(NUM_TOKENS, head_dim, 1), k, v, layer, ScoreRule(1.0))
    return layer


def queries(q_len: int, head_dim: int, seed: int) -> Tensor:
    return random_kv(1, NUM_KV_HEADS * GROUP_SIZE, q_len, head_dim, torch.float32, seed)[0]


@pytest.mark.parametrize(
    ("lookahead", "head_dim", "same_as"),
    [
        (Lookahead(), 128, Columns(40)),
        (Lookahead(), 16, Columns(4)),
        (Lookahead(0.01), 16, Columns(4)),
        (Lookahead(1), 24, Columns(24)),
        (Lookahead(None), 24, Bounds()),
    ],
)
def test_it_scores_what_was_foreseen_and_else_what_is_asked(
    lookahead: Lookahead, head_dim: int, same_as: Selector
) -> None:
    layer, other = filled(lookahead, head_dim), filled(same_as, head_dim)
    q, foreseen = queries(2, head_dim, 2), queries(2, head_dim, 3)
    expected = same_as.score(q, other.summaries())
    assert torch.equal(lookahead.score(q, layer.summaries()), expected)
    layer.foreseen = foreseen
    found = lookahead.score(q, layer.summaries())
    assert torch.equal(found, same_as.score(foreseen, other.summaries()))
    assert not torch.equal(found, expected)


def test_it_is_in_the_table() -> None:
    assert SELECTORS["lookahead"] == Lookahead(0.3)


@pytest.mark.parametrize("columns", [0, -0.5, 1.5, 32, True, "0.3"])
def test_refusals(columns: Any) -> None:
    with pytest.raises(InputError, match="columns must be a share of head_dim, above 0 and at most 1, or None, got"):
        Lookahead(columns)
