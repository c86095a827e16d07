"""A run goes on where it was stopped, counts what it should, and refuses what it cannot do."""

import gzip
import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from tandemkv import assets
from tandemkv.errors import InputError
from tandemkv.evaluate import run
from tandemkv.evaluate.ledger import Contestant, Ledger, Scores, contestants
from tandemkv.evaluate.prompts import FACTS_PER_QUESTION, Asked
from tandemkv.evaluate.report import bootstrap, draw, make_report, print_report
from tandemkv.evaluate.run import Settings, evaluate, read_forms, score, write_prompts
from tandemkv.evaluate.tasks import COUNTED, ROWS, TASKS, read_rows, read_tasks
from tests import models
from tests.integrations.agreement import attached

DENSE, WINDOW = Contestant("dense"), Contestant("window", 128)
TEXT = assets.held_out_text()[:60_000]
CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return attached(models.llama(vocab_size=300, max_position_embeddings=4096))


def asked_of(model: Any, settings: Settings, name: str = "tiny") -> Ledger:
    prompts = write_prompts(models.byte_tokenizer(), settings, model.config, CONSOLE)
    return evaluate(model, name, prompts, settings, CONSOLE)


def settings(out: Path, **changes: Any) -> Settings:
    base = Settings(("needle", "perplexity"), (DENSE, WINDOW), 900, TEXT, out, num_contexts=3, num_questions=2)
    return replace(base, **changes)


def test_a_run_keeps_every_score_and_asks_nothing_twice(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = asked_of(model, settings(tmp_path))
    forms = [("needle", "requests"), ("needle", "turns"), ("perplexity", "text")]
    expected = {(task, form, i, who) for task, form in forms for i in range(3) for who in (DENSE, WINDOW)}
    assert set(ledger.found) == expected
    assert all(len(scores.scores) == (2 if scores.task == "needle" else 1) for scores in ledger.found.values())
    monkeypatch.setattr(run, "SharedContexts", None)  # nothing is left to ask
    again = asked_of(model, settings(tmp_path))
    assert again.found == ledger.found


def test_a_run_that_was_cut_off_goes_on(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a line: that line is done again, and nothing before it."""
    whole = asked_of(model, settings(tmp_path)).found
    path = tmp_path / "scores.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:20])
    held: list[int] = []
    fill = run._fill

    def watched(ledger: Ledger, *rest: Any) -> None:
        held.append(len(ledger.found))
        fill(ledger, *rest)

    monkeypatch.setattr(run, "_fill", watched)
    again = asked_of(model, settings(tmp_path))
    assert held[0] == 7
    assert again.found.keys() == whole.keys()
    for key, scores in again.found.items():
        assert scores.scores == pytest.approx(whole[key].scores, abs=1e-6)
    assert len(path.read_text().splitlines()) == len(lines)


def test_scores_of_another_run_are_not_mixed_in(model: Any, tmp_path: Path) -> None:
    asked_of(model, settings(tmp_path, tasks=("needle",)))
    with pytest.raises(InputError, match=r"was made with length 900, this run has 800: give another --out"):
        asked_of(model, settings(tmp_path, length=800))
    with pytest.raises(InputError, match="was made with model 'tiny', this run has 'other'"):
        asked_of(model, settings(tmp_path), "other")


def test_scores_of_other_prompts_are_not_taken_over(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that writes something else under the same seed asks again."""
    one = settings(tmp_path, tasks=("needle",))
    before = asked_of(model, one)
    monkeypatch.setitem(FACTS_PER_QUESTION, "needle", 2)
    again = asked_of(model, one)
    assert again.found.keys() == before.found.keys()
    assert all(again.found[key].digest != before.found[key].digest for key in before.found)


@pytest.mark.parametrize("content", ["", "[]\n", "settings", '{"task": "needle"}'])
def test_a_ledger_that_is_none(model: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "scores.jsonl"
    if content.endswith("}"):
        asked_of(model, settings(tmp_path, tasks=("perplexity",)))
        content = path.read_text() + content + "\n"
    path.write_text(content)
    with pytest.raises(InputError, match=r"scores\.jsonl is damaged .*: delete it, or give another --out"):
        asked_of(model, settings(tmp_path, tasks=("perplexity",)))
    assert path.read_text() == content, "nothing that was there is harmed"


def test_an_out_that_cannot_hold_scores(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"scores cannot be kept in --out .*file \(File exists\): give another folder"):
        asked_of(model, settings(tmp_path / "file", tasks=("perplexity",)))
    ledger = asked_of(model, settings(tmp_path, tasks=("perplexity",)))
    ledger._path = Path("/dev/full")
    with pytest.raises(InputError, match="No space left on device"):
        ledger.add(Scores("needle", "turns", 0, "dense", None, (1.0,), ""))


def test_contexts_begin_as_the_tokenizer_begins_a_text(model: Any, tmp_path: Path) -> None:
    """Models that were trained with a first token of their own are asked with it; questions come without."""
    plain, begins = models.byte_tokenizer(), models.byte_tokenizer()
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)])
    begins.backend_tokenizer.post_processor = template
    expected, found = (write_prompts(each, settings(tmp_path), model.config, CONSOLE) for each in (plain, begins))
    for task, contexts in found.contexts.items():
        for context, other in zip(contexts, expected.contexts[task], strict=True):
            assert context.ids == (begins.bos_token_id, *other.ids)
            assert context.questions == other.questions


