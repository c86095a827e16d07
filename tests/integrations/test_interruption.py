"""Whatever is cut off, at whatever line: the cache is whole, goes on as stock does, and gives every byte back."""

import contextlib
import copy
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import tandemkv.integrations.transformers as tandem
from tandemkv.errors import CacheError, CapacityError
from tests import models
from tests.integrations.agreement import Streamer, arenas_of, attached, generate, no_garbage_collection, tiered
from tests.interrupts import OURS, STOCK_STATES, every_line, interrupted
from tests.processes import resident_bytes

SIZES = {"chunk_tokens": 16}
HELD, MORE = 53, 37  # tokens: before what is cut off, and of the prompt that is cut off, which is three chunks
IDS = torch.cat([models.random_ids(1, HELD + MORE + 2), models.random_ids(1, HELD + MORE + 2, seed=1)])
HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}
CHANGES: dict[str, dict[str, Any]] = {name: {**types, "num_hidden_layers": 3} for name, types in HYBRIDS.items()}


@dataclass
class Pair:
    """A stock model, its attached twin, and what stock answers to `IDS`."""

    family: str
    stock: Any
    ours: Any
    logits: Tensor

    def held(self, num_tokens: int = HELD) -> tandem.TieredCache:
        """A cache that is in use, mostly far."""
        cache = tiered(self.ours, **SIZES)
        self.feed(cache, num_tokens)
        return cache

    @torch.no_grad()
    def feed(self, cache: tandem.TieredCache, end: int, rows: Tensor | None = None) -> Tensor:
        """Logits of the last token before `end`."""
        ids = IDS if rows is None else IDS[rows]
        logits: Tensor = self.ours(ids[:, cache.get_seq_length() : end], past_key_values=cache).logits[:, -1]
        return logits

    def assert_goes_on(self, cache: tandem.TieredCache, end: int, *orders: tuple[int, int]) -> None:
        """Whatever is missing up to `end`, and one token more; as stock does with one of these orders of rows."""
        errors = []
        for order in map(list, orders or ((0, 1),)):
            found = self.feed(copy.deepcopy(cache) if orders else cache, end + 1, torch.tensor(order))
            errors.append((found - self.logits[order, end]).abs().max())
        assert min(errors) <= 5e-4


def pair_of(family: str) -> Pair:
    stock = models.build(family, **CHANGES.get(family, {}))
    with torch.no_grad():
        return Pair(family, stock, attached(stock), stock(IDS).logits)


@pytest.fixture(scope="module", params=["llama", "gemma2", *HYBRIDS])
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@pytest.fixture(scope="module")
def llama() -> Pair:
    return pair_of("llama")


def used_bytes(cache: tandem.TieredCache) -> list[int]:
    return [tier.used_bytes for tier in cache.use()]


# -- Ctrl-C at every line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "num_tokens", "which", "stride"),
    [
        ("llama", MORE, "first", 2),
        ("llama", 1, "first and last", 1),
        ("gemma2", MORE, "last", 2),
        ("gemma2", 1, "first and last", 1),
        ("lfm2", MORE, "first", 5),
        ("lfm2", 1, "first", 1),
        ("qwen3_next", MORE, "last", 60),  # 0.2 s each
        ("qwen3_next", 1, "first", 10),
    ],
)
def test_at_every_line_of_a_forward_pass(family: str, num_tokens: int, which: str, stride: int) -> None:
    """On a fork, whose parent must not notice. The tokens are there or not; going on gives what stock gives."""
    pair = pair_of(family)
    parent = pair.held()
    before, end = used_bytes(parent), HELD + num_tokens
    where = (*OURS, *STOCK_STATES) if family in HYBRIDS else OURS
    moments = every_line(lambda: copy.deepcopy(parent), lambda cache: pair.feed(cache, end), which, where)
    assert len(moments) > 300
    for moment in moments[::stride]:
        cache = copy.deepcopy(parent)
        with interrupted(moment, where), pytest.raises(KeyboardInterrupt):
            pair.feed(cache, end)
        assert cache.get_seq_length() in {HELD, end}
        cache.check()
        pair.assert_goes_on(cache, end)
        cache.check()
        cache.close()
        parent.check()
        assert used_bytes(parent) == before
    pair.assert_goes_on(parent, HELD)


@dataclass
class Change:
    """Something that happens to a cache of two sequences, and what it may be afterwards: the lengths and the rows."""

    act: Callable[[tandem.TieredCache], Any]
    lengths: frozenset[int] = frozenset({HELD})
    rows: tuple[tuple[int, int], ...] = ((0, 1),)


