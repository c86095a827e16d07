"""Measuring a machine, once; and a stored profile that is of no use."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tandemkv import machine, profiling
from tandemkv.errors import CapacityError, InputError, ProfileError, ProfileWarning
from tandemkv.schedule import Profile
from tests.schedule.test_profile import PROFILE
from tests.test_cli import run

CONSOLE = Console(quiet=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Profile]:
    """What was measured anew."""
    made: list[Profile] = []

    def measure(console: Console) -> Profile:
        made.append(replace(PROFILE, measured_on=profiling.measured_on()))
        return made[-1]

    monkeypatch.setattr(profiling, "measure", measure)
    return made


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return profiling.stored_profile_path()


def test_this_machine_is_measured_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really, but over less memory than by default."""
    monkeypatch.setattr(profiling, "_BUFFER_BYTES", 256 << 20)
    monkeypatch.setattr(profiling, "_ROUNDS", 3)
    found = profiling.measure(CONSOLE)
    assert found.measured_on == profiling.measured_on()
    assert set(found.kernels) == set(profiling.FORMATS)
    for by_threads in found.kernels.values():
        assert set(by_threads) == {1, machine.default_threads()}
        assert all(0.05 < each.attend.gbps < 5000 for each in by_threads.values())
    assert all(
        0.1 < rate < 1e5 for sizes in found.products.values() for each in sizes.values() for _, rate in each.points
    )
    assert 0.1 < found.memory_gbps < 5000
    assert 1 < found.tiers[0].latency_ns < 1e5
    assert 0 <= found.handoff_us < 1e4
    found.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == found


def test_it_is_measured_once(measured: list[Profile], stored: Path) -> None:
    first, second = (profiling.profile_of_this_machine(CONSOLE) for _ in range(2))
    assert first == second
    assert len(measured) == 1
    assert stored.exists()
    profiling.profile_of_this_machine(CONSOLE, again=True)
    assert len(measured) == 2


@pytest.mark.parametrize("changed", ["torch", "processor", "gpus"])
def test_it_is_measured_again_when_something_has_changed(measured: list[Profile], stored: Path, changed: str) -> None:
    here = profiling.measured_on()
    replace(PROFILE, measured_on={**here, changed: "another"}).save(stored)
    told = re.escape(f"measured on {changed} 'another', here {here[changed]!r}: measuring anew")
    with pytest.warns(ProfileWarning, match=told):
        profiling.profile_of_this_machine(CONSOLE)
    assert len(measured) == 1
    assert Profile.load(stored).measured_on == here


def test_a_damaged_file_is_measured_again(measured: list[Profile], stored: Path) -> None:
    stored.parent.mkdir()
    stored.write_text('{"format": 3, "checksum": "1", "profile": {}}')
    with pytest.warns(ProfileWarning, match=r"is damaged: its checksum does not fit its numbers: measuring anew"):
        profiling.profile_of_this_machine(CONSOLE)
    assert Profile.load(stored) == measured[0]


def test_a_file_that_was_asked_for_must_fit(measured: list[Profile], tmp_path: Path) -> None:
    """It was chosen: nothing is put in its place."""
    path = tmp_path / "mine.json"
    PROFILE.save(path)
    with pytest.raises(ProfileError, match=r"was measured on another machine: .*processor 'A', here"):
        profiling.profile_of_this_machine(CONSOLE, path)
    path.write_text("{")
    with pytest.raises(ProfileError, match="cannot be read"):
        profiling.profile_of_this_machine(CONSOLE, path)
    assert measured == []


def test_a_file_that_is_missing_is_made(measured: list[Profile], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    profiling.profile_of_this_machine(CONSOLE, path)
    assert Profile.load(path) == measured[0]
    with pytest.raises(InputError, match=r"--file .*/none/mine.json: there is no folder"):
        profiling.profile_of_this_machine(CONSOLE, tmp_path / "none" / "mine.json")
    assert len(measured) == 1


def test_what_cannot_be_kept_is_used(measured: list[Profile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder is a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(ProfileWarning, match="cannot be kept in .*: set XDG_CACHE_HOME to a folder"):
        assert profiling.profile_of_this_machine(CONSOLE) == measured[0]


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: machine.Available(512 << 20, "cgroup limit"))
    with pytest.raises(CapacityError, match=r"needs 4 x 256\.00 MiB of free memory, 512\.00 MiB are left"):
        profiling.measure(CONSOLE)


def test_the_command_prints_it(measured: list[Profile], stored: Path, capsys: Any) -> None:
    profiling.print_profile(profiling.profile_of_this_machine(CONSOLE), Console(width=200))
    told = capsys.readouterr().out
    for part in ("bfloat16", "19.0", "GFLOP/s", "110 ns a load", "pinned: no CUDA device", "30 us"):
        assert part in told


def test_json_is_one_object(stored: Path) -> None:
    replace(PROFILE, measured_on=profiling.measured_on()).save(stored)
    found = run("profile", "--json", XDG_CACHE_HOME=str(stored.parent.parent))
    assert json.loads(found.stdout.splitlines()[-1])["memory_gbps"] == 28.0, found.stderr
