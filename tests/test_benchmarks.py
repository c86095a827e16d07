"""The benchmarks' contract: what the last line says, and that a wrong result is never timed."""

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import attend, capacity, common, contest, coverage, decode, plot, prefill, quantised, tradeoff
from benchmarks.lanes import __main__ as lanes
from benchmarks.lanes import ground, kvpr, splits, systems
from benchmarks.peers import PEERS, Call, PeerUnavailableError, Problem
from tandemkv import kernels
from tandemkv.demo import speed as demo
from tandemkv.evaluate.tasks import COUNTED
from tandemkv.lanes import Crew
from tandemkv.schedule import Scheduler, Speed
from tandemkv.types import PagedKV, Partial, ScoreRule
from tests.schedule.test_profile import PROFILE

CONTRACT = (
    *("shape", "read_gbps", "ours_ms", "ours_gbps", "share_of_read", "peers_ms", "ratio_to_fastest_peer"),
    *("ratio_to_transformers", "max_error", "rows"),
)
SHAPE = contest.Shape(num_q_heads=4, num_kv_heads=2, head_dim=64, kv_len=1024)
RUN = common.Run("a machine", "abc1234", "a command")


def wrong_peer(problem: Problem) -> Call:
    return lambda: PEERS["torch_sdpa"](problem)() + 0.1


def nan_peer(problem: Problem) -> Call:
    return lambda: problem.q * math.nan


def missing_peer(problem: Problem) -> Call:
    raise PeerUnavailableError("not installed")


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rules() -> contest.Rules:
    peers = {name: PEERS[name] for name in ("torch_sdpa", "torch_matmul", "transformers")}
    peers |= {"wrong": wrong_peer, "nan": nan_peer, "missing": missing_peer}
    return contest.Rules(budget_s=0.0, rotate_bytes=4 << 20, peers=peers)


@pytest.fixture
def row(rules: contest.Rules) -> contest.Row:
    return contest.prepare(SHAPE, rules).row(2)


