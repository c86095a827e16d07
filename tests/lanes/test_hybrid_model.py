"""HybridGen's step in a model: the host begins a layer while the device runs the one before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv.lanes import HybridCrew, Rig
from tandemkv.select import Sparse
from tests.integrations.agreement import attached, tiered
from tests.integrations.test_foresight import deeper, step
from tests.lanes.test_hybrid import crew_on
from tests.models import left_padded

PROMPT, BUDGET = 300, 240


class Asked(list[tuple[int, bool]]):
    """Layers that the host was asked about, and whether their own attention had not come yet."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found, ask, begin = Asked(), HybridCrew.ask, HybridCrew._begin_layer
    last = [-1]

    def logged_ask(crew: HybridCrew, layer: int, question: Any) -> Any:
        found.append((layer, layer > last[0] + 1))
        return ask(crew, layer, question)

    def logged_begin(crew: HybridCrew, layer: int) -> None:
        last[0] = layer
        begin(crew, layer)

    monkeypatch.setattr(HybridCrew, "ask", logged_ask)
    monkeypatch.setattr(HybridCrew, "_begin_layer", logged_begin)
    return found


def filled(model: Any, crew: HybridCrew | None) -> tuple[Any, Tensor, Tensor]:
    """A cache that holds a padded prompt, ids of it and more, and their mask."""
    ids, mask = left_padded([PROMPT + 40, PROMPT + 20])
    cache = tiered(model)
    cache.kv.sparse, cache.kv.crew = Sparse("logits", BUDGET), crew
    with torch.no_grad():
        model(ids[:, :-40], attention_mask=mask[:, :-40], past_key_values=cache)
    return cache, ids, mask


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_rig_gives_what_one_processor_gives(rig: Rig, asked: Asked, family: str, num_tokens: int) -> None:
    model = attached(deeper(family, ["full_attention"] * 4 if family == "gemma3_text" else None))
    there, here = (filled(model, crew) for crew in (crew_on(rig), None))
    for i in range(10):
        asked.clear()
        out, expected = (step(model, *each, num_tokens) for each in (there, here))
        assert torch.allclose(out, expected, atol=1e-4)
        layers = {layer for layer, _ in asked}
        assert layers == {0, 1, 2, 3}
        ahead = {layer for layer, is_ahead in asked if is_ahead}
        assert ahead == (set() if i == 0 else {2, 3})  # a layer's rule is known from its first step on
        assert all(each.ahead is None and each.foreseen is None for each in there[0].kv._layers)
    there[0].check()


def test_a_pass_that_fails_leaves_nothing_begun(rig: Rig) -> None:
    model = attached(deeper("llama"))
    there, here = (filled(model, crew) for crew in (crew_on(rig), None))
    for each in (there, here):
        step(model, *each, 1)

    def fail(*_: object) -> None:
        raise RuntimeError("a layer failed")

    hook = model.get_decoder().layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a layer failed"):
        step(model, *there, 1)
    hook.remove()
    there[0].check()
    assert all(each.ahead is None for each in there[0].kv._layers)
    out, expected = (step(model, *each, 1) for each in (there, here))
    assert torch.allclose(out, expected, atol=1e-4)
