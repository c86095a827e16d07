"""benchmarks.gpu without a GPU: its sections in Triton's interpreter over tiny shapes, and a clock that is none."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from benchmarks import common
from benchmarks.common import Run
from benchmarks.gpu import (
    ahead,
    bootstrap,
    command,
    counters,
    measured,
    packed,
    peers,
    prefetch,
    section,
    speed,
    suite,
    sweep,
)
from benchmarks.gpu.bootstrap import ROOT
from benchmarks.gpu.budget import Allowance, Budget
from benchmarks.gpu.cases import MODELS, PAGE, Case, Form, Model, Pool, Pools, Problem
from benchmarks.gpu.compilers import ALIGNED, Compilers, compile_one, like
from benchmarks.gpu.ground import CudaTimer, Facts, Ground, Sample, slug, times_of
from benchmarks.gpu.peers import Entrants, Forms
from benchmarks.gpu.report import MOST_FILES, Report
from benchmarks.gpu.section import Bench, Found, Section
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.suite import Outcome
from benchmarks.peers import PeerUnavailableError
from tandemkv.errors import InputError, UnavailableError
from tandemkv.kernels import gpu
from tandemkv.types import PageLayout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself runs")
CPU = torch.device("cpu")
FACTS = Facts("Triton's interpreter", 0, 2, 1 << 10, 1 << 22)
RUN = Run("a machine", "abc1234", "a command")
TINY = Model("Tiny", 4, 2, 16)
AHEAD = ("", " ahead 1", " ahead 2", " ahead 4")
CASE = Case(TINY, 96, 2, torch.float32)


class Steps:
    """A timer that calls and says 10 us for the first contestant, 20 for the second, and so on."""

    def __init__(self) -> None:
        self.rounds: list[list[str]] = []

    def round(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Sample]:
        self.rounds.append(list(calls))
        for call in calls.values():
            call()
        return {name: Sample(10.0 * (i + 1), 1.0) for i, name in enumerate(calls)}


@pytest.fixture
def timer() -> Steps:
    return Steps()


@pytest.fixture
def ground(timer: Steps) -> Ground:
    return Ground(CPU, FACTS, timer, 1 << 16)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same numbers every time."""
    torch.manual_seed(0)
    monkeypatch.setattr(Ground.in_turn, "__defaults__", (1,))  # behind two to warm up
    monkeypatch.setattr("benchmarks.gpu.ground.MOST_ROUNDS", 3)
    for module, seconds in (
        (speed, "ROW_S"),
        (sweep, "STEP_S"),
        (prefetch, "CASE_S"),
        (ahead, "CASE_S"),
        (packed, "ROW_S"),
    ):
        monkeypatch.setattr(module, seconds, 0.0)


@pytest.fixture
def bench(ground: Ground) -> Bench:
    return Bench(ground, Pools(CPU, lambda: 1 << 20), Compilers(CPU), quick=False, tell=lambda _: None)


@pytest.fixture
def problem() -> Problem:
    return Problem(CASE, Pool(CPU, torch.float32, 1 << 18), FACTS.l2_bytes)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def dense_peer(problem: Problem) -> Forms:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return (torch.softmax(problem.case.scale * q.float() @ k.float().mT, -1) @ v.float(),)

    return {"rows": peers._torch_forms(problem, attend)["rows"]}


def wrong_peer(problem: Problem) -> Forms:
    right = dense_peer(problem)["rows"]
    return {"rows": right._replace(out_of=lambda found: (found[0].reshape(problem.q[:, :, 0].shape) * 1.1, None))}


def broken_peer(_: Problem) -> Forms:
    raise RuntimeError("CUDA error: something\nand more lines")


def missing_peer(_: Problem) -> Forms:
    raise PeerUnavailableError("import flash_attn: ModuleNotFoundError: No module named 'flash_attn'")


OTHERS = {"flash": dense_peer, "cudnn": wrong_peer, "flex": broken_peer, "flash_attn": missing_peer}


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_anything_takes_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", Path("/proc/nope")):
        with pytest.raises(InputError, match=f"--out must be a folder that can be written, got {out}: "):
            command.check_folder(out)
    command.check_folder(tmp_path / "new" / "folder")


def test_the_tests_that_come_first_are_found(tmp_path: Path) -> None:
    """By pytest itself, with the plugins that the run has."""
    found = subprocess.run(
        [*suite.command(), "--collect-only"], cwd=ROOT, env=suite._environment(), capture_output=True, check=False
    )
    assert found.returncode == 0, found.stdout[-2000:]
    assert b"test_variants.py" in found.stdout


def test_budgets_share_what_is_left() -> None:
    clock = Clock()
    whole = Budget(100.0, clock)
    first = whole.part(0.5)
    clock.now = 20.0
    assert (whole.left_s, first.left_s) == (80.0, 30.0)
    assert whole.part(0.25).left_s == 20.0
    assert first.has(30.0) and not first.has(31.0)
    clock.now = 200.0
    assert whole.left_s == 0.0


def test_an_allowance_ends_before_it_is_overdrawn() -> None:
    clock = Clock()
    allowance = Allowance(10.0, clock)
    for seconds in (4.0, 3.0):
        assert allowance.allows
        with allowance:
            clock.now += seconds
    assert not allowance.allows  # 3 s are left, and once took 4
    assert not Allowance(0.0, clock).allows


