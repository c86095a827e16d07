"""Caches whose far tokens are quantised: who is in which format, what is attended, what it costs, what is refused."""

import copy
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.attention import extend_and_attend, prefill_chunk
from tandemkv.cache import CacheSpec, FarFormat, KVCache, LayerKV, parse_far_dtype
from tandemkv.errors import CapacityError, InputError, PrecisionWarning, UnsupportedError
from tandemkv.kernels.blocks import read_keys
from tandemkv.machine import Available
from tandemkv.select import SELECTORS, Sparse, Verified
from tandemkv.types import ScoreRule
from tests.dense import causal_visible, dense_attention, random_kv

NUM_KV_HEADS, HEAD_DIM, RULE = 2, 64, ScoreRule(0.1)
NO_PADDING = torch.zeros(2, dtype=torch.int64)


def spec_of(far_dtype: str | None, dtype: torch.dtype = torch.float32) -> CacheSpec:
    return CacheSpec(
        num_layers=2,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        near_tokens=32,
        far_bytes=1 << 23,
        page_size=16,
        chunk_tokens=32,
        far_formats=parse_far_dtype(far_dtype),
    )


def feed(cache: KVCache, k: Tensor, v: Tensor, q: Tensor | None = None) -> Tensor | None:
    """The newest tokens of k and v, into every layer; what queries of the last of them got, where there are any."""
    num_new = k.shape[2] - cache.seq_len
    cache.begin_step(k.shape[0], num_new)
    out = None
    for index in range(2):
        new_k, new_v = k[:, :, -num_new:], v[:, :, -num_new:]
        queries = torch.zeros(k.shape[0], 2 * NUM_KV_HEADS, num_new, HEAD_DIM, dtype=k.dtype) if q is None else q
        out = extend_and_attend(queries, new_k, new_v, cache.layer(index), RULE)
    cache.end_step()
    return None if q is None else out


def grown(far_dtype: str | None, num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[KVCache, Tensor, Tensor]:
    cache = KVCache(spec_of(far_dtype, dtype))
    k, v = random_kv(2, NUM_KV_HEADS, num_tokens, HEAD_DIM, dtype, 3)
    feed(cache, k[:, :, :-1], v[:, :, :-1])
    feed(cache, k, v)  # a step leaves no more near than it must
    cache.check()
    return cache, k, v


def parts_of(layer: LayerKV) -> list[list[int]]:
    """Of every far page, by sequence."""
    slots = layer._map.slots[:, : layer.num_far_pages]
    parts: list[list[int]] = layer._store.far.part_of(slots).tolist()
    return parts


def stored(layer: LayerKV) -> tuple[Tensor, Tensor]:
    return layer.read(0, layer.seq_len)


# ---- What is said ----


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        (None, ()),
        ("model", ()),
        ("int8", (FarFormat("int8"),)),
        ("int8:8192,int4", (FarFormat("int8", 8192), FarFormat("int4"))),
        (
            " model:64 , int8/48:128,int4/32",
            (FarFormat("panels", 64), FarFormat("int8", 128, 48), FarFormat("int4", None, 32)),
        ),
    ],
)
def test_a_mixture_is_one_argument(text: str | None, formats: tuple[FarFormat, ...]) -> None:
    assert parse_far_dtype(text) == formats


@pytest.mark.parametrize(
    "text", ["", "int7", "int8,", "int8:64", "int8,int4", "int8:x,int4", "model/16", "int8/", 8, "fp8", "int8/4٨"]
)
def test_what_it_may_not_be(text: str) -> None:
    with pytest.raises(InputError, match=r"expected far_dtype as model, int8, int4, or by age as 'int8:8192,int4'"):
        parse_far_dtype(text)


def test_a_width_that_cannot_be_quantised_is_refused_before_anything_is_held() -> None:
    with pytest.raises(UnsupportedError, match="head_dim must be a multiple of it, got 80; use int8"):
        replace(spec_of("int4"), head_dim=80)
    replace(spec_of("int8"), head_dim=80)
    with pytest.raises(InputError, match="cannot keep 96 channels of keys that have 64"):
        spec_of("int8/96")
    with pytest.raises(InputError, match="a multiple of 16 channels, got 'int8/40'"):
        spec_of("int8/40")
    with pytest.raises(InputError, match="at most 4 ways, the model's dtype among them, got 'int8:"):
        spec_of("int8:16,int4:16,int8/16:16,int4/16")


# ---- Who is in which format ----