def test_all_prompts_are_written_before_anything_is_asked(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run, "SharedContexts", None)
    with pytest.raises(InputError, match="which is not shipped: give --rows FOLDER with it"):
        asked_of(model, settings(tmp_path, tasks=("needle", "kv_rows")))
    with pytest.raises(
        InputError, match=r"perplexity: a context and its questions take \d+ tokens, the model has 4096"
    ):
        asked_of(model, settings(tmp_path, tasks=("perplexity",), length=4000))


def test_every_task_runs(model: Any, tmp_path: Path) -> None:
    tasks = tuple(task for task in TASKS if task not in ROWS)
    one = settings(tmp_path, tasks=tasks, length=1500, num_contexts=2, num_questions=1)
    ledger = asked_of(model, one)
    assert {task for task, *_ in ledger.found} == set(tasks)
    report = make_report(ledger, [DENSE, WINDOW], tasks, one.forms)
    assert {row.task for row in report.rows} == set(tasks)
    print_report(report, CONSOLE)


def test_answers_are_scored_by_the_values_in_their_first_line() -> None:
    questions = [[Asked((), (), ("123", "77")), Asked((), (), ("123",))]]
    told = {0: " 123 and 77.", 1: "\n123.", 2: " 12\n123", 3: " 77"}
    assert score(questions, [[[0], [1]]], lambda ids: told[ids[0]]) == [(1.0, 1.0)]
    assert score(questions, [[[3], [2]]], lambda ids: told[ids[0]]) == [(0.5, 0.0)]


def ledger_of(tmp_path: Path, table: dict[tuple[str, str], dict[Contestant, list[list[float]]]]) -> Ledger:
    ledger = Ledger(tmp_path, {"length": 1024, "num_contexts": 4}, {})
    for (task, form), rows in table.items():
        for who, scores in rows.items():
            for context, of_context in enumerate(scores):
                ledger.add(Scores(task, form, context, who.system, who.budget_tokens, tuple(of_context), ""))
    return ledger


