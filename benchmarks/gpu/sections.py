"""The sections, in their order. A new one is a file and a line here."""

from collections.abc import Mapping

from benchmarks.gpu import ahead, counters, packed, prefetch, speed, sweep
from benchmarks.gpu.section import Section

SECTIONS: Mapping[str, Section] = {
    "speed": speed.SECTION,
    "paper": prefetch.SECTION,
    "ahead": ahead.SECTION,
    "packed": packed.SECTION,
    "sweep": sweep.SECTION,
    "counters": counters.SECTION,
}
