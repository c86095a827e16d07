"""`tandemkv explain`: it says what was predicted and what was measured, and both change with what they come from."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from tandemkv import machine, profiling
from tandemkv.explain import measure
from tandemkv.explain.shapes import Group, Told, parse_heads, shape_of
from tandemkv.lanes.crew import Step
from tandemkv.lanes.tickets import Span
from tandemkv.schedule import COSTS, Machine, Plan, Solution, Work, predict
from tandemkv.schedule.costs import Cost
from tests.command import Done, run_command
from tests.schedule.machines import plain_machine, plain_work
from tests.schedule.test_profile import PROFILE

SMALL = [
    *("--heads", "8:2", "--head-dim", "64", "--layers", "4"),
    *("--context", "4096", "--near-tokens", "512", "--link", "2", "--steps", "5"),
]
"""56 far pages of 32 KiB."""

SPLITTING = "hgca, flexgen, moe-lightning, kvpr, headinfer, tandem"
FAR_BYTES = (4096 - 512) * 2 * 2 * 64 * 2

needs_two = pytest.mark.skipif(machine.usable_cpus() < 2, reason="a device and a host need two processors")


Run = Callable[..., Done]


def group_of(done: Done) -> dict[str, Any]:
    """The first."""
    assert done.code == 0, done.err
    found: dict[str, Any] = done.report["groups"][0]
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`tandemkv explain args` in this process, with a made-up profile of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(machine, "set_passive_spin", lambda: True)
    monkeypatch.setattr(measure, "COLD_BYTES", 4 << 20)
    replace(PROFILE, measured_on=profiling.measured_on()).save(profiling.stored_profile_path())

    def call(*args: object) -> Done:
        return run_command(monkeypatch, capsys, "explain", *args)

    return call


def plan_file(folder: Path, **tokens: int) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps({"tokens": tokens, "stage_tokens": 256}))
    return path


# -- predicted ---------------------------------------------------------------------------------------------------------


def test_without_a_run_nothing_is_measured(run: Run) -> None:
    done = run(*SMALL, "--no-run", "--json")
    group = group_of(done)
    assert (group["measured"], group["corrected"], group["ratio"]) == (None, None, None)
    assert group["layers"] == [0, 1, 2, 3]
    assert group["plan"]["shares"] == pytest.approx({k: v / 3584 for k, v in group["plan"]["tokens"].items()})
    assert sum(group["plan"]["tokens"].values()) == group["far_tokens"] == 3584
    predicted = group["predicted"]
    assert predicted["seconds"] == max(predicted["needed"].values()) == predicted["needed"][predicted["binds"]]
    assert done.report["links"] == {"up": {"gbps": 2.0, "start_us": 0.0}, "down": {"gbps": 2.0, "start_us": 0.0}}
    assert "measured" in done.err  # the column; beside --json the tables go to stderr
    assert group["reasons"][0].split()[0] in done.err


def test_a_changed_cost_function_moves_plan_and_explanation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is ten times as slow at attending: what it has goes to others, and the words say so."""
    args = (*SMALL, "--context", 32768, "--no-run", "--json")
    before, original = group_of(run(*args)), COSTS["attend"]

    def slower(work: Work, machine: Machine, plan: Plan, num_tokens: float) -> Cost:
        cost = original(work, machine, plan, num_tokens)
        return cost._replace(busy={**cost.busy, "host": 10 * cost.busy["host"]})

    monkeypatch.setitem(COSTS, "attend", slower)
    after = group_of(run(*args))
    assert after["plan"]["tokens"].get("attend", 0) < before["plan"]["tokens"]["attend"] / 2
    assert after["alone"]["attend"]["seconds"] > 5 * before["alone"]["attend"]["seconds"]
    assert after["predicted"]["seconds"] > before["predicted"]["seconds"]
    assert after["reasons"] != before["reasons"]
    alone = f"attend {1e3 * after['alone']['attend']['seconds']:.3g} ms (the host would bind)"
    assert any(alone in sentence for sentence in after["reasons"])


