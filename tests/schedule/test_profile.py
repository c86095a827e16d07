"""A profile survives its file, and is refused where it is damaged or of another machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tandemkv.errors import InputError, ProfileError
from tandemkv.schedule import Kernels, Products, Profile, Speed, Tier, Transfers

ONE, TWO = (Kernels(Speed(10, rate), Speed(11, rate), Speed(12, rate)) for rate in (10.0, 19.0))
PROFILE = Profile(
    measured_on={"processor": "A", "torch": "2.13.0"},
    date="2026-11-23",
    kernels={"bfloat16": {1: ONE, 2: TWO}, "int8": {1: TWO, 2: TWO}, "float32": {1: ONE}},
    products={"bfloat16": {1024: Products(((16, 50.0), (256, 80.0))), 4096: Products(((16, 40.0),))}},
    memory_gbps=28.0,
    tiers=(Tier("dram", 28.0, 6.0, 110.0),),
    transfers=Transfers(Speed(1, 6), Speed(1, 5), None, None),
    handoff_us=30.0,
)


def test_it_is_what_it_was_when_it_is_read(tmp_path: Path) -> None:
    pinned = replace(PROFILE, transfers=Transfers(Speed(1, 6), Speed(1, 5), Speed(2, 25), Speed(2, 26)))
    for profile in (PROFILE, pinned):
        path = tmp_path / "new" / "profile.json"
        profile.save(path)
        assert Profile.load(path) == profile
        assert [each.name for each in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize("damage", ["digit", "cut", "empty", "checksum", "other", "no profile"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    text = path.read_text()
    changed = {
        "digit": text.replace("28.0", "82.0", 1),
        "cut": text[: len(text) // 2],
        "empty": "",
        "checksum": json.dumps({**json.loads(text), "checksum": "0"}),
        "other": json.dumps({**json.loads(text), "format": 2}),
        "no profile": "[1, 2]",
    }
    path.write_text(changed[damage])
    with pytest.raises(ProfileError, match=r"profile.*measure again with `tandemkv profile --again`"):
        Profile.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        Profile.load(tmp_path / "none.json")


def test_what_has_changed_is_named() -> None:
    assert PROFILE.differs_from({"processor": "A", "torch": "2.13.0"}) == ""
    told = PROFILE.differs_from({"processor": "B", "torch": "2.13.0", "gpus": "none"})
    assert told == "gpus 'unknown', here 'none'; processor 'A', here 'B'"


def test_the_device_is_one_thread_and_the_host_the_others() -> None:
    links = Speed(5, 12), Speed(6, 13)
    found = PROFILE.machine("bfloat16", 1100, links)
    assert (found.device_attend, found.host_attend) == (ONE.attend, ONE.attend)
    assert (found.up, found.down, found.handoff_us, found.memory_gbps) == (*links, 30.0, 28.0)
    assert found.products.gflops(256) == 80
    assert PROFILE.machine("bfloat16", 8192, links).products.gflops(256) == 40
    coded = PROFILE.machine("bfloat16", 1024, links, "int8")
    assert (coded.host_attend, coded.device_attend) == (TWO.attend, ONE.attend)


def test_products_lie_between_what_was_measured() -> None:
    products = Products(((16, 50.0), (256, 80.0)))
    assert [products.gflops(num) for num in (1, 16, 64, 256, 9999)] == pytest.approx([50, 50, 65, 80, 80])
    assert products.seconds(256, 1e6) == pytest.approx(256e6 / 80e9)
    assert products.seconds(0, 1e6) == 0


@pytest.mark.parametrize("points", [(), ((16, 50.0), (16, 60.0)), ((0, 1.0),), ((16, 0.0),), ((64, 1.0), (16, 2.0))])
def test_products_that_cannot_be(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(InputError, match="ascending tokens"):
        Products(points)


@pytest.mark.parametrize(("start_us", "gbps"), [(-1, 1), (0, 0), (0, -1), (float("nan"), 1), (0, float("nan"))])
def test_speeds_that_cannot_be(start_us: float, gbps: float) -> None:
    with pytest.raises(InputError, match=r"above 0 GB/s"):
        Speed(start_us, gbps)
