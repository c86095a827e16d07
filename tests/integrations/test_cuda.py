"""A model on a GPU: near pages there, far attention on the CPU. Needs a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tandemkv import kernels
from tandemkv.attention import extend_and_attend
from tandemkv.cache import CacheSpec, KVCache
from tandemkv.errors import InputError
from tandemkv.kernels import devices, gpu, reference
from tandemkv.lanes import DeviceFlags, pull_into_l2
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule
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
    assert devices.backend_of(cache.kv.spec.device).name == "triton"
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


def pages(num_seqs: int, num_pages: int) -> tuple[torch.Tensor, PagedKV]:
    """Queries, and rows of 8 heads of 128 in bfloat16 that they attend to."""
    generator = torch.Generator().manual_seed(2)
    arena = Arena.allocate(PageLayout(torch.bfloat16), num_seqs * num_pages, 8, 128)
    for x in (arena.k, arena.v):
        x.copy_(torch.randn(x.shape, generator=generator))
    table = torch.randperm(num_seqs * num_pages, generator=generator).int().view(num_seqs, 1, num_pages)
    kv = PagedKV(
        arena, table.expand(-1, 8, -1), torch.zeros(num_seqs).long(), torch.full((num_seqs,), 64 * num_pages - 9)
    )
    return torch.randn(num_seqs, 32, 1, 128, generator=generator).bfloat16(), kv


def on(kv: PagedKV, device: str) -> PagedKV:
    arena = kv.arena
    assert isinstance(arena, Arena)
    return replace(kv, arena=replace(arena, k=arena.k.to(device), v=arena.v.to(device)))


@pytest.mark.parametrize("distance", [1, 3])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_what_is_asked_for_ahead_changes_no_bit(num_splits: int, distance: int) -> None:
    q, kv = pages(3, 12)
    there, rule = on(kv, "cuda"), ScoreRule(128**-0.5)
    plain, ahead = (
        gpu.attend(q.cuda(), there, rule=rule, config=gpu.Config(num_splits=num_splits, distance=n, guarded=False))
        for n in (0, distance)
    )
    assert torch.equal(plain.out, ahead.out)
    assert torch.equal(plain.lse, ahead.lse)
    truth = reference.attend(q, kv, rule=rule, causal=False)
    assert (ahead.out.cpu() - truth.out).abs().max() < 1e-3
    assert (ahead.lse.cpu() - truth.lse).abs().max() < 1e-3


def test_pages_that_are_pulled_stay_what_they_are() -> None:
    q, kv = pages(2, 40)
    there, rule = on(kv, "cuda"), ScoreRule(128**-0.5)
    expected = kernels.attend(q.cuda(), there, rule=rule)
    for share in (0.1, 1.0):
        assert pull_into_l2(q.cuda(), there, rule, share) > 0
        assert torch.equal(kernels.attend(q.cuda(), there, rule=rule).out, expected.out)


def test_near_pages_are_pulled_while_a_model_generates() -> None:
    ours = attached(models.llama(hidden_size=128, num_attention_heads=4, num_key_value_heads=2).bfloat16().cuda())
    ids, found = models.random_ids(2, 120).cuda(), []
    for share in (0.0, 0.5):
        cache: Any = tiered(ours)
        cache.kv.l2_share = share
        found.append(generate(ours, ids, torch.ones_like(ids), past_key_values=cache).sequences)
    assert torch.equal(*found)


def test_nan_comes_without_waiting() -> None:
    flags, device = DeviceFlags(), torch.device("cuda", torch.cuda.current_device())
    q, kv = pages(1, 2)
    devices.attend(q.cuda() * torch.nan, on(kv, "cuda"), rule=ScoreRule(1.0), flags=flags.bits(device))
    torch.cuda._sleep(500_000_000)  # about a quarter of a second
    flags.send(7)
    flags.look()  # the device sleeps: nothing has come
    with pytest.raises(InputError, match=r"q contains NaN.*tokens from 7 on"):
        flags.wait()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one() -> None:
    q, kv = pages(2, 5)
    part = kernels.attend(q.to("cuda:1"), on(kv, "cuda:1"), rule=ScoreRule(0.1))
    truth = reference.attend(q, kv, rule=ScoreRule(0.1), causal=False)
    assert (part.lse.cpu() - truth.lse).abs().max() < 1e-3


def test_nan_in_a_prompt_is_told_by_the_next_step() -> None:
    """torch's flash kernel gives it an lse of +inf."""
    spec = CacheSpec(1, 2, 64, torch.bfloat16, 128, 1 << 20, device=torch.device("cuda", 0))
    cache = KVCache(spec)
    q, k, v = (torch.randn(1, heads, 32, 64, device="cuda").bfloat16() for heads in (4, 2, 2))
    q[0, 1, 7, 3] = torch.nan
    cache.begin_step(1, 32)
    extend_and_attend(q, k, v, cache.layer(0), ScoreRule(0.125))
    cache.end_step()
    with pytest.raises(InputError, match=r"q contains NaN.*tokens from 0 on"):
        cache.fork()
