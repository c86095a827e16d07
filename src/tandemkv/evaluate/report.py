"""What a run found: a table, averages with intervals, and one picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tandemkv.evaluate.formats import HELD_OUT_OF_TRAINING
from tandemkv.evaluate.ledger import Contestant, Ledger
from tandemkv.evaluate.tasks import PERPLEXITY
from tandemkv.systems import SYSTEMS

COUNTS_FROM = 0.9  # a task counts in averages where dense attention answers this share
LEAST_COUNTED = 4
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, bootstrapped over contexts."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A task in a form, for one contestant. `loss` is dense minus this, over the same questions; None for dense.

    For perplexity `score` is the perplexity, and `loss` by how much of dense's it is higher.
    """

    task: str
    form: str
    contestant: Contestant
    score: float
    num_questions: int
    loss: Interval | None
    counts: bool


@dataclass(frozen=True)
class Report:
    """Rows of all tasks, and for each contestant the mean over the tasks that count. shares: of verified ones, tokens
    read and heads attended exactly, over the same tasks. later_turns: what questions after the first of a conversation
    lose to the same questions asked first, each alone behind the context."""

    settings: dict[str, Any]
    rows: list[Row]
    counted: list[tuple[str, str]]
    averages: dict[Contestant, tuple[float, Interval | None]]
    shares: dict[Contestant, tuple[float, float]]
    later_turns: dict[Contestant, Interval]

    @property
    def num_counted_tasks(self) -> int:
        """Forms of a task are one task."""
        return len({task for task, _ in self.counted})

    @property
    def is_a_judge(self) -> bool:
        """Whether enough tasks count for averages to mean something."""
        return self.num_counted_tasks >= LEAST_COUNTED

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "settings": self.settings,
            "rows": [
                {
                    "task": row.task,
                    "form": row.form,
                    **_name(row.contestant),
                    "score": row.score,
                    "num_questions": row.num_questions,
                    "loss": _numbers(row.loss),
                    "counts": row.counts,
                }
                for row in self.rows
            ],
            "counted": [f"{task}/{form}" for task, form in self.counted],
            "is_a_judge": self.is_a_judge,
            "averages": [
                {
                    **_name(who),
                    "score": mean,
                    "loss": _numbers(loss),
                    "shares_read_and_exact": self.shares.get(who),
                    "lost_in_later_turns": _numbers(self.later_turns.get(who)),
                }
                for who, (mean, loss) in self.averages.items()
            ],
        }


def make_report(
    ledger: Ledger, contestants: list[Contestant], tasks: tuple[str, ...], forms: tuple[str, ...]
) -> Report:
    """Compare what these contestants, dense among them, have answered in these tasks and forms, whatever else the
    ledger holds; what is not complete is left out."""
    tables = _tables(ledger, contestants, tasks, forms)
    rows, counted = [], []
    for (task, form), by_contestant in tables.items():
        dense = by_contestant[Contestant("dense")]
        counts = task != PERPLEXITY and task not in HELD_OUT_OF_TRAINING and float(dense.mean()) >= COUNTS_FROM
        if counts:
            counted.append((task, form))
        rows += [_row((task, form), who, scores, dense, counts) for who, scores in by_contestant.items()]
    averages = {who: _average({key: tables[key] for key in counted}, who) for who in contestants if counted}
    shares = {who: found for who in contestants if (found := _shares(ledger, counted, who)) is not None}
    both = {task: [tables[task, form] for form in _FORMS] for task, _ in counted if {*_keys(task)} <= {*counted}}
    later = {who: _later_turns(both, who) for who in contestants if both and ledger.num_questions > 1}
    return Report(ledger.settings, rows, counted, averages, shares, later)