def test_a_given_plan_is_explained(run: Run, tmp_path: Path) -> None:
    """All four lanes: layer inputs are kept for what is to be rebuilt."""
    plan = plan_file(tmp_path, recompute=512, attend=1024, logits=1024, stream=1024)
    group = group_of(run(*SMALL, "--plan", plan, "--no-run", "--json"))
    assert group["plan"]["tokens"] == {"recompute": 512, "attend": 1024, "logits": 1024, "stream": 1024}
    assert group["inputs"] == {"num_tokens": 512, "where": "far"}
    assert any(sentence.startswith("The solver would choose ") for sentence in group["reasons"])


def test_other_formats_of_far_tokens(run: Run) -> None:
    stream = [
        group_of(run(*SMALL, "--system", "flexgen", "--far-dtype", name, "--no-run", "--json"))["predicted"]["at_work"][
            "up"
        ]
        for name in ("model", "int8")
    ]
    assert 0.5 < stream[1] / stream[0] < 0.56


# -- measured ----------------------------------------------------------------------------------------------------------


@needs_two
def test_steps_run_and_are_measured(run: Run) -> None:
    done = run(*SMALL, "--json")
    group = group_of(done)
    measured = group["measured"]
    assert measured["num_steps"] == 5
    assert measured["middle_half"][0] <= measured["seconds"] <= measured["middle_half"][1]
    assert 0 < measured["at_work"][measured["busiest"]] <= measured["seconds"]
    assert measured["at_work"]["memory"] is None
    assert group["ratio"] == pytest.approx(measured["seconds"] / group["predicted"]["seconds"])
    assert set(group["alone"]) == {"recompute", "attend", "logits", "stream"}
    assert f"{group['ratio_to_corrected']:.2f} times that" in done.err or not group["factors"]


@needs_two
def test_what_the_link_carries_takes_what_its_speed_says(run: Run) -> None:
    group = group_of(run(*SMALL, "--system", "flexgen", "--json"))
    assert group["measured"]["at_work"]["up"] == pytest.approx(FAR_BYTES / 2e9, rel=1e-6)
    assert group["predicted"]["at_work"]["up"] == pytest.approx(FAR_BYTES / 2e9, rel=1e-6)
    assert group["measured"]["seconds"] >= FAR_BYTES / 2e9


@needs_two
@pytest.mark.parametrize(("memory_gbps", "num_doubts"), [(0.01, 1), (1000.0, 0)])
def test_a_memory_that_is_faster_than_profiled_is_told(run: Run, memory_gbps: float, num_doubts: int) -> None:
    """Feedback corrects what lanes clock; nobody clocks memory."""
    made = replace(PROFILE, measured_on=profiling.measured_on(), memory_gbps=memory_gbps)
    made.save(profiling.stored_profile_path())
    group = group_of(run(*SMALL, "--json"))
    assert len(group["doubts"]) == num_doubts
    assert (group["predicted"]["binds"] == "memory") == bool(num_doubts)


@needs_two
def test_a_picture_and_a_trace_of_all_lanes(run: Run, tmp_path: Path) -> None:
    plan = plan_file(tmp_path, recompute=512, attend=1024, logits=1024, stream=1024)
    picture, trace = tmp_path / "step.png", tmp_path / "run.json"
    done = run(*SMALL, "--plan", plan, "--gantt", picture, "--trace", trace)
    assert done.code == 0, done.err
    assert f"gantt: {picture}" in done.out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    lanes = {f"{lane} on the device" for lane in COSTS}
    assert {"step", "near kernel", "host", "link up", "link down", *lanes} <= set(rows.values())
    complete = [event for event in events if event["ph"] == "X"]
    assert sum(rows[event["tid"]] == "step" for event in complete) == 5
    for tid, row in rows.items():
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in complete if event["tid"] == tid)
        assert all(first[1] <= second[0] + 1e-3 for first, second in pairwise(spans)), row


