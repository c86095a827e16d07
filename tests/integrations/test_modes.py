"""Around the model: torch.compile, inference mode, a config that was saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tandemkv.integrations.transformers as tandem
from tests import models
from tests.integrations.agreement import attached, tiered

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