def test_medians_leave_out_calls_for_which_the_device_waited() -> None:
    samples = [Sample(us, 5.0) for us in (10.0, 30.0, 20.0)] + [Sample(900.0, 5.0, waited=True)]
    times = times_of(samples)
    assert (times.us, times.low_us, times.high_us, times.num, times.waited) == (20.0, 10.0, 30.0, 3, False)
    assert times.spread == pytest.approx(1.0)
    assert times_of(samples[3:]).waited


def test_contestants_take_turns_at_places_that_change(ground: Ground, timer: Steps) -> None:
    turns: list[int] = []
    timer.rounds.clear()
    times = ground.in_turn({"a": turns.append, "b": turns.append}, 0.0, least=3)
    assert timer.rounds == [["a", "b"]] * 5  # two to warm up
    assert turns == list(range(turns[0], turns[0] + 10))
    assert (times["a"].us, times["b"].us, times["a"].num) == (10.0, 20.0, 3)


def test_bandwidth_counts_reading_and_writing(ground: Ground) -> None:
    assert ground.speeds.num_bytes == 1 << 16
    assert ground.speeds.copy_gbps == pytest.approx(2 * (1 << 16) / 10.0 / 1e3)
    assert ground.speeds.read_gbps == pytest.approx((1 << 16) / 20.0 / 1e3)
    assert ground.is_large(4 << 10) and not ground.is_large((4 << 10) - 1)


def test_events_surround_the_call_while_the_device_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what the GPU is asked for, and more sleep for a host that was too slow."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def query(self) -> bool:
            return len(log) < 8

        def elapsed_time(self, end: "Event") -> float:
            return 0.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    timer = CudaTimer()
    first, second = (timer.round({"ours": lambda: log.append("call")})["ours"] for _ in range(2))
    assert log == [
        *("sleep 400000", "event", "call", "event", "wait"),
        *("sleep 800000", "event", "call", "event", "wait"),
    ]
    assert (first.us, first.waited, second.waited) == (500.0, True, False)


# -- cases -------------------------------------------------------------------------------------------------------------


