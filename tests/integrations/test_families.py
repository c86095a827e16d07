"""Every supported family generates over a tiered cache what stock generates with eager attention."""

import re
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache, LinearAttentionAndFullAttentionLayer

import tandemkv.integrations.transformers as tandem
from tandemkv.errors import UnsupportedError
from tests import models
from tests.integrations.agreement import assert_far, attached, generate, logits_of, tiered


def test_every_supported_family_has_a_row() -> None:
    assert sorted(models.FAMILIES) == sorted(tandem.FAMILIES)


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.family(family)) for family in sorted(models.FAMILIES)]
)
def test_family(family: str) -> None:
    """A left-padded batch, most of it far: equal tokens, and logits; the shape was known before."""
    stock = models.build(family)
    ours = attached(stock)
    ids, mask = models.left_padded([100, 40])
    cache = tiered(ours)
    shape = cache.kv.spec.content
    expected = generate(stock, ids, mask, max_new_tokens=12)
    found = generate(ours, ids, mask, max_new_tokens=12, past_key_values=cache)
    assert torch.equal(expected.sequences, found.sequences)
    scale = logits_of(expected).abs().max()
    assert (logits_of(found) - logits_of(expected)).abs().max() <= 1e-4 * scale
    assert cache.kv.spec.content == shape
    assert None in cache.kv.spec.windows or not cache.kv.spec.windows
    assert_far(cache)


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_a_pass_is_as_long_as_the_decoders(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins before the first layer and ends behind the last: what fails in between is undone whole."""
    seen: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        method: Callable[..., None] = getattr(tandem.TieredCache, name)

        def note(*args: Any) -> None:
            seen.append(name)
            method(*args)

        return note

    for name in ("begin_pass", "end_pass"):
        monkeypatch.setattr(tandem.TieredCache, name, noted(name))
    ours = attached(models.build(family))
    with torch.no_grad():
        ours(models.random_ids(1, 20), past_key_values=tiered(ours))
    assert seen == ["begin_pass", "end_pass"]


MLA, ENCODER = "one latent for all heads", "an encoder and a decoder"
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3")
REFUSED = tandem.REFUSED | dict.fromkeys(LATENT, MLA) | dict.fromkeys(("bart", "t5"), ENCODER)


def asks_for_attention(model: Any) -> bool:
    """Whether a forward pass comes by the functions that transformers knows by name."""
    asked = []

    def spy(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        asked.append(module)
        return query.transpose(1, 2), None

    with mock.patch.dict(AttentionInterface._global_mapping, {"sdpa": spy}):
        ids = torch.ones(1, 4, dtype=torch.int64, device="meta")
        model(
            ids, attention_mask=torch.zeros(1, 1, 4, 4, device="meta"), use_cache=False
        )  # ready-made: not looked into
    return bool(asked)


def takes_the_common_cache(model: Any) -> bool:
    try:
        model(torch.ones(1, 4, dtype=torch.int64, device="meta"), past_key_values=DynamicCache(config=model.config))
    except ValueError as error:
        assert "uses cache of its own" in str(error)
        return False
    return True


def has(word: str) -> Callable[[Any], bool]:
    return lambda model: any(word in name for name, _ in model.named_modules())


OBSERVED: dict[str, Callable[[Any], bool]] = {
    MLA: has("kv_a_proj"),
    ENCODER: has("encoder"),
    "adds a bias of distance": lambda model: any("alibi" in name for name in vars(sys.modules[type(model).__module__])),
    "computes attention in code of its own": lambda model: not asks_for_attention(model),
    "attend to keys and values of another": lambda model: any(
        getattr(module, "is_kv_shared_layer", False) for module in model.modules()
    ),
    "different head widths": lambda model: {256, 512} <= {getattr(module, "head_dim", 0) for module in model.modules()},
    "and a linear state at once": lambda model: any(
        isinstance(layer, LinearAttentionAndFullAttentionLayer) for layer in DynamicCache(config=model.config).layers
    ),
    "a cache of a class of its own": lambda model: not takes_the_common_cache(model),
}
"""What a model does that a reason speaks of."""


def test_a_model_that_asks_for_attention_is_seen_to() -> None:
    with torch.device("meta"):
        model = models.llama()
    model.set_attn_implementation("sdpa")
    assert asks_for_attention(model)


def _refused_row(model_type: str, why: str) -> Any:
    title = {MLA: "MLA", ENCODER: "encoder and decoder"}.get(why, why)
    return pytest.param(model_type, why, marks=pytest.mark.refused(model_type, title), id=model_type)


@pytest.mark.parametrize(("model_type", "why"), [_refused_row(*row) for row in sorted(REFUSED.items())])
def test_family_is_refused_by_name(model_type: str, why: str) -> None:
    """Full size, without weights; the model stays as it was."""
    config = CONFIG_MAPPING[model_type]()
    head: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = head.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(
        UnsupportedError, match=re.escape(f"(model_type '{model_type}') is not supported: it ")
    ) as caught:
        tandem.attach(model)
    assert why in str(caught.value)
    assert type(model).__name__ in str(caught.value)
    assert model.config._attn_implementation == before
    assert "_tandem_before" not in vars(model)
    (observe,) = (observe for words, observe in OBSERVED.items() if words in str(caught.value))
    assert observe(model)