CHANGED = {
    "crop": Change(lambda cache: cache.crop(-9), frozenset({HELD, HELD - 9})),
    "crop into far pages": Change(lambda cache: cache.crop(-40), frozenset({HELD, HELD - 40})),
    "reorder": Change(lambda cache: cache.reorder_cache(torch.tensor([1, 1])), rows=((0, 1), (1, 1))),
    "select": Change(lambda cache: cache.batch_select_indices(torch.tensor([1, 0])), rows=((0, 1), (1, 0))),
    "fork": Change(copy.deepcopy),
    "reset": Change(tandem.TieredCache.reset, frozenset({HELD, 0})),
}
CANNOT = {(family, name) for family in HYBRIDS for name in CHANGED if "crop" in name}


@pytest.mark.parametrize("name", CHANGED)
def test_at_every_line_of_a_change(pair: Pair, name: str) -> None:
    """It has happened to all layers or to none, and a fork with the same pages has not noticed."""
    if (pair.family, name) in CANNOT:
        with pytest.raises(CacheError, match="cannot crop"):
            CHANGED[name].act(pair.held())
        return
    parent, change = pair.held(), CHANGED[name]
    before = used_bytes(parent)
    moments = every_line(lambda: copy.deepcopy(parent), change.act, "first and last", (*OURS, *STOCK_STATES))
    for moment in moments[:: 7 if pair.family == "qwen3_next" else 2]:
        cache = copy.deepcopy(parent)
        with interrupted(moment, (*OURS, *STOCK_STATES)), pytest.raises(KeyboardInterrupt):
            change.act(cache)
        cache.check()
        assert cache.get_seq_length() in change.lengths
        pair.assert_goes_on(cache, HELD, *change.rows)
        cache.check()
        del cache
        assert used_bytes(parent) == before
    pair.assert_goes_on(parent, HELD)


@pytest.mark.parametrize("name", CHANGED)
def test_forks_count_a_change_that_was_cut_off(llama: Pair, name: str) -> None:
    """While the one that was cut off still lives: at once, and when another fork has come and gone."""
    parent = llama.held()
    for moment in every_line(lambda: copy.deepcopy(parent), CHANGED[name].act, "first and last"):
        cache = copy.deepcopy(parent)
        with interrupted(moment), pytest.raises(KeyboardInterrupt):
            CHANGED[name].act(cache)
        parent.check()
        copy.deepcopy(parent)  # which goes at once
        parent.check()


def test_at_every_line_of_generate(llama: Pair) -> None:
    """A cache that was never used: also while it is allocated."""
    ids = IDS[:, :MORE]

    def run(cache: tandem.TieredCache) -> None:
        generate(llama.ours, ids, past_key_values=cache, max_new_tokens=3)

    for moment in every_line(lambda: tiered(llama.ours, **SIZES), run, "first and last")[::3]:
        cache = tiered(llama.ours, **SIZES)
        with interrupted(moment), pytest.raises(KeyboardInterrupt):
            run(cache)
        cache.check()
        assert cache.get_seq_length() in {0, MORE, MORE + 1, MORE + 2}
        llama.assert_goes_on(cache, MORE) if cache.get_seq_length() <= MORE else cache.reset()
        cache.close()
        assert cache.use() == []


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_linear_layers_cannot_do_is_refused_before_anything_changes(family: str) -> None:
    pair = pair_of(family)
    cache = pair.held()
    for tokens in (-1, 10, -1000):
        with pytest.raises(CacheError, match=r"cannot crop 53 tokens to .* linear attention .* reset\(\) and prefill"):
            cache.crop(tokens)
    cache.crop(0)
    cache.crop(HELD + 5)
    assert cache.get_seq_length() == HELD
    cache.check()
    pair.assert_goes_on(cache, HELD)
    cache.reset()
    cache.crop(-1)  # nothing to forget


@pytest.mark.parametrize("family", HYBRIDS)
def test_reset_forgets_what_stock_layers_hold(family: str) -> None:
    """Also for a batch of another size, which the states of stock layers would not fit."""
    pair = pair_of(family)
    cache = pair.held()
    cache.reset()
    with torch.no_grad():
        found = pair.ours(IDS[:1, :40], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, pair.logits[:1, 39], atol=5e-4, rtol=0)


