"""Ours beside stock: both models, their caches, and a tolerance that stock's own error sets."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import tandemkv.integrations.transformers as tandem
from tests.models import MAX_POSITIONS, random_ids

PAGE_SIZE, NEAR_TOKENS, CHUNK_TOKENS = 16, 32, 48
IDS, HELD = random_ids(1, 90), 70  # the tokens of a cache in use, and how many of them it holds


def attached(stock: Any) -> Any:
    """A twin of a stock model, attached."""
    return tandem.attach(copy.deepcopy(stock))


def tiered(model: Any, **changes: Any) -> tandem.TieredCache:
    """A cache so small that a hundred tokens are mostly far."""
    sizes: dict[str, Any] = {"near_tokens": NEAR_TOKENS, "far_bytes": "32MiB"}
    return tandem.TieredCache(
        model.config, **{**sizes, "page_size": PAGE_SIZE, "chunk_tokens": CHUNK_TOKENS, **changes}
    )


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Sequences and logits; greedy unless told otherwise."""
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{**options, **kwargs})


def logits_of(found: Any) -> Tensor:
    """`[num_seqs, num_new_tokens, vocab_size]`, float64."""
    return torch.stack(found.logits, 1).double()


@torch.no_grad()
def exact_logits(stock: Any, sequences: Tensor, num_new: int, mask: Tensor | None = None) -> Tensor:
    """What a float64 twin answers to the same tokens, all at once, each sequence alone and without its padding."""
    exact = copy.deepcopy(stock).double()
    starts = [0] * len(sequences) if mask is None else mask.logical_not().sum(1).tolist()
    rows = [exact(row[None, start:-1]).logits[0, -num_new:] for row, start in zip(sequences, starts, strict=True)]
    return torch.stack(rows)


def assert_agrees(stock: Any, expected: Any, found: Any, mask: Tensor | None = None) -> None:
    """Equal tokens; logits no farther from float64 than four times stock's largest own error."""
    assert torch.equal(expected.sequences, found.sequences)
    truth = exact_logits(stock, expected.sequences, len(expected.logits), mask)
    tolerance = 4 * (logits_of(expected) - truth).abs().max()
    assert tolerance < 1e-3
    assert (logits_of(found) - truth).abs().max() <= tolerance


def assert_far(cache: tandem.TieredCache) -> None:
    """The test would prove little if everything fitted near."""
    cache.check()
    near, far = cache.use()
    assert near.used_bytes > 0
    assert far.used_bytes > 0
    assert far.moved_bytes >= far.used_bytes
    assert cache.get_seq_length() < MAX_POSITIONS


@contextmanager
def unharmed(stock: Any, ours: Any, cache: tandem.TieredCache) -> Iterator[None]:
    """What happens inside leaves the cache's tokens as they were, and the next turn is right."""
    held = cache.get_seq_length()
    before = [layer.read(0, held) for layer in cache.kv._layers]
    yield
    cache.check()
    assert cache.get_seq_length() == held
    for (k, v), layer in zip(before, cache.kv._layers, strict=True):
        got_k, got_v = layer.read(0, held)
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)
    found = generate(ours, IDS, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(found.sequences, generate(stock, IDS, max_new_tokens=4).sequences)
    cache.check()


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What is gone in here went with its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def arenas_of(cache: tandem.TieredCache) -> list[StorageWeakRef]:
    """The memory of K and V, near and far, of a cache and its forks; none before the first use, or after the last."""
    store = cache.kv._store
    pools = [] if store is None else [store.near, store.far]
    return [
        StorageWeakRef(half.untyped_storage())
        for pool in pools
        for part in pool.arena.parts
        for half in (part.k, part.v)
    ]


class Streamer:
    """What `generate` asks of a streamer; keeps the ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.num_puts = 0
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()
        self.num_puts += 1

    def end(self) -> None:
        self.is_ended = True