def test_last_line_is_the_contract(
    rules: contest.Rules, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attend, "HEADLINE", SHAPE)
    monkeypatch.setattr(attend, "QUICK", {SHAPE: (1, 2)})
    monkeypatch.setattr(attend, "QUICK_RULES", rules)
    monkeypatch.setattr(attend, "spinning_peers_ms", lambda quick: {"torch_sdpa": 1.0} if quick else {})
    assert attend.main(["--quick", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not set(CONTRACT) - set(result)
    assert (result["shape"], result["num_threads"]) == (str(SHAPE), 2)
    assert [row["num_threads"] for row in result["rows"]] == [1, 2]
    assert result["command"] == "python -m benchmarks.attend --quick --json"
    peers_ms, ours_ms = result["peers_ms"], result["ours_ms"]
    assert set(peers_ms) == {"torch_sdpa", "torch_matmul", "transformers"}
    assert result["ratio_to_fastest_peer"] == pytest.approx(min(peers_ms.values()) / ours_ms)
    assert result["ratio_to_transformers"] == pytest.approx(peers_ms["transformers"] / ours_ms)
    assert result["ours_gbps"] == pytest.approx(2 * 2 * 1024 * 64 * 2 / ours_ms / 1e6)
    assert result["share_of_read"] == pytest.approx(result["ours_gbps"] / result["read_gbps"])
    assert result["share_of_limit"] > 0


def test_the_limit_is_the_slower_of_reading_and_multiplying(row: contest.Row) -> None:
    kv_us = SHAPE.kv_bytes / 100e3  # at 100 GB/s
    fixed = replace(row, read_gbps_by_threads={1: 50.0, 2: 100.0}, ours_ms=2 * kv_us / 1e3, multiply_adds=6)
    num_pairs = 2 * 1024 * 64  # KV heads, tokens, dims: an element of K and one of V each
    slow = replace(fixed, dot_gops=num_pairs * 6 / (1.5 * kv_us) / 1e3)
    assert slow.arithmetic_limit_us == pytest.approx(1.5 * kv_us)
    assert slow.share_of_limit == pytest.approx(0.75)
    fast = replace(fixed, dot_gops=1e6)
    assert fast.share_of_limit == pytest.approx(fast.share_of_read(fast.ours_ms)) == pytest.approx(0.5)
    tiles = replace(slow, multiply_adds=0)
    assert tiles.arithmetic_limit_us is None
    assert tiles.share_of_limit == pytest.approx(0.5)


def test_every_group_size_is_measured_without_peers(
    rules: contest.Rules, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert [shape.group_size for shape in attend.GROUPS] == list(range(1, 17))
    assert {attend.HEADLINE} < set(attend.GROUPS)
    assert not attend.GROUPS_RULES.peers
    monkeypatch.setattr(attend, "HEADLINE", SHAPE)
    monkeypatch.setattr(attend, "GROUPS", {SHAPE: (2,), replace(SHAPE, num_q_heads=6): (2,)})
    monkeypatch.setattr(attend, "GROUPS_RULES", replace(rules, peers={}))
    monkeypatch.setattr(attend, "spinning_peers_ms", lambda _: pytest.fail("there are no peers"))
    monkeypatch.setattr(attend, "RESULTS", tmp_path)
    assert attend.main(["--groups", "--json"]) == 0
    assert not list(tmp_path.iterdir()), "saved without --save"
    assert attend.main(["--groups", "--json", "--save"]) == 0
    assert len((tmp_path / "attend.csv").read_text().splitlines()) == 1 + 2
    output = capsys.readouterr().out
    assert "limit: " in output
    assert [found["shape"] for found in json.loads(output.splitlines()[-1])["rows"]] == ["4:2x64 at 1K", "6:2x64 at 1K"]


def test_wrong_and_missing_peers_are_not_timed(row: contest.Row) -> None:
    assert "tolerance" in row.peers_missing["wrong"]
    assert "nan" in row.peers_missing["nan"]
    assert row.peers_missing["missing"] == "not installed"
    assert max(row.peers_max_error.values()) > 0


def test_every_copy_is_the_same_sequence(rules: contest.Rules) -> None:
    made = contest.prepare(SHAPE, rules)
    assert len(made.copies.paged) == len(made.problem.dense) == 8
    slots = torch.cat([paged.page_table[0, 0] for paged in made.copies.paged]).tolist()
    assert len(set(slots)) == len(slots), "copies that share memory would be read from a cache"
    for paged in made.copies.paged:
        out = kernels.attend(made.problem.q, paged, rule=ScoreRule(made.problem.scale)).out
        assert made.judge.error(out) <= made.judge.tolerance


def test_one_wrong_page_of_ours_is_not_timed(rules: contest.Rules) -> None:
    made = contest.prepare(SHAPE, rules)
    made.copies.paged[0].page_table[0, 0, 3] = made.copies.paged[1].page_table[0, 0, 4]
    with pytest.raises(common.WrongResultError, match="tolerance"):
        made.row(1)


def test_wrong_result_of_ours_is_an_exit_status(
    rules: contest.Rules, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attend, "QUICK", {SHAPE: (1,)})
    monkeypatch.setattr(attend, "QUICK_RULES", rules)
    monkeypatch.setattr(kernels, "attend", lambda q, *_, **__: Partial(torch.zeros(q.shape), torch.zeros(q.shape[:3])))
    assert attend.main(["--quick", "--json"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "wrong" in output.err


def test_share_above_one_is_said_to_be_the_fault_of_the_probe(
    row: contest.Row, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = replace(row, read_gbps_by_threads={1: 1e9})
    disturbed = replace(row, read_gbps_by_threads={1: 1e-9})
    attend.show([honest], honest, {})
    assert not honest.to_json()["probe_at_fault"] and "fault of the probe" not in capsys.readouterr().out
    attend.show([disturbed], disturbed, {})
    assert disturbed.to_json()["probe_at_fault"] and "fault of the probe" in capsys.readouterr().out


def test_a_disturbed_arithmetic_limit_is_told(row: contest.Row, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [replace(row, dot_gops=speed) for speed in (200.0, 181.0)]
    attend.show(rows, row, {})
    assert "this arithmetic limit is none" not in capsys.readouterr().out
    attend.show([*rows, replace(row, dot_gops=179.0)], row, {})
    assert (
        " ".join(capsys.readouterr().out.split()).count("from registers took part at 179 G/s, in another row at 200")
        == 1
    )


def test_contestants_take_turns() -> None:
    calls: list[str] = []

    def contestant(name: str, score: float) -> Callable[[], float]:
        def call() -> float:
            calls.append(name)
            return score

        return call

    medians = common.medians_in_turn({"a": contestant("a", 1.0), "b": contestant("b", 2.0)}, budget_s=0.0)
    assert medians == {"a": 1.0, "b": 2.0}
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert turns == ["a", "b"] * 3


def test_rows_are_appended_below_one_header(row: contest.Row, tmp_path: Path) -> None:
    path = tmp_path / "results" / "attend.csv"
    for _ in range(2):
        common.append_rows(path, list(attend.csv_rows([row])), RUN)
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 2 * 4
    assert lines[0].startswith("date,num_q_heads") and lines[0].endswith("machine,commit,command")
    assert lines[1].endswith("a machine,abc1234,a command")
    with pytest.raises(ValueError, match="columns"):
        common.append_rows(path, [{"other": 1}], RUN)


def test_picture(row: contest.Row, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "attend.png"
    assert str(path) in plot.draw([row], RUN, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        attend.main(["--help"])
    assert stop.value.code == 0
    assert "python -m benchmarks.attend --quick --json" in capsys.readouterr().out


# -- whole tokens and prompts ------------------------------------------------------------------------------------------

OURS = {"ours": 6.0, "read_gbps": 20.0, "attention": 4.0}
MEDIANS = {name: 10.0 * (i + 3) for i, name in enumerate(decode.STOCK)} | OURS


def decode_row(ours_error: float) -> decode.Row:
    truth = torch.zeros(5)
    logits = {"ours": truth + ours_error, decode.AS_GENERATE: truth + 0.1}
    times = {name: [median - 1, median, 2 * median] for name, median in MEDIANS.items()}
    shares = {"ours": [6.0, 5.0, 20.0], "weights": [1.5, 1.0, 9.0], "native": [3.5, 3.75, 3.0]}
    return decode.summarise(1024, times, shares, demo.demo_model(small=True), (logits, truth))


def test_a_decode_row_follows_from_its_medians() -> None:
    row = decode_row(0.2)
    assert row.fastest_stock == min(decode.STOCK, key=MEDIANS.__getitem__)
    assert (row.stock_ms, row.fastest_stock_ms) == (MEDIANS[decode.AS_GENERATE], 30.0)
    assert row.ratio == row.stock_ms / 6.0
    assert row.ratio_to_fastest_stock == 5.0
    model = demo.demo_model(small=True)
    kv_bytes = 2 * 2 * 1 * 64 * 2 * 1024  # K and V, layers, heads, dims, bytes, tokens
    assert row.limit_ms == pytest.approx((demo.weight_bytes(model) + kv_bytes) / 20e6)
    assert row.attention_share_of_limit == pytest.approx(kv_bytes / 20e6 / 4.0)
    assert (row.step_ms, row.weights_ms, row.native_ms) == (6.0, 1.5, 3.5)
    assert row.overhead_ms == 1.0  # the median of 6 - 1.5 - 3.5, 5 - 1 - 3.75 and 20 - 9 - 3
    assert (row.overhead_low_ms, row.overhead_high_ms) == (0.25, 8.0)
    assert row.overhead_share == pytest.approx(1 / 6)
    assert row.max_logit_error == pytest.approx(0.2)
    assert row.stock_logit_error == pytest.approx(0.1)


def test_the_interval_of_the_overhead() -> None:
    """Of 100 steps those of rank 41 and 61, as tables of order statistics say (40 or 41 and 60 or 61)."""
    steps = [float(i) for i in range(1, 101)]
    found = decode.shares_of({"ours": steps, "weights": [0.0] * 100, "native": [0.0] * 100})
    assert (found["overhead_low_ms"], found["overhead_ms"], found["overhead_high_ms"]) == (41.0, 50.5, 61.0)


@pytest.mark.parametrize("error", [0.5, math.nan])
def test_wrong_logits_are_no_decode_row(error: float) -> None:
    with pytest.raises(common.WrongResultError, match="logits are off"):
        decode_row(error)


def test_wrong_logits_are_no_prefill_row() -> None:
    prefill.check([[1.0, 2.0], [1.2, 2.0]], 10)
    for wrong in (2.3, math.nan):
        with pytest.raises(common.WrongResultError, match="differ by"):
            prefill.check([[1.0, 2.0], [1.0, wrong]], 10)


@pytest.mark.parametrize(
    ("module", "context", "number"),
    [
        ("decode", 512, "ratio"),
        ("prefill", 512, "ratio"),
        ("sparse", 4096, "speedup"),
        ("coverage", 4096, "largest_error"),
    ],
)
def test_the_last_line_of_a_short_run(module: str, context: int, number: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--context", str(context), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["context"] == context
    assert found["rows"][-1][number] == found[number] > 0
    assert {"machine", "commit", "command"} <= found.keys()


Found = dict[tuple[str, int | None], dict[str, list[float]]]


def write_scores(path: Path, found: Found) -> Path:
    """Scores of two contexts each, as `tandemkv eval` keeps them behind 1024 tokens."""
    rows = [
        {
            "task": task,
            "form": form,
            "context": context,
            "system": system,
            "budget_tokens": budget,
            "scores": [score],
            "digest": f"{task} {context}",
        }
        for (system, budget), tasks in found.items()
        for task, scores in tasks.items()
        for context, score in enumerate(scores)
        for form in ("requests", "turns")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"length": 1024, "num_contexts": 2}, *rows)))
    return path


def test_accuracy_is_of_those_who_were_asked_everything(tmp_path: Path) -> None:
    every = {task: [1.0, 0.0] for task in COUNTED}
    found: Found = {("window", 256): {**every, "lines": [0.0, 0.0]}, ("dense", None): {**every, COUNTED[0]: [1.0, 1.0]}}
    some: Found = {
        ("quest", 256): {task: [1.0, 1.0] for task in COUNTED[1:]},
        ("h2o", 256): {**every, COUNTED[0]: [1.0]},
    }
    path = write_scores(tmp_path / "scores.jsonl", {**found, **some})
    length, judged = tradeoff.read_accuracy(path)
    assert length == 1024
    dense = 0.5 + 0.5 / len(COUNTED)
    assert [(one.who.system, one.accuracy, one.num_answers) for one in judged] == [
        ("dense", pytest.approx(dense), 2 * len(COUNTED)),
        ("window", 0.5, 2 * len(COUNTED)),
    ]
    settings, *lines = path.read_text().splitlines()
    stale = [line.replace('"digest": "', '"digest": "other ').replace("1.0", "0.25") for line in lines]
    path.write_text("\n".join([settings, *stale, *lines]) + '\n{"task": "nee')
    assert tradeoff.read_accuracy(path) == (length, judged), "scores of other prompts count, or a cut line does"
    for path in (write_scores(tmp_path / "some.jsonl", some), tmp_path / "none.jsonl"):
        with pytest.raises(SystemExit, match=r"^error: .* (does not hold every counted task of dense|is not there)"):
            tradeoff.read_accuracy(path)


def test_a_short_tradeoff(tmp_path: Path) -> None:
    every = {task: [1.0, 0.5] for task in COUNTED}
    contestants: list[tuple[str, int | None]] = [("dense", None), ("tandem-verified", 160), ("window", 160)]
    scores = write_scores(tmp_path / "scores.jsonl", dict.fromkeys(contestants, every))
    command = [sys.executable, "-m", "benchmarks.tradeoff", "--quick", "--json", "--scores", str(scores)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(row["system"], row["accuracy"], row["context"]) for row in found["rows"]] == [
        (system, 0.75, 1024) for system, _ in contestants
    ]
    assert all(row["model_ms"] > 0 and row["layer_ms"] > 0 for row in found["rows"])
    assert found["rows"][2]["layer_budget"] == 160 * 16
    if find_spec("matplotlib") is not None:
        assert "picture" in plot.draw_tradeoff(found["rows"], common.this_run("x", []), tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_a_wrong_exact_output_says_nothing_about_errors(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    text = coverage.RandomContext("flat", 2048)
    for added in (0.0, error):

        def attend_wrongly(*args: Any, added: float = added, **rest: Any) -> Partial:
            return Partial(kernels.attend(*args, **rest).out + added, Tensor())

        monkeypatch.setattr(coverage, "attend", attend_wrongly)
        if added == 0:
            assert coverage.measure(text, "window", coverage.PROMISE, 2).largest_error > 0
            continue
        with pytest.raises(common.WrongResultError, match=r"exact attention is .* from float64"):
            coverage.measure(text, "window", coverage.PROMISE, 2)


@pytest.mark.parametrize("keys", coverage.KEYS)
def test_random_keys_are_what_they_are_called(keys: str) -> None:
    """The mass of tokens of single queries, in float64."""
    q, k, _ = coverage.random_tokens(16_384, keys)
    logits = q[0, 0, :64].double() @ k[0, 0].double().mT * coverage.RULE.scale
    mass = logits.softmax(-1)
    blocks = mass.unflatten(1, (-1, 16)).sum(-1)
    largest = blocks.amax(-1).median()
    if keys == "flat":
        assert abs(float(logits.std()) - 1) < 0.05
        assert largest < 0.01
    elif keys == "two clusters":
        is_heavy = k[0, 0, :, 0] > 4
        assert 0.09 < float(is_heavy.double().mean()) < 0.11
        assert float(mass[:, is_heavy].sum(-1).median()) > 0.99
        assert largest < 0.01
    elif keys == "one needle":
        assert 0.35 < float(largest) < 0.65
        assert len(blocks.argmax(-1).unique()) == 1
    else:
        assert 0.02 < float(largest) < 0.5
        assert len(blocks.argmax(-1).unique()) > 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--context=1024"], "--context must be at least 2048, got 1024"),
        (["--steps=512"], "--steps must be below 512, got 512"),
    ],
)
def test_coverage_needs_something_left_out(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["coverage", *arguments])
    with pytest.raises(SystemExit):
        coverage.main()
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--context=0", "--context=many", "--steps=-1"])
def test_a_count_below_one_is_refused(argument: str) -> None:
    command = [sys.executable, "-m", "benchmarks.decode", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert "expected a whole number of at least 1, got" in done.stderr


def test_quantised_rows_are_checked_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format, with its errors; a kernel that is off is told, and nothing is timed."""
    monkeypatch.setattr(quantised, "ROTATE_BYTES", 1 << 20)
    monkeypatch.setattr(quantised, "PROBE_BYTES", 1 << 22)
    monkeypatch.setattr(quantised, "_peers", lambda *_: {})
    rows = quantised.measure(1024, (1,), 0.0)
    assert [row.contestant for row in rows] == list(quantised.LAYOUTS)
    by_name = {row.contestant: row for row in rows}
    assert by_name["bf16"].times_bf16 == 1
    assert by_name["bf16"].kv_bytes > 1.9 * by_name["int8"].kv_bytes
    assert by_name["bf16"].kv_bytes > 3.4 * by_name["int4"].kv_bytes
    errors = [by_name[name].logit_error or 0.0 for name in ("bf16", "int8", "int4")]
    assert errors[0] == 0 < errors[1] < 0.02 < errors[2] < 0.3
    attended = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *a, **k: Partial(attended(*a, **k).out * 1.01, torch.zeros(1)))
    with pytest.raises(common.WrongResultError, match="bf16 at 1024: off by"):
        quantised.measure(1024, (1,), 0.0)


@pytest.mark.parametrize("of", ["attention", "model"])
def test_a_step_that_demotes_is_told_apart(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of those that are decoded of every 64 tokens, in every layer."""
    monkeypatch.setattr(quantised, "LENGTHS", (4096, 4096))
    is_model = of == "model"
    steps = quantised.ModelSteps(quantised.wide_model(64, 64), "int8") if is_model else quantised.LayerSteps("int8", 2)
    demoted: list[bool] = []
    decode = steps.step

    def counted() -> None:
        before = [layer.num_far_pages for layer in map(steps.cache.layer, range(2))]
        decode()
        after = [layer.num_far_pages for layer in map(steps.cache.layer, range(2))]
        assert len({now - then for now, then in zip(after, before, strict=True)}) == 1
        demoted.append(after[0] > before[0])

    monkeypatch.setattr(steps, "step", counted)
    (row,) = quantised.demote_in_turn([steps], 0.0)
    assert demoted == [index % quantised.DECODED == 5 for index in range(5 * quantised.DECODED)]
    assert row.of == ("model" if is_model else "attention x 2")
    assert row.longer_by_least <= row.longer_by <= row.longer_by_most
    assert row.step_ms > 0


@pytest.mark.parametrize("far_dtype", ["fp8", "int8/96"])
def test_a_capacity_of_no_format_is_refused(far_dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        capacity.main(["--quick", "--far-dtype", far_dtype])
    assert "error: --far-dtype: " in capsys.readouterr().err


def test_a_context_is_held_and_decoded() -> None:
    found = capacity.hold(16_384, "int4", Console(quiet=True))
    assert found.bf16_bytes == 16_384 * 8192
    assert found.far_bytes < found.bf16_bytes / 3
    assert found.refusal == ""
    assert 0 < found.error < capacity.ERROR_TOLERANCE


# -- lanes -------------------------------------------------------------------------------------------------------------


def test_lanes_are_measured_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One small case: what the last line says, and that shares follow from its numbers."""
    monkeypatch.setattr(lanes, "measure_machine", lambda console: PROFILE)
    monkeypatch.setattr(ground, "ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr(sys, "argv", ["lanes", "--quick", "--json", "--context", "2048"])
    lanes.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["link_ratio"] for row in result["lanes"]] == [0.25, 1.0, 4.0]
    for row in result["lanes"]:
        assert sum(int(num.replace(",", "")) for num in re.findall(r"[\d,]*\d", row["plan"])) == 2048 - 256
        assert 0 < row["b_gbps"] <= row["link_gbps"] * 1.0001
        shares = [value for name, value in row.items() if name.startswith("share_of")]
        assert len(shares) == 7
        assert all(0 < share < 10 for share in shares)


def test_a_round_says_what_splitting_gains() -> None:
    """Of the better lane alone, though logits may be better still: the ideal speaks of two speeds."""
    times = {"attend": 4.0, "stream": 6.0, "logits": 3.0, "tandem": 2.5}
    found = splits.Round(times, a=9.0, b=6.0)
    assert (found.gain, found.ideal) == pytest.approx((1.6, 15 / 9))


def test_shares_are_medians_of_what_rounds_say() -> None:
    """Three rounds: one fast, one slow, one in which tandem lost; swept and best are those of all rounds."""
    rounds = [
        splits.Round({"attend": 4.0, "stream": 6.0, "logits": 3.0, "tandem": 2.5, "0.4": 2.0}, 10.0, 5.0),
        splits.Round({"attend": 8.0, "stream": 12.0, "logits": 6.0, "tandem": 5.0, "0.4": 5.0}, 5.0, 2.5),
        splits.Round({"attend": 4.0, "stream": 6.0, "logits": 3.0, "tandem": 8.0, "0.4": 2.0}, 10.0, 5.0),
    ]
    found = splits._medians(rounds, 30.0, "0.4", "logits")
    assert found == pytest.approx(
        {
            "a_gbps": 10.0,
            "b_gbps": 5.0,
            "gain": 1.6,
            "ideal": 1.5,
            "share_of_ideal": 1.6 / 1.5,
            "share_of_raw": 30 / 2.5 / 15,
            "share_of_swept": 0.8,
            "share_of_best": 1.2,
            "share_of_most": 1.2 / 1.5,
            "share_of_kernel": 0.75,
            "share_of_link": 1.0,
        }
    )


def test_raw_speeds_are_those_of_both_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pages each, but for one; what is taken is of the steps since the last time."""
    read: list[int] = []
    prepare = kernels.prepare_attend

    def logged(q: torch.Tensor, run: PagedKV, **rest: Any) -> Any:
        read.append(run.page_table.shape[2])
        return prepare(q, run, **rest)

    monkeypatch.setattr(kernels, "prepare_attend", logged)
    with ground.rig_with(Speed(0, 10)) as rig:
        raw = ground.Raw(ground.Layers(4, 2, 2048 + 64), rig)  # 29 far pages
        for _ in range(3):
            raw.step()
        host, device = zip(*raw.gbps, strict=True)
        assert len(host) == 3
        assert raw.take() == (statistics.median(host), statistics.median(device))
        assert raw.gbps == []
        assert read == [14, 15] * 3


def test_lanes_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with ground.rig_with(Speed(0, 10)) as rig:
        layers = ground.Layers(4, 2, 2048)
        speeds = PROFILE.machine("bfloat16", 0, (rig.up.speed, rig.down.speed))
        wrong = ground.Contestant(Crew(rig, Scheduler(speeds, ("attend",))), layers)
        ground.check([wrong])
        monkeypatch.setattr(wrong.crew, "attend", lambda q, *rest: Partial(q.float() * 0, q[..., 0].float()))
        with pytest.raises(common.WrongResultError, match=r"\('attend',\): off by"):
            ground.check([wrong])


def test_kvpr_gains_what_its_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link is set so that a share is worth rebuilding: half of the tokens, as far as speeds stay what they were."""
    assert kvpr.share_to_rebuild(75.0, 2 * 75.0 * 0.7 / (2 * 1024 * 0.3), 1024) == pytest.approx(0.3)
    assert [kvpr.ideal_gain("row", 0.5), kvpr.ideal_gain("column", 0.5)] == pytest.approx([2, 4 / 3])
    monkeypatch.setattr(kvpr, "KVPR_TOKENS", 256)
    monkeypatch.setattr(kvpr, "KVPR_SHARES", (0.5,))
    rows = list(kvpr.measure(PROFILE, 0.1))
    assert [row.schedule for row in rows] == ["row", "column"]
    for row in rows:
        assert row.f == pytest.approx(kvpr.share_to_rebuild(row.rebuild_gflops, row.link_gbps, 1024))
        assert row.ideal == pytest.approx(kvpr.ideal_gain(row.schedule, row.f))
        assert 0 < row.f < 1
        assert 0 <= row.rebuilt_tokens <= 256


def test_systems_are_told_beside_the_longest_of_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a slow link, HybridGen's V is what binds; nobody is faster than its limit by more than noise."""
    monkeypatch.setattr(ground, "ROTATED_BYTES", 1 << 24)
    rows = {row.system: row for row in systems.measure(PROFILE, 4096, 0.2)}
    assert list(rows) == ["flexgen", "moe-lightning", "hgca", "hybridgen", "headinfer"]
    assert [rows[name].limit for name in ("flexgen", "moe-lightning", "headinfer")] == ["link", "host, attend", "link"]
    assert rows["flexgen"].limit_ms == pytest.approx(3840 * 4096 / rows["flexgen"].gbps / 1e6)
    assert rows["hgca"].limit_ms < rows["moe-lightning"].limit_ms
    for row in rows.values():
        assert 0 < row.share < 2
        assert row.share == pytest.approx(row.limit_ms / row.ms, rel=0.5)
