"""Models on a rig: generation with every lane is what it is without, whatever the system."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tandemkv import machine
from tandemkv.errors import InputError, LaneError, LaneWarning
from tandemkv.lanes import LANES, Crew, Rig, Task
from tandemkv.schedule import Plan, Scheduler, Speed
from tandemkv.types import PagedKV
from tests import models
from tests.integrations.agreement import assert_agrees, attached, generate, tiered
from tests.schedule.machines import plain_machine

# Of soft caps, sinks, sliding layers, fused weights, learned positions one each; what K and V are rebuilt
# from is tested for every family (test_adapter.py).
FAMILIES = ("llama", "gemma2", "gpt_oss", "phi3", "opt", "qwen3", "gpt2", "olmo2", "gpt_neox")
SHARES = {"recompute": 64, "attend": 64, "logits": 64, "stream": 64}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    if machine.usable_cpus() < 2:
        pytest.skip("a device and a host need two processors, there is one")
    made = Rig(Speed(5, 20), Speed(5, 20))
    yield made
    made.close()


def crew_of(rig: Rig, shares: dict[str, int]) -> Crew:
    return Crew(rig, Scheduler(plain_machine(), tuple(shares), Plan(shares, 64, 32)))


@pytest.mark.filterwarnings("ignore")  # of stock, about configs
@pytest.mark.parametrize("family", FAMILIES)
def test_all_lanes_together_agree_with_stock(rig: Rig, family: str) -> None:
    """Soft caps, sinks, sliding layers, fused weights, learned positions; a padded batch."""
    stock = models.build(family)
    model = attached(stock)
    cache = tiered(model)
    cache.keep_inputs(48, "far")
    cache.kv.crew = crew_of(rig, SHARES)
    ids, mask = models.left_padded([200, 170])
    expected = generate(stock, ids, mask)
    assert_agrees(stock, expected, generate(model, ids, mask, past_key_values=cache), mask)
    cache.check()
    assert cache.kv.layer(cache.kv.full_layers[-1]).far_tokens > 128
    assert cache.kv.crew.plan is not None
    assert set(cache.kv.crew.plan.tokens) == set(SHARES)


@pytest.mark.parametrize("lane", list(LANES))
def test_one_lane_alone(rig: Rig, lane: str) -> None:
    stock = models.build("llama")
    model = attached(stock)
    cache = tiered(model, near_tokens=128)
    cache.keep_inputs(256 if lane == "recompute" else 0)
    cache.kv.crew = crew_of(rig, {lane: 64})
    ids = models.random_ids(1, 300)
    assert_agrees(stock, generate(stock, ids), generate(model, ids, past_key_values=cache))


def test_in_inference_mode_and_as_beams(rig: Rig) -> None:
    """Tensors of inference mode count no versions; beams change places among pages."""
    stock = models.build("llama")
    model = attached(stock)
    cache = tiered(model)
    cache.kv.crew = crew_of(rig, {"attend": 64, "stream": 64})
    ids = models.random_ids(2, 150)
    with torch.inference_mode():
        found = generate(model, ids, past_key_values=cache, num_beams=3)
    assert torch.equal(found.sequences, generate(stock, ids, num_beams=3).sequences)


@torch.no_grad()
def test_a_fork_takes_its_crew_along(rig: Rig) -> None:
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.kv.crew = crew = crew_of(rig, {"attend": 64})
    model(models.random_ids(1, 100), past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert twin.kv.crew is crew
    cache.kv.crew = None
    assert twin.kv.layer(0).crew is crew
    assert cache.kv.layer(0).crew is None


@torch.no_grad()
def test_a_failed_step_is_undone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane that raises an error of ours, and none that is left: the new tokens do not count."""
    model = attached(models.build("llama"))
    cache = tiered(model)
    cache.kv.crew = crew_of(rig, {"attend": 64})
    ids = models.random_ids(1, 120)
    model(ids[:, :100], past_key_values=cache)

    def dead(task: Task, share: PagedKV) -> Any:
        raise OSError("gone")
        yield

    with monkeypatch.context() as patch:
        patch.setitem(LANES, "attend", dead)
        with pytest.warns(LaneWarning, match="gone"), pytest.raises(LaneError, match="the last lane"):
            model(ids[:, 100:101], past_key_values=cache)
    assert cache.get_seq_length() == 100
    cache.check()
    cache.kv.crew = crew_of(rig, {"attend": 64})
    model(ids[:, 100:101], past_key_values=cache)
    assert cache.get_seq_length() == 101


def test_what_is_no_crew_is_refused() -> None:
    cache = tiered(attached(models.build("llama")))
    with pytest.raises(InputError, match=r"crew is a Crew\(rig, scheduler\) or None, got str"):
        cache.kv.crew = "everybody"  # type: ignore[assignment]