@pytest.mark.parametrize("far_dtype", ["int8", "int4"])
def test_the_first_page_is_kept_as_it_is(far_dtype: str) -> None:
    cache, k, v = grown(far_dtype, 150)
    for index in range(2):
        layer = cache.layer(index)
        assert parts_of(layer) == [[0, 1, 1, 1, 1, 1, 1, 1]] * 2
        got_k, got_v = stored(layer)
        exact = [*range(16), *range(128, 150)]
        assert torch.equal(got_k[:, :, exact], k[:, :, exact]) and torch.equal(got_v[:, :, exact], v[:, :, exact])
        assert not torch.equal(got_k, k)
        assert float((got_k - k).abs().max()) < (0.03 if far_dtype == "int8" else 0.4)


@pytest.mark.parametrize("num_steps", [1, 40])
def test_tokens_grow_older(num_steps: int) -> None:
    """At once as a prompt, or token by token: the same formats, of which the older is made from the younger one."""
    cache, (k, v) = KVCache(spec_of("int8:48,int4")), random_kv(2, NUM_KV_HEADS, 200, HEAD_DIM, torch.float32, 3)
    for end in sorted({199, *(max(1, 200 * step // num_steps) for step in range(1, num_steps + 1))}):
        feed(cache, k[:, :, :end], v[:, :, :end])
        cache.check()
    for index in range(2):
        assert parts_of(cache.layer(index)) == [[0, *[2] * 7, *[1] * 3]] * 2


def test_a_mixture_may_begin_with_the_models_dtype() -> None:
    cache, k, _ = grown("model:32,int8", 150)
    layer = cache.layer(0)
    assert parts_of(layer) == [[0, 1, 1, 1, 1, 1, 0, 0]] * 2
    assert torch.equal(stored(layer)[0][:, :, 96:], k[:, :, 96:])


def test_what_is_cropped_does_not_become_wider() -> None:
    """Pages that were narrow stay so when they are young again; a page that is cut is reopened from what it stored."""
    cache, _, _ = grown("int8:48,int4", 200)
    before = stored(cache.layer(0))[0]
    cache.crop(100)
    cache.check()
    layer = cache.layer(0)
    assert parts_of(layer) == [[0, 2, 2, 2, 2, 2]] * 2
    assert torch.equal(stored(layer)[0], before[:, :, :100])
    k, v = random_kv(2, NUM_KV_HEADS, 180, HEAD_DIM, torch.float32, 4)
    feed(cache, k, v)
    cache.check()
    assert parts_of(layer) == [[0, *[2] * 5, *[1] * 3]] * 2
    assert torch.equal(stored(layer)[0][:, :, :96], before[:, :, :96])


def test_forks_share_what_grows_older() -> None:
    """Two owners of a page quantise it once, whoever comes first; its bytes come back with the last of them."""
    cache, k, v = grown("int8:48,int4", 120)
    fork = cache.fork()
    more_k, more_v = random_kv(2, NUM_KV_HEADS, 80, HEAD_DIM, torch.float32, 5)
    longer = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    feed(cache, *longer)
    cache.check()
    feed(fork, *longer)
    fork.check()
    for index in range(2):
        mine, its = (each.layer(index)._map.slots[:, :5] for each in (cache, fork))
        assert torch.equal(mine, its)
    both = fork.use()[1].used_bytes
    cache.close()
    fork.check()
    pages = torch.cat([fork.layer(index).used_slots()[1] for index in range(2)])
    parts = fork.layer(0)._store.far.part_of(pages.unique())
    counts = tuple(torch.bincount(parts, minlength=3).tolist())
    assert both > fork.use()[1].used_bytes == fork.spec.far_bytes_of(counts)


def test_beams_go_on() -> None:
    cache, k, v = grown("int8:48,int4", 120)
    before = [stored(cache.layer(index)) for index in range(2)]
    seqs = torch.tensor([1, 1, 0])
    cache.select(seqs)
    cache.check()
    for index in range(2):
        for got, was in zip(stored(cache.layer(index)), before[index], strict=True):
            assert torch.equal(got, was[seqs])
    feed(cache, *(torch.cat([x[seqs], x[seqs][:, :, :60]], 2) for x in (k, v)))
    cache.check()


# ---- What is attended ----


@pytest.mark.parametrize("far_dtype", ["int8", "int4", "int8:48,int4", "int8/32", "int4/48"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_attends_to_what_is_stored(dtype: torch.dtype, far_dtype: str) -> None:
    cache, k, v = grown(far_dtype, 199, dtype)
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 1, HEAD_DIM, dtype, 7)
    new = torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)
    out = feed(cache, *new, q)
    assert out is not None
    held_k, held_v = stored(cache.layer(1))
    truth = dense_attention(q, held_k, held_v, causal_visible(200, 1, NO_PADDING), RULE.scale).out
    # `stored` is rounded to bf16, the kernel reads the codes: half a unit of K of about 3, in 64 products.
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    assert float((out.transpose(1, 2).double() - truth).abs().max()) < tolerance
    exact = dense_attention(q, *new, causal_visible(200, 1, NO_PADDING), RULE.scale).out
    assert float((out.transpose(1, 2).double() - exact).abs().max()) > (1e-4 if dtype == torch.float32 else 0)


def test_a_prompt_attends_to_what_is_stored() -> None:
    cache, _, _ = grown("int4", 150)
    layer = cache.layer(0)
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 20, HEAD_DIM, torch.float32, 7)
    k, v = random_kv(2, NUM_KV_HEADS, 20, HEAD_DIM, torch.float32, 8)
    part = prefill_chunk(q, k, v, layer, RULE)
    held_k, held_v = (torch.cat([old, new], 2) for old, new in zip(stored(layer), (k, v), strict=True))
    truth = dense_attention(q, held_k, held_v, causal_visible(170, 20, NO_PADDING), RULE.scale)
    torch.testing.assert_close(part.out.double(), truth.out, rtol=0, atol=1e-4)


@pytest.mark.parametrize("far_dtype", ["int8", "int8:48,int4"])
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_chooses_from_what_is_stored(name: str, far_dtype: str) -> None:
    """A budget for everything is exact; a smaller one stays near it, and nothing is counted wrong."""
    cache, k, v = grown(far_dtype, 299)
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 1, HEAD_DIM, torch.float32, 7)
    twin = cache.fork()
    twin.sparse = Sparse(name, 192)
    new = torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)
    exact, sparse = feed(cache, *new, q), feed(twin, *new, q)
    twin.check()
    assert exact is not None and sparse is not None
    assert bool(sparse.isfinite().all())
    assert float((exact - sparse).abs().max()) < 1.0
    twin.sparse = Sparse(name, 100_000)
    new_k, new_v = (torch.cat([x, x[:, :, :1]], 2) for x in new)
    again, last = feed(cache, new_k, new_v, q), feed(twin, new_k, new_v, q)
    assert again is not None and last is not None
    if name not in ("heavy_hitters", "keyformer", "recall"):  # which forget what they did not choose
        torch.testing.assert_close(last, again, rtol=0, atol=1e-5)


def test_what_is_left_out_is_sampled_from_what_is_stored() -> None:
    cache = KVCache(spec_of("int8:160,int4"))
    k, v = random_kv(2, NUM_KV_HEADS, 8099, HEAD_DIM, torch.float32, 3)
    v += 1.0  # so that there is something of which an error is a small share
    feed(cache, k, v)
    cache.sparse = Sparse("columns", 400, verified=Verified(0.1, 0.1))
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 1, HEAD_DIM, torch.float32, 7)
    new = torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)
    out = feed(cache, *new, q)
    assert out is not None
    held = stored(cache.layer(1))
    truth = dense_attention(q, *held, causal_visible(8100, 1, NO_PADDING), RULE.scale).out
    error = (out.transpose(1, 2).double() - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert float(error.median()) < 0.1
    tally = cache.tallies[1]
    assert 0.05 < tally.num_read / tally.num_tokens < 0.9


def test_codes_of_a_selector_are_of_the_stored_keys() -> None:
    """Those of a page that became narrower too."""
    cache, k, v = grown("int8:48,int4", 150)
    cache.sparse = Sparse("bounds", 100)
    feed(cache, *(torch.cat([x, x[:, :, :60]], 2) for x in (k, v)))
    layer = cache.layer(0)
    far = layer.far
    assert layer.sparse is not None and layer.sparse.summariser is not None
    book = layer._store.codes_of(layer.sparse.summariser)
    for slot in far.slots.flatten().tolist():
        keys = read_keys(far.arena, torch.tensor([slot], dtype=torch.int32))[0]
        for head in range(NUM_KV_HEADS):
            codes = book.codes.codes[head, slot, 0].flatten(0, 1)[:, 0].flatten()[: 2 * HEAD_DIM].float() - 128
            assert book.codes.steps is not None
            low, high = (codes * book.codes.steps[head, slot, 0]).view(2, HEAD_DIM)
            assert bool((low <= keys[head].amin(0) + 1e-6).all()) and bool((high >= keys[head].amax(0) - 1e-6).all())


def test_channels_follow_the_newest_queries() -> None:
    """A channel that no query has weighed is the first to be left out, of each sequence by its own queries."""
    cache = KVCache(spec_of("int8/32"))
    k, v = random_kv(2, NUM_KV_HEADS, 150, HEAD_DIM, torch.float32, 3)
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 150, HEAD_DIM, torch.float32, 4)
    q[0, ..., 10:42] = 0.0
    q[1, ..., 32:] = 0.0
    feed(cache, k, v, q)
    held, _ = stored(cache.layer(0))
    assert bool((held[0, :, 16:96, 10:42] == 0).all())
    assert bool((held[1, :, 16:96, 32:] == 0).all())
    for seq, kept in ((0, [*range(10), *range(42, 64)]), (1, range(32))):
        assert bool((held[seq, :, 16:96, list(kept)] != 0).any(1).all())
    fork = cache.fork()
    fork.select(torch.tensor([1]))
    weights, its = cache.layer(0).channel_weights, fork.layer(0).channel_weights
    assert weights is not None and its is not None and torch.equal(its, weights[1:])


