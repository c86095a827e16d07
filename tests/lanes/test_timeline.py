"""Steps as rows: which span is shown where, and a trace that Perfetto can read."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandemkv.errors import InputError
from tandemkv.lanes.crew import Step
from tandemkv.lanes.tickets import Span
from tandemkv.lanes.timeline import Recorder, chrome_trace, row_of, tracks_of, write_trace
from tandemkv.schedule import Plan, Solution, predict
from tests.schedule.machines import plain_machine, plain_work

PLAN = Plan({"attend": 640, "stream": 640})
SOLUTION = Solution(PLAN, predict(plain_work(1280), plain_machine(), PLAN))
SPANS = [
    Span("device", "stream", 10.0, 10.001),
    Span("device", "near", 10.001, 10.003),
    Span("up", "stream", 10.001, 10.004),
    Span("up", "attend", 10.002, 10.0021),
    Span("up", "stream", 10.004, 10.007),
    Span("down", "attend", 10.0, 10.0001),
    Span("host", "attend", 10.0001, 10.0019),
    Span("device", "stream", 10.004, 10.0065),
]
STEP = Step(SOLUTION, SPANS, 9.999, 10.008)


def test_a_row_for_near_kernel_each_lane_and_each_link() -> None:
    assert [row_of(span) for span in SPANS] == [
        "stream on the device",
        "near kernel",
        "link up",
        "link up",
        "link up",
        "link down",
        "host",
        "stream on the device",
    ]


def test_what_overlaps_goes_to_another_track() -> None:
    tracks = tracks_of(SPANS)
    assert [span.begin for span in tracks["link up"]] == [10.001, 10.004]
    assert tracks["link up (2)"] == [SPANS[3]]


@given(st.lists(st.tuples(st.sampled_from(["up", "host"]), st.integers(0, 50), st.integers(0, 9)), max_size=30))
def test_no_track_has_spans_that_overlap_and_none_is_lost(drawn: list[tuple[str, int, int]]) -> None:
    spans = [Span(row, "stream", begin, begin + length) for row, begin, length in drawn]
    tracks = tracks_of(spans)
    assert sorted(span for track in tracks.values() for span in track) == sorted(spans)
    for track in tracks.values():
        ordered = sorted(track, key=lambda span: (span.begin, span.end))
        assert all(first.end <= second.begin for first, second in pairwise(ordered))


def test_the_trace_has_complete_events_of_named_threads() -> None:
    found = json.loads(json.dumps(chrome_trace([STEP, STEP])))
    named = [event for event in found["traceEvents"] if event["name"] == "thread_name"]
    rows = {event["tid"]: event["args"]["name"] for event in named}
    assert [rows[tid] for tid in sorted(rows)] == [
        "step",
        "near kernel",
        "stream on the device",
        "host",
        "link up",
        "link up (2)",
        "link down",
    ]
    events = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * (1 + len(SPANS))
    assert min(event["ts"] for event in events) == 0
    assert {event["pid"] for event in events} == {1}
    (step, _) = [event for event in events if rows[event["tid"]] == "step"]
    assert step["dur"] == pytest.approx(9000)
    assert step["args"]["plan"] == "attend 640, stream 640"
    near = next(event for event in events if rows[event["tid"]] == "near kernel")
    assert (near["ts"], near["dur"]) == (pytest.approx(2000), pytest.approx(2000))


def test_no_step_is_a_trace_too() -> None:
    assert [event["ph"] for event in chrome_trace([])["traceEvents"]] == ["M"]


def test_a_recorder_keeps_no_more_than_it_may() -> None:
    recorder = Recorder(2)
    for _ in range(2):
        recorder(STEP)
    assert recorder.told == "2 steps of layers"
    recorder(STEP)
    assert len(recorder.steps) == 2
    assert recorder.told == "the first 2 of 3 steps of layers"


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write_trace(tmp_path, [STEP])
