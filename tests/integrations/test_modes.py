"""Around the model: torch.compile, inference mode, a config that was saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tandemkv.integrations.transformers as tandem
from tests import models
from tests.integrations.agreement import assert_far, attached, tiered

IDS = models.random_ids(1, 300)


@pytest.fixture
def stock() -> Any:
    return models.llama()


@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds
def test_a_compiled_model_answers_as_stock(stock: Any) -> None:
    ours = attached(stock)
    cache = tiered(ours)
    compiled: Any = torch.compile(ours, backend="eager")
    with torch.no_grad():
        found = compiled(IDS, past_key_values=cache).logits
        torch.testing.assert_close(found, stock(IDS).logits, rtol=0, atol=1e-3)
    assert cache.use()[1].used_bytes > 0
    cache.check()


@pytest.mark.way("`torch.compile(model.forward, fullgraph=True)`, left-padded prompts and several turns")
@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama", "opt"])
def test_compiled_prompts_and_turns(family: str) -> None:
    """Three compilations: the first prompt, as long as it is; one token; so many tokens as come, once another number
    has come. No more for other caches, prompts, paddings and turns."""
    torch.compiler.reset()
    counters.clear()
    stock = models.build(family)
    stock.config._experts_implementation = "batched_mm"  # the eager one loops over experts: a graph break of stock
    ours = attached(stock)
    compiled: Any = torch.compile(ours.forward, fullgraph=True, backend="eager")
    num_compiled: list[int] = []
    for lengths in ([90, 40], [97, 97], [85, 3]):
        cache = tiered(ours)
        ids, mask = models.left_padded([length + 50 for length in lengths], seed=lengths[1])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        end = 0
        for num_tokens in (max(lengths), 1, 1, 21, 1, 1, 20, 1, 1):
            begin, end = end, end + num_tokens
            new = {"input_ids": ids[:, begin:end].clone(), "position_ids": places[:, begin:end].clone()}  # no views
            with torch.no_grad():
                found = compiled(**new, attention_mask=mask[:, :end].clone(), past_key_values=cache).logits[:, -1]
                whole = {"attention_mask": mask[:, :end], "position_ids": places[:, :end]}
                torch.testing.assert_close(found, stock(ids[:, :end], **whole).logits[:, -1], rtol=0, atol=1e-3)
            assert cache.get_seq_length() == end
            num_compiled.append(counters["stats"]["unique_graphs"])
        assert_far(cache)
    assert num_compiled == [1, 2, 2] + [3] * 24
    assert not counters["graph_break"]


def test_a_cache_filled_in_inference_mode_goes_on_outside(stock: Any) -> None:
    ours = attached(stock)
    cache = tiered(ours)
    with torch.inference_mode():
        ours(IDS[:, :-1], past_key_values=cache)
    with torch.no_grad():
        found = ours(IDS[:, -1:], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(found, stock(IDS).logits[0, -1], rtol=0, atol=1e-3)
    cache.crop(-100)
    cache.check()


def test_a_cache_made_forked_and_recounted_in_inference_mode_goes_on_outside(stock: Any) -> None:
    ours = attached(stock)
    with torch.inference_mode():
        cache = tiered(ours)
        ours(IDS[:, :-1], past_key_values=cache)
        fork = copy.deepcopy(cache)
        copy.deepcopy(cache).reset()
        cache.check()
    for each in (cache, fork):
        with torch.no_grad():
            found = ours(IDS[:, -1:], past_key_values=each).logits[0, -1]
            torch.testing.assert_close(found, stock(IDS).logits[0, -1], rtol=0, atol=1e-3)
        each.crop(-100)
        each.check()
        each.close()


def test_a_saved_model_can_still_be_given_a_cache(stock: Any, tmp_path: Path) -> None:
    ours = attached(stock)
    ours.save_pretrained(tmp_path)
    assert tandem.TieredCache(ours.config, near_tokens=128, far_bytes="1MiB").kv.spec.dtype == torch.float32