@needs_two
def test_layers_with_a_window_have_a_plan_of_their_own(run: Run, tmp_path: Path) -> None:
    """A model's config.json is enough."""
    Gemma2Config(
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        hidden_size=256,
        sliding_window=1024,
        dtype=torch.bfloat16,
    ).save_pretrained(tmp_path / "gemma")
    args = (
        tmp_path / "gemma",
        "--context",
        4096,
        "--near-tokens",
        512,
        "--link",
        2,
        "--steps",
        5,
        "--system",
        "tandem",
    )
    report = run(*args, "--json").report
    assert report["model"] == "gemma"
    full, windowed = report["groups"]
    assert (full["layers"], full["window"], full["far_tokens"]) == ([1, 3], None, 3584)
    assert (windowed["layers"], windowed["window"], windowed["near_tokens"]) == ([0, 2, 4], 1024, 1024)
    assert windowed["plan"]["tokens"] == {}
    assert windowed["measured"]["busy"].keys() == {"near"}
    assert windowed["reasons"] == ["Nothing is far: the device attends to 1,024 near tokens."]
    assert "layers 0, 2, 4: a sliding window of 1,024: near only" in run(*args).out


def step(plan: Plan, seconds: float, *spans: Span) -> Step:
    return Step(Solution(plan, predict(plain_work(640), plain_machine(), plan)), list(spans), 0.0, seconds)


def test_medians_and_what_overlaps_on_a_link() -> None:
    plan = Plan({"attend": 640})
    near = [Span("device", "near", 0.0, seconds) for seconds in (1.0, 2.0, 9.0)]
    links = [Span("up", "stream", 0.0, 2.0), Span("up", "attend", 1.0, 1.5), Span("up", "stream", 2.0, 2.5)]
    steps = [step(plan, 10.0, near[2]), step(plan, 3.0, near[0], *links), step(plan, 4.0, near[1], *links)]
    found = measure.measured_of(steps, plain_machine())
    assert found.seconds == 4.0
    assert found.median_step is steps[2]
    assert found.resources == {"device": 2.0, "up": 2.5}
    assert found.busiest == "up"
    assert found.busy == {"attend": {"up": 0.5}, "near": {"device": 2.0}, "stream": {"up": 2.5}}


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_llama_3_8b_without_a_model() -> None:
    shape = shape_of(None, Told(), "auto")
    assert (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.hidden) == (32, 8, 128, 4096)
    assert shape.groups == (Group(tuple(range(32))),)
    assert shape.dtype == torch.bfloat16
    assert shape_of(None, Told("8", 64), "float32").hidden == 512


def test_layers_are_named_by_runs() -> None:
    assert Group((0, 1, 2, 5, 7, 8)).name == "layers 0-2, 5, 7-8"
    assert Group((3,)).name == "layer 3"


