"""A decode step and a prefill chunk over near and far pages equal dense causal attention, however tokens arrive."""

import math
import os
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv import attention, kernels, machine
from tandemkv.attention import decode_step, extend_and_attend, prefill_chunk, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import InputError
from tandemkv.kernels import cpu, torch_ops
from tandemkv.types import Arena, PageLayout, Partial, ScoreRule
from tests.dense import causal_visible, dense_attention, random_kv
from tests.paged import paginate
from tests.tolerances import (
    TORCH_BF16,
    TORCH_FLOAT32,
    Rounding,
    assert_within,
    attend_bound,
)

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 2, 2, 16
SCALE = 0.3
RULE = ScoreRule(SCALE)
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


def rounding_of(dtype: torch.dtype) -> Rounding:
    """Either kernel's, and the cast of the merged result to the model's dtype."""
    own = TORCH_BF16 if dtype == torch.bfloat16 else TORCH_FLOAT32
    return own._replace(out=own.out + (2.0**-8 if dtype == torch.bfloat16 else 0))


def random_qkv(num_seqs: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    k, v = random_kv(num_seqs, NUM_KV_HEADS, num_tokens, HEAD_DIM, dtype, seed=num_tokens)
    q, _ = random_kv(num_seqs, NUM_KV_HEADS * GROUP_SIZE, num_tokens, HEAD_DIM, dtype, seed=1)
    return q, k, v


def new_layer(spec: CacheSpec, num_seqs: int) -> LayerKV:
    cache = KVCache(spec, worker_pool())
    cache.reserve(num_seqs, 0)
    return cache.layer(0)


def feed(spec: CacheSpec, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], kv_start: Tensor) -> tuple[Tensor, int]:
    """Outputs `[num_seqs, num_tokens, num_q_heads, head_dim]` of runs of these lengths, and the last far_tokens."""
    layer = new_layer(spec, q.shape[0])
    outs = []
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        layer.set_kv_start(kv_start)
        run = slice(end - length, end)
        run_q, run_k, run_v = q[:, :, run], k[:, :, run], v[:, :, run]
        outs.append(extend_and_attend(run_q, run_k, run_v, layer, RULE))
        assert outs[-1].is_contiguous()
        assert outs[-1].dtype == q.dtype
    return torch.cat(outs, 1), layer.far_tokens


def assert_equals_dense(out: Tensor, q: Tensor, k: Tensor, v: Tensor, kv_start: Tensor, num_merges: int) -> None:
    """Only `out` is compared: lse does not leave `extend_and_attend`."""
    visible = causal_visible(q.shape[2], q.shape[2], kv_start)
    truth = dense_attention(q, k, v, visible, SCALE)
    bound = attend_bound(q, k, v, visible, SCALE, rounding_of(q.dtype), num_merges)
    got = Partial(out.transpose(1, 2).float(), truth.lse.float())
    lse_bound = torch.full_like(bound.lse, math.inf)
    assert_within(got, Partial(truth.out, truth.lse), bound._replace(lse=lse_bound))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20) | st.sampled_from([32, 33, 64, 65, 100]), min_size=1, max_size=6),
    kv_start=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    near_tokens=st.sampled_from([32, 33, 47, 48, 80]),
    chunk_tokens=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(lengths=[100, 1, 8, 9], kv_start=[0], near_tokens=32, chunk_tokens=32, dtype=torch.float32)
@example(lengths=[64, 32, 20], kv_start=[150, 0, 33], near_tokens=32, chunk_tokens=16, dtype=torch.float32)
def test_any_way_to_feed_tokens_equals_dense_attention(
    lengths: list[int], kv_start: list[int], near_tokens: int, chunk_tokens: int, dtype: torch.dtype
) -> None:
    """Runs of 1 to 20 tokens and prompts, paddings that end anywhere (some in no token at all), every chunk size."""
    q, k, v = random_qkv(len(kv_start), sum(lengths), dtype)
    spec = replace(SPEC, near_tokens=near_tokens, chunk_tokens=chunk_tokens, dtype=dtype)
    starts = torch.tensor(kv_start)
    out, _ = feed(spec, q, k, v, lengths, starts)
    assert_equals_dense(out, q, k, v, starts, num_merges=8)
    is_padding = torch.arange(sum(lengths)) < starts[:, None]
    assert (out[is_padding] == 0).all()


