"""Codes of far pages: made once, for what is there, from what is no padding; all or nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache
from tandemkv.errors import CapacityError, UnsupportedError
from tandemkv.select import SELECTORS, Sparse, Verified
from tandemkv.select.bounds import Bounds
from tandemkv.types import ScoreRule

SPEC = CacheSpec(
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    dtype=torch.float32,
    near_tokens=128,
    far_bytes=1 << 24,
    page_size=64,
    chunk_tokens=128,
)
RULE = ScoreRule(0.25)
BUDGET = 300


def text(num_seqs: int, num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_seqs, 2, num_tokens, 16, generator=torch.Generator().manual_seed(seed))


def read(x: Tensor, sparse: Sparse | None = None, kv_start: tuple[int, ...] = (0,)) -> KVCache:
    cache = KVCache(SPEC, worker_pool())
    cache.sparse = sparse
    cache.reserve(x.shape[0], x.shape[2] + 256)
    for index in range(SPEC.num_layers):
        cache.layer(index).set_kv_start(torch.tensor(kv_start))
    feed(cache, x)
    return cache


def feed(cache: KVCache, x: Tensor) -> Tensor:
    cache.begin_step(x.shape[0], x.shape[2])
    for index in range(SPEC.num_layers):
        out = extend_and_attend(x, x, x, cache.layer(index), RULE)
    cache.end_step()
    return out


@pytest.mark.parametrize("name", ["bounds", "columns", "lookahead", "tandem"])
def test_a_mode_that_is_cut_off_while_codes_are_made_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, num_calls = Sparse(name, BUDGET), 0
    cache, never = read(text(1, 1000)), read(text(1, 1000))
    never.sparse = sparse
    summarise = type(sparse.policy).summarise  # type: ignore[attr-defined]

    def cut_off(*args: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            raise KeyboardInterrupt
        summarise(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(sparse.policy), "summarise", cut_off)
        cache.sparse = sparse
    assert cache.sparse is None
    assert all(cache.layer(index).sparse is None for index in range(2))
    cache.sparse = sparse
    new = text(1, 1, seed=1)
    assert torch.equal(feed(cache, new), feed(never, new))


def test_codes_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    summarise = Bounds.summarise

    def counted(*args: Any) -> None:
        made.append(len(args[2]))
        summarise(*args)

    monkeypatch.setattr(Bounds, "summarise", counted)
    cache = read(text(1, 1000), Sparse("bounds", BUDGET))
    num_pages = 2 * cache.layer(0).num_far_pages
    assert sum(made) == num_pages
    cache.fork().sparse = Sparse("bounds", BUDGET + 64)
    assert sum(made) == num_pages
    cache.sparse = None  # the codes go: nobody wants them
    cache.sparse = Sparse("bounds", BUDGET)
    assert sum(made) == 2 * num_pages


def test_directions_are_of_tokens_not_of_padding() -> None:
    """Padding that is all alike would leave no direction; one short prompt in a batch would do so for all."""
    x = text(2, 1000)
    x[1, :, :900] = 3.0
    padded = read(x, Sparse("columns", BUDGET), (0, 900))
    alone = read(x[:1], Sparse("columns", BUDGET))
    steps = [cache.layer(0).summaries().basis.steps for cache in (padded, alone)]
    torch.testing.assert_close(*steps)


def test_another_text_has_other_directions() -> None:
    cache = read(text(1, 1000), Sparse("columns", BUDGET))
    cache.crop(0)
    feed(cache, text(1, 1000, seed=5))
    fresh = read(text(1, 1000, seed=5), Sparse("columns", BUDGET))
    assert torch.equal(*(each.layer(1).summaries().basis.mean for each in (cache, fresh)))


def test_codes_that_would_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = read(text(1, 1000))
    monkeypatch.setattr(machine, "available_bytes", lambda: machine.Available(100, "cgroup limit"))
    with pytest.raises(CapacityError, match=r"needed for codes of 24 far pages, 100 B available .*such as 'window'"):
        cache.sparse = Sparse("tandem", BUDGET)
    assert cache.sparse is None
    cache.sparse = Sparse("window", BUDGET)


@pytest.mark.parametrize(
    "sparse",
    [
        *(Sparse(name, BUDGET) for name in ("salience", "heavy_hitters", "clusters", "tandem")),
        Sparse("bounds", BUDGET, verified=Verified(0.1, 0.1)),
    ],
    ids=lambda sparse: str(sparse.selector),
)
def test_what_needs_the_host_is_refused_on_a_device(sparse: Sparse) -> None:
    """Before the device is known, and after."""
    on_device = replace(SPEC, device=torch.device("cuda"))
    cache = KVCache(on_device)
    with pytest.raises(UnsupportedError, match="works with a CPU as the near device, got cuda: use bounds, columns"):
        cache.sparse = sparse
    cache = KVCache(SPEC)
    cache.sparse = sparse
    with pytest.raises(UnsupportedError, match="works with a CPU as the near device, got cuda"):
        cache.adapt(on_device)
    for name in ("window", "bounds", "columns", "lookahead"):
        KVCache(on_device).sparse = Sparse(name, BUDGET)
    with pytest.raises(UnsupportedError, match="'logits' joins logits of far and near tokens, which works with a CPU"):
        KVCache(on_device).sparse = Sparse("logits", BUDGET)
    assert set(SELECTORS) >= {"window", "bounds", "columns", "lookahead"}
