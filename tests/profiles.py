"""A profile of a made-up machine, stored where this one's would be: no test is to measure it for half a minute."""

from dataclasses import replace
from pathlib import Path

import pytest

from tandemkv import profiling
from tandemkv.schedule import Products
from tests.schedule.test_profile import ONE, PROFILE, TWO


def store_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends, everybody finds it there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    products = {64: Products(((16, 50.0), (256, 80.0)))}
    found = replace(
        PROFILE,
        measured_on=profiling.measured_on(),
        kernels={name: {1: ONE, 2: TWO} for name in profiling.FORMATS},
        products={"float32": products, "bfloat16": products},
    )
    found.save(profiling.stored_profile_path())