def print_report(report: Report, console: Console) -> None:
    """The table for people: a row for a task, a column for a contestant."""
    contestants = list(dict.fromkeys(row.contestant for row in report.rows))
    length = report.settings["length"]
    table = Table(title=f"Share of values found in the answers, %, after {length} tokens", title_justify="left")
    table.add_column("task", no_wrap=True)
    for contestant in contestants:
        table.add_column(_label(contestant), justify="right")
    by_task: dict[tuple[str, str], dict[Contestant, Row]] = {}
    for row in report.rows:
        by_task.setdefault((row.task, row.form), {})[row.contestant] = row
    for (task, form), cells in by_task.items():
        counts = any(row.counts for row in cells.values())
        name = task if task == PERPLEXITY else f"{task}, {form}{'' if counts else ' *'}"
        table.add_row(name, *(_cell(cells.get(who)) for who in contestants))
    if report.averages:
        table.add_section()
        table.add_row("mean of those that count", *(_told(*report.averages[who]) for who in contestants))
    console.print(table)
    console.print(
        f"In brackets: points lost to dense (of perplexity: % gained), with a 95 % interval over contexts. * does not "
        f"count: dense is below {COUNTS_FROM:.0%}, or the format was held out of training. Tasks that count: "
        f"{report.num_counted_tasks}."
    )
    for who, (read, exact) in report.shares.items():
        console.print(f"{_label(who)}: {read:.1%} of tokens read, {exact:.1%} of heads attended exactly.")
    for who, loss in report.later_turns.items():
        console.print(f"{_label(who)}: {_in_percent(loss)} points lost by questions after the first of a conversation.")
    for system in dict.fromkeys(who.system for who in contestants):
        differs = SYSTEMS[system].where_it_differs
        console.print(f"{system}: {SYSTEMS[system].about}{f'; {differs}' if differs else ''}.")
    if not report.is_a_judge:
        console.print(f"[yellow]Fewer than {LEAST_COUNTED} tasks count: this run judges nothing.[/yellow]")


