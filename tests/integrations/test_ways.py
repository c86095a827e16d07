"""Ways of generating beyond one answer after another: beams, assistants, forks, compiled models."""

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tandemkv.integrations.transformers as tandem
from tests import models
from tests.integrations.agreement import assert_far, attached, generate, tiered


@pytest.fixture(scope="module", params=models.VARIED)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model and its attached twin."""
    stock = models.build(request.param)
    return stock, attached(stock)


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


def test_prompt_lookup(pair: tuple[Any, Any]) -> None:
    """Candidates that are refused are cropped away, also where a window has moved on."""
    stock, ours = pair
    ids = models.random_ids(1, 20).repeat(1, 5)
    cache = tiered(ours)
    expected = generate(stock, ids, max_new_tokens=20)
    found = generate(ours, ids, max_new_tokens=20, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(found.sequences, expected.sequences)
    assert_far(cache)


def test_a_draft_model() -> None:
    stock, draft = models.llama(), models.llama(num_hidden_layers=1)
    ours, ids = attached(stock), models.random_ids(1, 90)
    cache = tiered(ours)
    expected = generate(stock, ids, max_new_tokens=20)
    found = generate(ours, ids, max_new_tokens=20, past_key_values=cache, assistant_model=draft)
    assert torch.equal(found.sequences, expected.sequences)
    assert_far(cache)


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


def test_a_pipeline_comes_to_a_cache_by_attach() -> None:
    made = []

    def make(config: Any) -> tandem.TieredCache:
        made.append(tandem.TieredCache(config, near_tokens=32, far_bytes="32MiB", page_size=16, chunk_tokens=48))
        return made[-1]

    stock = models.llama()
    ours = tandem.attach(copy.deepcopy(stock), make)
    ids = models.random_ids(1, 90)
    assert torch.equal(generate(ours, ids).sequences, generate(stock, ids).sequences)
    assert_far(made[0])


def test_ten_caches_and_one_compilation() -> None:
    """Append and attend are one operator; of lengths, handles and caches nothing is compiled in."""
    stock = models.llama()
    ours = attached(stock)
    counter = CompileCounter()
    compiled: Any = torch.compile(ours.forward, fullgraph=True, backend=counter)
    ids = models.random_ids(1, 130)
    with torch.no_grad():
        for turn in range(10):
            cache, length = tiered(ours), 80 + 4 * turn
            ours(ids[:, :length], past_key_values=cache)
            for end in range(length + 1, length + 4):
                found = compiled(ids[:, end - 1 : end], past_key_values=cache).logits[0, -1]
                torch.testing.assert_close(found, stock(ids[:, :end]).logits[0, -1], atol=2e-4, rtol=0)
            assert_far(cache)
    assert counter.frame_count == 1
