"""A rig for tests of lanes: fast links, one for all tests of a file."""

from collections.abc import Iterator

import pytest

from tandemkv import machine
from tandemkv.lanes import Rig
from tandemkv.schedule import Speed

FAST = Speed(10, 20)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    if machine.usable_cpus() < 2:
        pytest.skip("a device and a host need two processors, there is one")
    made = Rig(FAST, FAST)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def links_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "rig" in request.fixturenames:
        rig = request.getfixturevalue("rig")
        rig.up.speed = rig.down.speed = FAST
        rig.clear()
        rig.host.settle()
        rig.trace.take()
