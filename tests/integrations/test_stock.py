"""An attached model without our cache computes what it computed before; `attach` leaves no trace after `detach`."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

import tandemkv.integrations.transformers as tandem
from tandemkv.integrations.transformers.configs import IMPLEMENTATIONS
from tests import models
from tests.integrations.agreement import attached, generate, no_garbage_collection, tiered

PADDED = models.left_padded([30, 4, 17])


@pytest.fixture(scope="module", params=models.PLAIN)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A stock model with sdpa, which an attached model falls back to, and its attached twin."""
    stock = models.build(request.param)
    stock.set_attn_implementation("sdpa")
    return stock, attached(stock)


def without_cache(model: Any) -> Tensor:
    logits: Tensor = model(models.random_ids(2, 40), use_cache=False).logits
    return logits


def padded(model: Any) -> Tensor:
    ids, mask = PADDED
    return torch.stack(generate(model, ids, mask).logits, 1)


def with_dynamic_cache(model: Any) -> Tensor:
    cache = DynamicCache(config=model.config)
    return torch.stack(generate(model, models.random_ids(2, 40), past_key_values=cache).logits, 1)


def with_static_cache(model: Any) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=80)
    ids, mask = PADDED
    return torch.stack(generate(model, ids, mask, past_key_values=cache, disable_compile=True).logits, 1)


def with_beams(model: Any) -> Tensor:
    found = generate(model, models.random_ids(2, 20), num_beams=3, output_scores=True)
    return torch.cat([found.sequences.float().flatten(), found.sequences_scores])


def with_a_4d_mask(model: Any) -> Tensor:
    """Every token sees itself and the first one only."""
    visible = torch.eye(12, dtype=torch.bool)
    visible[:, 0] = True
    options = {"attention_mask": visible[None, None], "position_ids": torch.arange(12)[None], "use_cache": False}
    logits: Tensor = model(models.random_ids(1, 12), **options).logits
    return logits


def packed(model: Any) -> Tensor:
    """Two sequences in one row, told apart by their positions."""
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    logits: Tensor = model(models.random_ids(1, 16), position_ids=positions, use_cache=False).logits
    return logits


@pytest.mark.way("an attached model without our cache: bit for bit stock")
@pytest.mark.parametrize(
    "compute", [without_cache, padded, with_dynamic_cache, with_static_cache, with_beams, with_a_4d_mask, packed]
)
@torch.no_grad()
def test_bit_for_bit_as_stock(pair: tuple[Any, Any], compute: Callable[[Any], Tensor]) -> None:
    stock, ours = pair
    assert torch.equal(compute(ours), compute(stock))


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
@torch.no_grad()
def test_every_family_is_bit_for_bit_as_stock(family: str) -> None:
    """With eager attention, which lives in each family's own file, and layers that stay stock; left-padded."""
    stock = models.build(family)
    assert torch.equal(padded(attached(stock)), padded(stock))


@pytest.mark.way("training an attached model: the same gradients")
def test_training_gives_the_same_gradients(pair: tuple[Any, Any]) -> None:
    ids, mask = PADDED
    gradients = []
    for model in map(copy.deepcopy, pair):
        model.train()
        labels = ids.masked_fill(mask == 0, -100)
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 10
    assert all(torch.equal(expected, found) for expected, found in zip(*gradients, strict=True))


def test_the_stock_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attached(models.llama())
    made = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return eager_mask(*args, **kwargs)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "eager", counted)
    ids, mask = PADDED
    with torch.no_grad():
        ours(ids, attention_mask=mask)
    assert len(made) == 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_restores(implementation: str) -> None:
    model = models.llama()
    model.set_attn_implementation(implementation)
    before = set(vars(model))
    ids = models.random_ids(1, 30)
    expected = generate(model, ids).logits
    assert tandem.attach(model) is model
    assert tandem.attach(model) is model  # once more changes nothing
    assert model.config._attn_implementation == IMPLEMENTATIONS[implementation]
    assert tandem.detach(model) is model
    assert tandem.detach(model) is model
    assert model.config._attn_implementation == implementation
    assert set(vars(model)) == before
    assert torch.equal(torch.stack(generate(model, ids).logits), torch.stack(expected))


def test_a_detached_model_gives_its_memory_back_at_once() -> None:
    model = tandem.attach(models.llama())
    weight = weakref.ref(model.lm_head.weight)
    tandem.detach(model)
    with no_garbage_collection():
        del model
        assert weight() is None


def test_attach_again_after_detach() -> None:
    model = tandem.attach(tandem.detach(tandem.attach(models.llama())))
    ids = models.random_ids(1, 100)
    cache = tiered(model)
    expected = generate(models.llama(), ids).sequences
    assert torch.equal(generate(model, ids, past_key_values=cache).sequences, expected)
    assert cache.use()[1].used_bytes > 0


def test_attach_changes_this_model_only() -> None:
    model, other = models.llama(), models.llama()
    tandem.attach(model)
    assert other.config._attn_implementation == "eager"


def test_each_of_two_models_with_one_config_gets_its_hook() -> None:
    """They share the name of the implementation, but not `generate`."""
    model = models.llama()
    other = type(model)(model.config)
    for each in (model, other):
        tandem.attach(each)
        assert "_prepare_cache_for_generation" in vars(each)


def test_two_models_with_one_config_are_detached_in_the_order_of_attaching() -> None:
    first = models.llama()
    second = type(first)(first.config)
    for model in (first, second):
        tandem.attach(model)
    for model in (first, second):
        tandem.detach(model)
    assert first.config._attn_implementation == "eager"


def test_a_deep_copy_of_an_attached_model_reserves_its_own_cache() -> None:
    ours = attached(models.llama())
    twin = copy.deepcopy(ours)
    assert twin._prepare_cache_for_generation.__self__ is twin
    cache, ids = tiered(twin), models.random_ids(1, 90)
    expected = generate(models.llama(), ids).sequences
    assert torch.equal(generate(twin, ids, past_key_values=cache).sequences, expected)