@pytest.mark.parametrize("q_len", range(1, 21))
def test_every_query_length_over_far_pages(q_len: int) -> None:
    """Up to MAX_DECODE_QUERIES the paged kernel, beyond it torch's; one sequence is padded into its far pages."""
    q, k, v = random_qkv(2, 90 + q_len)
    kv_start = torch.tensor([0, 21])
    out, far_tokens = feed(SPEC, q, k, v, [90, q_len], kv_start)
    assert far_tokens == 64
    assert_equals_dense(out, q, k, v, kv_start, num_merges=8)


@pytest.mark.parametrize("prompt", [31, 32, 33, 47, 48, 49, 63, 64, 65])
def test_boundaries_between_near_and_far_on_and_off_page_edges(prompt: int) -> None:
    """20 single tokens across the first evictions."""
    q, k, v = random_qkv(1, prompt + 20)
    out, far_tokens = feed(SPEC, q, k, v, [prompt] + [1] * 20, torch.tensor([0]))
    assert far_tokens >= 16
    assert_equals_dense(out, q, k, v, torch.tensor([0]), num_merges=8)


def test_history_longer_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that cut pages, cross from far to near and end anywhere."""
    monkeypatch.setattr(attention, "PREFILL_PIECE_TOKENS", 27)
    q, k, v = random_qkv(2, 200)
    kv_start = torch.tensor([5, 40])
    out, _ = feed(SPEC, q, k, v, [150, 50], kv_start)
    assert_equals_dense(out, q, k, v, kv_start, num_merges=10)


def filled(num_tokens: int, kv_start: list[int]) -> tuple[LayerKV, Tensor, Tensor, Tensor]:
    q, k, v = random_qkv(len(kv_start), num_tokens)
    layer = new_layer(SPEC, len(kv_start))
    for begin in range(0, num_tokens, SPEC.chunk_tokens):
        layer.evict()
        layer.append(k[:, :, begin : begin + SPEC.chunk_tokens], v[:, :, begin : begin + SPEC.chunk_tokens])
    layer.set_kv_start(torch.tensor(kv_start))
    return layer, q, k, v


def test_a_decode_step_and_the_lse_of_a_chunk() -> None:
    layer, q, k, v = filled(100, [0, 70])
    for q_len in (1, 3):
        tail = slice(100 - q_len, 100)
        queries, chunk_k, chunk_v = q[:, :, tail], k[:, :, tail], v[:, :, tail]
        visible = causal_visible(100, q_len, layer.kv_start)
        truth = dense_attention(queries, k, v, visible, SCALE)
        bound = attend_bound(queries, k, v, visible, SCALE, TORCH_FLOAT32, num_merges=2)
        layer.crop(100 - q_len)
        assert_within(prefill_chunk(queries, chunk_k, chunk_v, layer, rule=RULE), truth, bound)
        out = decode_step(queries, chunk_k, chunk_v, layer, rule=RULE)
        assert layer.seq_len == 100
        assert bool(((out.transpose(1, 2) - truth.out).abs() <= bound.out).all())


def test_a_failed_decode_step_leaves_the_layer_as_it_was() -> None:
    layer, q, k, v = filled(95, [0])
    expected = [x.clone() for x in layer.read(0, 95)]
    with pytest.raises(InputError, match=r"k must be torch\.float32"):
        decode_step(q[:, :, :1], k[:, :, :1].double(), v[:, :, :1], layer, rule=RULE)
    with pytest.raises(InputError, match="q contains NaN"):
        decode_step(q[:, :, :2] * math.nan, k[:, :, :2], v[:, :, :2], layer, rule=RULE)  # would open a page
    assert layer.seq_len == 95
    assert sum(map(len, layer.used_slots())) == 6
    layer.crop(95)  # not held any more
    assert all(torch.equal(x, y) for x, y in zip(layer.read(0, 95), expected, strict=True))


@pytest.mark.parametrize("num_tokens", [10, 41, 95])
def test_a_failed_step_on_a_device_leaves_the_layer_as_it_was(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a lane looks at q, and where the near part fails after the tokens came."""
    layer, q, k, v = filled(num_tokens, [0])
    expected, pages = layer.read(0, num_tokens), sum(map(len, layer.used_slots()))
    tail = k[:, :, :1], v[:, :, :1], layer, RULE
    if layer.far_tokens:  # else nobody looks at q until the step is over
        with pytest.raises(InputError, match="q contains NaN"):
            attention._decode_on_device(q[:, :, :1] * math.nan, *tail)

    def failing(*args: Any) -> Partial:
        raise RuntimeError("the device failed")

    monkeypatch.setattr(attention, "_attend_near", failing)
    with pytest.raises(RuntimeError, match="the device failed"):
        attention._decode_on_device(q[:, :, :1], *tail)
    assert (layer.seq_len, sum(map(len, layer.used_slots()))) == (num_tokens, pages)
    assert all(torch.equal(x, y) for x, y in zip(layer.read(0, num_tokens), expected, strict=True))


