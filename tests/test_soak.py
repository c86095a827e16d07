"""Ten seconds of `make soak`, as a command; what it must notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.__main__ import MAX_GROWTH, Held, MemoryGrewError, assert_flat, clear
from tests.soak.operations import Garden


def test_ten_seconds_of_soak() -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.17", "--seed", "3", "--json"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["operations"] > 10
    assert report["tokens"] > 0
    assert report["far_bytes_moved"] > 0


@pytest.mark.parametrize("held", [[], [9], [9, 5], [9, 5, 5 + MAX_GROWTH], [9, 5, 3, 4]])
def test_memory_is_flat_or_not_looked_at_often_enough(held: list[int]) -> None:
    """Clearings are a tenth of the time apart: `--operations` may stop before the first of them."""
    assert_flat([Held(30.0 * (i + 1), num_bytes) for i, num_bytes in enumerate(held)])


def test_memory_that_grows_is_noticed_once_it_is_warm() -> None:
    assert_flat([Held(20, 0), Held(59, 6), Held(61, MAX_GROWTH), Held(80, 2 * MAX_GROWTH)])
    with pytest.raises(MemoryGrewError, match="grew by 8 MiB"):
        assert_flat([Held(61, 5), Held(70, 6 + MAX_GROWTH), Held(80, 5)])


def test_pages_that_outlive_their_family_are_noticed() -> None:
    """A view of them is enough, also where the tensor that it is a view of is gone."""
    garden = Garden(0)
    while not garden.arenas:
        garden.step()
    store = garden.sequences[0].cache.kv._store
    assert store is not None
    view = store.near.arena.parts[0].v[0]
    del store
    with pytest.raises(AssertionError, match="1 arenas are alive that no cache uses"):
        clear(garden)
    del view
    garden.check_arenas()