@pytest.mark.parametrize("text", ["32", "32:8", " 8 : 2 "])
def test_heads(text: str) -> None:
    assert parse_heads(text) in {(32, 32), (32, 8), (8, 2)}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["--heads", "32:5"],
            "expected --heads as query heads:KV heads, a multiple of them, such as '32:8', got '32:5'",
        ),
        (["--heads", "x"], "expected --heads as query heads:KV heads"),
        (["--layers", "0"], "--layers must be 1 to 10,000, got 0"),
        (["--layers", "1000000000"], "--layers must be 1 to 10,000, got 1,000,000,000"),
        (["--head-dim", "300"], "--head-dim must be 1 to 256, got 300"),
        (["--trace", "/"], "--trace / is a folder: expected a file to write"),
        (["--context", "0"], "--context must be 1 to"),
        (["--batch", "0"], "--batch must be 1 to"),
        (["--steps", "20000"], "--steps must be 1 to 10,000, got 20,000"),
        (["--near-tokens", "64"], "--near-tokens must be at least two pages, 128, got 64"),
        (
            ["--system", "dense"],
            f"split far tokens over lanes have a plan: {SPLITTING}; got 'dense'",
        ),
        (["--system", "nope"], "got 'nope'"),
        (["--system", "hybridgen"], f"over lanes have a plan: {SPLITTING}; got 'hybridgen'"),
        (["--link", "fast"], "expected a link (--link) as GB/s above 0, or GB/s:us"),
        (["--far-dtype", "int8:64,int4"], "one format of far tokens is explained at a time"),
        (["--far-dtype", "int3"], "expected --far-dtype as model, int8, int4"),
        (["--dtype", "float16"], "what products in float16 cost is not measured"),
        (["--no-run", "--gantt", "step.png"], "--gantt shows steps that ran: leave --no-run out"),
        (["--trace", "/nowhere/at/all.json"], "--trace /nowhere/at/all.json: there is no folder /nowhere/at"),
        (["--plan", "/nowhere.json"], "the plan /nowhere.json cannot be read"),
        (["/nowhere"], "there is no folder /nowhere"),
        (["/nowhere", "--heads", "8"], "--heads: /nowhere says what its layers are"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run: Run, args: list[str], expected: str) -> None:
    done = run(*args)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert expected in done.err
    assert done.out == ""


def test_a_context_beyond_the_models_positions(run: Run, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=1, max_position_embeddings=2048).save_pretrained(tmp_path / "llama")
    done = run(tmp_path / "llama", "--context", 4096)
    assert (done.code, done.err) == (2, "error: --context must be at most the model's 2,048 positions, got 4,096\n")


def test_too_little_memory_is_told_with_the_arithmetic(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: machine.Available(1 << 20, "cgroup limit"))
    done = run(*SMALL)
    assert done.code == 2
    assert "steps of one layer take 2 times 2.00 MiB of keys and values, 1.00 MiB are left (cgroup limit)" in done.err
    assert "predict alone with --no-run" in done.err


def test_a_picture_needs_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandemkv.explain.command.find_spec", lambda name: None)
    done = run(*SMALL, "--gantt", "step.png")
    assert (done.code, done.err) == (2, "error: --gantt needs matplotlib: pip install 'tandemkv[plot]'\n")


def test_what_cannot_be_written_in_the_end_loses_no_report(run: Run) -> None:
    done = run("--context", 2048, "--near-tokens", 128, "--steps", 3, "--trace", "/dev/full", "--json")
    assert done.code == 0
    assert "error: the trace /dev/full cannot be written: No space left on device" in done.err
    assert json.loads(done.out.splitlines()[-1])["trace"] is None


def test_the_plan_that_is_told_can_be_given(run: Run, tmp_path: Path) -> None:
    first = json.loads(run("--no-run", "--json").out.splitlines()[-1])["groups"][0]["plan"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(first))
    assert json.loads(run("--no-run", "--json", "--plan", path).out.splitlines()[-1])["groups"][0]["plan"] == first


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 200_000, "got no JSON: maximum recursion depth"),
        ('{"tokens": {"attend": 1}, "stage_tokens": 1' + "0" * 400 + "}", "whole numbers above 0 and below 2**40"),
        ('{"tokens": {"attend": -1}}', "whole numbers above 0"),
    ],
    ids=["deep", "large", "negative"],
)
def test_a_plan_that_is_none(run: Run, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    done = run("--no-run", "--plan", path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: --plan {path}: expected a plan such as")
    assert expected in done.err


def test_one_processor_is_told_before_a_profile_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    monkeypatch.setattr("tandemkv.explain.command.profile_of_this_machine", lambda console: pytest.fail("measured"))
    done = run("--no-run")
    assert done.code == 2
    assert "a device and a host need two processors, this process may use 1" in done.err