def test_nan_in_a_step_on_a_device_is_told_when_it_is_over_and_until_it_is_gone() -> None:
    """No page is far, so that no host looks at q."""
    cache = KVCache(SPEC, worker_pool())
    q, k, v = random_qkv(1, 3)

    def step(token: int, factor: float) -> None:
        cache.begin_step(1, 1)
        t = slice(token, token + 1)
        for index in range(SPEC.num_layers):
            attention._decode_on_device(q[:, :, t] * factor, k[:, :, t], v[:, :, t], cache.layer(index), RULE)
        cache.end_step()

    step(0, 1.0)
    step(1, math.nan)
    for _ in range(2):
        with pytest.raises(InputError, match=r"q contains NaN.*; tokens from 1 on are spoilt, crop the cache"):
            step(2, 1.0)
        with pytest.raises(InputError, match="tokens from 1 on are spoilt"):
            cache.fork()
    assert cache.seq_len == 2
    cache.crop(1)
    step(1, 1.0)
    cache.fork()
    assert cache.seq_len == 2


def test_nan_of_a_step_that_was_undone_is_forgotten() -> None:
    cache = KVCache(SPEC, worker_pool())
    q, k, v = random_qkv(1, 3)
    for factor in (1.0, math.nan, 1.0):
        cache.begin_step(1, 1)
        for index in range(SPEC.num_layers):
            attention._decode_on_device(q[:, :, :1] * factor, k[:, :, :1], v[:, :, :1], cache.layer(index), RULE)
        if math.isnan(factor):
            cache.settle()
        else:
            cache.end_step()
    cache.fork()
    assert cache.seq_len == 2


def test_q_and_k_of_different_lengths_are_refused() -> None:
    layer, q, k, v = filled(41, [0])
    for num_tokens in (1, 3):
        with pytest.raises(InputError, match=f"of the same tokens, got 2 of q and {num_tokens} of k"):
            decode_step(q[:, :, :2], k[:, :, :num_tokens], v[:, :, :num_tokens], layer, rule=RULE)
    assert layer.seq_len == 41


def test_a_chunk_of_padding_alone_is_empty() -> None:
    layer, q, k, v = filled(20, [0, 50])
    part = prefill_chunk(q[:, :, :10], k[:, :, :10], v[:, :, :10], layer, rule=RULE)
    assert (part.out[1] == 0).all()
    assert (part.lse[1] == -math.inf).all()
    assert part.lse[0].isfinite().all()


