"""Who works for a system: links and plans as users write them, work as a cache's shape says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandemkv import machine
from tandemkv.cache import CacheSpec, KVCache, parse_far_dtype
from tandemkv.crews import crew_for, links_of, machine_for, parse_link, placement_for, read_plan, work_for
from tandemkv.errors import InputError
from tandemkv.lanes.crew import work_of
from tandemkv.schedule import Plan, Speed
from tandemkv.systems import SYSTEMS
from tests.schedule.machines import plain_machine, plain_work
from tests.schedule.test_profile import ONE, PROFILE, TWO

SPEC = CacheSpec(4, 2, 64, torch.bfloat16, near_tokens=256, far_bytes=1 << 24, v_head_dim=32, hidden_size=512)


@pytest.mark.parametrize(
    ("text", "speed"),
    [("16", Speed(0, 16)), ("0.5", Speed(0, 0.5)), (" 8 : 20 ", Speed(20, 8)), ("8:1.5", Speed(1.5, 8))],
)
def test_links_as_they_are_written(text: str, speed: Speed) -> None:
    assert parse_link(text) == speed
    assert links_of(PROFILE, text) == (speed, speed)


@pytest.mark.parametrize("text", ["", "fast", "0", "0:5", "-3", "8:", "8:-1", "8 GB/s", "inf", "nan", "1e3", "٣"])
def test_links_that_cannot_be(text: str) -> None:
    with pytest.raises(InputError, match=r"expected a link \(--link\) as GB/s above 0, or GB/s:us, .*, got '"):
        parse_link(text)


def test_links_are_as_memory_is_copied_where_none_is_given() -> None:
    assert links_of(PROFILE, None) == (PROFILE.transfers.up, PROFILE.transfers.down)


def test_speeds_are_those_of_the_format_that_most_far_tokens_have() -> None:
    links = Speed(0, 8), Speed(0, 9)
    plain = machine_for(PROFILE, SPEC, links)
    assert (plain.host_attend, plain.up, plain.down) == (ONE.attend, *links)
    coded = machine_for(PROFILE, replace(SPEC, far_formats=parse_far_dtype("model:64,int8")), links)
    assert coded.host_attend == TWO.attend


def test_work_is_what_a_step_finds() -> None:
    """What is known before there is a cache equals what is known of its pages."""
    work = work_for(SPEC, 8, 2, 1000)
    cache = KVCache(SPEC)
    cache.begin_step(2, 1000)
    for index in range(SPEC.num_layers):
        layer = cache.layer(index)
        for begin in range(0, 1000, 512):
            num = min(512, 1000 - begin)
            layer.evict()
            layer.append(torch.zeros(2, 2, num, 64).bfloat16(), torch.zeros(2, 2, num, 32).bfloat16())
    cache.end_step()
    layer = cache.layer(0)
    layer.evict()
    with layer.hold() as held:
        found = work_of(torch.zeros(2, 8, 1, 64).bfloat16(), held.near, held.far)
    assert replace(found, hidden=512, near_tokens=work.near_tokens) == work
    assert (work.far_tokens, work.near_tokens) == (768, 256)


def test_a_frozen_plan_says_whose_inputs_are_kept() -> None:
    work = plain_work(1024, near_tokens=256)
    placed = placement_for(SYSTEMS["kvpr"], work, plain_machine(), Plan({"recompute": 64, "stream": 192}))
    assert (placed.num_inputs, placed.where, placed.near_tokens) == (256, "far", 256)
    assert placed.solution.plan.tokens == {"recompute": 256, "stream": 768}


def test_a_crew_has_the_lanes_of_its_system() -> None:
    if machine.usable_cpus() < 2:
        pytest.skip("a device and a host need two processors, there is one")
    crew = crew_for(SYSTEMS["kvpr"], plain_machine(up_gbps=3))
    try:
        assert crew.scheduler.lanes == ("recompute", "stream")
        assert crew.rig.up.speed == Speed(0, 3)
    finally:
        crew.close()


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"tokens": {"attend": 300, "stream": 100}, "stage_tokens": 128}')
    assert read_plan(path, SYSTEMS["tandem"]) == Plan({"attend": 300, "stream": 100}, 128)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "expected a plan such as .*, got no JSON"),
        ("[]", r"expected a plan such as .*, got '\[\]'"),
        ('{"tokens": {}}', "expected a plan such as"),
        ('{"tokens": {"attend": 0}}', "whole numbers above 0"),
        ('{"tokens": {"attend": 1.5}}', "whole numbers above 0"),
        ('{"tokens": {"attend": 64}, "stage": 3}', "whole numbers above 0"),
        ('{"tokens": {"attend": 64}, "stage_tokens": true}', "whole numbers above 0"),
        ('{"tokens": {"teleport": 64}}', "uses the lanes teleport, this system has recompute, attend, logits, stream"),
        ("\udcff", "cannot be read"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=told):
        read_plan(path, SYSTEMS["tandem"])


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_plan(tmp_path / "none.json", SYSTEMS["tandem"])