def test_only_tasks_that_dense_masters_count(tmp_path: Path) -> None:
    """Held-out formats never do, nor does perplexity."""
    good, bad, poor = [[1.0, 1.0]] * 4, [[0.0, 1.0]] * 4, [[1.0, 0.5]] * 4
    table = {
        ("needle", "requests"): {DENSE: good, WINDOW: bad},
        ("lines", "requests"): {DENSE: poor, WINDOW: bad},
        ("telephone", "requests"): {DENSE: good, WINDOW: good},
        ("perplexity", "text"): {DENSE: [[2.0], [3.0]] * 2, WINDOW: [[2.1], [3.1]] * 2},
    }
    tasks = tuple(task for task, _ in table)
    report = make_report(ledger_of(tmp_path, table), [DENSE, WINDOW], tasks, ("requests", "turns"))
    assert report.counted == [("needle", "requests")]
    assert report.averages[DENSE][0] == 1.0
    mean, loss = report.averages[WINDOW]
    assert loss is not None
    assert (mean, loss.mean, loss.low, loss.high) == (0.5, 0.5, 0.5, 0.5)
    told = report.to_dict()
    assert told["is_a_judge"] is False
    perplexity = [row for row in report.rows if row.task == "perplexity"]
    assert perplexity[0].score == pytest.approx(math.exp(2.5))
    assert perplexity[1].loss is not None
    assert perplexity[1].loss.mean == pytest.approx(math.expm1(0.1))
    assert report.num_counted_tasks == 1
    draw(report, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    print_report(report, CONSOLE)


def test_what_a_promise_cost_stands_in_the_report(tmp_path: Path) -> None:
    """The mean over contexts of the tasks that count; not where some scores were found before it was kept."""
    good, verified, other = [[1.0]] * 4, Contestant("tandem-verified", 410), Contestant("tandem-verified", 256)
    table = {(task, "requests"): {DENSE: good, verified: good, other: good} for task in ("needle", "kv")}
    ledger = ledger_of(tmp_path, table)
    shares = {"needle": (0.2, 0.4, 0.2, 0.4), "kv": (0.6, 0.8, 0.6, 0.8)}
    for task, context in product(shares, range(4)):
        key, share = (task, "requests", context, verified), shares[task][context]
        ledger.found[key] = replace(ledger.found[key], share_read=share, share_fallbacks=share / 10)
    report = make_report(ledger, [DENSE, verified, other], ("needle", "kv"), ("requests",))
    assert report.shares == {verified: pytest.approx((0.5, 0.05))}
    told = [each["shares_read_and_exact"] for each in report.to_dict()["averages"]]
    assert told == [None, report.shares[verified], None]
    console = Console(record=True, width=200)
    print_report(report, console)
    assert "tandem-verified 410: 50.0% of tokens read, 5.0% of heads attended exactly." in console.export_text()


def test_what_later_turns_lose(tmp_path: Path) -> None:
    """Only questions after the first, against the same questions asked alone; of tasks of which both forms count."""
    alone, turns = [[1.0, 1.0, 1.0]] * 4, [[0.0, 1.0, 0.0]] * 4
    table = {
        ("needle", "requests"): {DENSE: alone, WINDOW: alone},
        ("needle", "turns"): {DENSE: alone, WINDOW: turns},
        ("kv", "requests"): {DENSE: alone, WINDOW: [[0.0, 0.0, 0.0]] * 4},
    }
    ledger = ledger_of(tmp_path, table)
    assert make_report(ledger, [DENSE, WINDOW], ("needle", "kv"), ("requests", "turns")).later_turns == {}
    ledger.settings["num_questions"] = 3
    report = make_report(ledger, [DENSE, WINDOW], ("needle", "kv"), ("requests", "turns"))
    assert {who: (x.mean, x.low, x.high) for who, x in report.later_turns.items()} == {
        DENSE: (0.0, 0.0, 0.0),
        WINDOW: (0.5, 0.5, 0.5),
    }
    assert report.to_dict()["averages"][1]["lost_in_later_turns"] == [0.5, 0.5, 0.5]
    console = Console(record=True, width=200)
    print_report(report, console)
    told = "window 128: 50.0: 50.0 to 50.0 points lost by questions after the first of a conversation."
    assert told in console.export_text()


def test_a_report_is_about_this_run(tmp_path: Path) -> None:
    """Other budgets, tasks and forms in the ledger, and a task that is only half done, change nothing."""
    good, bad = [[1.0]] * 4, [[0.0]] * 4
    other = Contestant("window", 256)
    table = {
        ("needle", "requests"): {DENSE: good, WINDOW: bad, other: good},
        ("needle", "turns"): {DENSE: good, WINDOW: good},
        ("kv", "requests"): {DENSE: good, other: bad},
        ("mqar", "requests"): {DENSE: good[:2], WINDOW: bad[:1]},
    }
    report = make_report(ledger_of(tmp_path, table), [DENSE, WINDOW], ("needle", "kv", "mqar"), ("requests",))
    assert [(row.task, row.contestant, row.score) for row in report.rows] == [
        ("needle", DENSE, 1.0),
        ("needle", WINDOW, 0.0),
    ]
    assert {who: mean for who, (mean, _) in report.averages.items()} == {DENSE: 1.0, WINDOW: 0.0}


def test_the_forms_of_a_task_are_no_evidence_of_their_own(tmp_path: Path) -> None:
    """Two forms with the same losses in the same contexts: the average's interval is that of one of them."""
    rng = np.random.default_rng(5)
    dense = [[1.0] * 10] * 4
    window = [list(map(float, rng.random(10) < share)) for share in (0.2, 0.9, 0.5, 0.4)]
    one = {("needle", "requests"): {DENSE: dense, WINDOW: window}}
    both = {**one, ("needle", "turns"): {DENSE: dense, WINDOW: window}}
    found = [
        make_report(ledger_of(tmp_path / name, table), [DENSE, WINDOW], ("needle",), ("requests", "turns"))
        for name, table in (("one", one), ("both", both))
    ]
    assert found[0].averages[WINDOW] == found[1].averages[WINDOW]


def test_intervals_cover_as_they_say() -> None:
    """The true mean of 40 normal losses lies inside in 95 % of 200 cases, within four standard errors of that; and
    contexts, not questions, are what is drawn again."""
    rng = np.random.default_rng(1)
    found = [bootstrap(rng.normal(0.3, 0.2, 40)) for _ in range(200)]
    covered = sum(each.low <= 0.3 <= each.high for each in found) / len(found)
    assert 0.95 - 0.07 < covered < 0.95 + 0.05
    width = np.mean([each.high - each.low for each in found])
    assert width == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(40), rel=0.1)
    two_tasks = [bootstrap(rng.normal(0.3, 0.2, (2, 40))) for _ in range(50)]
    assert np.mean([each.high - each.low for each in two_tasks]) == pytest.approx(width / math.sqrt(2), rel=0.1)


