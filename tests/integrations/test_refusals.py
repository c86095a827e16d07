"""What cannot be served is refused by name, once, and the cache goes on: its books are right and a good call works."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import tandemkv.integrations.transformers as tandem
from tandemkv import machine
from tandemkv.errors import CacheError, CapacityError, InputError, UnsupportedError
from tests import models
from tests.integrations.agreement import HELD, IDS, attached, generate, tiered, unharmed


@contextmanager
def no_forward(model: Any) -> Iterator[None]:
    """Nothing is computed before the refusal."""
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    yield
    hook.remove()
    assert calls == []


# -- models that are not supported -------------------------------------------------------------------------------------


def with_attention(implementation: str) -> Any:
    model = models.llama()
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=11)), "'mamba'"),
        (lambda: models.llama(head_dim=260), "LlamaForCausalLM has head_dim 260"),
        (lambda: models.build("gpt2", add_cross_attention=True), "attends to an encoder as well"),
        (lambda: with_attention("flex_attention"), "attends with 'flex_attention'.*'sdpa' or 'eager'"),
    ],
    ids=["unknown", "large-head", "cross-attention", "another-attention"],
)
def test_unsupported_models_are_refused_by_name(build: Callable[[], Any], message: str) -> None:
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=message):
        tandem.attach(model)
    assert model.config._attn_implementation == before
    assert "_tandem_before" not in vars(model)


def test_a_cache_for_a_model_that_is_not_attached(stock: Any) -> None:
    with pytest.raises(CacheError, match=r"not attached; call .*attach"):
        tandem.TieredCache(stock.config)


def test_a_detached_model_is_refused_and_the_cache_is_not_spoiled(
    stock: Any, ours: Any, cache: tandem.TieredCache
) -> None:
    with unharmed(stock, ours, cache):
        tandem.detach(ours)
        with pytest.raises(CacheError, match="not attached"), torch.no_grad():
            ours(IDS[:, HELD:], past_key_values=cache)
        tandem.attach(ours)


def test_a_model_that_does_not_attend_its_updates_is_refused(stock: Any, ours: Any) -> None:
    """Its second layer is not computed: nothing was appended, and an attached model goes on."""
    cache = tiered(ours)
    for _ in range(2):
        with pytest.raises(CacheError, match="the model that uses this cache is not attached: call"), torch.no_grad():
            stock(IDS, past_key_values=cache)
    cache.check()
    found = generate(ours, IDS, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(found.sequences, generate(stock, IDS, max_new_tokens=4).sequences)


@pytest.mark.parametrize("num_layers", [2, 4])
def test_a_cache_made_for_another_number_of_layers(
    stock: Any, ours: Any, cache: tandem.TieredCache, num_layers: int
) -> None:
    other = attached(models.llama(num_hidden_layers=num_layers))
    message = f"cache is for a model of 3 layers, this one has {num_layers}"
    with unharmed(stock, ours, cache), pytest.raises(InputError, match=message), torch.no_grad():
        other(IDS[:, HELD:], past_key_values=cache)


def test_a_cache_made_for_another_shape(stock: Any, ours: Any, cache: tandem.TieredCache) -> None:
    other = attached(models.llama(num_key_value_heads=4))
    with (
        unharmed(stock, ours, cache),
        pytest.raises(InputError, match=r"holds 2 heads of 16 and 16 .* got 4 heads of 16"),
        torch.no_grad(),
    ):
        other(IDS[:, HELD:], past_key_values=cache)


# -- numbers that cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"near_tokens": 31}, InputError, "near_tokens must be at least two pages, 32, got 31"),
        ({"far_bytes": "many"}, InputError, "expected a size such as '16GiB' .*, got 'many'"),
        ({"far_bytes": -1}, InputError, "cannot be negative"),
        ({"page_size": 20}, InputError, "page_size must be a multiple of 16, got 20"),
        ({"chunk_tokens": 20}, InputError, "chunk_tokens must be a multiple of page_size 16"),
        ({"far_bytes": machine.memory().total_bytes + 1}, CapacityError, "lower far_bytes"),
    ],
)
def test_sizes_that_cannot_be(ours: Any, sizes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiered(ours, **sizes)


def test_double_precision_is_refused_with_the_way_out() -> None:
    model = attached(models.llama(dtype=torch.float64))
    with pytest.raises(InputError, match=r"float64: load the model with dtype=torch\.bfloat16"):
        tiered(model)


def test_far_capacity_is_checked_before_any_forward(stock: Any, ours: Any) -> None:
    """3 layers x K and V of 2 heads x 16 x 4 bytes x 16 tokens = 12 KiB a page of all layers."""
    cache = tiered(ours, far_bytes=5 * 12288)
    generate(ours, IDS, past_key_values=cache, max_new_tokens=4)  # ends with 93 tokens: 4 pages far
    with (
        pytest.raises(CapacityError, match=r"1 x 149 tokens .*far_bytes is 60\.00 KiB; raise far_bytes"),
        no_forward(ours),
    ):
        generate(ours, IDS, past_key_values=cache, max_new_tokens=60)
    cache.crop(HELD - cache.get_seq_length())
    with unharmed(stock, ours, cache):
        pass


def test_far_capacity_of_a_bare_forward(stock: Any, ours: Any) -> None:
    """Without `generate` nobody reserves: the first layer refuses for all of them."""
    cache = tiered(ours, far_bytes=5 * 12288)
    with torch.no_grad():
        with pytest.raises(CapacityError, match="raise far_bytes"):
            ours(models.random_ids(1, 400), past_key_values=cache)
        assert cache.get_seq_length() == 0
        ours(IDS[:, :HELD], past_key_values=cache)
        with unharmed(stock, ours, cache), pytest.raises(CapacityError, match="far tier is full"):
            ours(models.random_ids(1, 400), past_key_values=cache)


def test_more_positions_than_the_model_has(stock: Any, ours: Any, cache: tandem.TieredCache) -> None:
    with unharmed(stock, ours, cache):
        with pytest.raises(InputError, match="exceed the model's 1024 positions; shorten the prompt"), no_forward(ours):
            generate(ours, IDS, past_key_values=cache, max_new_tokens=models.MAX_POSITIONS)
        with pytest.raises(InputError, match="1070 tokens exceed the model's 1024 positions"), torch.no_grad():
            ours(models.random_ids(1, 1000), past_key_values=cache)


# -- calls that are not supported --------------------------------------------------------------------------------------


def zeros_at(*positions: int) -> Tensor:
    mask = torch.ones(1, 90, dtype=torch.long)
    mask[0, list(positions)] = 0
    return mask


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_mask": zeros_at(89)}, UnsupportedError, "only left padding is supported: set tokenizer"),
        ({"attention_mask": zeros_at(0, 2)}, UnsupportedError, "only left padding is supported"),
        ({"attention_mask": torch.ones(1, 1, 20, 90) > 0}, UnsupportedError, "not ready-made 4D masks"),
        ({"attention_mask": torch.ones(1, 20)}, InputError, r"cover all tokens.*expected \[1, 90\], got \[1, 20\]"),
        ({"position_bias": 30.0}, UnsupportedError, "LlamaAttention passes position_bias: not supported yet"),
        ({"is_causal": False}, UnsupportedError, "is_causal=False"),
        ({"output_attentions": True}, UnsupportedError, "output_attentions"),
    ],
    ids=["right", "hole", "4d", "short", "bias", "bidirectional", "attentions"],
)
def test_arguments_that_are_not_understood(
    stock: Any,
    ours: Any,
    cache: tandem.TieredCache,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with unharmed(stock, ours, cache), pytest.raises(error, match=message), torch.no_grad():
        ours(IDS[:, HELD:], past_key_values=cache, **arguments)


def test_dropout_in_training(stock: Any) -> None:
    ours = attached(models.llama(attention_dropout=0.1))
    cache = tiered(ours)
    with torch.no_grad():
        ours(IDS[:, :HELD], past_key_values=cache)
        with unharmed(stock, ours, cache):
            ours.train()
            with pytest.raises(UnsupportedError, match=r"dropout.*model\.eval\(\)"):
                ours(IDS[:, HELD:], past_key_values=cache)
            ours.eval()


def test_gradients(stock: Any, ours: Any, cache: tandem.TieredCache) -> None:
    """They would be wrong without a word: the kernel is no torch op."""
    with unharmed(stock, ours, cache), pytest.raises(UnsupportedError, match=r"torch\.no_grad\(\)"):
        ours(IDS[:, HELD:], past_key_values=cache)


@pytest.mark.parametrize("num_tokens", [1, 9, 20])
@pytest.mark.parametrize("layer", [0, 2])
def test_nan_in_a_layer(stock: Any, ours: Any, cache: tandem.TieredCache, layer: int, num_tokens: int) -> None:
    """Layers before the bad one have taken the tokens already and give them back; 9 and 20 are prefill chunks."""
    weight = ours.model.layers[layer].self_attn.q_proj.weight
    good = weight.detach().clone()
    with unharmed(stock, ours, cache):
        weight.data[0] = torch.nan
        with pytest.raises(InputError, match="q contains NaN"), torch.no_grad():
            ours(IDS[:, HELD : HELD + num_tokens], past_key_values=cache)
        weight.data.copy_(good)


def test_nan_in_an_embedding_stops_a_long_prompt(stock: Any, ours: Any) -> None:
    """In the third chunk of the first layer."""
    cache = tiered(ours)
    ids = models.random_ids(1, 120)
    ids[0, 110] = 1
    good = ours.model.embed_tokens.weight.detach().clone()
    ours.model.embed_tokens.weight.data[1] = torch.nan
    with pytest.raises(InputError, match="q contains NaN"), torch.no_grad():
        ours(ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
    cache.check()
    ours.model.embed_tokens.weight.data.copy_(good)
    found = generate(ours, ids, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(found.sequences, generate(stock, ids, max_new_tokens=4).sequences)


def test_another_batch_size(stock: Any, ours: Any, cache: tandem.TieredCache) -> None:
    with unharmed(stock, ours, cache):
        for num_tokens in (1, 20):
            with pytest.raises(InputError, match="holds 1 sequences, asked for 2"), torch.no_grad():
                ours(models.random_ids(2, num_tokens), past_key_values=cache)
        with pytest.raises(InputError, match="holds 1 sequences, asked for 2"), no_forward(ours):
            generate(ours, models.random_ids(2, 90), past_key_values=cache)


def test_another_dtype(stock: Any, ours: Any, cache: tandem.TieredCache) -> None:
    other = attached(stock).bfloat16()
    with unharmed(stock, ours, cache):
        with (
            pytest.raises(InputError, match=r"holds .* torch\.float32 on cpu, got .* torch\.bfloat16 on cpu"),
            torch.no_grad(),
        ):
            other(IDS[:, HELD:], past_key_values=cache)
        with pytest.raises(InputError, match=r"holds .* torch\.float32"), no_forward(other):
            generate(other, IDS, past_key_values=cache)


def test_a_closed_cache(ours: Any, cache: tandem.TieredCache) -> None:
    cache.close()
    with pytest.raises(CacheError, match="closed"), no_forward(ours):
        generate(ours, IDS, past_key_values=cache)
    with pytest.raises(CacheError, match="closed"), torch.no_grad():
        ours(IDS, past_key_values=cache)
    cache.check()


def test_near_tokens_must_be_whole(ours: Any) -> None:
    with pytest.raises(InputError, match=r"whole number, got 128\.5"):
        tandem.TieredCache(ours.config, near_tokens=128.5, far_bytes="1MiB")  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [40.5, float("nan"), "3", None])
def test_crop_takes_whole_numbers(stock: Any, ours: Any, cache: tandem.TieredCache, tokens: Any) -> None:
    with unharmed(stock, ours, cache), pytest.raises(InputError, match="crop takes a whole number"):
        cache.crop(tokens)


# -- what is not what it should be -------------------------------------------------------------------------------------


def test_wrong_objects_are_named() -> None:
    with pytest.raises(InputError, match="attach takes a transformers model, got NoneType"):
        tandem.attach(None)
    with pytest.raises(InputError, match=r"LlamaModel has no generate: .* with its head"):
        tandem.attach(models.llama().model)
    with pytest.raises(
        InputError, match=r"takes the config of an attached model, config=model\.config, got LlamaForCausalLM"
    ):
        tandem.TieredCache(attached(models.llama()))


def test_a_cache_cannot_be_saved(ours: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be saved yet"):
        pickle.dumps(tiered(ours))


def test_a_mask_of_one_dimension(ours: Any) -> None:
    with pytest.raises(InputError, match=r"attention_mask must be \[num_seqs, kv_len\], got \[20\]"):
        ours(IDS[:, :20], attention_mask=torch.ones(20), past_key_values=tiered(ours))


def test_no_cache_and_a_cache(ours: Any) -> None:
    with pytest.raises(InputError, match="contradict each other"):
        ours.generate(IDS, past_key_values=tiered(ours), use_cache=False, max_new_tokens=2)


def test_autocast(stock: Any, ours: Any, cache: tandem.TieredCache) -> None:
    refused = pytest.raises(UnsupportedError, match=r"of one dtype, got .* instead of torch\.autocast")
    with unharmed(stock, ours, cache), refused, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        ours(IDS[:, HELD:], past_key_values=cache)


def test_attach_again_after_another_implementation_was_set() -> None:
    before = models.llama().config._attn_implementation
    model = attached(models.llama())
    model.set_attn_implementation("eager")
    with pytest.raises(CacheError, match=r"call .*attach\(model\) first"):
        tiered(model)
    assert tandem.attach(model) is model
    tiered(model)
    assert tandem.detach(model).config._attn_implementation == before


def test_an_unknown_keyword_of_update(ours: Any) -> None:
    kv = torch.zeros(1, 2, 1, 16)
    with pytest.raises(UnsupportedError, match=r"passes window to Cache\.update"):
        tiered(ours).update(kv, kv, 0, window=5)


def test_a_prompt_on_a_cache_in_use_asks_for_memory(
    stock: Any, ours: Any, cache: tandem.TieredCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The far pool has room, the machine has not."""
    with unharmed(stock, ours, cache), torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(machine, "available_bytes", lambda: machine.Available(10, "physical memory"))
        with pytest.raises(CapacityError, match="of host memory needed, 10 B available"):
            ours(models.random_ids(1, 100), past_key_values=cache)


