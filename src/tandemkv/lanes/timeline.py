"""Steps as rows of time: near kernel, what the device does for each lane, host, each link; for people and for Perfetto.

A link's small messages go between the packets of large transfers, so that spans of a link overlap: what overlaps goes
to a second track of its row.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tandemkv.errors import InputError
from tandemkv.lanes.crew import Step
from tandemkv.lanes.tickets import Span
from tandemkv.schedule import COSTS

NEAR_ROW, HOST_ROW = "near kernel", "host"
_LINK_ROWS = {"up": "link up", "down": "link down"}
_PID = 1


class Recorder:
    """Keeps the first steps that it is told of; a crew's `on_step`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.steps: list[Step] = []
        self.num_steps = 0

    @property
    def told(self) -> str:
        """`"the first 4,096 of 9,000 steps of layers"`."""
        if len(self.steps) == self.num_steps:
            return f"{self.num_steps:,} steps of layers"
        return f"the first {len(self.steps):,} of {self.num_steps:,} steps of layers"

    def __call__(self, step: Step) -> None:
        """A step is over."""
        self.num_steps += 1
        if len(self.steps) < self.most:
            self.steps.append(step)


def row_of(span: Span) -> str:
    """The row that a span is shown in."""
    if span.row == "device":
        return NEAR_ROW if span.name == "near" else f"{span.name} on the device"
    return _LINK_ROWS.get(span.row, span.row)


def rows_of(lanes: Iterable[str]) -> list[str]:
    """All rows of steps with these lanes, from above."""
    known = [name for name in COSTS if name in lanes] + [name for name in lanes if name not in COSTS]
    return [NEAR_ROW, *(f"{name} on the device" for name in known), HOST_ROW, *_LINK_ROWS.values()]


def lanes_of(steps: Sequence[Step]) -> list[str]:
    """Whom spans are named for, beside near tokens."""
    return list(dict.fromkeys(span.name for step in steps for span in step.spans if span.name != "near"))


def tracks_of(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Spans by track, in which none overlap: a row, "row (2)" for what overlaps there, and so on. The longest come
    first, so that a link's large transfers share a track."""
    tracks: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.begin - span.end):
        row, num = row_of(span), 1
        while any(span.begin < other.end and other.begin < span.end for other in tracks[_track(row, num)]):
            num += 1
        tracks[_track(row, num)].append(span)
    return dict(tracks)


def _track(row: str, num: int) -> str:
    return row if num == 1 else f"{row} ({num})"


def chrome_trace(steps: Sequence[Step]) -> dict[str, Any]:
    """What chrome://tracing and ui.perfetto.dev open: an event for each span, a thread for each track, in us."""
    origin = min((moment for step in steps for moment in (step.begin, *(span.begin for span in step.spans))), default=0)

    def event(name: str, track: str, begin: float, end: float, args: Mapping[str, Any]) -> dict[str, Any]:
        first, last = (round((moment - origin) * 1e9) for moment in (begin, end))  # so that neighbours do not overlap
        return {"name": name, "ph": "X", "ts": first / 1e3, "dur": (last - first) / 1e3, "track": track, "args": args}

    events = []
    for i, step in enumerate(steps):
        plan, predicted_ms = step.solution.plan, 1e3 * step.solution.prediction.seconds
        args = {"plan": plan.summary, "stage_tokens": plan.stage_tokens, "predicted_ms": round(predicted_ms, 4)}
        events.append(event(f"step {i}", "step", step.begin, step.end, args))
        for track, spans in tracks_of(step.spans).items():
            events += [event(span.name, track, span.begin, span.end, {}) for span in spans]
    tracks = _ordered({each["track"] for each in events}, rows_of(lanes_of(steps)))
    for each in events:
        each.update(pid=_PID, tid=tracks.index(each.pop("track")))
    named = [_named("thread_name", tid, name=track) for tid, track in enumerate(tracks)]
    sorted_ = [_named("thread_sort_index", tid, sort_index=tid) for tid in range(len(tracks))]
    first = _named("process_name", 0, name="tandemkv")
    return {"displayTimeUnit": "ms", "traceEvents": [first, *named, *sorted_, *sorted(events, key=_when)]}


def write_trace(path: Path, steps: Sequence[Step]) -> None:
    """`chrome_trace` in a file; InputError where it cannot be written."""
    try:
        path.write_text(json.dumps(chrome_trace(steps)))
    except OSError as error:
        raise InputError(f"the trace {path} cannot be written: {error.strerror}") from error


def _ordered(tracks: set[str], rows: Sequence[str]) -> list[str]:
    """Steps first, then rows from above, each with its further tracks below it."""
    known = ["step", *rows]
    return sorted(tracks, key=lambda track: (known.index(track.partition(" (")[0]), track))


def _named(what: str, tid: int, **args: Any) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _PID, "tid": tid, "args": args}


def _when(event: Mapping[str, Any]) -> float:
    return float(event["ts"])
