"""Keys and values made again from what entered a layer: for every family what the layer itself made, or a refusal."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

import tandemkv.integrations.transformers as tandem
from tandemkv.cache import LayerKV
from tandemkv.errors import CacheError, InputError, UnsupportedError
from tandemkv.integrations.transformers.adapter import Call, RecordedCall, needs_of, rebuild_kv
from tandemkv.integrations.transformers.cache import TieredLayer
from tandemkv.integrations.transformers.foresight import layers_in
from tests import models
from tests.integrations.agreement import attached, generate, logits_of, no_garbage_collection, tiered
from tests.interrupts import every_line, interrupted
from tests.tolerances import sum_error

KEPT, PIECES = 90, (50, 51, 120)  # tokens whose inputs are kept; where the passes over a prompt end
HIDDEN = 64  # inputs of every product
CANNOT: dict[str, str] = {}
"""Families that are refused, and why."""


def full_layers(cache: tandem.TieredCache) -> dict[int, LayerKV]:
    """Those that keep their inputs, by their place in the model."""
    ours = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, TieredLayer) and not layer.window}
    return {place: cache.kv.layer(layer.index) for place, layer in ours.items()}


@torch.no_grad()
def read_in(model: Any, cache: tandem.TieredCache, lengths: tuple[int, ...], ends: tuple[int, ...] = PIECES) -> None:
    """Prompts of these lengths, one pass up to each of the ends."""
    ids, mask = models.left_padded(list(lengths))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for end in ends:
        new = slice(cache.get_seq_length(), end)
        model(ids[:, new], attention_mask=mask[:, :end], position_ids=places[:, new], past_key_values=cache)


def assert_rebuilt(layer: LayerKV, begin: int, end: int) -> None:
    """As far as sums of products in another order may differ, relative to a token's largest number."""
    for new, old in zip(layer.rebuild(begin, end), layer.read(begin, end), strict=True):
        assert new.dtype == old.dtype
        assert new.shape == old.shape
        largest = old.abs().amax(dim=(1, 3), keepdim=True).float()
        rounding = 2 * torch.finfo(old.dtype).eps + 2 * sum_error(HIDDEN)
        assert bool(((new.float() - old.float()).abs() <= rounding * largest).all())


def kept(cache: tandem.TieredCache) -> list[int]:
    return [layer.num_inputs for layer in full_layers(cache).values()]


@pytest.mark.filterwarnings("ignore")  # of stock, about configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_what_a_layer_made_is_made_again(family: str, dtype: torch.dtype) -> None:
    """Padding gives each sequence other positions; norms, biases, fused weights, partial RoPE and sliding layers come
    with the families. Passes of 50, 1 and 69 tokens, the last cut into chunks, and kept up to its middle."""
    model = attached(models.build(family)).to(dtype)
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    if family in CANNOT:
        with pytest.raises(UnsupportedError, match=CANNOT[family]):
            read_in(model, cache, (120, 100))
        return
    read_in(model, cache, (120, 100))
    layers = full_layers(cache)
    assert layers
    for layer in layers.values():
        assert layer.num_inputs == KEPT
        assert layer.num_far_pages > 0
        for begin, end in ((0, KEPT), (13, 77), (50, 51), (0, 1)):
            assert_rebuilt(layer, begin, end)
    cache.check()


class Counts(TorchFunctionMode):
    """Outputs of products with weights."""

    num_outputs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {linear, torch.addmm}:
            self.num_outputs += args[1].shape[0] if func is linear else args[2].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", models.FAMILIES)
def test_no_product_is_made_for_queries(family: str) -> None:
    model = attached(models.build(family))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    read_in(model, cache, (120, 100))
    for layer in full_layers(cache).values():
        with Counts() as counts:
            k, v = layer.rebuild(0, 40)
        assert counts.num_outputs == k.shape[1] * (k.shape[3] + v.shape[3])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma2"])
