"""Every supported family generates over a tiered cache what stock generates with eager attention."""

import pytest
import torch

import tandemkv.integrations.transformers as tandem
from tests import models
from tests.integrations.agreement import assert_far, attached, generate, logits_of, tiered


def test_every_supported_family_has_a_row() -> None:
    assert sorted(models.FAMILIES) == sorted(tandem.FAMILIES)


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
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