@pytest.mark.parametrize("q_len", [1, 8, 9, 70])
def test_the_same_call_gives_the_same_bits(q_len: int) -> None:
    q, k, v = random_qkv(2, 100 + q_len)
    first, second = (feed(SPEC, q, k, v, [100, q_len], torch.tensor([0, 3]))[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("q_len", [1, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_a_single_query_is_refused(q_len: int, dtype: torch.dtype) -> None:
    """torch's CPU kernel alone would hide it in runs of fewer than 16 tokens."""
    layer = new_layer(replace(SPEC, dtype=dtype), 1)
    q, k, v = random_qkv(1, q_len, dtype)
    q[0, 1, q_len // 2, 3] = math.nan
    with pytest.raises(InputError, match="q contains NaN"):
        extend_and_attend(q, k, v, layer, RULE)


def test_strided_inputs_as_models_give_them() -> None:
    """transformers hands `[num_seqs, q_len, heads, head_dim]` over, transposed."""
    q, k, v = random_qkv(2, 60)
    plain, _ = feed(SPEC, q, k, v, [50, 1, 9], torch.tensor([0, 0]))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(feed(SPEC, q, k, v, [50, 1, 9], torch.tensor([0, 0]))[0], plain)


def test_memory_of_a_prefill_is_bounded_by_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel never sees more queries than a chunk, nor more history than a piece."""
    seen: list[tuple[int, int]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *, rule: ScoreRule, first_query: int | None = None) -> Partial:
        seen.append((q.shape[2], k.shape[2]))
        return torch_ops.attend_dense(q, k, v, rule=rule, first_query=first_query)

    monkeypatch.setattr(attention, "attend_dense", spy)
    monkeypatch.setattr(attention, "PREFILL_PIECE_TOKENS", 64)
    feed(SPEC, *random_qkv(1, 500), [500], torch.tensor([0]))
    assert max(q_len for q_len, _ in seen) == 32
    assert max(kv_len for _, kv_len in seen) == 64


# -- the path of a device, on CPU tensors: it asks nothing of the device but torch -------------------------------------


@pytest.mark.parametrize("kv_start", [[0, 0], [0, 70], [90, 99], [64, 65]])
def test_near_attention_as_on_a_device(kv_start: list[int]) -> None:
    layer, q, k, v = filled(100, kv_start)
    queries = q[:, :, -1:]
    with layer.hold() as held:
        far = kernels.attend(queries, *held.far, rule=RULE)
        near = attention._attend_near(queries, held.near, RULE, torch.zeros(1, dtype=torch.int32))
    visible = causal_visible(100, 1, layer.kv_start)
    bound = attend_bound(queries, k, v, visible, SCALE, TORCH_FLOAT32, num_merges=2)
    assert_within(torch_ops.merge([far, near]), dense_attention(queries, k, v, visible, SCALE), bound)


def test_decode_as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane answers from its own thread, the near part is gathered, parts are merged."""

    def on_device(q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink: None) -> Tensor:
        assert q.shape[2] == 1
        return attention._decode_on_device(q, k, v, layer, rule, sink)

    monkeypatch.setattr(attention, "decode_step", on_device)
    q, k, v = random_qkv(2, 130)
    kv_start = torch.tensor([0, 70])
    out, far_tokens = feed(SPEC, q, k, v, [100] + [1] * 30, kv_start)
    assert far_tokens > 64
    assert_equals_dense(out, q, k, v, kv_start, num_merges=8)


def test_an_error_in_the_lane_reaches_the_caller_and_releases_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane itself fails, on its thread, while the near part goes well: the new token and its page go back."""
    layer, q, k, v = filled(96, [0])
    pages, failed_on = sum(map(len, layer.used_slots())), []

    def failing_attend(*args: Any, **kwargs: Any) -> Partial:
        failed_on.append(threading.current_thread())
        raise RuntimeError("the lane failed")

    monkeypatch.setattr("tandemkv.lanes.attend.kernels.prepare_attend", failing_attend)
    with pytest.raises(RuntimeError, match="the lane failed"):
        attention._decode_on_device(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], layer, RULE)
    assert len(failed_on) == 1
    assert failed_on != [threading.current_thread()]
    assert (layer.seq_len, sum(map(len, layer.used_slots()))) == (96, pages)
    layer.crop(0)


def test_pages_are_held_until_the_lane_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The near part fails while the lane still reads: the layer must not move pages under it."""
    layer, q, k, v = filled(100, [0])
    may_end, seen, prepare = threading.Event(), [], kernels.prepare_attend

    def slow_attend(*args: Any, **kwargs: Any) -> "cpu.Call[Partial]":
        may_end.wait(10)
        seen.append(layer._is_held)
        return prepare(*args, **kwargs)

    def failing_near(*args: Any) -> Partial:
        threading.Timer(0.05, may_end.set).start()
        raise RuntimeError("the device failed")

    monkeypatch.setattr("tandemkv.lanes.attend.kernels.prepare_attend", slow_attend)
    monkeypatch.setattr(attention, "_attend_near", failing_near)
    with pytest.raises(RuntimeError, match="the device failed"):
        attention._decode_on_device(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], layer, RULE)
    assert seen == [True]
    layer.crop(0)


@pytest.mark.parametrize("begin", [0, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_append_and_gather_by_torch_equal_the_native_ones(begin: int, dtype: torch.dtype) -> None:
    """Heads share their pages, as in a cache; what is not written stays NaN."""
    k, v = random_kv(2, 3, 40, 10, dtype)
    table = torch.tensor([[4, 1, 7, 0], [3, 9, 2, 5]], dtype=torch.int32)[:, None].expand(2, 3, 4)
    arenas = []
    for backend in (torch_ops, cpu):
        arena = Arena.allocate(PageLayout(dtype, 16), 10, 3, 10)
        arena.k.fill_(math.nan)
        arena.v.fill_(math.nan)
        backend.append(arena, table, begin, k, v)
        arenas.append(arena)
    native = arenas[1]
    for mine, theirs in ((arenas[0].k, native.k), (arenas[0].v, native.v)):
        assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    for backend in (torch_ops, cpu):
        got_k, got_v = torch.empty(2, 3, 33, 10, dtype=dtype), torch.empty(2, 3, 33, 10, dtype=dtype)
        backend.gather(native, table, begin + 7, got_k, got_v)
        assert torch.equal(got_k, k[:, :, 7:])
        assert torch.equal(got_v, v[:, :, 7:])


def test_dense_attention_agrees_with_the_reference() -> None:
    """The oracle of this file against the specification."""
    from tandemkv.kernels import reference

    q, k, v = random_qkv(2, 40)
    kv = paginate(k, v, PageLayout(torch.float32, 16), kv_start=torch.tensor([0, 11]))
    truth = reference.attend(q, kv, rule=RULE, causal=True)
    out, lse = dense_attention(q, k, v, causal_visible(40, 40, kv.kv_start), SCALE)
    torch.testing.assert_close(out, truth.out)
    torch.testing.assert_close(lse, truth.lse)


MASKS = """
import os
import time
import torch
from tandemkv.attention import worker_pool
from tandemkv.kernels import cpu, probes
torch.set_num_threads(2)
buffer = torch.ones(64 << 20, dtype=torch.uint8)
before = set(os.listdir("/proc/self/task"))
probes.read_gbps(worker_pool(), buffer)
started = set(os.listdir("/proc/self/task")) - before
for _ in range(100):  # a busy machine: the other thread may not have come to run yet
    masks = [sorted(os.sched_getaffinity(int(thread))) for thread in started]
    if all(len(mask) == 1 for mask in masks):
        break
    time.sleep(0.01)
print(masks, sorted(os.sched_getaffinity(0)))
"""


@pytest.mark.parametrize("pinned", [False, True])
def test_workers_are_pinned_where_the_user_asks(pinned: bool) -> None:
    usable = sorted(os.sched_getaffinity(0))
    if min(len(usable), machine.default_threads()) < 2:
        pytest.skip("one processor: there is no worker beside the caller")
    environ = os.environ | {"TANDEMKV_PIN_WORKERS": str(int(pinned))}
    done = subprocess.run([sys.executable, "-c", MASKS], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"[{usable[1:2] if pinned else usable}] {usable}"