@pytest.mark.parametrize("where", ["near", "far"])
def test_generation_with_and_without_is_the_same(family: str, where: Any) -> None:
    """Also where beams change places, and rows are copied or dropped."""
    model = attached(models.build(family))
    ids, mask = models.left_padded([60, 41])
    for num_beams in (1, 3):
        plain, cache = tiered(model), tiered(model)
        cache.keep_inputs(70, where)  # ten tokens are kept while beams move
        options = {"num_beams": num_beams, "max_new_tokens": 20}
        expected = generate(model, ids, mask, past_key_values=plain, **options)
        found = generate(model, ids, mask, past_key_values=cache, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(logits_of(found), logits_of(expected))
        for layer in full_layers(cache).values():
            assert layer.num_inputs == 70
            assert_rebuilt(layer, 0, 70)


def test_dynamic_rope_is_that_of_the_time() -> None:
    """Longrope changes its factors with the length of a pass, as its tokens come; the first ones stay as they are."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = attached(models.build("phi3", rope_parameters=factors, original_max_position_embeddings=64))
    cache = tiered(model)
    cache.keep_inputs(100)
    read_in(model, cache, (120,), (50, 120))
    assert_rebuilt(full_layers(cache)[0], 0, 100)
    k, _ = full_layers(cache)[0].rebuild(0, 50)
    cache.reset()
    read_in(model, cache, (120,), (120,))
    assert not torch.allclose(full_layers(cache)[0].rebuild(0, 50)[0], k)
    assert_rebuilt(full_layers(cache)[0], 0, 100)


def test_forks_go_their_own_ways() -> None:
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    read_in(model, cache, (120, 100), (50,))
    fork = copy.deepcopy(cache)
    assert_rebuilt(full_layers(fork)[0], 0, 50)  # before it has seen a pass
    with torch.no_grad():
        model(models.random_ids(2, 60, seed=5), past_key_values=fork)
    read_in(model, cache, (120, 100), (120,))
    for each in (cache, fork):
        assert kept(each) == [KEPT] * 3
        for layer in full_layers(each).values():
            assert_rebuilt(layer, 0, KEPT)
    a, b = (full_layers(each)[1].rebuild(50, KEPT)[0] for each in (cache, fork))
    assert not torch.allclose(a, b)


def test_a_fork_that_keeps_nothing_more() -> None:
    """What its parent has learnt of the layers it knows, too."""
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    read_in(model, cache, (120, 100), (110,))
    fork = copy.deepcopy(cache)
    cache.close()
    read_in(model, fork, (120, 100), (111,))
    for layer in full_layers(fork).values():
        assert_rebuilt(layer, 0, KEPT)


def test_crop_and_go_on() -> None:
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    read_in(model, cache, (120, 100))
    cache.crop(-60)
    assert kept(cache) == [60] * 3
    with torch.no_grad():
        model(models.random_ids(2, 40, seed=5), past_key_values=cache)
    assert kept(cache) == [KEPT] * 3
    for layer in full_layers(cache).values():
        assert_rebuilt(layer, 0, KEPT)


def test_a_copy_of_a_model_rebuilds_with_its_own_weights() -> None:
    model = attached(models.build("llama"))
    twin = copy.deepcopy(model)
    torch.nn.init.normal_(twin.get_decoder().layers[1].self_attn.k_proj.weight)
    caches = [tiered(each) for each in (model, twin)]
    for each, cache in zip((model, twin), caches, strict=True):
        cache.keep_inputs(KEPT)
        read_in(each, cache, (120, 100))
        assert_rebuilt(full_layers(cache)[1], 0, KEPT)


def assert_rebuilt_before_and_after(change: Callable[[Any], None]) -> None:
    """Of a model whose attention is changed between two caches."""
    model = attached(models.build("llama"))
    for _ in range(2):
        cache = tiered(model)
        cache.keep_inputs(KEPT)
        read_in(model, cache, (120, 100))
        for layer in full_layers(cache).values():
            assert_rebuilt(layer, 0, KEPT)
        for decoder_layer in model.get_decoder().layers:
            change(decoder_layer.self_attn)


def test_weights_that_take_the_place_of_others() -> None:
    """What was found out of a layer is by the names of its weights."""

    def other_weights(attention: Any) -> None:
        attention.q_proj.weight = torch.nn.Parameter(torch.randn_like(attention.q_proj.weight))
        attention.k_proj.weight = torch.nn.Parameter(torch.randn_like(attention.k_proj.weight))

    assert_rebuilt_before_and_after(other_weights)


class LowRank(torch.nn.Module):
    """What adapters do to a projection."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.a, self.b = base, torch.nn.Linear(64, 4, bias=False), torch.nn.Linear(4, 32)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.b(self.a(x))


def test_adapters_that_come_later() -> None:
    """Weights have other names then, and there are more of them."""

    def with_adapters(attention: Any) -> None:
        attention.k_proj, attention.v_proj = LowRank(attention.k_proj), LowRank(attention.v_proj)

    assert_rebuilt_before_and_after(with_adapters)


# -- a trial tells what is needed --------------------------------------------------------------------------------------


class Odd(torch.nn.Module):
    """A layer whose second block of outputs goes into keys, by a sum with a part of its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.Linear(8, 64)
        self.more = torch.nn.Linear(8, 16, bias=False)

    def forward(self, hidden_states: Tensor, cache: Any) -> None:
        both = self.both(hidden_states)
        q, k, v, rest = both.unflatten(-1, (4, 16)).unbind(2)
        scale = rest.clamp(-1e-3, 1e-3)  # a gradient would say that nothing depends on it
        cache.update((k + scale + self.more(hidden_states))[:, None], (v * 2)[:, None], 0)
        raise AssertionError(q)


def test_a_part_that_is_clipped_is_needed() -> None:
    torch.manual_seed(3)
    layer, x, cache = Odd(), torch.randn(1, 5, 8), object()
    recorded, beside = RecordedCall.of(Call((x, cache), {}), cache)
    needs = needs_of(layer, recorded, x, beside)
    assert {name: part.blocks for name, part in needs.parts.items()} == {"both.weight": (1, 2, 3)}
    k, v = rebuild_kv(layer, recorded, x, beside)
    both = layer.both(x).detach()
    expected = both[..., 16:32] + both[..., 48:].clamp(-1e-3, 1e-3) + layer.more(x).detach()
    torch.testing.assert_close(k[:, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(v[:, 0], both[..., 32:48] * 2, atol=1e-6, rtol=0)


# -- refused -----------------------------------------------------------------------------------------------------------


@contextmanager
def hooked(model: Any, place: int, change: Callable[..., Any]) -> Iterator[None]:
    """A hook of the user's in front of a layer; `change(args, kwargs)` gives others."""
    hook = layers_of(model)[place].register_forward_pre_hook(
        lambda _, args, kwargs: change(args, kwargs), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def layers_of(model: Any) -> torch.nn.ModuleList:
    found = layers_in(model.get_decoder())
    assert found is not None
    return found


def assert_refused(model: Any, cache: tandem.TieredCache, message: str) -> None:
    """The pass is undone; the knob that is named helps."""
    with pytest.raises(UnsupportedError, match=rf"a llama model cannot be made again.*{message}.*keep_inputs\(0\)"):
        read_in(model, cache, (120, 100))
    cache.check()
    assert cache.get_seq_length() == 0
    cache.keep_inputs(0)
    read_in(model, cache, (120, 100))
    assert cache.kv.inputs is None


def test_a_layer_that_is_entered_with_something_else() -> None:
    """A hook behind ours (steering, offloading) changes what we have seen; such a thing shows in the numbers."""
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    with hooked(model, 1, lambda args, kwargs: ((args[0] + 0.01, *args[1:]), kwargs)):
        assert_refused(model, cache, "keys of layer 1 come out .* off, rounding accounts for")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["position", "value"])
def test_positions_and_values_that_are_off_by_little(dtype: torch.dtype, what: str) -> None:
    """One position, one head of four: what rounding accounts for is far less, also in bf16."""
    model = attached(models.build("llama", num_key_value_heads=4)).to(dtype)
    cache = tiered(model)
    cache.keep_inputs(KEPT)

    def moved(args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        if what == "value":
            cos = cos.clone()
            cos[:, -5:] *= 1.2
            return args, {**kwargs, "position_embeddings": (cos, sin)}
        return args, {**kwargs, "position_embeddings": (cos.roll(1, 1), sin.roll(1, 1))}

    with hooked(model, 2, moved):
        assert_refused(model, cache, "keys of layer 2 come out")


def test_a_layer_that_is_told_what_is_no_value_per_token() -> None:
    model = models.build("llama")
    hook = (
        model.get_decoder()
        .layers[1]
        .register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "extra": torch.zeros(7)}), with_kwargs=True
        )
    )
    tandem.attach(model)
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    with pytest.raises(UnsupportedError, match=r"takes a tensor \[7\], which is no value per token"):
        read_in(model, cache, (120, 100))
    hook.remove()