def test_layers_that_a_detached_model_has_moved_on_are_not_trusted() -> None:
    """Linear attention has no way back, and the first of its layers comes before ours can refuse."""
    stock = models.build("qwen3_next")
    ours = attached(stock)
    cache = tiered(ours)
    generate(ours, IDS, past_key_values=cache, max_new_tokens=4)
    tandem.detach(ours)
    with pytest.raises(CacheError, match="not attached"):
        generate(ours, IDS, past_key_values=cache, max_new_tokens=8)
    tandem.attach(ours)
    with pytest.raises(CacheError, match=r"cannot be taken back: reset\(\) the cache"):
        generate(ours, IDS, past_key_values=cache, max_new_tokens=8)
    cache.reset()
    found = generate(ours, IDS, past_key_values=cache, max_new_tokens=8)
    assert torch.equal(found.sequences, generate(stock, IDS, max_new_tokens=8).sequences)


@pytest.mark.parametrize("indices", [[5], [-1], [[0]], [0.0], []], ids=str)
def test_places_of_sequences_that_do_not_exist(
    stock: Any, ours: Any, cache: tandem.TieredCache, indices: list[Any]
) -> None:
    with (
        unharmed(stock, ours, cache),
        pytest.raises(InputError, match="expected places of sequences, each from 0 to 0"),
    ):
        cache.batch_select_indices(torch.tensor(indices))


