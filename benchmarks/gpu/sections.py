"""The sections, in their order. A new one is a file and a line here."""

from collections.abc import Mapping

from benchmarks.gpu import counters, prefetch, speed, sweep
from benchmarks.gpu.section import Section

SECTIONS: Mapping[str, Section] = {
    "speed": speed.SECTION,
    "paper": prefetch.SECTION,
    "sweep": sweep.SECTION,
    "counters": counters.SECTION,
}