def test_a_layer_that_is_told_another_number() -> None:
    """Which may stand for a length that its RoPE depends on."""
    model, numbers = models.build("llama"), iter(range(100))
    model.get_decoder().layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "cache_position": next(numbers)}), with_kwargs=True
    )
    tandem.attach(model)
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    with pytest.raises(UnsupportedError, match="layer 1 is called in another way than before"):
        read_in(model, cache, (120, 100))
    assert cache.get_seq_length() == 50


def test_a_layer_that_asks_its_cache() -> None:
    """A length of now would be wrong for tokens of then."""
    model = attached(models.build("llama"))
    layer = layers_of(model)[1]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs["past_key_values"].get_seq_length()
        return type(layer).forward(layer, hidden_states, *args, **kwargs)

    layer.forward = forward
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    assert_refused(model, cache, "cannot be run for its keys and values alone: .*get_seq_length")


@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_compiled_models_are_refused(family: str) -> None:
    torch.compiler.reset()
    model = attached(models.build(family))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedError, match=r"torch.compile leaves no place.*keep_inputs\(0\)"):
        read_in(compiled, cache, (120, 100), (50,))
    assert cache.get_seq_length() == 0
    cache.keep_inputs(0)
    read_in(compiled, cache, (120, 100), (50,))


def test_a_decoder_without_a_list_of_layers_is_refused() -> None:
    model = attached(models.build("llama"))
    model.get_decoder().more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    with pytest.raises(UnsupportedError, match="layers of a llama model were not found, whose inputs"):
        read_in(model, cache, (120, 100))


