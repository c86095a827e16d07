"""The benchmarks' contract: what the last line says, and that a wrong result is never timed."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attend, common, contest, plot
from benchmarks.peers import PEERS, Call, PeerUnavailableError, Problem
from tandemkv.kernels import cpu
from tandemkv.types import Partial

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
    monkeypatch.setattr(attend, "spinning_peers_ms", lambda: {"torch_sdpa": 1.0})
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
        out = cpu.attend(made.problem.q, [paged], scale=made.problem.scale, causal=False).out
        assert made.judge.error(out) <= made.judge.tolerance


def test_one_wrong_page_of_ours_is_not_timed(rules: contest.Rules) -> None:
    made = contest.prepare(SHAPE, rules)
    made.copies.paged[0].page_table[0, 0, 3] = made.copies.paged[1].page_table[0, 0, 4]
    with pytest.raises(contest.WrongResultError, match="tolerance"):
        made.row(1)


def test_wrong_result_of_ours_is_an_exit_status(
    rules: contest.Rules, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attend, "QUICK", {SHAPE: (1,)})
    monkeypatch.setattr(attend, "QUICK_RULES", rules)
    monkeypatch.setattr(cpu, "attend", lambda q, *_, **__: Partial(torch.zeros(q.shape), torch.zeros(q.shape[:3])))
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