# -- Ctrl-C by the user ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [600, 20], ids=["prefill", "decode"])
def test_a_signal(pair: Pair, num_tokens: int) -> None:
    """SIGINT from another thread while `generate` runs, at moments that nobody has chosen."""
    ids, cache = models.random_ids(1, num_tokens), tiered(pair.ours)
    for delay_ms in range(1, 60, 6):
        timer = threading.Timer(delay_ms / 1000, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                generate(pair.ours, ids, past_key_values=cache, max_new_tokens=300)
                cache.reset()
        timer.join()
        cache.check()
        cache.reset()
        assert cache.use() == []
    found = generate(pair.ours, ids, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(found.sequences, generate(pair.stock, ids, max_new_tokens=4).sequences)


@pytest.mark.parametrize("which", ["LayerKV.extended", "TieredLayer.attending"])
def test_a_traceback_that_is_kept(pair: Pair, which: str) -> None:
    """Cut off as a `with` has entered its generator: that is closed when the traceback goes, and changes nothing."""
    cache, kept = pair.held(), []

    def returning(frame: FrameType, event: str, _: Any) -> Any:
        generator = getattr(frame.f_locals.get("self"), "gen", None)
        if event == "return" and generator is not None and generator.__qualname__ == which:
            sys.settrace(None)
            raise KeyboardInterrupt
        return returning

    enter = vars(contextlib)["_GeneratorContextManager"].__enter__.__code__
    sys.settrace(lambda frame, *_: returning if frame.f_code is enter else None)
    try:
        pair.feed(cache, HELD + 1)
    except KeyboardInterrupt as error:
        kept.append(error)
    finally:
        sys.settrace(None)
    pair.assert_goes_on(cache, HELD + 1)
    hook = pair.ours.get_decoder().layers[1].register_forward_pre_hook(lambda *_: kept.clear())  # amid a later pass
    assert len(kept) == 1
    pair.assert_goes_on(cache, HELD + 3)
    hook.remove()
    assert kept == []
    cache.check()


class FailsError(Exception):
    """What a layer of the user's raises."""


@contextmanager
def failing(model: Any, layer: int) -> Iterator[None]:
    """The feed-forward part of a decoder layer raises."""

    def fail(*_: Any) -> None:
        raise FailsError

    decoder = model.model.layers[layer]
    hook = (decoder.mlp if hasattr(decoder, "mlp") else decoder.feed_forward).register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("num_tokens", [MORE, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_an_exception_inside_a_layer(pair: Pair, layer: int, num_tokens: int) -> None:
    """Also behind the last attention, where every layer has grown: the pass ends with the decoder, not before.

    Nobody looks at the cache in between: the next pass undoes what is left of this one.
    """
    cache, end = pair.held(), HELD + num_tokens
    for _ in range(3):
        with failing(pair.ours, layer), pytest.raises(FailsError):
            pair.feed(cache, end)
        assert cache.get_seq_length() == HELD
    pair.assert_goes_on(cache, end)
    cache.check()
    cache.close()
    assert cache.use() == []


def test_a_streamer_that_raises(pair: Pair) -> None:
    """In the middle of an answer; it is asked again, and comes as stock gives it."""

    class Raises(Streamer):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if self.num_puts == 5:
                raise FailsError

    cache, ids = tiered(pair.ours), models.random_ids(1, 60)
    with pytest.raises(FailsError):
        pair.ours.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, streamer=Raises())
    cache.check()
    assert cache.get_seq_length() == 63  # four tokens were put, and the last one not fed
    expected = generate(pair.stock, ids, max_new_tokens=12).sequences
    found = generate(pair.ours, expected[:, :66], past_key_values=cache, max_new_tokens=6).sequences
    assert torch.equal(found, expected)


def test_beams_that_are_cut_off(pair: Pair) -> None:
    """At many a line that moves them; the same search again comes to what stock comes to."""
    ids = models.random_ids(1, 60)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4}
    expected = generate(pair.stock, ids, **options).sequences

    def run(cache: tandem.TieredCache) -> Tensor:
        sequences: Tensor = generate(pair.ours, ids, past_key_values=cache, **options).sequences
        return sequences

    def used() -> tandem.TieredCache:
        """One that holds its arenas already, as the cache has from the second search on: it passes fewer lines."""
        cache = tiered(pair.ours)
        run(cache)
        cache.reset()
        return cache

    cache = used()
    for moment in every_line(used, run, "last")[:: 100 if pair.family == "qwen3_next" else 7]:
        with interrupted(moment), pytest.raises(KeyboardInterrupt):
            run(cache)
        cache.check()
        cache.reset()
    assert torch.equal(run(cache), expected)


# -- a full far tier ---------------------------------------------------------------------------------------------------


def test_far_full_in_the_middle_of_a_batch(pair: Pair) -> None:
    """`generate` is let start; then a fork takes the pages that it counted on. What it did is whole, and goes on."""
    spec = pair.held(1).kv.spec
    cache = tiered(pair.ours, far_bytes=14 * spec.num_full_layers * spec.far_page_bytes, **SIZES)
    pair.feed(cache, HELD)
    forks: list[tandem.TieredCache] = []

    def fork(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == HELD + 5:
            forks.append(copy.deepcopy(cache))
            pair.ours(models.random_ids(2, 60, seed=8), past_key_values=forks[0])
        return scores

    with pytest.raises(CapacityError, match=r"far tier is full: .* raise far_bytes"):
        generate(pair.ours, IDS[:, : HELD + 1], past_key_values=cache, max_new_tokens=75, logits_processor=[fork])
    held = cache.get_seq_length()
    assert held > HELD + 5
    cache.check()
    forks[0].check()
    assert forks[0].get_seq_length() == HELD + 5 + 60
    forks.pop().close()
    expected = generate(pair.stock, IDS[:, : HELD + 1], max_new_tokens=75).sequences
    found = generate(pair.ours, expected[:, : held + 1], past_key_values=cache, max_new_tokens=HELD + 75 - held)
    assert torch.equal(found.sequences, expected)
    cache.check()


def test_a_prompt_for_which_far_has_no_room(pair: Pair) -> None:
    """Without `generate` nobody has asked before; the first layer of a hybrid has moved already."""
    spec = pair.held(1).kv.spec
    cache = tiered(pair.ours, far_bytes=6 * spec.num_full_layers * spec.far_page_bytes, **SIZES)
    pair.feed(cache, HELD)
    before = used_bytes(cache)
    for _ in range(2):
        with pytest.raises(CapacityError, match="far tier is full"), torch.no_grad():
            pair.ours(models.random_ids(2, 90), past_key_values=cache)
        cache.check()
        assert used_bytes(cache) == before
    pair.assert_goes_on(cache, HELD)


# -- every byte comes back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset", "del"])
@pytest.mark.parametrize("is_cut_off", [False, True])
def test_arenas_go_with_the_last_reference(pair: Pair, end: str, is_cut_off: bool) -> None:
    """No garbage has to be collected for it: nothing refers to a cache in a circle."""
    with no_garbage_collection():
        cache = pair.held()
        if is_cut_off:
            with failing(pair.ours, 1), pytest.raises(FailsError):
                pair.feed(cache, HELD + MORE)
        arenas = arenas_of(cache)
        assert len(arenas) == 4
        assert not any(arena.expired() for arena in arenas)
        if end == "del":
            del cache
        else:
            getattr(cache, end)()
            assert cache.use() == []
        assert all(arena.expired() for arena in arenas)


@pytest.mark.parametrize("end", ["close", "reset", "del"])
def test_a_fork_gives_back_what_it_alone_had(pair: Pair, end: str) -> None:
    parent = pair.held()
    before = used_bytes(parent)
    with no_garbage_collection():
        fork = copy.deepcopy(parent)
        pair.feed(fork, HELD + MORE)
        assert used_bytes(parent) > before
        if end == "del":
            del fork
        else:
            getattr(fork, end)()
        assert used_bytes(parent) == before
    parent.check()
    arenas = arenas_of(parent)
    parent.close()
    assert all(arena.expired() for arena in arenas)


def test_an_outgrown_arena_goes(llama: Pair) -> None:
    """A prefix rests while its fork grows, and the near tier with it: the smaller arena is nobody's any more."""
    parent = llama.held()
    near = arenas_of(parent)[:2]
    fork = copy.deepcopy(parent)
    llama.feed(fork, HELD + MORE)
    assert not set(near) & set(arenas_of(parent))
    assert all(arena.expired() for arena in near)


def test_resident_memory_is_flat(llama: Pair) -> None:
    """Fifty times 8 MiB of pages: a leak of one time in ten would show as 40 MiB."""
    sizes: dict[str, Any] = {"near_tokens": 2048, "far_bytes": "64MiB", "chunk_tokens": 512, "page_size": 64}
    held = []
    for turn in range(50):
        cache = tandem.TieredCache(llama.ours.config, **sizes)
        with failing(llama.ours, 1), pytest.raises(FailsError), torch.no_grad():
            llama.ours(models.random_ids(4, 400), past_key_values=cache)
        with torch.no_grad():
            llama.ours(models.random_ids(4, 400), past_key_values=cache)
        fork = copy.deepcopy(cache)
        (cache.close, cache.reset, lambda: None)[turn % 3]()
        del cache, fork
        held.append(resident_bytes())
    assert max(held[10:]) - min(held[10:]) < 16 << 20
