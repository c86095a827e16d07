"""A model on a GPU: near pages there, far attention on the CPU. Needs a GPU."""

from typing import Any

import pytest
import torch

from tests import models
from tests.integrations.agreement import assert_far, attached, generate, logits_of, tiered

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_generate_on_cuda(family: str) -> None:
    """A left-padded batch in float32, against eager on the same device."""
    stock = models.build(family).cuda()
    ours = attached(stock)
    cache: Any = tiered(ours)
    ids, mask = (x.cuda() for x in models.left_padded([120, 3, 61]))
    expected, found = generate(stock, ids, mask), generate(ours, ids, mask, past_key_values=cache)
    assert cache.kv.spec.device.type == "cuda"
    assert torch.equal(expected.sequences, found.sequences)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=2e-3, rtol=0)
    assert_far(cache)


def test_bf16_on_cuda() -> None:
    """Flash attention with lse; closeness to eager in bf16."""
    stock = models.llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=2).bfloat16().cuda()
    ours = attached(stock)
    cache, ids = tiered(ours), models.random_ids(2, 120).cuda()
    with torch.no_grad():
        expected = stock(ids).logits[:, -1].float()
        ours(ids[:, :119], past_key_values=cache)
        found = ours(ids[:, 119:], past_key_values=cache).logits[:, -1].float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert_far(cache)


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen3_next"])
def test_rebuilt_on_cuda(family: str, where: Any) -> None:
    """Keys and values made again, of inputs on the device or in pinned host memory; beams have changed places."""
    ours = attached(models.build(family).cuda())
    cache: Any = tiered(ours)
    cache.keep_inputs(70, where)
    ids, mask = (x.cuda() for x in models.left_padded([60, 41]))
    generate(ours, ids, mask, past_key_values=cache, num_beams=3)
    for index in cache.kv.full_layers:
        layer = cache.kv.layer(index)
        assert layer.num_inputs == 70
        x = layer.inputs.x(index, 0, 70)
        assert (x.device.type == "cuda") == (where == "near")
        for found in (layer.rebuild(0, 70), layer.rebuild(0, 70, x.cuda())):
            for new, old in zip(found, layer.read(0, 70), strict=True):
                torch.testing.assert_close(new, old, atol=2e-3, rtol=0)