def test_intervals_hold_their_mean_where_nothing_differs() -> None:
    """One context in each of six tasks: sums in another order are off by a rounding, and no error bar is negative."""
    rng = np.random.default_rng(3)
    for losses in rng.integers(0, 5, (100, 6, 1)) / 4:
        found = bootstrap(losses)
        assert found.low <= found.mean <= found.high


def test_published_rows(tmp_path: Path) -> None:
    pairs = [[f"key{i}-{j}", f"value{i}-{j}"] for i in (1, 2) for j in range(6)]
    rows = [{"ordered_kv_records": pairs, "key": "key1-3", "value": "value1-3"}] * 2
    (tmp_path / ROWS["kv_rows"].file_name).write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    records = "".join(f"line w-{i}: REGISTER_CONTENT is <{100 + i}>\n" for i in range(8))
    prompt = f"Now the record start:\n\n{records}\nNow the record is over. Tell me what is in line w-3? "
    row = {"prompt": prompt, "correct_line": "line w-3: REGISTER_CONTENT is <103>\n"}
    (tmp_path / ROWS["lines_rows"].file_name).write_text(json.dumps(row) + "\n")

    def encode(text: str) -> list[int]:
        return list(text.encode())

    for task, num_contexts, own in (("kv_rows", 2, "value1-3"), ("lines_rows", 1, "103")):
        contexts = read_rows(task, tmp_path, encode, num_contexts, 3)
        assert len(contexts) == num_contexts
        for context in contexts:
            assert context.questions[0].values == (own,)
            assert len({asked.values for asked in context.questions}) == 3
            assert all(asked.values[0] in bytes(context.ids).decode() for asked in context.questions)
    assert bytes(contexts[0].ids).decode().endswith("Now the record is over.")
    with pytest.raises(InputError, match=r"has 1 rows, 2 were asked for: lower --contexts"):
        read_rows("lines_rows", tmp_path, encode, 2, 3)
    with pytest.raises(InputError, match=r"has 8 records, 9 questions were asked for: lower --questions"):
        read_rows("lines_rows", tmp_path, encode, 1, 9)
    with pytest.raises(InputError, match=r"kv_rows reads kv-retrieval-75_keys.jsonl.gz, .* give --rows FOLDER"):
        read_rows("kv_rows", None, encode, 1, 1)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: contestants(["dense", "best"], [512]), "unknown system 'best': the known ones are dense, window"),
        (lambda: contestants(["window"], []), "system 'window' needs a budget, in tokens per KV head: give --budget"),
        (lambda: contestants(["window"], [95]), "budget_tokens must be at least 96: 16 for the blocks of the first 4"),
        (lambda: read_tasks("needle,haystack", None), "unknown task 'haystack': the known ones are perplexity, needle"),
        (lambda: read_forms("request"), "forms are requests, turns, named with commas, got 'request'"),
        (lambda: settings(Path(), length=100), "--length must be at least 128, got 100"),
        (lambda: settings(Path(), num_contexts=1), "--contexts must be at least 2, got 1"),
    ],
)
def test_refusals(make: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()


def test_names_of_tasks() -> None:
    assert read_tasks("counted", None) == COUNTED
    assert set(read_tasks("all", None)) == set(TASKS) - set(ROWS)
    assert read_tasks("all", Path()) == TASKS
    assert read_tasks("lines,needle,lines", None) == ("lines", "needle")


def test_a_text_that_is_too_short(model: Any, tmp_path: Path) -> None:
    long = settings(tmp_path, length=59_900, tasks=("perplexity",))
    with pytest.raises(InputError, match="the text has 60000 tokens, a context asks for 60157: give a longer text"):
        asked_of(model, long)


def test_formats_of_far_tokens_take_part_beside_dense(model: Any, tmp_path: Path) -> None:
    """Each reads the contexts into a cache of its own; scores are kept by format, and a second run asks nothing."""
    found = contestants(["dense"], [], ["int8", "model:64,int8", "int8"])
    int8, mixed = Contestant("dense", None, "int8"), Contestant("dense", None, "model:64,int8")
    assert found == [DENSE, int8, mixed]
    some = replace(settings(tmp_path), contestants=tuple(found), tasks=("perplexity",))
    ledger = asked_of(model, some)
    assert {who for *_, who in ledger.found} == {DENSE, int8, mixed}
    losses = {who: [ledger.found["perplexity", "text", i, who].scores[0] for i in range(3)] for who in found}
    assert len({tuple(each) for each in losses.values()}) == 3
    assert losses[int8] == pytest.approx(losses[DENSE], rel=0.01)
    report = make_report(asked_of(model, some), found, ("perplexity",), ("requests",))
    assert [row.contestant for row in report.rows] == found
    assert [row.loss is None for row in report.rows] == [True, False, False]
    with pytest.raises(InputError, match="expected far_dtype as model, int8, int4"):
        contestants(["dense"], [], ["int5"])