def test_a_prompt_in_a_cache_that_is_in_use() -> None:
    model = attached(models.build("llama"))
    cache = tiered(model)
    read_in(model, cache, (120, 100))
    assert cache.keeper is None
    assert kept(cache) == [0] * 3
    with pytest.raises(InputError, match=r"this cache holds 120: reset\(\) it"):
        cache.keep_inputs(KEPT)
    cache.reset()
    cache.keep_inputs(KEPT)
    read_in(model, cache, (120, 100))
    assert kept(cache) == [KEPT] * 3


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_the_model_may_go() -> None:
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    read_in(model, cache, (120, 100))
    gone = weakref.ref(layers_of(model)[0])
    tandem.detach(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(CacheError, match="the model whose layers would make keys and values again is gone"):
        full_layers(cache)[0].rebuild(0, 4)


@pytest.mark.parametrize("end", ["close", "reset", "del"])
@pytest.mark.parametrize("is_cut_off", [False, True])
def test_memory_comes_back(end: str, is_cut_off: bool) -> None:
    """Without garbage being collected, also in the middle of a pass."""
    model = attached(models.build("llama"))

    def fail(*_: Any) -> None:
        raise KeyError

    with no_garbage_collection():
        cache = tiered(model)
        cache.keep_inputs(KEPT)
        read_in(model, cache, (120, 100), (50,))
        if is_cut_off:
            hook = model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(KeyError):
                read_in(model, cache, (120, 100), (120,))
            hook.remove()
        assert cache.kv.inputs is not None
        buffers = [weakref.ref(x) for x in cache.kv.inputs.buffers("near")]
        assert len(buffers) == 4
        if end == "del":
            del cache
        else:
            getattr(cache, end)()
        assert all(each() is None for each in buffers)


def test_what_entered_a_layer_that_failed_goes_when_that_is_noticed() -> None:
    model, entered = attached(models.build("llama")), []
    cache = tiered(model)
    cache.keep_inputs(KEPT)
    layer = model.get_decoder().layers[1]
    layer.register_forward_pre_hook(lambda _, args: entered.append(StorageWeakRef(args[0].untyped_storage())))

    def fail(*_: Any) -> None:
        raise KeyError

    hook = layer.input_layernorm.register_forward_pre_hook(fail)
    with no_garbage_collection():
        with pytest.raises(KeyError):
            read_in(model, cache, (120, 100))
        assert not entered[0].expired()
        cache.check()
        assert entered[0].expired()
    hook.remove()
    read_in(model, cache, (120, 100))
    assert kept(cache) == [KEPT] * 3


@pytest.mark.parametrize("num_tokens", [37, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_at_every_line_of_a_pass(family: str, num_tokens: int) -> None:
    """What is kept is of tokens that count, and is whole when they come again; the parent has not noticed."""
    model, held = attached(models.build(family)), 53
    end = held + num_tokens
    parent = tiered(model)
    parent.keep_inputs(KEPT - 10)
    read_in(model, parent, (120, 100), (held,))

    def feed(cache: tandem.TieredCache) -> None:
        read_in(model, cache, (120, 100), (end,))

    moments = every_line(lambda: copy.deepcopy(parent), feed, "first and last")
    for moment in moments[::17]:
        cache = copy.deepcopy(parent)
        with interrupted(moment), pytest.raises(KeyboardInterrupt):
            feed(cache)
        cache.check()
        assert kept(cache) == [min(cache.get_seq_length(), KEPT - 10)] * len(full_layers(cache))
        if cache.get_seq_length() == held:
            feed(cache)
        for each, length in ((cache, end), (parent, held)):
            for layer in full_layers(each).values():
                assert layer.num_inputs == min(length, KEPT - 10)
                assert_rebuilt(layer, 0, layer.num_inputs)