def draw(report: Report, path: Path) -> None:
    """Accuracy against budget, a line for each system, dense as the ceiling. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    ceiling, _ = report.averages[Contestant("dense")]
    axes.axhline(100 * ceiling, color="0.3", linestyle="--", label="dense")
    lines: dict[str, list[tuple[int, float, Interval]]] = {}
    for who, (mean, loss) in report.averages.items():
        if who.budget_tokens is not None and loss is not None:
            lines.setdefault(who.system, []).append((who.budget_tokens, mean, loss))
    for system, points in lines.items():
        budgets, means, losses = zip(*sorted(points), strict=True)
        low = [100 * (loss.high - loss.mean) for loss in losses]
        high = [100 * (loss.mean - loss.low) for loss in losses]
        axes.errorbar(budgets, [100 * mean for mean in means], yerr=(low, high), marker="o", capsize=3, label=system)
    axes.set_xscale("log", base=2)
    ticks = sorted({who.budget_tokens for who in report.averages if who.budget_tokens is not None})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel("budget, tokens per KV head")
    axes.set_ylabel("values found, %")
    axes.set_ylim(0, 102)
    told = f"{report.num_counted_tasks} tasks after {report.settings['length']:,} tokens"
    axes.set_title(f"{told}; bars: 95 % intervals of what is lost", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def bootstrap(losses: np.ndarray) -> Interval:
    """The mean of losses `[num_contexts]`, or of tasks `[num_tasks, num_contexts]` averaged, and its 95 %.

    Contexts of different tasks are different contexts. The forms of a task share theirs: they are one row.
    """
    rng = np.random.default_rng(0)
    losses = np.atleast_2d(losses)
    means = np.zeros(RESAMPLES)
    for row in losses:
        means += row[rng.integers(0, len(row), (RESAMPLES, len(row)))].mean(1) / len(losses)
    mean, (low, high) = float(losses.mean()), np.quantile(means, (0.025, 0.975))
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))  # equal losses differ by rounding


_Table = dict[Contestant, np.ndarray]
_FORMS = "requests", "turns"


def _keys(task: str) -> list[tuple[str, str]]:
    return [(task, form) for form in _FORMS]


def _later_turns(both: dict[str, list[_Table]], who: Contestant) -> Interval:
    """Of tables of each task, its requests and its turns."""
    losses = [(alone[who][:, 1:] - in_turns[who][:, 1:]).mean(1) for alone, in_turns in both.values()]
    return bootstrap(np.array(losses))


def _tables(
    ledger: Ledger, contestants: list[Contestant], tasks: tuple[str, ...], forms: tuple[str, ...]
) -> dict[tuple[str, str], _Table]:
    """Scores `[num_contexts, num_questions]` by task and form, then by contestant; contexts in order."""
    tables: dict[tuple[str, str], _Table] = {}
    for task, form in [(name, form) for name in tasks for form in (("text",) if name == PERPLEXITY else forms)]:
        found: _Table = {}
        for who in contestants:
            keys = [(task, form, index, who) for index in range(ledger.num_contexts)]
            if all(key in ledger.found for key in keys):
                found[who] = np.array([ledger.found[key].scores for key in keys])
        if len(found) == len(contestants):
            tables[task, form] = found
    return tables


def _row(key: tuple[str, str], who: Contestant, scores: np.ndarray, dense: np.ndarray, counts: bool) -> Row:
    task, form = key
    mean = float(scores.mean())
    if task == PERPLEXITY:
        ratio = bootstrap((scores - dense).mean(1))
        loss = Interval(*(math.expm1(x) for x in (ratio.mean, ratio.low, ratio.high)))
        mean = math.exp(mean)
    else:
        loss = bootstrap((dense - scores).mean(1))
    return Row(task, form, who, mean, scores.size, loss if who != Contestant("dense") else None, counts)


def _average(tables: dict[tuple[str, str], _Table], who: Contestant) -> tuple[float, Interval | None]:
    """Of tasks; the forms of each are averaged first."""
    dense = Contestant("dense")
    means, losses = [], []
    for task in dict.fromkeys(task for task, _ in tables):
        forms = [table for (other, _), table in tables.items() if other == task]
        means.append(np.mean([table[who].mean() for table in forms]))
        losses.append(np.mean([(table[dense] - table[who]).mean(1) for table in forms], axis=0))
    return float(np.mean(means)), None if who == dense else bootstrap(np.array(losses))


def _shares(ledger: Ledger, counted: list[tuple[str, str]], who: Contestant) -> tuple[float, float] | None:
    """Mean shares of tokens read and of fallbacks; None where some or all were not told."""
    keys = [(*key, index, who) for key in counted for index in range(ledger.num_contexts)]
    found = [(ledger.found[key].share_read, ledger.found[key].share_fallbacks) for key in keys]
    if not found or any(read is None for read, _ in found):
        return None
    read, exact = np.mean(np.array(found, dtype=float), axis=0)
    return float(read), float(exact)


def _name(who: Contestant) -> dict[str, object]:
    return {"system": who.system, "budget_tokens": who.budget_tokens, "far_dtype": who.far_dtype}


def _numbers(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.mean, interval.low, interval.high]


def _label(who: Contestant) -> str:
    told = who.system if who.budget_tokens is None else f"{who.system} {who.budget_tokens}"
    return told if who.far_dtype is None else f"{told}, {who.far_dtype}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.task == PERPLEXITY:
        return f"{row.score:.2f}" + ("" if row.loss is None else f" ({_in_percent(row.loss, '+')})")
    return _told(row.score, row.loss)


def _told(score: float, loss: Interval | None) -> str:
    told = f"{100 * score:.1f}"
    return told if loss is None else f"{told} ({_in_percent(loss)})"


def _in_percent(loss: Interval, sign: str = "") -> str:
    return f"{100 * loss.mean:{sign}.1f}: {100 * loss.low:{sign}.1f} to {100 * loss.high:{sign}.1f}"