def test_bytes_of_cases() -> None:
    llama_2, llama_3, qwen_7b, qwen_14b = (Case(model, 8192, 16) for model in MODELS)
    assert llama_3.kv_bytes == qwen_14b.kv_bytes == 2 * 16 * 8 * 8192 * 128 * 2
    assert (llama_2.kv_bytes, qwen_7b.kv_bytes) == (4 * llama_3.kv_bytes, llama_3.kv_bytes // 2)
    assert [case.group_size for case in (llama_2, llama_3, qwen_7b, qwen_14b)] == [1, 4, 7, 5]
    ragged = Case(TINY, 100, 3)
    assert (ragged.num_pages, ragged.numbers) == (2, 3 * 2 * 2 * PAGE * 16)
    assert {(case.context, case.batch) for case in speed.CASES} == {
        (context, batch) for context in (2048, 8192, 32_768, 131_072) for batch in (1, 4, 16, 64)
    }
    assert len(set(speed.CASES)) == 64


def test_a_case_lies_at_places_that_l2_cannot_hold() -> None:
    pool = Pool(CPU, torch.float32, 1 << 20)
    places = pool.places(CASE, l2_bytes=8 << 10)
    assert len(places) == 2  # 49 KB each
    assert len(pool.places(CASE, l2_bytes=30 << 10)) == 5
    assert len(pool.places(CASE, l2_bytes=1 << 30)) == pool.k.numel() // CASE.numbers
    assert all(0 <= place <= pool.k.numel() - CASE.numbers for place in places)
    assert pool.fits(CASE) and not pool.fits(CASE._replace(batch=100))


def test_pages_are_shuffled_and_each_read_once(problem: Problem) -> None:
    for run in problem.runs:
        slots = run.page_table[:, 0].flatten()
        assert sorted(slots.tolist()) == list(range(CASE.batch * CASE.num_pages))
        assert torch.equal(run.page_table[:, 0], run.page_table[:, 1])


def test_every_layout_of_a_place_is_judged_by_its_own(problem: Problem) -> None:
    assert problem.check(problem.ours())[1] == ""
    assert problem.check(dense_peer(problem)["rows"])[1] == ""

    def tokens_first(turn: int) -> torch.Tensor:
        k, v = (x.transpose(1, 2) for x in problem.tokens_first[turn % len(problem.places)])
        return torch.softmax(CASE.scale * problem.q_rows @ k.mT, -1) @ v

    shape = problem.q[:, :, 0].shape
    form = Form(tokens_first, lambda out: (out.reshape(shape), None), problem.of_tokens_first)
    assert problem.check(form)[1] == ""
    assert problem.check(form._replace(rows=problem.of_dense))[1].startswith("wrong: out")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_what_is_wrong_is_told(problem: Problem, value: float) -> None:
    ours = problem.ours()
    error, why = problem.check(ours._replace(out_of=lambda part: (part.out[:, :, 0] * value, None)))
    assert error > 0.5 and why.startswith("wrong: out")
    _, why = problem.check(ours._replace(out_of=lambda part: (part.out[:, :, 0], part.lse[:, :, 0] + 1 + value)))
    assert why.startswith("wrong: lse")


# -- sections ----------------------------------------------------------------------------------------------------------


def test_speed_tells_ours_and_its_peers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    large = CASE._replace(dtype=torch.bfloat16)
    small, huge = (Case(TINY, context, 1, torch.bfloat16) for context in (16, 1 << 20))
    monkeypatch.setattr(speed, "CASES", (large, small, huge))
    found = Found()
    speed.measure(bench, Budget(600.0), found, OTHERS)
    first, second = found.rows
    assert (first["us"], first["flash_us"], first["wrong"]) == (10.0, 20.0, "")
    assert first["gbps"] == pytest.approx(large.kv_bytes / 10.0 / 1e3)
    assert first["share_of_copy"] == pytest.approx(first["gbps"] / bench.ground.speeds.copy_gbps)
    assert (first["best_peer"], first["times_best_peer"], first["forms"]) == ("flash", 2.0, "flash:rows")
    assert "cudnn: rows: wrong: out is off by 0.1" in first["missing"]
    assert "flex: RuntimeError: CUDA error: something" in first["missing"] and "more lines" not in first["missing"]
    assert "import flash_attn: ModuleNotFoundError: No module named 'flash_attn'" in first["missing"]
    assert (second["is_large"], second["share_of_copy"]) == (False, None)
    assert found.missed == [f"{huge}: 0 GB of K and V do not fit"]
    assert any(note.startswith("flashinfer: ") for note in found.notes)
    told = dict(speed.summary(found))
    assert told["Tiny, times the best peer"].startswith("1 of 1 at least 1; least 2.00")
    assert told["Tiny, small cases"] == "10.0 to 10.0 us"


def test_a_wrong_result_has_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CASES", (CASE._replace(dtype=torch.bfloat16),))
    right = gpu.attend
    monkeypatch.setattr(gpu, "attend", lambda *args, **words: right(*args, **words)._replace(lse=torch.zeros(2, 4, 1)))
    found = Found()
    speed.measure(bench, Budget(600.0), found, {"flash": dense_peer})
    (row,) = found.rows
    assert row["wrong"].startswith("wrong: lse")
    assert (row["us"], row["gbps"], row["share_of_copy"], row["times_best_peer"]) == (None, None, None, None)
    assert row["flash_us"] == 10.0
    assert found.wrong == [row]


def test_cases_for_which_no_time_is_left_are_listed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CASES", (CASE, CASE))
    found = Found()
    monkeypatch.setattr(speed, "ROW_S", 1.0)
    speed.measure(bench, Budget(0.0), found, {})
    assert found.missed == ["Tiny 96 x 2: no time was left"] * 2
    slow = Allowance(0.0)
    entrants = peers.admit(
        Problem(CASE, Pool(CPU, torch.float32, 1 << 18), 1), bench.ground, {"flex": dense_peer}, slow
    )
    assert entrants.missing["flex"].startswith("not measured")


def test_the_fastest_form_that_is_right_takes_part(bench: Bench, problem: Problem) -> None:
    def forms(problem: Problem) -> Forms:
        wrong, right = wrong_peer(problem)["rows"], dense_peer(problem)["rows"]
        return {"wrong": wrong, "first": right, "second": right}

    found = peers.admit(problem, bench.ground, {"flash": forms}, Allowance(0.0))
    assert found.names == {"flash": "first"}


@pytest.mark.parametrize("name", sorted(set(peers.PEERS) - {"flex"}))
def test_peers_that_cannot_run_here_say_why(bench: Bench, problem: Problem, name: str) -> None:
    """On a CPU none can but compiled attention, which takes half a minute. Each is entered, and none ends a run."""
    found = peers.admit(problem, bench.ground, {name: peers.PEERS[name]}, Allowance(60.0))
    assert not found.forms and found.missing[name]


def test_torch_forms_of_groups_and_heads(problem: Problem) -> None:
    shapes: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        shapes.append(tuple(q.shape))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), None

    forms = peers._torch_forms(problem, attend)
    for form in forms.values():
        assert problem.check(form)[1] == ""
    assert set(shapes) == {(2, 2, 2, 16), (2, 4, 1, 16)}
    alike = Problem(CASE._replace(model=Model("Tiny", 2, 2, 16)), problem.pool, 1)
    assert set(peers._torch_forms(alike, attend)) == {"rows"}