@pytest.mark.parametrize("made", [None, 3, DynamicCache()], ids=["None", "3", "DynamicCache"])
def test_a_function_that_makes_no_tiered_cache(stock: Any, made: Any) -> None:
    model = attached(stock)
    tandem.attach(model, lambda _: made)
    with pytest.raises(InputError, match=f"make_cache must return a TieredCache, got {type(made).__name__}"):
        generate(model, IDS, max_new_tokens=1)


def test_python_types_that_cannot_be(ours: Any, cache: Any) -> None:
    five: Any = 5
    for act, message in (
        (lambda: tandem.detach(None), "detach takes a transformers model, got NoneType"),
        (lambda: tandem.attach(ours, five), "make_cache takes a function of a config, such as TieredCache, got 5"),
        (lambda: cache.reserve(1.5, 3), r"whole numbers, .* got 1\.5, 3"),
        (lambda: cache.reserve("1", None), "whole numbers, .* got '1', None"),
        (lambda: cache.batch_select_indices(None), "expected places of sequences, .* got None"),
        (lambda: cache.batch_repeat_interleave(1.5), r"a whole number of times, at least once, got 1\.5"),
        (lambda: cache.batch_repeat_interleave(0), "a whole number of times, at least once, got 0"),
        (lambda: tiered(ours, near_tokens="128"), "near_tokens is a whole number, got '128'"),
        (lambda: tiered(ours, page_size="64"), "page_size must be a multiple of 16, got '64'"),
        (tandem.TieredCache, "takes the config of an attached model, config=model.config, got NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            act()
    cache.check()


@torch.no_grad()
def test_pages_are_pulled_into_l2_on_cuda_alone() -> None:
    model = attached(models.llama())
    cache: Any = tiered(model)
    for share in (-0.1, 1.5, True, "half"):
        with pytest.raises(InputError, match="l2_share is a part of a device's L2, 0 to 1, got"):
            cache.kv.l2_share = share
    cache.kv.l2_share = 0.25
    ids = models.random_ids(1, 3)
    with pytest.raises(UnsupportedError, match="l2_share is for CUDA devices, the near tier is on a CPU: set it to 0"):
        model(ids, past_key_values=cache)
    cache.kv.l2_share = 0
    model(ids, past_key_values=cache)
    assert cache.kv.seq_len == 3
    cache.kv.l2_share = 0.5
    assert cache.kv.fork().l2_share == 0.5
    assert {layer.l2_share for layer in cache.kv.fork()._layers} == {0.5}