def test_a_channels_weight_is_the_sum_of_squares_of_its_newest_queries() -> None:
    """Of 64, those of a KV head together; a step later each counts a 64th less."""
    cache = KVCache(spec_of("int8/32"))
    k, v = random_kv(2, NUM_KV_HEADS, 101, HEAD_DIM, torch.float32, 3)
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 101, HEAD_DIM, torch.float32, 4)
    feed(cache, k[:, :, :100], v[:, :, :100], q[:, :, :100])
    # A prompt comes in chunks of 32, and each takes half of what was there.
    squares = q.square().view(2, NUM_KV_HEADS, 2, 101, HEAD_DIM).sum(2)
    chunks = [squares[:, :, begin : min(begin + 32, 100)].sum(2) for begin in range(0, 100, 32)]
    expected = ((chunks[0] / 2 + chunks[1]) / 2 + chunks[2]) * (1 - 4 / 64) + chunks[3]
    weights = cache.layer(0).channel_weights
    assert weights is not None and torch.allclose(weights, expected)
    feed(cache, k, v, q[:, :, 100:])
    weights = cache.layer(0).channel_weights
    assert weights is not None and torch.allclose(weights, expected * (63 / 64) + squares[:, :, 100])


def test_a_copy_is_a_fork() -> None:
    cache, _, _ = grown("int8:48,int4", 120)
    before = stored(cache.layer(0))
    twin = copy.deepcopy(cache)
    k, v = random_kv(2, NUM_KV_HEADS, 150, HEAD_DIM, torch.float32, 5)
    feed(twin, k, v)
    twin.check()
    cache.check()
    assert all(torch.equal(mine, was) for mine, was in zip(stored(cache.layer(0)), before, strict=True))
    twin.close()
    cache.check()


