"""What the cache refuses, and that nothing has changed afterwards; what an append may touch."""

import math
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandemkv import machine
from tandemkv.cache import CacheSpec, KVCache, pool
from tandemkv.cache.layer import PageMap
from tandemkv.errors import CacheError, CapacityError, InputError, UnsupportedError
from tandemkv.machine import Available, CgroupMemory, Memory
from tandemkv.types import format_bytes
from tests.dense import random_kv
from tests.interrupts import every_line, interrupted

SPEC = CacheSpec(
    num_layers=2,
    num_kv_heads=2,
    head_dim=16,
    dtype=torch.float32,
    near_tokens=32,
    far_bytes=1 << 20,
    page_size=16,
    chunk_tokens=32,
)


def fill(cache: KVCache, num_seqs: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The same random K and V in every layer."""
    k, v = random_kv(num_seqs, SPEC.num_kv_heads, num_tokens, SPEC.head_dim, SPEC.dtype)
    if not cache.num_seqs:
        cache.reserve(num_seqs, 0)
    for index in range(SPEC.num_layers):
        layer = cache.layer(index)
        for begin in range(0, num_tokens, SPEC.chunk_tokens):
            layer.evict()
            layer.append(k[:, :, begin : begin + SPEC.chunk_tokens], v[:, :, begin : begin + SPEC.chunk_tokens])
    return k, v


def assert_holds(cache: KVCache, k: Tensor, v: Tensor) -> None:
    cache.check()
    for index in range(SPEC.num_layers):
        layer = cache.layer(index)
        assert layer.seq_len == k.shape[2]
        got_k, got_v = layer.read(0, layer.seq_len)
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, v)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near_tokens": 31}, "near_tokens must be at least two pages, 32, got 31"),
        ({"chunk_tokens": 24}, "chunk_tokens must be a multiple of page_size 16, got 24"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a multiple"),
        ({"page_size": 24}, "page_size must be a multiple of 16, got 24"),
        ({"dtype": torch.float64}, "float.*got torch.float64"),
        ({"windows": (8,)}, r"a window or None for each of 2 layers, got \(8,\)"),
    ],
)
def test_a_spec_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SPEC, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [0, 257])
def test_heads_that_the_kernel_cannot_read(head_dim: int) -> None:
    with pytest.raises(UnsupportedError, match=f"head_dim must be 1 to 256, got {head_dim}"):
        replace(SPEC, head_dim=head_dim)


def test_far_full_changes_nothing() -> None:
    """Room for two far pages per layer: 32 near + 32 far + the chunk that is appended after the last eviction."""
    cache = KVCache(replace(SPEC, far_bytes=4 * SPEC.far_page_bytes))
    k, v = fill(cache, 1, 96)
    before = cache.use()
    with pytest.raises(CapacityError, match=r"far tier is full: .* needed, 0 B of .* free; raise far_bytes"):
        cache.begin_step(1, 1)
    with pytest.raises(CapacityError, match="far tier is full"):
        cache.layer(0).evict()
    assert cache.use() == before
    assert_holds(cache, k, v)
    cache.crop(64)
    cache.begin_step(1, 32)
    assert_holds(cache, k[:, :, :64], v[:, :, :64])


def test_near_overflow_is_refused_before_anything_is_written() -> None:
    """Who forgets to evict learns it; the pages that exist stay as they are."""
    cache = KVCache(SPEC)
    k, v = fill(cache, 1, 32)
    layer = cache.layer(0)
    more = torch.randn(1, 2, 1000, 16)
    with pytest.raises(CapacityError, match="near tier is full"):
        layer.append(more, more)
    assert_holds(cache, k, v)


def test_reserve_spells_the_arithmetic_out() -> None:
    """3 sequences x (1000 - 32) far tokens = 61 pages each, 2 layers, K and V of 2 heads x 16 x 4 bytes."""
    cache = KVCache(replace(SPEC, far_bytes=1 << 19))
    needed = 3 * 61 * 16 * 2 * (2 * 2 * 16 * 4)
    with pytest.raises(CapacityError) as refused:
        cache.reserve(3, 1000)
    message = str(refused.value)
    for part in ("3 x 1000 tokens", "3 x 968 far", "2 layers", "256 bytes a token", format_bytes(needed), "512.00 KiB"):
        assert part in message
    assert "raise far_bytes or near_tokens" in message
    assert cache.use() == []
    cache.reserve(3, 32 + 16 * (2**19 // (3 * 2 * 16 * 256)))  # exactly what fits


@pytest.mark.parametrize("seq_len", [100, 99, 96, 81, 80, 79, 65, 64, 63, 50, 49, 48, 33, 32, 31, 17, 16, 15, 1, 0])
def test_crop_to_any_length_and_grow_again(seq_len: int) -> None:
    """64 of 100 tokens are far: cuts in near pages, in far pages and at every edge."""
    cache = KVCache(SPEC)
    k, v = fill(cache, 2, 100)
    assert cache.layer(0).far_tokens == 64
    cache.crop(seq_len)
    cache.check()
    for index in range(SPEC.num_layers):
        layer = cache.layer(index)
        assert layer.far_tokens == min(64, seq_len // 16 * 16)
        for begin in range(seq_len, 100, SPEC.chunk_tokens):
            layer.evict()
            layer.append(k[:, :, begin : begin + SPEC.chunk_tokens], v[:, :, begin : begin + SPEC.chunk_tokens])
    assert_holds(cache, k, v)


@pytest.mark.parametrize(("num_seqs", "num_tokens"), [(0, 10), (-1, 10), (1, -1)])
def test_reserve_of_nonsense(num_seqs: int, num_tokens: int) -> None:
    with pytest.raises(InputError, match="at least one sequence"):
        KVCache(SPEC).reserve(num_seqs, num_tokens)


def machine_with(total_bytes: int, free_bytes: int, cgroup: CgroupMemory | None = None) -> Memory:
    return Memory(total_bytes, free_bytes, cgroup)


@pytest.mark.parametrize(
    ("memory", "limit"),
    [
        (machine_with(1 << 19, 1 << 19), "physical memory is 512.00 KiB"),
        (machine_with(1 << 30, 1 << 30, CgroupMemory("/x", 1 << 18, 0)), "cgroup limit is 256.00 KiB"),
    ],
)
def test_far_bytes_beyond_the_machine(monkeypatch: pytest.MonkeyPatch, memory: Memory, limit: str) -> None:
    monkeypatch.setattr(machine, "memory", lambda: memory)
    with pytest.raises(CapacityError, match=f"far_bytes asks for 1.00 MiB, but the {limit}; lower far_bytes"):
        KVCache(SPEC)


def test_memory_that_is_gone_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """far_bytes is a capacity: only what a request would touch for the first time must be free."""
    cache = KVCache(SPEC)
    near_bytes = SPEC.num_near_slots(1) * SPEC.near_page_bytes

    def leave(num_bytes: int) -> None:
        monkeypatch.setattr(machine, "available_bytes", lambda: Available(num_bytes, "cgroup limit"))

    leave(near_bytes - 1)
    message = f"{re.escape(format_bytes(near_bytes))} of host memory needed.*cgroup limit.*lower far_bytes"
    with pytest.raises(CapacityError, match=message):
        cache.reserve(1, 32)
    assert cache.use() == []
    leave(near_bytes)
    cache.reserve(1, 32)
    k, v = fill(cache, 1, 96)  # touches 2 x 2 far pages
    near = cache.layer(0)._store.near
    untouched_near = near.held_bytes - near._parts[0].num_touched * SPEC.near_page_bytes
    leave(untouched_near + 2 * SPEC.far_page_bytes)
    cache.reserve(1, 32 + 3 * 16)
    with pytest.raises(CapacityError, match="host memory needed"):
        cache.reserve(1, 32 + 4 * 16)
    assert_holds(cache, k, v)


def test_memory_that_a_fork_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that a fork holds are nobody else's to fill again; those that came back are."""
    cache = KVCache(SPEC)
    held = fill(cache, 1, 96)
    fork = cache.fork()
    cache.crop(0)
    near = fork.layer(0)._store.near
    untouched_near = near.untouched_bytes()
    assert untouched_near > near.held_bytes - near._parts[0].num_touched * SPEC.near_page_bytes

    def leave(num_far_pages: int) -> None:
        num_bytes = untouched_near + num_far_pages * SPEC.far_page_bytes
        monkeypatch.setattr(machine, "available_bytes", lambda: Available(num_bytes, "cgroup limit"))

    leave(2 * 2 - 1)
    with pytest.raises(CapacityError, match="host memory needed"):
        cache.reserve(1, 32 + 2 * 16)
    leave(2 * 2)
    cache.reserve(1, 32 + 2 * 16)
    assert_holds(fork, *held)
    fork.close()
    leave(0)
    cache.reserve(1, 32 + 2 * 16)


def test_a_cache_of_no_far_bytes_holds_what_is_near() -> None:
    cache = KVCache(replace(SPEC, far_bytes=0))
    k, v = fill(cache, 2, 32)
    assert_holds(cache, k, v)
    with pytest.raises(CapacityError, match="raise far_bytes"):
        cache.reserve(2, 33)


def test_a_closed_cache_is_refused() -> None:
    cache = KVCache(SPEC)
    fill(cache, 1, 100)
    cache.close()
    assert cache.use() == []
    cache.check()
    for act in (lambda: cache.reserve(1, 1), lambda: cache.layer(0), lambda: cache.begin_step(1, 1)):
        with pytest.raises(CacheError, match="closed"):
            act()


@pytest.mark.parametrize("end", [KVCache.close, KVCache.reset], ids=["close", "reset"])
def test_close_and_reset_give_every_byte_back(end: Callable[[KVCache], None]) -> None:
    cache = KVCache(SPEC)
    fill(cache, 1, 100)
    layer = cache.layer(0)
    arenas = [weakref.ref(layer._store.near.arena), weakref.ref(layer._store.far.arena)]
    del layer
    end(cache)
    assert [arena() for arena in arenas] == [None, None]


def test_a_pool_that_is_cut_off_while_it_grows_loses_nothing() -> None:
    """At every line of the pool, while forks need more near pages than there are."""

    def forked() -> tuple[KVCache, list[KVCache], tuple[Tensor, Tensor]]:
        cache = KVCache(SPEC)
        held = fill(cache, 1, 60)
        return cache, [cache.fork() for _ in range(4)], held

    def grow(made: tuple[KVCache, list[KVCache], tuple[Tensor, Tensor]]) -> None:
        for fork in made[1]:
            fork.begin_step(1, 32)
            for index in range(SPEC.num_layers):
                fork.layer(index).append(*random_kv(1, 2, 32, 16, SPEC.dtype))
            fork.end_step()

    where = (str(Path(pool.__file__)),)
    made = forked()
    slots = made[0].use()[0].capacity_bytes
    grow(made)
    assert made[0].use()[0].capacity_bytes > slots
    for moment in every_line(forked, grow, "first and last", where):
        cache, forks, held = made = forked()
        with interrupted(moment, where), pytest.raises(KeyboardInterrupt):
            grow(made)
        assert_holds(cache, *held)
        for fork in forks:
            fork.check()
            assert fork.seq_len in {60, 92}
            fork.close()
        assert_holds(cache, *held)


def test_layers_of_different_lengths_are_noticed() -> None:
    cache = KVCache(SPEC)
    fill(cache, 1, 40)
    k, v = random_kv(1, 2, 1, 16, SPEC.dtype)
    cache.layer(0).append(k, v)
    with pytest.raises(AssertionError, match="different numbers of tokens"):
        cache.check()
    cache.crop(40)
    cache.check()


def test_check_counts_slots() -> None:
    """The books are compared with the tables, not with themselves."""
    cache = KVCache(SPEC)
    fill(cache, 1, 100)
    layer = cache.layer(1)
    layer._map.slots[0, 0] = layer._map.slots[0, 1]
    with pytest.raises(AssertionError, match=r"far: references to slots \[.*\] are miscounted"):
        cache.check()


def test_adapt_takes_the_models_dtype_until_tokens_are_held() -> None:
    cache = KVCache(SPEC)
    cache.reserve(1, 100)
    cache.adapt(replace(SPEC, dtype=torch.bfloat16))
    cache.reserve(1, 100)
    cache.layer(0).append(*random_kv(1, 2, 5, 16, torch.bfloat16))
    message = r"holds 2 heads of 16 and 16 torch.bfloat16 on cpu, got 2 heads of 16 and 16 torch.float32 on cpu"
    with pytest.raises(InputError, match=message):
        cache.adapt(SPEC)


class AllocatedBytes(TorchDispatchMode):
    """The largest tensor that any op returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            owned = result.untyped_storage().nbytes() if func._schema.returns[0].alias_info is None else 0
            self.largest = max(self.largest, owned)
        return result


def test_append_at_100k_tokens_touches_one_row_and_makes_nothing_long() -> None:
    """A sentinel everywhere: after one more token, exactly one token of one near page differs."""
    spec = replace(SPEC, num_layers=1, near_tokens=100_016, far_bytes=0, chunk_tokens=64)
    cache = KVCache(spec)
    cache.reserve(1, 0)
    layer = cache.layer(0)
    arena = layer._store.near.arena
    arena.k.fill_(math.pi)
    arena.parts[0].v.fill_(math.pi)
    layer._map = PageMap(layer._store.take_near(1, 100_000 // 16), 0, 100_000)
    one = torch.ones(1, 2, 1, 16)
    for num_new, table_bytes in ((1, 4 * 6251), (2, 0)):  # a new page, with a table of 4 bytes a page; a place in it
        with AllocatedBytes() as allocated:
            layer.evict()
            layer.append(one, one)
            with layer.hold():
                pass
        assert allocated.largest <= max(table_bytes, 1024)
        for half in (arena.k, arena.parts[0].v):
            changed = (half != torch.tensor(math.pi)).flatten(1).sum(1)
            assert changed.nonzero().tolist() == [[6250]]
            assert changed[6250] == num_new * one.numel()
        for half in layer.read(100_000, 100_000 + num_new):
            assert (half == 1).all()
    cache.check()
