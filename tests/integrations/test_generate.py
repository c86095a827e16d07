"""Every family generates over a tiered cache what stock generates with eager attention, while most KV is far."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, set_seed

from tandemkv import attention
from tandemkv.cache.layer import Held, LayerKV
from tandemkv.types import PagedKV
from tests import models
from tests.integrations.agreement import (
    PAGE_SIZE,
    Streamer,
    assert_agrees,
    assert_far,
    attached,
    exact_logits,
    generate,
    logits_of,
    tiered,
)


@pytest.fixture(scope="module", params=models.PLAIN)
def plain_pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model without windows, which cannot be cropped far back, and its attached twin."""
    stock = models.build(request.param)
    return stock, attached(stock)


@pytest.mark.way("greedy")
def test_greedy(pair: tuple[Any, Any]) -> None:
    """The prompt is longer than two chunks."""
    stock, ours = pair
    cache, ids = tiered(ours), models.random_ids(2, 110)
    found = generate(ours, ids, past_key_values=cache)
    assert_agrees(stock, generate(stock, ids), found)
    assert_far(cache)


def test_decoding_as_on_a_device(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU tensors, with every rule of scores: a lane for far pages, near ones gathered, a merge."""
    stock, ours = pair
    lengths: list[int] = []

    def on_device(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(q.shape[2])
        return attention._decode_on_device(q, *args, **kwargs)

    monkeypatch.setattr(attention, "decode_step", on_device)
    ids, mask = models.left_padded([110, 61])
    cache = tiered(ours)
    found = generate(ours, ids, mask, past_key_values=cache)
    assert lengths == [1] * (len(found.logits) - 1) * cache.kv.spec.num_layers
    assert_agrees(stock, generate(stock, ids, mask), found, mask)
    assert_far(cache)


@pytest.mark.way("sampling")
def test_sampling_with_a_seed(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    cache, ids = tiered(ours), models.random_ids(2, 90)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20}
    set_seed(5)
    expected = generate(stock, ids, **options)
    set_seed(5)
    assert_agrees(stock, expected, generate(ours, ids, past_key_values=cache, **options))
    assert_far(cache)


@pytest.mark.way("sampling: `num_return_sequences`")
def test_many_answers_to_one_prompt(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    cache, ids = tiered(ours), models.random_ids(2, 70)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    set_seed(6)
    expected = generate(stock, ids, **options)
    set_seed(6)
    found = generate(ours, ids, past_key_values=cache, **options)
    assert torch.equal(expected.sequences, found.sequences)
    assert cache.kv.num_seqs == 6
    assert_far(cache)


@pytest.mark.way("left padding, very different lengths, with `prefill_chunk_size`")
@pytest.mark.parametrize("prefill_chunk_size", [None, 7, 40])
def test_left_padded_batch(pair: tuple[Any, Any], prefill_chunk_size: int | None) -> None:
    """Very different lengths; in pieces, the short prompts' first pieces are nothing but padding."""
    stock, ours = pair
    ids, mask = models.left_padded([120, 3, 61])
    cache = tiered(ours)
    found = generate(ours, ids, mask, past_key_values=cache, prefill_chunk_size=prefill_chunk_size)
    assert_agrees(stock, generate(stock, ids, mask), found, mask)
    assert_far(cache)


def test_each_sequence_of_a_padded_batch_is_as_if_alone(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    lengths = [120, 3, 61]
    ids, mask = models.left_padded(lengths)
    together = generate(ours, ids, mask, past_key_values=tiered(ours))
    for row, length in enumerate(lengths):
        alone = generate(ours, ids[row : row + 1, -length:], past_key_values=tiered(ours))
        assert torch.equal(alone.sequences[0, length:], together.sequences[row, max(lengths) :])
        torch.testing.assert_close(logits_of(alone)[0], logits_of(together)[row], atol=2e-4, rtol=0)


@pytest.mark.way("`prefill_chunk_size`")
@pytest.mark.parametrize("prefill_chunk_size", [1, 16, 50, 1000])
def test_chunked_prefill(pair: tuple[Any, Any], prefill_chunk_size: int) -> None:
    stock, ours = pair
    cache, ids = tiered(ours), models.random_ids(1, 101)
    found = generate(ours, ids, past_key_values=cache, prefill_chunk_size=prefill_chunk_size, max_new_tokens=6)
    assert_agrees(stock, generate(stock, ids, max_new_tokens=6), found)
    assert_far(cache)


@pytest.mark.parametrize("prefill_chunk_size", [None, 30])
@pytest.mark.parametrize("num_tokens", [60, 90], ids=["while decoding", "in the prompt"])
@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_rope_changes_to_long_factors(family: str, num_tokens: int, prefill_chunk_size: int | None) -> None:
    """Behind 64 tokens Phi-3 starts anew, into a cache of its own: into ours, which is far in the end."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    factors |= {"original_max_position_embeddings": 64}
    if family == "phimoe":
        factors |= {"short_mscale": 1.0, "long_mscale": 1.2}
    stock = models.build(family, original_max_position_embeddings=64, rope_parameters=factors)
    ours = attached(stock)
    cache, ids = tiered(ours), models.random_ids(2, num_tokens)
    options: dict[str, Any] = {"max_new_tokens": 12, "prefill_chunk_size": prefill_chunk_size}
    found = generate(ours, ids, past_key_values=cache, **options)
    expected = generate(stock, ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=2e-4, rtol=0)
    assert cache.get_seq_length() == num_tokens + 11
    assert_far(cache)


def test_one_bool_mask_for_every_piece_of_a_prompt(pair: tuple[Any, Any]) -> None:
    """transformers hands a bool mask on as it is: the same object, which is longer than the pieces, again and again."""
    stock, ours = pair
    ids, mask = models.left_padded([90, 50])
    cache, whole, places = tiered(ours), mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask, position_ids=places).logits[:, -1]
        for begin in range(0, 90, 30):
            piece = {"input_ids": ids[:, begin : begin + 30], "position_ids": places[:, begin : begin + 30]}
            found = ours(**piece, attention_mask=whole, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_sequences_chosen_by_bools_and_on_an_unused_cache(plain_pair: tuple[Any, Any]) -> None:
    stock, ours = plain_pair
    ids, cache = models.random_ids(3, 90), tiered(ours)
    cache.reorder_cache(torch.tensor([], dtype=torch.int64))
    with torch.no_grad():
        ours(ids[:, :-1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        found = ours(ids[[0, 2], -1:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, stock(ids[[0, 2]]).logits[:, -1], atol=1e-3, rtol=0)
    cache.crop(torch.tensor(-4))
    assert cache.get_seq_length() == 86


@pytest.mark.way("several turns on one cache")
def test_second_turn_on_the_same_cache(pair: tuple[Any, Any]) -> None:
    """The full ids are passed again; only what the cache does not hold is computed."""
    stock, ours = pair
    cache, ids, question = tiered(ours), models.random_ids(2, 80), models.random_ids(2, 21, seed=9)
    first = generate(ours, ids, past_key_values=cache).sequences
    ids = torch.cat([first, question], 1)
    fed: list[int] = []
    hook = ours.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = generate(ours, ids, past_key_values=cache)
    hook.remove()
    assert fed[0] == 22  # the last token of the first turn was never fed
    assert_agrees(stock, generate(stock, ids), found)
    assert_far(cache)


@pytest.mark.way("a streamer")
def test_streaming(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    cache, ids, streamer = tiered(ours), models.random_ids(1, 75), Streamer()
    ours.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, streamer=streamer)
    expected = generate(stock, ids, max_new_tokens=12).sequences
    assert streamer.ids == expected[0].tolist()
    assert streamer.num_puts == 13  # the prompt, then token by token
    assert streamer.is_ended
    assert_far(cache)


@pytest.mark.way("`cache.crop` and on")
@pytest.mark.parametrize("removed", [1, 5, 70, 80])
def test_crop_and_continue(plain_pair: tuple[Any, Any], removed: int) -> None:
    """70 and 80 tokens reach into the far pages: inside one, and to the edge of one."""
    stock, ours = plain_pair
    cache, ids = tiered(ours), models.random_ids(1, 129)
    with torch.no_grad():
        ours(ids[:, :128], past_key_values=cache)
        assert cache.kv.layer(0).far_tokens == 64
        cache.crop(-removed)
        cache.check()
        assert cache.get_seq_length() == 128 - removed
        other = torch.cat([ids[:, : 128 - removed], models.random_ids(1, 33, seed=3)], 1)
        found = generate(ours, other, past_key_values=cache)
    assert_agrees(stock, generate(stock, other), found)
    assert_far(cache)


def test_sequences_that_are_repeated(pair: tuple[Any, Any]) -> None:
    """As stock's cache repeats them, told by the next step's logits: every copy goes on with a token of its own."""
    stock, ours = pair
    prompts, ids = models.random_ids(2, 90), models.random_ids(6, 1, seed=3)
    expected, found = DynamicCache(config=stock.config), tiered(ours)
    logits = []
    with torch.no_grad():
        for model, cache in ((stock, expected), (ours, found)):
            model(prompts, past_key_values=cache)
            cache.batch_repeat_interleave(3)
            logits.append(model(ids, past_key_values=cache).logits[:, -1])
    torch.testing.assert_close(*logits, atol=2e-4, rtol=0)
    assert found.kv.num_seqs == 6
    assert_far(found)


def test_crop_keeps_a_length_as_transformers_5_17_asks(plain_pair: tuple[Any, Any]) -> None:
    _, ours = plain_pair
    cache = tiered(ours)
    with torch.no_grad():
        ours(models.random_ids(1, 90), past_key_values=cache)
    for tokens_to_remove, left in ((0, 90), (100, 90), (70, 70), (-1, 69), (-1000, 0)):
        cache.crop(tokens_to_remove)
        assert cache.get_seq_length() == left
        cache.check()


@pytest.mark.way("`cache.reset` and another batch")
def test_reset_and_reuse_with_another_batch(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    cache = tiered(ours)
    for num_seqs, num_tokens in ((1, 100), (3, 60), (2, 75)):
        ids = models.random_ids(num_seqs, num_tokens)
        found = generate(ours, ids, past_key_values=cache, max_new_tokens=8)
        assert_agrees(stock, generate(stock, ids, max_new_tokens=8), found)
        assert_far(cache)
        cache.reset()
        assert cache.use() == []
        cache.check()


@pytest.mark.way("two models and two caches in one process", "llama", "opt")
def test_two_models_and_two_caches_in_turn() -> None:
    """Token by token, so that a state shared by mistake would mix them."""
    stocks = [models.llama(), models.build("opt")]
    ours = [attached(stock) for stock in stocks]
    caches = [tiered(model) for model in ours]
    ids = models.random_ids(1, 100)
    with torch.no_grad():
        for begin, end in [(0, 80), *((i, i + 1) for i in range(80, 100))]:
            logits = [
                model(ids[:, begin:end], past_key_values=cache).logits
                for model, cache in zip(ours, caches, strict=True)
            ]
        for stock, cache, found in zip(stocks, caches, logits, strict=True):
            torch.testing.assert_close(found[:, -1], stock(ids).logits[:, -1], atol=2e-4, rtol=0)
            assert_far(cache)


@pytest.mark.way("one model and two caches in turn", "qwen2")
def test_one_model_with_two_caches_in_turn() -> None:
    stock = models.build("qwen2")
    ours = attached(stock)
    prompts = [models.random_ids(1, 90), models.random_ids(2, 70, seed=4)]
    caches = [tiered(ours), tiered(ours, near_tokens=48)]
    with torch.no_grad():
        for step in range(3):
            for ids, cache in zip(prompts, caches, strict=True):
                piece = ids[:, cache.get_seq_length() : ids.shape[1] - 2 + step]
                found = ours(piece, past_key_values=cache).logits[:, -1]
                expected = stock(ids[:, : ids.shape[1] - 2 + step]).logits[:, -1]
                torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    for cache in caches:
        assert_far(cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", models.PLAIN)
def test_sixteen_bits(family: str, dtype: torch.dtype) -> None:
    """Prompt and answer are fed to both; ours is no farther from float64 than four times stock in the same dtype."""
    stock = models.build(family).to(dtype)
    ours = attached(stock)
    cache, ids = tiered(ours), models.random_ids(2, 120)
    with torch.no_grad():
        truth = exact_logits(stock, ids, 20)
        stock_error = (stock(ids[:, :-1]).logits[:, -20:].double() - truth).abs().max()
        pieces = [ours(ids[:, :100], past_key_values=cache).logits[:, -1:]]
        pieces += [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(100, 119)]
    assert (torch.cat(pieces, 1).double() - truth).abs().max() <= 4 * stock_error
    assert cache.kv.spec.dtype == dtype
    assert_far(cache)


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.build("opt", hidden_size=68, word_embed_proj_dim=68),
        lambda: models.llama(hidden_size=68, num_attention_heads=17, num_key_value_heads=1),
    ],
    ids=["head_dim of 17", "17 query heads per KV head"],
)
def test_odd_heads_and_large_groups(build: Callable[[], Any]) -> None:
    stock = build()
    ours = attached(stock)
    cache, ids = tiered(ours), models.random_ids(2, 110)
    expected = generate(stock, ids)
    assert_agrees(stock, expected, generate(ours, ids, past_key_values=cache))
    assert_far(cache)


def test_the_dtype_is_that_of_the_model_not_of_its_config() -> None:
    """Also where the cache was reserved before the model was seen."""
    ours = attached(models.llama()).bfloat16()
    cache = tiered(ours)
    cache.reserve(1, 100)
    generate(ours, models.random_ids(1, 80), past_key_values=cache, max_new_tokens=3)
    assert cache.kv.spec.dtype == torch.bfloat16
    assert_far(cache)


def test_a_withheld_far_page_is_noticed(plain_pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that the comparisons above can fail: one page of 16 tokens is left out of the far table."""
    stock, ours = plain_pair
    extended = LayerKV.extended

    @contextmanager
    def extended_less(layer: LayerKV, num_tokens: int) -> Iterator[Held]:
        with extended(layer, num_tokens) as held:
            far = [PagedKV(x.arena, x.page_table[..., 1:], x.kv_start, x.kv_len - PAGE_SIZE) for x in held.far]
            yield Held(tuple(far), held.near)

    monkeypatch.setattr(LayerKV, "extended", extended_less)
    ids = models.random_ids(2, 110)
    expected, found = generate(stock, ids), generate(ours, ids, past_key_values=tiered(ours))
    with pytest.raises(AssertionError):
        assert_agrees(stock, expected, found)
    truth = exact_logits(stock, expected.sequences, 24)
    tolerance = 4 * (logits_of(expected) - truth).abs().max()
    assert (logits_of(found)[:, 1] - truth[:, 1]).abs().max() > 100 * tolerance