def test_moved_bytes_are_of_pages_that_became_far() -> None:
    """Once, in the format that they came in; not again where they become narrower."""
    cache, _, _ = grown("int8:48,int4", 200)
    sizes = cache.spec.far_page_sizes
    num_first = 2 * 2  # of each sequence and layer, in the model's dtype
    num_far = sum(len(row) for layer in map(cache.layer, range(2)) for row in parts_of(layer))
    assert cache.use()[1].moved_bytes == num_first * sizes[0] + (num_far - num_first) * sizes[1]


# ---- What it costs ----


@pytest.mark.parametrize(("far_dtype", "least"), [("int8", 1.9), ("int4", 3.4)])
def test_far_bytes_buy_more_tokens(far_dtype: str, least: float) -> None:
    """Of a real size, with 64 tokens a page: tokens that `reserve` lets through, in the same bytes."""

    def most(far_dtype: str | None) -> int:
        spec = replace(
            spec_of(far_dtype, torch.bfloat16), page_size=64, near_tokens=128, chunk_tokens=64, far_bytes=1 << 26
        )
        low, high = 1, 1 << 20
        while low < high:
            middle = (low + high + 1) // 2
            try:
                KVCache(spec).reserve(1, middle)
                low = middle
            except CapacityError:
                high = middle - 1
        return low - 128  # far ones

    assert most(far_dtype) / most(None) >= least


