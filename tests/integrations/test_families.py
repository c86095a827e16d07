"""Every supported family generates over a tiered cache what stock generates with eager attention."""

import re
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

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


MLA, ENCODER = "one latent for all heads", "an encoder and a decoder"
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash", "minicpm3")
REFUSED = tandem.REFUSED | dict.fromkeys(LATENT, MLA) | dict.fromkeys(("bart", "t5"), ENCODER)


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
