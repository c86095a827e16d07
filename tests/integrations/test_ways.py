"""Ways of generating beyond one answer after another: beams, assistants, forks, compiled models."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters

import tandemkv.integrations.transformers as tandem
from tandemkv.errors import UnsupportedError
from tests import models
from tests.integrations.agreement import assert_far, attached, generate, logits_of, tiered


def recorded() -> tuple[list[tandem.TieredCache], Callable[[Any], tandem.TieredCache]]:
    """The caches that were made, and what makes them."""
    made: list[tandem.TieredCache] = []

    def make(config: Any) -> tandem.TieredCache:
        made.append(tandem.TieredCache(config, near_tokens=32, far_bytes="32MiB", page_size=16, chunk_tokens=48))
        return made[-1]

    return made, make


@pytest.mark.way("beam search: `num_beams`, `num_return_sequences`")
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams(pair: tuple[Any, Any], options: dict[str, int]) -> None:
    """A padded batch; beams that drop out give their pages to those that go on."""
    stock, ours = pair
    ids, mask = models.left_padded([90, 40])
    cache = tiered(ours)
    expected = generate(stock, ids, mask, max_new_tokens=24, **options)
    found = generate(ours, ids, mask, max_new_tokens=24, past_key_values=cache, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert_far(cache)


@pytest.mark.way("assisted decoding: `prompt_lookup_num_tokens`")
def test_prompt_lookup(pair: tuple[Any, Any]) -> None:
    """Candidates that are refused are cropped away, also where a window has moved on."""
    stock, ours = pair
    ids = models.random_ids(1, 20).repeat(1, 5)
    cache = tiered(ours)
    expected = generate(stock, ids, max_new_tokens=20)
    found = generate(ours, ids, max_new_tokens=20, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(found.sequences, expected.sequences)
    assert_far(cache)


@pytest.mark.way("assisted decoding: `assistant_model`", "llama")
def test_a_draft_model() -> None:
    stock, draft = models.llama(), models.llama(num_hidden_layers=1)
    ours, ids = attached(stock), models.random_ids(1, 90)
    cache = tiered(ours)
    expected = generate(stock, ids, max_new_tokens=20)
    found = generate(ours, ids, max_new_tokens=20, past_key_values=cache, assistant_model=draft)
    assert torch.equal(found.sequences, expected.sequences)
    assert_far(cache)


@pytest.mark.way("assisted decoding: `assistant_model` with a tiered cache too", "llama")
def test_a_draft_model_with_a_cache_of_ours() -> None:
    """A draft of other weights is wrong at nearly every token: both caches are cropped all the time."""
    stock = models.llama()
    made, make = recorded()
    draft = tandem.attach(models.llama(num_hidden_layers=1), make)
    ours, ids = attached(stock), models.random_ids(1, 90)
    cache = tiered(ours)
    found = generate(ours, ids, past_key_values=cache, assistant_model=draft)
    assert torch.equal(found.sequences, generate(stock, ids).sequences)
    assert_far(cache)
    assert_far(made[0])


@pytest.mark.way("assisted decoding: `assistant_early_exit`", "llama")
def test_the_first_layers_as_a_draft() -> None:
    stock = models.llama()
    ours, ids = attached(stock), models.random_ids(1, 90)
    cache = tiered(ours)
    found = generate(ours, ids, past_key_values=cache, assistant_early_exit=1)
    assert torch.equal(found.sequences, generate(stock, ids).sequences)
    assert_far(cache)


@pytest.mark.way("sampling, in beams and assisted")
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_sampling_in_other_ways(pair: tuple[Any, Any], options: dict[str, int]) -> None:
    """The same seed draws the same tokens."""
    stock, ours = pair
    ids, cache = models.random_ids(1, 30).repeat(1, 3), tiered(ours)
    answers = []
    chosen: dict[str, Any] = {**options, "do_sample": True, "top_k": 20}
    for model, given in ((stock, None), (ours, cache)):
        torch.manual_seed(3)
        answers.append(generate(model, ids, past_key_values=given, **chosen).sequences)
    assert torch.equal(*answers)
    assert_far(cache)


@pytest.mark.way("`copy.deepcopy(cache)`, one prefix for many prompts")
def test_forks_of_a_prefix(pair: tuple[Any, Any]) -> None:
    """The idiom for prefix reuse: prefill once, copy for every question. The copies cost nothing, and differ."""
    stock, ours = pair
    prefix = models.random_ids(1, 100)
    cache = tiered(ours)
    with torch.no_grad():
        ours(prefix, past_key_values=cache)
    before = cache.use()
    forks = [copy.deepcopy(cache) for _ in range(3)]
    assert cache.use() == before
    for seed, fork in enumerate(forks):
        ids = torch.cat([prefix, models.random_ids(1, 9, seed=20 + seed)], 1)
        found = generate(ours, ids, past_key_values=fork, max_new_tokens=30)
        assert torch.equal(found.sequences, generate(stock, ids, max_new_tokens=30).sequences)
        assert_far(fork)
    assert cache.get_seq_length() == 100
    for fork in forks:
        fork.close()
    assert cache.use()[0].used_bytes == before[0].used_bytes  # far copies of near pages wait for the prefix to follow
    cache.check()


@pytest.mark.way("`pipeline`, by `attach(model, make_cache)`", "llama")
def test_a_pipeline_comes_to_a_cache_by_attach() -> None:
    """A batch of texts of different lengths; one cache for each call, given back behind it."""
    stock = models.llama()
    made, make = recorded()
    ours = tandem.attach(copy.deepcopy(stock), make)
    texts = [" ".join(f"w{i}" for i in ids.tolist()) for ids in models.random_ids(2, 90)]
    texts[1] = texts[1][:100]
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2, "return_full_text": False}
    found, expected = (
        transformers.pipeline("text-generation", model, tokenizer=models.tokenizer())(texts, **options)
        for model in (ours, stock)
    )
    assert found == expected
    assert len(made) == 1
    assert_far(made[0])


@pytest.mark.way("`TextIteratorStreamer`, `generate` in a thread")
def test_a_streamer_read_while_a_thread_generates(pair: tuple[Any, Any]) -> None:
    stock, ours = pair
    ids = models.random_ids(1, 90)
    cache, tokenizer = tiered(ours), models.tokenizer()
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"past_key_values": cache, "streamer": streamer, "max_new_tokens": 24}
    thread = threading.Thread(target=generate, args=(ours, ids), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(generate(stock, ids).sequences[0, 90:])
    assert_far(cache)


@pytest.mark.parametrize(
    "device_map", [{"model": "cuda:0", "lm_head": "cuda:1"}, {"": 0, "lm_head": "cuda:1"}], ids=str
)
def test_a_model_over_several_devices_is_refused(device_map: dict[str, Any]) -> None:
    """What `from_pretrained(device_map="auto")` leaves on the model; no such machine is needed to refuse."""
    ours = attached(models.llama())
    ours.hf_device_map = device_map
    cache = tiered(ours)
    with pytest.raises(UnsupportedError, match=r"spreads it over .*cuda:1.* load it on one device"):
        generate(ours, models.random_ids(1, 90), past_key_values=cache)
    ours.hf_device_map = {"": "cpu"}
    generate(ours, models.random_ids(1, 90), past_key_values=cache)
    cache.check()


def test_a_layer_on_another_device_is_refused() -> None:
    """Without `generate`: the second layer computes on another device, here that of no memory."""
    ours = attached(models.llama())
    cache, attention = tiered(ours), ours.model.layers[1].self_attn

    def moved(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        there = {
            "hidden_states": kwargs["hidden_states"].to("meta"),
            "position_embeddings": (cos.to("meta"), sin.to("meta")),
        }
        return args, kwargs | there

    attention.to("meta").register_forward_pre_hook(moved, with_kwargs=True)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="layer 1 is on meta, the cache's near tier on cpu"):
        ours(models.random_ids(1, 90), past_key_values=cache)
    cache.check()
    assert cache.get_seq_length() == 0


@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds
@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_layers_that_stay_stock_compile_around_the_cache(family: str) -> None:
    """What they were before a pass is kept by Python, so there are graph breaks, and fullgraph=True says why."""
    torch.compiler.reset()
    stock = models.build(family)
    stock.config._experts_implementation = "batched_mm"
    ours, ids = attached(stock), models.random_ids(1, 90)
    cache = tiered(ours)
    with torch.no_grad():
        ours(ids[:, :79], past_key_values=cache)
        whole: Any = torch.compile(ours.forward, fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a TieredCache keeps what stock layers were"):
            whole(ids[:, -1:], past_key_values=cache)
        compiled: Any = torch.compile(ours.forward, backend="eager")
        for end in range(80, 90):
            found = compiled(ids[:, end - 1 : end], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(found, stock(ids[:, :end]).logits[0, -1], atol=2e-4, rtol=0)
    assert_far(cache)


failing: list[str] = []


@torch.library.custom_op("tandemkv_tests::pass_on", mutates_args=())
def pass_on(x: Tensor) -> Tensor:
    """What a compiled graph can fail in."""
    if failing:
        raise OverflowError
    return x.clone()


@pass_on.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.filterwarnings("ignore")  # inductor's own, of many kinds
@pytest.mark.parametrize(
    ("family", "backend"), [("gemma2", "eager"), ("lfm2", "eager"), ("llama", "inductor"), ("qwen3", "aot_eager")]
)
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_a_compiled_pass_that_fails_is_undone(family: str, backend: str, layer: int) -> None:
    """Behind the attention of a layer, the last one too; in layers that stay stock, too."""
    torch.compiler.reset()
    stock = models.build(family)
    ours, ids = attached(stock), models.random_ids(1, 90)
    cache = tiered(ours)
    block = ours.model.layers[layer]
    mlp = block.feed_forward if family == "lfm2" else block.mlp
    mlp.register_forward_hook(lambda _, __, out: pass_on(out))
    compiled: Any = torch.compile(ours.forward, fullgraph=family != "lfm2", backend=backend)
    with torch.no_grad():
        ours(ids[:, :80], past_key_values=cache)
        for end in (81, 83):
            failing.append(family)
            with pytest.raises(OverflowError):
                compiled(ids[:, end - 1 : end], past_key_values=cache)
            failing.clear()
            assert cache.get_seq_length() == end - 1
            for now in (end, end + 1):
                found = compiled(ids[:, now - 1 : now], past_key_values=cache).logits[0, -1]
                torch.testing.assert_close(found, stock(ids[:, :now]).logits[0, -1], atol=2e-4, rtol=0)
    cache.check()
    assert_far(cache)


@pytest.mark.way("`torch.compile(model.forward, fullgraph=True)`, ten caches, one compilation")
@pytest.mark.filterwarnings("ignore")  # inductor's own, of many kinds
@pytest.mark.parametrize(
    ("family", "backend"),
    [("gemma2", "eager"), ("gpt_oss", "eager"), ("llama", "inductor"), ("opt", "aot_eager"), ("qwen3", "aot_eager")],
)
def test_ten_caches_and_one_compilation(family: str, backend: str) -> None:
    """Append and attend are one operator; of lengths, handles and caches nothing is compiled in."""
    torch.compiler.reset()
    counters.clear()
    stock = models.build(family)
    stock.config._experts_implementation = "batched_mm"  # the eager one loops over experts: a graph break of stock
    ours = attached(stock)
    compiled: Any = torch.compile(ours.forward, fullgraph=True, backend=backend)
    ids = models.random_ids(1, 130)
    with torch.no_grad():
        for turn in range(10):
            cache, length = tiered(ours), 80 + 4 * turn
            ours(ids[:, :length], past_key_values=cache)
            for end in range(length + 1, length + 4):
                found = compiled(ids[:, end - 1 : end], past_key_values=cache).logits[0, -1]
                torch.testing.assert_close(found, stock(ids[:, :end]).logits[0, -1], atol=2e-4, rtol=0)
            assert_far(cache)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.way("one model and two caches in two threads", "llama")
def test_one_model_with_two_caches_in_two_threads() -> None:
    """Each thread generates from another prompt, several times, while the other does."""
    stock = models.llama()
    ours = attached(stock)
    prompts = [models.random_ids(1, 90), models.random_ids(2, 110, seed=4)]
    expected = [generate(stock, ids, max_new_tokens=16) for ids in prompts]

    def repeat(which: int) -> list[Any]:
        found = []
        for _ in range(5):
            cache = tiered(ours)
            found.append(generate(ours, prompts[which], past_key_values=cache, max_new_tokens=16))
            cache.check()
            assert_far(cache)
        return found

    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(repeat, [0, 1]))
    for truth, answers in zip(expected, runs, strict=True):
        for found in answers:
            assert torch.equal(found.sequences, truth.sequences)
            assert (logits_of(found) - logits_of(truth)).abs().max() <= 1e-4 * logits_of(truth).abs().max()
