"""The demo's claims: the check holds and can fail, and the output says how the context came about."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tandemkv import machine
from tandemkv.cli import app
from tandemkv.demo import speed
from tandemkv.demo.recall import Answered, Recall
from tandemkv.errors import CapacityError


def test_the_check_holds_and_fails_when_a_far_page_is_withheld() -> None:
    found = speed.check_agreement(1024)
    assert found.far_pages > 0
    assert found.error <= found.tolerance < found.withheld_error
    assert found.holds


def test_json_of_a_short_run() -> None:
    done = CliRunner().invoke(app, ["demo", "--context", "2048", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["agrees"]
    assert found["prefilled"]
    assert found["far_bytes"] > 0
    assert found["ratio"] == pytest.approx(found["stock_ms"] / found["ours_ms"])


def test_a_context_that_stock_could_not_hold_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: machine.Available(3 << 30, "cgroup limit"))
    with pytest.raises(CapacityError, match=r"needs about 6\.00 GiB for 131072 tokens.*3\.00 GiB.*lower --context"):
        speed.run_demo(131_072, Console(quiet=True))


@pytest.mark.parametrize(
    ("told", "holds"),
    [
        (("12", "12", "34", "12", "34"), True),  # salience may be wrong: it cannot know what will be asked
        (("12", "34", "12", "12", "34"), False),  # ours is wrong
        (("12", "12.", "12", "12", "34"), False),  # ours is right, in other words than stock's
        (("12", "12", "12", "34", "34"), False),  # the verified one is wrong
        (("34", "34", "34", "34", "34"), False),  # the model is no judge
        (("12", "12", "12", "12", "12"), False),  # a window would do
    ],
)
def test_recall_holds_only_where_ours_is_stock_s_and_right_and_a_window_is_wrong(
    told: tuple[str, ...], holds: bool
) -> None:
    answers = tuple(Answered("", text, "12" in text, 1.0) for text in told)
    assert Recall(100, 90, "fact", "question", "12", 1, answers).holds is holds


@pytest.mark.parametrize(("prefilled", "words"), [(True, "prefilled from random tokens"), (False, "not prefilled")])
def test_the_table_says_how_the_context_came_about(prefilled: bool, words: str) -> None:
    agreement = speed.Agreement(1024, 3, stock_error=1e-6, error=1e-6, withheld_error=1e-2)
    found = speed.Demo(65_536, prefilled, 4.0, 3.0, 2.0, 1.0, 30.0, 0.1, 1 << 20, 1 << 30, agreement)
    console = Console(record=True, width=200)
    speed.print_demo(found, console)
    assert words in console.export_text()