def test_reserve_spells_the_arithmetic_out() -> None:
    """64 channels: 64 bytes and 2 of 16 scales of K, as many of V and a scale: 2 heads x 2 x 132 + what lines take."""
    cache = KVCache(spec_of("int8"))
    page = cache.spec.far_page_sizes[1]
    assert page == 2 * (16 * 64 + 128 + 16 * 64 + 64)
    with pytest.raises(CapacityError, match=r"1 x 16000 tokens leave 1 x 15968 far: ") as raised:
        cache.reserve(1, 16_000)
    told = re.search(r"2 layers x ([\d.]+) bytes a token need 8.55 MiB, far_bytes is 8.00 MiB", str(raised.value))
    first = cache.spec.far_page_sizes[0]
    assert told is not None and float(told[1]) == pytest.approx((first + 997 * page) / 998 / 16, rel=1e-4)


@pytest.mark.parametrize("is_shared", [False, True])
def test_pages_that_a_fork_keeps_wide_are_counted_before_a_step(is_shared: bool) -> None:
    """Three pages become narrower and three new ones are wide: without a fork these take their place."""
    spec = spec_of("model:48,int8")
    before, more = spec.near_tokens + 8 * spec.page_size, 3 * spec.page_size
    needed = spec.far_bytes_of(spec.num_far_pages(1, before + more))
    k, v = random_kv(1, NUM_KV_HEADS, before + more, HEAD_DIM, torch.float32, 3)
    cache = KVCache(replace(spec, far_bytes=needed))
    feed(cache, k[:, :, :before], v[:, :, :before])
    twin = cache.fork() if is_shared else KVCache(spec)
    if is_shared:
        with pytest.raises(CapacityError, match="far tier is full"):
            cache.begin_step(1, more)
        assert cache.seq_len == before
    twin.close()
    feed(cache, k, v)
    assert cache.seq_len == before + more


def test_memory_is_asked_for_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(spec_of("int8"))
    near = cache.spec.num_near_slots(1) * cache.spec.near_page_bytes
    pages = cache.spec.num_far_pages(1, 1000)
    needed = near + cache.spec.far_bytes_of(pages)
    assert pages == (2, 2 * 60)
    monkeypatch.setattr(machine, "available_bytes", lambda: Available(needed - 1, "cgroup limit"))
    with pytest.raises(CapacityError, match="host memory needed"):
        cache.reserve(1, 1000)
    monkeypatch.setattr(machine, "available_bytes", lambda: Available(needed, "cgroup limit"))
    cache.reserve(1, 1000)


def test_a_full_tier_is_refused_before_a_step_and_nothing_is_lost() -> None:
    spec = spec_of("int8")
    cache = KVCache(replace(spec, far_bytes=spec.far_bytes_of((2, 2 * 3))))
    k, v = random_kv(1, NUM_KV_HEADS, 400, HEAD_DIM, torch.float32, 3)
    feed(cache, k[:, :, :96], v[:, :, :96])
    before = stored(cache.layer(0))[0]
    with pytest.raises(CapacityError, match="far tier is full"):
        feed(cache, k[:, :, :200], v[:, :, :200])
    cache.check()
    assert torch.equal(stored(cache.layer(0))[0], before)


# ---- What cannot be quantised ----


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("far_dtype", ["int8", "int8:48,int4"])
def test_a_page_that_cannot_be_quantised_stays(far_dtype: str, spoilt: float) -> None:
    """Told with layer, token and sequence; its tokens are kept as they are, and the cache goes on."""
    cache = KVCache(spec_of(far_dtype))
    k, v = random_kv(2, NUM_KV_HEADS, 200, HEAD_DIM, torch.float32, 3)
    v[1, 0, 37, 5] = spoilt
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        feed(cache, k, v)
        feed(cache, *(torch.cat([x, x[:, :, :1]], 2) for x in (k, v)))
    assert {each.category for each in caught} == {PrecisionWarning}
    told = (
        "layer 1, token 37 of sequence 1: K or V is not finite, or too large for a scale; its page of 16 tokens stays"
    )
    assert any(told in str(each.message) for each in caught)
    cache.check()
    layer = cache.layer(1)
    assert [parts[2] for parts in parts_of(layer)] == [2 if "," in far_dtype else 1, 0]
    held_k, held_v = stored(layer)
    assert torch.equal(held_k[1, :, 32:48], k[1, :, 32:48])
    assert torch.equal(held_v[1, :, 32:48].nan_to_num(9.0), v[1, :, 32:48].nan_to_num(9.0))
    assert not torch.equal(held_k[0, :, 32:48], k[0, :, 32:48])
    q, _ = random_kv(2, 2 * NUM_KV_HEADS, 1, HEAD_DIM, torch.float32, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = [torch.cat([x, x[:, :, :2]], 2) for x in (k, v)]
        out = feed(cache, longer[0], longer[1], q)
    assert out is not None
    assert bool(out[0].isfinite().all()) and not bool(out[1, 0, 0].isfinite().all())