def test_sweep_takes_the_best_of_each_step_along(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in {"CASES": (CASE,), "BLOCK_N": (64, 32), "NUM_WARPS": (4,), "NUM_STAGES": (3,)}.items():
        monkeypatch.setattr(sweep, name, values)
    monkeypatch.setattr(sweep, "SPLITS", (2,))
    monkeypatch.setattr(sweep, "DISTANCES", (1,))
    found = Found()
    sweep.measure(bench, Budget(600.0), found)
    assert [row["step"] for row in found.rows] == ["tiles"] * 2 + ["splits"] * 2 + ["ahead"] * 2
    assert [row["best"] for row in found.rows] == [True, False] * 3
    assert found.rows[0]["config"] == sweep.short(sweep.chosen(CASE, 2))
    assert [row["fits_l2"] for row in found.rows] == [True] * 5 + [False]  # 1 KiB of L2
    assert not any(config.guarded for config in sweep.ahead(gpu.Config()))
    assert len({row["config"] for row in found.rows}) == 4  # the best stands in every step
    ((what, told),) = sweep.summary(found)
    assert what == "sweep Tiny 96 x 2" and told.startswith("10.0 us")


def test_a_configuration_that_does_not_compile_is_a_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CASES", (CASE,))
    monkeypatch.setattr(sweep, "STEPS", {"tiles": lambda _: [gpu.Config(block_n=128)]})
    right = gpu.attend

    def attend(*args: Any, **words: Any) -> Any:
        if words["config"].block_n == 128:
            raise RuntimeError("out of resource: shared memory")
        return right(*args, **words)

    monkeypatch.setattr(gpu, "attend", attend)
    found = Found()
    sweep.measure(bench, Budget(600.0), found)
    assert [(row["us"], row["failed"]) for row in found.rows] == [
        (None, "RuntimeError: out of resource: shared memory"),
        (10.0, ""),
    ]


def test_what_is_foreseen_follows_from_the_paper_s_table() -> None:
    """On its own GPU its own numbers; where memory is the limit before prefetch, no gain."""
    mha, gqa = (Case(model, 528, 64, torch.float16) for model in MODELS[:2])
    assert mha.kv_bytes == pytest.approx(553e6, rel=0.002)
    own = prefetch.foreseen(mha, 78, 4000.0)
    assert own == pytest.approx((293.47, 159.14))
    assert own.gain == pytest.approx(1.84, abs=0.01)
    on_h100 = prefetch.foreseen(mha, 132, 3000.0)
    assert on_h100.gain == 1.0 and on_h100.before_us == pytest.approx(mha.kv_bytes / 3e6)
    assert prefetch.foreseen(gqa, 132, 3000.0).gain == pytest.approx(1.89, abs=0.01)
    assert prefetch.foreseen(gqa._replace(context=1056), 132, 3000.0).after_us == pytest.approx(2 * 119.90 * 78 / 132)
    assert [prefetch.fits_l2(mha, n, 50 << 20) for n in (0, 1, 2)] == [True, True, False]  # 32 MiB for each
    assert not prefetch.fits_l2(mha._replace(batch=128), 1, 60_000_000)
    config = gpu.Config(distance=1)  # 32 KiB for each of 2,048 programs, or of 512
    assert not sweep.fits_l2(mha, config, 50 << 20) and sweep.fits_l2(gqa, config, 16 << 20)


class FakePaper:
    """`benchmarks.gpu.paper` as far as it is asked for."""

    class PaperKernel:
        def __init__(self, head_dim: int, dtype: torch.dtype, block_tokens: int = 16, **words: Any) -> None:
            assert (head_dim, dtype, block_tokens) == (16, torch.float16, 16)
            assert set(words) == {"distance", "prologue", "loads_first"}
            self.distance, self.off = words["distance"], 0.1 if words["distance"] == 4 else 0.0

        def attend(self, q: Any, k: Any, v: Any, table: Any, lens: Any, scale: float) -> Any:
            assert lens.dtype == torch.int32 and table is None
            scores = scale * (q.view(2, 2, 2, 16).float() @ k.float().mT)
            out = torch.softmax(scores, -1) @ v.float()
            return out.view(2, 4, 16) + self.off, torch.logsumexp(scores, -1).view(2, 4)

    @staticmethod
    def paged(k: torch.Tensor, v: torch.Tensor, block_tokens: int) -> Any:
        return k.clone(), v.clone(), None


def test_the_paper_s_table(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "import_module", lambda _: FakePaper)
    monkeypatch.setattr(prefetch, "BATCH", 2)
    monkeypatch.setattr(prefetch, "MODELS", (TINY,))
    monkeypatch.setattr(prefetch, "CONTEXTS", (96,))
    monkeypatch.setattr(prefetch, "PAPER_US", {"Tiny": (200.0, 100.0)})
    right, asked, found = gpu.attend, set(), Found()

    def attend(*args: Any, **words: Any) -> Any:
        asked.add((words["config"].distance, words["config"].guarded))
        return right(*args, **words)

    monkeypatch.setattr(gpu, "attend", attend)
    prefetch.measure(bench, Budget(600.0), found)
    rows = {row["variant"]: row for row in found.rows}
    assert list(rows) == [str(variant) for variant in prefetch.VARIANTS]
    base, ahead, wrong = (rows[name] for name in ("baseline", "baseline ahead 1", "baseline ahead 4 + prologue"))
    assert (base["us"], base["gain"], ahead["us"], ahead["gain"]) == (10.0, 1.0, 20.0, 0.5)
    assert base["of_copy"] == pytest.approx(base["gbps"] / bench.ground.speeds.copy_gbps)
    assert base["asked_gbps"] == pytest.approx(2 * base["gbps"])
    assert ahead["ceiling"] == pytest.approx(1 / base["of_copy"])
    assert ahead["foreseen_gain"] == pytest.approx(2.0) and base["foreseen_gain"] is None
    assert wrong["us"] is None and wrong["wrong"].startswith("wrong: out")
    assert rows["ours ahead 2"]["us"] and rows["ours ahead 2"]["foreseen_us"] is None
    assert rows["ours"]["fits_l2"] and not rows["ours ahead 2"]["fits_l2"]
    assert asked == {(0, False), (1, False), (2, False), (4, False)}
    told = dict(prefetch.summary(found))
    assert (
        "foreseen 2.00 to 2.00; best prefetch 0.50 to 0.50 times as fast; slower in 4 of 4"
        in told["paper Tiny, baseline"]
    )


def test_without_the_baseline_ours_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> Any:
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(prefetch, "import_module", absent)
    found = Found()
    monkeypatch.setattr(prefetch, "PAPER_US", {"Tiny": (200.0, 100.0)})
    prefetch._measure(bench, Case(TINY, 32, 1, torch.float16), Pool(CPU, torch.float16, 1 << 16), found)
    assert {row["variant"] for row in found.rows if row["us"]} == {
        "ours",
        "ours ahead 1",
        "ours ahead 2",
        "ours ahead 4",
    }
    assert found.notes == ["paper, the baseline: ModuleNotFoundError: No module named 'cuda'"]


def test_the_paper_s_kernel_takes_what_it_is_given(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is there: all that it refuses is a CPU."""
    monkeypatch.setattr(prefetch, "PAPER_US", {"Small": (200.0, 100.0)})
    found, case = Found(), Case(Model("Small", 4, 2, 64), 32, 1, torch.float16)
    prefetch._measure(bench, case, Pool(CPU, torch.float16, 1 << 17), found)
    told = {row["reason"] for row in found.rows if row["variant"].startswith("baseline")}
    assert told == {"InputError: expected tensors on a CUDA device, got cpu"}


@pytest.fixture
def small_layer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> ahead.Layer:
    """A small MLP and 4 KiB of L2."""
    monkeypatch.setattr(ahead, "INTERMEDIATE", 32)
    monkeypatch.setattr(ahead, "SHARES", (0.5,))
    mlp = ahead.Mlp(CASE, CPU, 4 << 10)
    return ahead.Layer(Problem(CASE, Pool(CPU, CASE.dtype, 1 << 18), 4 << 10), mlp)


def test_pulling_ahead_gains_or_loses(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls: list[int] = []

    def pull(q: Any, kv: Any, rule: Any, share: float) -> int:
        pulls.append(int(share * bench.ground.facts.l2_bytes))
        return min(pulls[-1], int(kv.num_bytes))

    monkeypatch.setattr(ahead, "pull_into_l2", pull)
    monkeypatch.setattr(ahead, "INTERMEDIATE", 32)
    huge = CASE._replace(context=1 << 20)
    monkeypatch.setattr(ahead, "CASES", (CASE, huge))
    monkeypatch.setattr(ahead, "SHARES", (0.125, 0.5))
    found = Found()
    ahead.measure(bench, Budget(600.0), found)
    assert [(row["l2_share"], row["before"]) for row in found.rows] == [
        (share, before) for before in ("MLP", "down") for share in ahead.SHARES
    ]
    first = found.rows[0]
    assert (first["MLP_us"], first["attend_us"], first["without_us"], first["us"]) == (10.0, 20.0, 30.0, 40.0)
    assert first["gain_percent"] == pytest.approx(-100 / 3) and first["wrong"] == ""
    assert (first["asked_bytes"], first["weight_bytes"]) == (128, 3 * 64 * 32 * 4)
    assert first["copy_us"] == pytest.approx(128 / bench.ground.speeds.copy_gbps / 1e3)
    assert set(pulls) == {128, 512}
    assert found.missed == [f"ahead, {huge}: K and V do not fit"]
    told = list(ahead.summary(found))
    assert told[0] == ("ahead, pulled before MLP", "faster in 0 of 2, -66.7 to -33.3 %")
    assert told[2][1].startswith(
        "96 x 2: MLP 10.0 us, attend 20.0, both 30.0; pulled -33.3 % (0.0 MB before MLP) to -13"
    )


def test_what_pulling_may_save() -> None:
    """No more than memory's idle time; where it has none, what is evicted is paid twice, and nothing else is lost."""
    assert ahead.foreseen(100.0, 8.0, 50.0) == (92.0, 100.0)
    assert ahead.foreseen(100.0, 8.0, 3.0) == (97.0, 105.0)
    assert ahead.foreseen(100.0, 8.0, 0.0) == (100.0, 108.0)
    l2, case = 50 << 20, Case(MODELS[1], 1024, 4)  # 16.8 MB of K and V
    assert [each.share for each in ahead.variants_of(case, l2)] == 2 * [0.125, 0.25, 0.5]
    assert [each.share for each in ahead.variants_of(case._replace(batch=1), l2)] == 2 * [0.125]
    assert {(case.context, case.batch) for case in ahead.CASES} == {
        (context, batch) for context in (1024, 4096, 8192) for batch in (1, 4, 16)
    }


def test_a_pull_that_fails_is_told_and_the_rest_is_measured(bench: Bench, small_layer: ahead.Layer) -> None:
    def pull(variant: ahead.Variant, turn: int) -> int:
        if variant.before == "down":
            raise RuntimeError("no such instruction")
        return 7

    small_layer.pull = pull  # type: ignore[method-assign]
    found = Found()
    ahead._measure(bench, small_layer, found)
    rows = {(row["before"], row["l2_share"]): row for row in found.rows}
    assert rows["MLP", 0.5]["us"] and rows["MLP", 0.5]["asked_bytes"] == 7
    assert rows["down", 0.5]["wrong"] == "RuntimeError: no such instruction"
    assert (rows["down", 0.5]["us"], rows["down", 0.5]["asked_bytes"]) == (None, None)


def test_what_is_pulled_is_what_this_turn_attends_to(small_layer: ahead.Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    runs, right, linear = small_layer.problem.runs, gpu.attend, functional.linear

    def note(what: str, kv: Any) -> None:
        log.append((what, next(i for i, run in enumerate(runs) if run is kv)))

    def attend(q: Any, kv: Any, **words: Any) -> Any:
        note("attend", kv)
        return right(q, kv, **words)

    def multiply(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        log.append(("linear", weights.shape[0]))
        return linear(x, weights)

    monkeypatch.setattr(ahead, "pull_into_l2", lambda q, kv, rule, share: note("pull", kv))
    monkeypatch.setattr(gpu, "attend", attend)
    monkeypatch.setattr(functional, "linear", multiply)
    gate, down = ("linear", 32), ("linear", 64)
    for turn, before in ((0, "MLP"), (1, "down")):
        small_layer.form(ahead.Variant(0.5, before)).call(turn)
        pulled, attended = ("pull", turn), ("attend", turn)
        middle = [pulled, gate, gate, down] if before == "MLP" else [gate, gate, pulled, down]
        assert log == [*middle, attended]
        log.clear()
    small_layer.form().call(2)
    assert [what for what, _ in log] == ["linear"] * 3 + ["attend"]


def test_packed_pages_beside_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Model("Small", 4, 2, 64), 40, 2, torch.bfloat16)
    huge = case._replace(context=1 << 17)
    monkeypatch.setattr(packed, "CASES", (case, huge))
    found = Found()
    packed.measure(bench, Budget(600.0), found)
    unpacked, attended = found.rows[:3], found.rows[3:]
    assert [(row["what"], row["packing"], row["us"], row["wrong"]) for row in unpacked] == [
        ("unpack", packing, 10.0 * (i + 1), "") for i, packing in enumerate(("panels", "int8", "int4"))
    ]
    page = PageLayout(torch.bfloat16, PAGE).page_bytes(2, 64, 64)
    assert unpacked[0]["num_bytes"] == unpacked[0]["num_pages"] * 2 * page >= 4 * FACTS.l2_bytes
    assert [(row["packing"], row["us"], row["times_rows"], row["wrong"]) for row in attended] == [
        (packing, 10.0 * (i + 1), 1 / (i + 1), "") for i, packing in enumerate(packed.PACKINGS)
    ]
    rows, panels, int8, int4 = (row["num_bytes"] for row in attended)
    assert rows == panels == 2 * page
    assert 1.8 < attended[2]["foreseen_times_rows"] == rows / int8 < 2
    assert 2.8 < attended[3]["foreseen_times_rows"] == rows / int4 < 4
    assert all(row["error"] < 0.01 for row in attended)
    assert found.missed == [f"packed, {huge}: 1 GB of pages do not fit"]
    told = dict(packed.summary(found))
    assert told["unpacked"].startswith("panels 10.0 us, 50.0% of copy; int8 20.0 us, ")
    assert told["packed Small 40 x 2"].startswith("rows 10.0 us, 50.0% of copy; panels 20.0 us, 25.0% of copy, 0.50 ti")
    packed.compile_one("cpu", like(case), "int4")


def test_wrong_packed_pages_have_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 of which V is gone, and an unpacking that leaves a page out."""
    case = Case(Model("Small", 4, 2, 64), 40, 2, torch.bfloat16)
    monkeypatch.setattr(packed, "PACKINGS", ("rows", "int8"))
    monkeypatch.setattr(packed, "CASES", (case,))
    right, unpack = gpu.attend, gpu.unpack

    def attend(q: Any, kv: Any, **words: Any) -> Any:
        if kv.arena.layout.packing == "int8":
            kv.arena.v.zero_()
        return right(q, kv, **words)

    monkeypatch.setattr(gpu, "attend", attend)
    monkeypatch.setattr(gpu, "unpack", lambda source, target, *slots: unpack(source, target, *(x[1:] for x in slots)))
    found = Found()
    packed.measure(bench, Budget(600.0), found)
    unpacked, rows, codes = found.rows
    assert unpacked["wrong"].startswith("wrong: rows of place 0") and unpacked["us"] is None
    assert (rows["us"], rows["wrong"]) == (10.0, "")
    assert codes["wrong"].startswith("wrong: out") and (codes["us"], codes["times_rows"]) == (None, None)
    assert len(found.wrong) == 2


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","spin_kernel(long)","lts__t_sector_hit_rate.pct","%","1.0"
"5","7","fill","gpu__time_duration.sum","ns","1,900"
"1","7","paged_attention","lts__t_sector_hit_rate.pct","%","43.70"
"1","7","paged_attention","gpu__time_duration.sum","us","159.1"
"2","7","spin_kernel(long)","lts__t_sector_hit_rate.pct","%","1.0"
"3","7","decode_rows","lts__t_sector_hit_rate.pct","%","2.5"
"4","7","merge_parts","lts__t_sector_hit_rate.pct","%","99"
==PROF== Disconnected
"""


def test_counters_are_read_from_what_ncu_prints() -> None:
    rows = counters.rows_of(NCU.splitlines())
    assert [(row["variant"], row["kernel"], row.get("l2_hit_percent")) for row in rows] == [
        ("baseline", "fill", None),
        ("baseline", "paged_attention", "43.70 %"),
        ("baseline ahead 1", "decode_rows", "2.5 %"),
        ("baseline ahead 1", "merge_parts", "99 %"),
    ]
    assert [row.get("time") for row in rows[:2]] == ["1,900 ns", "159.1 us"]
    assert counters.rows_of(["no kernels were profiled"]) == []
    assert dict(counters.summary(Found(rows=rows)))["counters, baseline"] == "time 159.1 us, l2_hit_percent 43.70 %"


def test_why_counters_are_missing(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters, "TOOLKIT", str(tmp_path))
    found = Found()
    counters.measure(bench, Budget(60.0), found)
    assert found.notes == [f"counters: ncu is neither in PATH nor in {tmp_path}"]
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n")
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    counters.measure(bench, Budget(60.0), found)
    assert "ERR_NVGPUCTRPERM" in found.notes[1] and not found.rows


def test_small_cases_are_compiled_in_the_place_of_large_ones() -> None:
    """Triton tells numbers that are 1, multiples of 16, and others apart; small ones are what large ones are."""
    counts: tuple[Callable[[Case], int], ...] = (
        lambda x: x.num_pages,
        lambda x: x.num_pages * x.batch,
        lambda x: 4 * x.num_pages,
    )
    contexts, batches = (528, 1024, 1536, 2048, 4608, 8704, 131_072), (1, 4, 16, 64)
    for case in (Case(model, context, batch) for model in MODELS for context in contexts for batch in batches):
        small = like(case)
        assert small.kv_bytes <= 300 << 20 and small.model == case.model
        for count in counts:
            assert 1 not in (count(case), count(small))
            assert (count(case) % ALIGNED == 0) == (count(small) % ALIGNED == 0)
    compile_one("cpu", like(Case(TINY, 64 * 18, 1)), gpu.Config(distance=1))
    Compilers(CPU).compile([(CASE, gpu.Config())], 0.0)


# -- the command -------------------------------------------------------------------------------------------------------


def two_rows(bench: Bench, budget: Budget, found: Found) -> None:
    entrants = Entrants(names={"flash": "rows"})
    times = bench.ground.in_turn({"ours": lambda _: None, "flash": lambda _: None}, 0.0)
    for context in (96, 192):
        case = Case(TINY, context, 2)
        found.rows.append(speed.row_of(bench, case, times, entrants) | {"error": 0.0, "wrong": ""})


def breaking(bench: Bench, budget: Budget, found: Found) -> None:
    found.rows.append({"model": "Tiny", "ratio": float("inf")})
    raise RuntimeError("CUDA error: an illegal memory access")


def nothing(_: Found) -> Iterator[tuple[str, str]]:
    return iter(())


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> dict[str, Section]:
    table = {"speed": speed.SECTION._replace(measure=two_rows), "broken": Section(breaking, 1, nothing)}
    monkeypatch.setattr(measured, "SECTIONS", table)
    return table


def options(out: Path | None, *names: str, with_tests: bool = False) -> measured.Options:
    return measured.Options(quick=False, json=True, with_tests=with_tests, sections=names, out=out)


def test_a_run_writes_its_files_and_ends_with_an_object(
    ground: Ground,
    sections: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measured, "run_tests", lambda log, _: Outcome(bool(log.write_text("log\n")), "30 passed"))
    code = measured.measure_and_report(options(tmp_path, "speed", with_tests=True), ["--json"], "found", lambda: ground)
    printed = capsys.readouterr()
    assert code == 0
    last = json.loads(printed.out.splitlines()[-1])
    assert json.loads((tmp_path / "kernels.json").read_text()) == last
    assert last["tests"] == {"passed": True, "told": "30 passed"} and last["failed"] is False
    assert last["machine"].startswith("Triton's interpreter") and last["gpu"]["l2_bytes"] == 1 << 10
    assert last["bandwidth"]["after"]["copy_gbps"] == pytest.approx(last["bandwidth"]["before"]["copy_gbps"])
    assert [row["context"] for row in last["sections"]["speed"]["rows"]] == [96, 192]
    picture = {"speed.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "speed.csv", "tests.log"} | picture
    with (tmp_path / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["us"] for row in rows] == ["10", "10"] and rows[0]["machine"].startswith("Triton's interpreter")
    assert "passed: 30 passed" in printed.err and "times the best peer" in printed.err


def test_a_section_that_fails_leaves_the_others(
    ground: Ground, sections: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured.measure_and_report(options(tmp_path, "broken", "speed"), [], "found", lambda: ground) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]
    assert found["broken"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "in breaking" in found["broken"]["traceback"]
    assert found["broken"]["rows"] == [{"model": "Tiny", "ratio": None}]
    assert len(found["speed"]["rows"]) == 2


def test_failed_tests_and_wrong_results_are_an_exit_code(ground: Ground) -> None:
    good = Report(RUN, "found", Outcome(True, "ok"), ground, {"speed": Found(rows=[{"wrong": ""}])})
    assert not good.failed
    assert Report(RUN, "found", Outcome(False, "1 failed"), ground).failed
    assert Report(RUN, "found", None, ground, {"speed": Found(rows=[{"wrong": "wrong: out"}])}).failed
    console = Console(file=StringIO(), width=120)
    Report(RUN, "found", Outcome(False, "1 failed"), ground).show(console, SECTIONS)
    assert isinstance(console.file, StringIO) and "FAILED: 1 failed" in console.file.getvalue()


def test_all_sections_together_write_few_files() -> None:
    files = 2 + sum(each.has_csv + (each.draw is not None) for each in SECTIONS.values())
    assert files <= MOST_FILES
    with pytest.raises(InputError, match="--section must be one of speed, "):
        measured.chosen(options(None, "sped"))
    quick = measured.Options(True, False, False, (), None)
    assert set(measured.chosen(quick)) < set(SECTIONS)


def test_a_commit_is_told_where_git_knows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told = measured.Options(True, False, False, (), None, "abc1234")
    monkeypatch.setattr(common, "commit", lambda: "unknown")
    assert measured.commit_of(told) == "abc1234 (as told)"
    assert measured.commit_of(measured.Options(True, False, False, (), None)) == "unknown"
    monkeypatch.setattr(common, "commit", lambda: "def5678+")
    with pytest.raises(InputError, match=r"git, which here says def5678\+"):
        measured.commit_of(told)


def test_pictures(ground: Ground, bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = Found()
    two_rows(bench, Budget(1.0), found)
    assert speed.SECTION.draw is not None and prefetch.SECTION.draw is not None
    speed.SECTION.draw(found.rows, RUN, tmp_path / "speed.png")
    case = Case(MODELS[0], 528, 64, torch.float16)
    times = ground.in_turn({str(variant): lambda _: None for variant in prefetch.VARIANTS[:-1]}, 0.0)
    prefetch.SECTION.draw(prefetch.rows_of(bench, case, times, {}), RUN, tmp_path / "paper.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_without_a_gpu_it_is_refused_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bootstrap, "ensure_native", lambda *_: pytest.fail("built for nothing"))
    assert command.main(["--quick"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: benchmarks.gpu needs a CUDA device") and "\n" not in told
    with pytest.raises(SystemExit):
        command.main(["--part", "lanes"])
    assert "invalid choice: 'lanes'" in capsys.readouterr().err


def test_gpu_tests_run_in_a_process_with_a_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "command", lambda: [sys.executable, "-c", "print('== 3 passed in 1s ==')"])
    assert suite.run_tests(tmp_path / "a.log", 30.0) == Outcome(True, "3 passed in 1s (exit code 0)")
    monkeypatch.setattr(suite, "command", lambda: [sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"])
    assert suite.run_tests(tmp_path / "b.log", 30.0) == Outcome(False, "1 failed (exit code 1)")
    waiting = "import time; print('begun', flush=True); time.sleep(60)"
    monkeypatch.setattr(suite, "command", lambda: [sys.executable, "-c", waiting])
    tested = suite.run_tests(tmp_path / "c.log", 1.0)
    assert not tested.passed and tested.told.startswith("did not end within 1 s")


def test_the_native_module_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "build", lambda: pytest.fail("it is there"))
    assert bootstrap.ensure_native("benchmarks.gpu", []) == "found"


def test_without_it_the_command_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        begun.append((arguments[1:], environment["PYTHONPATH"].split(os.pathsep)[0]))
        raise SystemExit

    monkeypatch.setattr(bootstrap, "find_spec", lambda _: None)
    monkeypatch.setattr(bootstrap, "build", lambda: None)
    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        bootstrap.ensure_native("benchmarks.gpu", ["--quick"])
    assert begun == [(["-m", "benchmarks.gpu", "--quick"], str(bootstrap._site()))]
    monkeypatch.setenv("PYTHONPATH", begun[0][1])
    with pytest.raises(UnavailableError, match="is not found in"):
        bootstrap.ensure_native("benchmarks.gpu", [])
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UnavailableError, match="cmake is not found"):
        bootstrap._program("cmake")


def test_a_bare_checkout_finds_its_source() -> None:
    """Without installed packages, and without a path to the source: benchmarks finds it beside itself."""
    code = "import benchmarks.gpu.bootstrap, tandemkv; print(tandemkv.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "src" / "tandemkv" / "__init__.py"


def test_help_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    assert "python -m benchmarks.gpu --part kernels --out DIR" in capsys.readouterr().out
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert section.Row is not None
