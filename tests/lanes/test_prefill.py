"""A prompt on a rig: far pages come over the link, each once for a chunk, while the chunk attends to others."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tandemkv import attention, kernels
from tandemkv.attention import worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV, parse_far_dtype
from tandemkv.lanes import Crew, Rig
from tandemkv.schedule import Scheduler
from tests.dense import causal_visible, dense_attention
from tests.schedule.machines import plain_machine
from tests.test_selectors import NUM_KV_HEADS, SCALE, Text, feed, spec_of
from tests.tolerances import TORCH_FLOAT32, attend_bound

PAGE = 16
PIECE = 64


class Log(NamedTuple):
    """What went over the link to the device, and what of it was read: ("sent", bytes) and ("read", far tokens)."""

    events: list[tuple[str, int]]

    @property
    def sent(self) -> list[int]:
        return [num for name, num in self.events if name == "sent"]

    def most_staged(self) -> int:
        """Bytes of loads that were sent and whose reader was not yet done, at most."""
        open_loads: list[int] = []
        most = 0
        for name, num in self.events:
            if name == "read":
                open_loads.pop(0)
            else:
                open_loads.append(num)
                most = max(most, sum(open_loads))
        return most


@pytest.fixture
def log(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Log:
    found, up, read = Log([]), rig.up.send, LayerKV.read

    def send(name: str, num_bytes: int, *more: Any) -> Any:
        assert name == "prefill"
        found.events.append(("sent", num_bytes))
        return up(name, num_bytes, *more)

    def logged_read(layer: LayerKV, begin: int, end: int, *more: Any) -> Any:
        if layer.crew is not None and begin < layer.first_near_token:
            assert end <= layer.first_near_token, "near tokens do not come up"
            found.events.append(("read", end - begin))
        return read(layer, begin, end, *more)

    monkeypatch.setattr(rig.up, "send", send)
    monkeypatch.setattr(LayerKV, "read", logged_read)
    monkeypatch.setattr(attention, "PREFILL_PIECE_TOKENS", PIECE)
    return found


def cache_on(rig: Rig, text: Text, stages_heads: bool, spec: CacheSpec) -> KVCache:
    cache = KVCache(spec, worker_pool())
    cache.crew = Crew(rig, Scheduler(plain_machine(), ("stream",)), stages_heads=stages_heads)
    cache.reserve(text.num_seqs, text.num_tokens)
    cache.layer(0).set_kv_start(torch.tensor(text.kv_start))
    return cache


def chunks(cache: KVCache, text: Text, num_tokens: int, log: Log) -> Iterator[tuple[int, Tensor]]:
    """A prompt chunk by chunk: the first token of each, and what it gave; of each the log is its own."""
    while cache.seq_len < num_tokens:
        log.events.clear()
        begin = cache.seq_len
        yield begin, feed(cache, text, min(cache.spec.chunk_tokens, num_tokens - begin))


def assert_dense(out: Tensor, begin: int, text: Text) -> None:
    q_len, kv_start = out.shape[1], torch.tensor(text.kv_start)
    end = begin + q_len
    q, k, v = text.q[:, :, begin:end], text.k[:, :, :end], text.v[:, :, :end]
    visible = causal_visible(end, q_len, kv_start)
    exact = dense_attention(q, k, v, visible, SCALE)
    bound = attend_bound(q, k, v, visible, SCALE, TORCH_FLOAT32, num_merges=end // PAGE)
    assert bool(((out.transpose(1, 2) - exact.out).abs() <= bound.out).all())


@pytest.mark.parametrize("stages_heads", [False, True], ids=["all heads", "head by head"])
@pytest.mark.parametrize("kv_start", [(0, 0), (0, 37)], ids=["no padding", "padding"])
def test_far_pages_come_up_once_for_every_chunk(
    rig: Rig, log: Log, stages_heads: bool, kv_start: tuple[int, ...]
) -> None:
    text = Text(kv_start=kv_start)
    cache = cache_on(rig, text, stages_heads, spec_of(PAGE))
    page_bytes = sum(part.num_bytes // part.num_slots for part in cache.layer(0).far.arena.parts)
    piece_bytes = PIECE // PAGE * page_bytes
    num_alone = 2 if any(kv_start) else 1  # sequences with other padding come alone
    per_load = piece_bytes * 2 // num_alone // (NUM_KV_HEADS if stages_heads else 1)
    for begin, out in chunks(cache, text, 600, log):
        assert_dense(out, begin, text)
        far_tokens = cache.layer(0).far_tokens  # what the chunk found: it evicted before it attended
        num_pages = sum(-(-(far_tokens - start // PAGE * PAGE) // PAGE) for start in kv_start if start < far_tokens)
        assert sum(log.sent) == num_pages * page_bytes
        assert max(log.sent, default=0) <= per_load
        assert rig.trace.take() == []  # a long prompt would leave millions of spans to the first step
        assert log.most_staged() <= 2 * per_load
    assert log.most_staged() == 2 * per_load
    assert len(log.sent) > 8


def test_a_chunk_s_pages_are_on_their_way_while_it_attends_to_itself(
    rig: Rig, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(kv_start=(0, 0))
    cache = cache_on(rig, text, False, spec_of(PAGE))
    feed(cache, text, 300)
    log.events.clear()
    attend_dense = kernels.attend_dense

    def logged(*args: Any, **kwargs: Any) -> Any:
        log.events.append(("attended", 0))
        return attend_dense(*args, **kwargs)

    monkeypatch.setattr(attention, "attend_dense", logged)
    feed(cache, text, 48)
    names = [name for name, _ in log.events]
    assert names[:4] == ["sent", "sent", "attended", "attended"]  # the chunk, near tokens
    assert names[4:8] == ["read", "attended", "sent", "read"]  # a slot is filled again when its load was attended


@pytest.mark.parametrize("far_dtype", [None, "int8", "model:64,int8"])
def test_head_by_head_reads_what_all_heads_read(far_dtype: str | None, rig: Rig) -> None:
    """Whatever the far format: a head's slice of every page, near ones too."""
    text = Text()
    cache = cache_on(rig, text, True, replace(spec_of(PAGE), far_formats=parse_far_dtype(far_dtype)))
    feed(cache, text, 300)
    layer = cache.layer(0)
    whole = layer.read(3, 290)
    for heads in (slice(0, 1), slice(1, 2), slice(0, 2)):
        for seqs in (slice(None), slice(1, 2)):
            for mine, its in zip(layer.read(3, 290, seqs, heads), whole, strict=True):
                assert torch.equal(mine, its[seqs, heads])


def test_without_a_rig_nothing_comes_over_a_link(log: Log) -> None:
    text = Text()
    cache = KVCache(spec_of(PAGE), worker_pool())
    cache.reserve(text.num_seqs, text.num_tokens)
    cache.layer(0).set_kv_start(torch.tensor(text.kv_start))
    feed(cache, text, 300)
    assert cache.layer(0).far_tokens > 0
    assert not log.sent
