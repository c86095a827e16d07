"""A cache in other hands: models that are not attached, that leave out layers, another family's; threads that meet."""

import copy
import threading
from typing import Any

import pytest
import torch

import tandemkv.integrations.transformers as tandem
from tandemkv.errors import CacheError, InputError
from tests import models
from tests.integrations.agreement import HELD, IDS, attached, generate, tiered, unharmed


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_cache_in_use_and_a_model_that_is_not_attached(num_layers: int) -> None:
    """Before its first layer attends, and nothing is harmed."""
    stock = models.llama(num_hidden_layers=num_layers)
    ours = attached(stock)
    cache = tiered(ours)
    with torch.no_grad():
        ours(IDS[:, :HELD], past_key_values=cache)
        with (
            unharmed(stock, ours, cache),
            pytest.raises(CacheError, match="model that uses this cache is not attached"),
        ):
            stock(IDS[:, HELD : HELD + 1], past_key_values=cache)


@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_a_compiled_model_that_is_not_attached_fails(family: str) -> None:
    """Never attached, or detached behind the compiler: torch's own error, for no product takes our keys as they are."""
    torch.compiler.reset()
    stock = models.build(family)
    stock.set_attn_implementation("sdpa")
    ours = attached(stock)
    cache, ids = tiered(ours), IDS[:, : HELD + 2]
    with torch.no_grad():
        ours(ids[:, :HELD], past_key_values=cache)
        compiled: Any = torch.compile(ours.forward, fullgraph=True, backend="eager")
        compiled(ids[:, HELD : HELD + 1], past_key_values=cache)
        for detached in (torch.compile(stock.forward, fullgraph=True, backend="eager"), compiled):
            tandem.detach(ours)
            with pytest.raises(Exception, match=r"dtype|Float but found Int|data-dependent"):
                detached(ids[:, HELD + 1 :], past_key_values=cache)
        tandem.attach(ours)
        found = ours(ids[:, HELD + 1 :], past_key_values=cache).logits
        torch.testing.assert_close(found[:, -1], stock(ids).logits[:, -1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [1, 2], [2]], ids=str)
def test_a_model_that_leaves_out_layers(stock: Any, ours: Any, cache: tandem.TieredCache, kept: list[int]) -> None:
    layers = ours.model.layers
    with unharmed(stock, ours, cache):
        ours.model.layers = torch.nn.ModuleList(layers[index] for index in kept)
        with torch.no_grad(), pytest.raises(CacheError, match="left out"):
            ours(IDS[:, HELD : HELD + 1], past_key_values=cache)
        ours.model.layers = layers


@pytest.mark.parametrize("place", ["layers.1", "layers.1.mlp", "layers.2.mlp", "norm"])
def test_a_cache_and_its_fork_in_two_threads(stock: Any, ours: Any, cache: tandem.TieredCache, place: str) -> None:
    """Turns are told from passes that meet: one comes between the layers of the other, or behind its last attention."""
    fork = copy.deepcopy(cache)

    @torch.no_grad()
    def use_the_fork() -> None:
        ours(IDS[:, HELD : HELD + 3], past_key_values=fork)

    def between(*_: Any) -> None:
        hook.remove()
        other = threading.Thread(target=use_the_fork)
        other.start()
        other.join()

    with unharmed(stock, ours, cache):
        hook = ours.model.get_submodule(place).register_forward_pre_hook(between)
        with torch.no_grad(), pytest.raises(CacheError, match="one thread at a time"):
            ours(IDS[:, HELD:], past_key_values=cache)
    assert fork.get_seq_length() == HELD + 3
    found = generate(ours, IDS, past_key_values=fork, max_new_tokens=4)
    assert torch.equal(found.sequences, generate(stock, IDS, max_new_tokens=4).sequences)


@pytest.mark.parametrize("place", ["layers.1", "layers.2.mlp", "norm"])
def test_a_check_in_the_middle_of_a_pass(stock: Any, ours: Any, cache: tandem.TieredCache, place: str) -> None:
    """Who checks a fork undoes what is under way: the pass does not end as if nothing had happened."""
    fork = copy.deepcopy(cache)
    with unharmed(stock, ours, cache):
        hook = ours.model.get_submodule(place).register_forward_pre_hook(lambda *_: fork.check())
        with torch.no_grad(), pytest.raises(CacheError, match="one thread at a time"):
            ours(IDS[:, HELD:], past_key_values=cache)
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_a_model_whose_only_layer_attends_elsewhere(family: str) -> None:
    """Another attention was set after `attach`, and the cache is one of an attached twin."""
    types = {"layer_types": ["conv", "full_attention"]} if family == "lfm2" else {"num_hidden_layers": 1}
    stock = models.build(family, **types)
    ours, other = attached(stock), attached(stock)
    other.set_attn_implementation("sdpa")
    cache = tiered(ours)
    with torch.no_grad():
        ours(IDS[:, :HELD], past_key_values=cache)
    with unharmed(stock, ours, cache), torch.no_grad(), pytest.raises(CacheError, match=r"attach\(model\)"):
        other(IDS[:, HELD : HELD + 1], past_key_values=cache)


def test_gradient_checkpointing_leaves_no_cache_behind() -> None:
    """In training it takes the cache away from every layer, and sdpa goes on without."""
    stock = models.llama()
    stock.set_attn_implementation("sdpa")
    ours = attached(stock)
    cache = tiered(ours)
    # the name of today, and that of transformers 5.17
    getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
    with pytest.raises(CacheError, match="checkpointing"):
        ours.train()(IDS, past_key_values=cache)
    cache.check()
    found = generate(ours.eval(), IDS, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(found.sequences, generate(stock, IDS, max_new_tokens=4).sequences)


def test_a_cache_with_stock_layers_and_a_model_of_another_family() -> None:
    hybrid, llama = attached(models.build("qwen3_next")), attached(models.llama())
    cache = tiered(hybrid)
    with torch.no_grad():
        before = hybrid(IDS, past_key_values=cache).logits[:, -1]
        with pytest.raises(InputError, match="for a model of type 'qwen3_next', this is a 'llama'"):
            llama(IDS[:, :1], past_key_values=cache)
        cache.check()
        cache.reset()
        torch.testing.assert_close(hybrid(IDS, past_key_values=cache).logits[:, -1], before)
