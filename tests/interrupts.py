"""Ctrl-C at a chosen line of our own code: a trace counts the lines that run, and raises at one of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import transformers

import tandemkv

_ROOT = Path(tandemkv.__file__).parent
OURS = tuple(str(_ROOT / name) for name in ("cache", "integrations", "attention.py", "kernels", "lanes"))
"""Of these files every line is counted."""

STOCK_STATES = (str(Path(transformers.cache_utils.__file__)), str(Path(transformers.models.__file__).parent))
"""Where layers that stay stock are computed and kept."""

Place = tuple[str, int]
T = TypeVar("T")


@contextmanager
def interrupted(nth: int, where: tuple[str, ...] = OURS) -> Iterator[list[Place]]:
    """KeyboardInterrupt before the nth counted line, from 0; never for -1. Gives the places that were passed."""
    places: list[Place] = []

    def at_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            if len(places) == nth:
                raise KeyboardInterrupt
            places.append((frame.f_code.co_filename, frame.f_lineno))
        return at_line

    def at_call(frame: FrameType, *_: Any) -> Any:
        return at_line if frame.f_code.co_filename.startswith(where) else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield places
    finally:
        sys.settrace(before)


def every_line(make: Callable[[], T], act: Callable[[T], Any], which: str, where: tuple[str, ...] = OURS) -> list[int]:
    """The moments at which `act(make())` can be interrupted: of every line that it passes the first, last or both."""
    act(make())  # what is made once, such as threads, is made here
    made = make()
    with interrupted(-1, where) as places:
        act(made)
    first = {place: index for index, place in reversed(list(enumerate(places)))}
    last = {place: index for index, place in enumerate(places)}
    wanted = {"first": [first], "last": [last], "first and last": [first, last]}[which]
    return sorted({index for found in wanted for index in found.values()})
