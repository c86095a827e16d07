"""What a system answers against what a token of it takes: accuracy that was measured before, times of now."""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import common, plot, sparse
from tandemkv import machine

machine.set_passive_spin()

import torch  # noqa: E402

import tandemkv.integrations.transformers as tandem  # noqa: E402
from tandemkv import assets  # noqa: E402
from tandemkv.cache import KVCache  # noqa: E402
from tandemkv.evaluate.answers import NEAR_TOKENS, PAGE_SIZE, answer_greedily  # noqa: E402
from tandemkv.evaluate.ledger import Contestant  # noqa: E402
from tandemkv.evaluate.tasks import COUNTED  # noqa: E402
from tandemkv.integrations.transformers.folders import load_model, quieten, read_config, read_tokenizer  # noqa: E402
from tandemkv.select import Sparse  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE = "benchmarks.tradeoff"
SCORES = common.RESULTS / "eval-sparse" / "scores.jsonl"
FAR_BYTES = 1 << 30
HELP = """Accuracy against time per token, for every system whose answers were kept by `tandemkv eval`.

Accuracy: the mean over the counted tasks of questions that are asked alone (requests), of the contestants that have all
of them. Times, in turn, medians: of a token of the shipped model behind a context as long as those of the evaluation;
and of one layer of 32:8 heads x 128 at 128K from Python, from memory, with the same share of the context as its
budget, on keys whose widths fall as those of trained models do. The second is what a long context costs in a model that
people run; its answers are not known here, and those of the shipped model stand in for them. Two pairs flatter: hgca
reads every run of a question exactly, and its time is of a decoded token, which is not; and tandem-verified reads most
of the shipped model's tokens, but a sixth of these keys.

Example: python -m benchmarks.tradeoff --scores benchmarks/results/eval-sparse/scores.jsonl
"""


@dataclass(frozen=True)
class Row:
    """A contestant. accuracy: 0 to 1; model_ms: of a token of the shipped model; layer_ms: of a step of one layer."""

    system: str
    budget_tokens: int | None
    accuracy: float
    num_answers: int
    context: int
    model_ms: float
    layer_context: int
    layer_budget: int | None
    layer_ms: float


class Judged(NamedTuple):
    """What an evaluation found of one contestant, over all counted tasks."""

    who: Contestant
    accuracy: float
    num_answers: int


def read_accuracy(path: Path) -> tuple[int, list[Judged]]:
    """Tokens of a context, and those of whom every context of every counted task was asked, dense first."""
    if not path.exists():
        raise SystemExit(f"error: {path} is not there: run tandemkv eval --out {path.parent}")
    lines = path.read_text().splitlines()
    settings, *rows = (json.loads(line) for line in lines if line.endswith("}"))  # a last line may have been cut off
    asked = [row for row in rows if row["form"] == "requests" and row["task"] in COUNTED]
    # Scores of other prompts may stand in the file: those of the last run of dense count.
    digests = {(row["task"], row["context"]): row["digest"] for row in asked if row["system"] == "dense"}
    found: dict[Contestant, dict[str, dict[int, list[float]]]] = {}
    for row in asked:
        who, task, context = Contestant(row["system"], row["budget_tokens"]), row["task"], row["context"]
        if digests.get((task, context)) == row["digest"]:
            found.setdefault(who, {}).setdefault(task, {})[context] = row["scores"]
    whole = {
        who: {task: [score for scores in tasks[task].values() for score in scores] for task in COUNTED}
        for who, tasks in found.items()
        if all(len(tasks.get(task, ())) == settings["num_contexts"] for task in COUNTED)
    }
    judged = [
        Judged(who, fmean(map(fmean, tasks.values())), sum(map(len, tasks.values()))) for who, tasks in whole.items()
    ]
    if not any(one.who.sparse is None for one in judged):
        raise SystemExit(f"error: {path} does not hold every counted task of dense: {', '.join(COUNTED)}")
    return settings["length"], sorted(judged, key=lambda one: (one.who.sparse is not None, one.who.system))


class ShippedModel:
    """The shipped model behind a context of its novel, as an evaluation holds it; contestants go on from forks."""

    def __init__(self, num_tokens: int) -> None:
        quieten()
        self._model: PreTrainedModel = load_model(assets.MODEL, read_config(assets.MODEL, "bfloat16").dtype)
        ids = read_tokenizer(assets.MODEL)(assets.held_out_text()[: 8 * num_tokens], return_tensors="pt").input_ids
        context, self._token = ids[:, :num_tokens], ids[:, num_tokens : num_tokens + 1]
        config = self._model.config.get_text_config(decoder=True)
        self._cache = tandem.TieredCache(config, NEAR_TOKENS, FAR_BYTES, page_size=PAGE_SIZE)
        answer_greedily(self._model, self._cache, context, 1)

    def fork(self, sparse: Sparse | None) -> tandem.TieredCache:
        """The same context under a system."""
        fork = copy.deepcopy(self._cache)
        fork.kv.sparse = sparse
        return fork

    @torch.inference_mode()
    def step(self, cache: tandem.TieredCache) -> None:
        """One token."""
        self._model(self._token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def model_times(judged: Sequence[Judged], num_tokens: int, budget_s: float) -> dict[str, float]:
    """Milliseconds of a token of the shipped model, by contestant."""
    model = ShippedModel(num_tokens)
    caches = {_name(one.who): model.fork(one.who.sparse) for one in judged}
    for cache in caches.values():
        for _ in range(3):  # an observer looks at everything first
            model.step(cache)
    steps = {name: common.in_ms(partial(model.step, cache)) for name, cache in caches.items()}
    return common.medians_in_turn(steps, budget_s)


def layer_times(judged: Sequence[Judged], num_tokens: int, context: int, budget_s: float) -> dict[str, float]:
    """Milliseconds of a step of one layer behind so many tokens, with the same shares of them as budgets."""
    layer = sparse.Layer(sparse.random_tokens(context, "graded"), context)
    caches = {}
    for one in judged:
        mode, budget = one.who.sparse, scaled(one.who, num_tokens, context)
        caches[_name(one.who)] = layer.fork(
            None if mode is None or budget is None else replace(mode, budget_tokens=budget)
        )
    for cache in caches.values():
        for _ in range(3):
            layer.step(cache)

    def cold_ms(cache: KVCache) -> float:
        return layer.timed_step(cache, is_cold=True)[1]

    return common.medians_in_turn({name: partial(cold_ms, cache) for name, cache in caches.items()}, budget_s)


def scaled(who: Contestant, num_tokens: int, context: int) -> int | None:
    """A budget as the same share of another context, at least what a layer keeps near twice."""
    if who.budget_tokens is None:
        return None
    return max(2 * sparse.NEAR_TOKENS, who.budget_tokens * context // num_tokens)


def _name(who: Contestant) -> str:
    return f"{who.system} {who.budget_tokens or ''}".strip()


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The table for people."""
    table = Table(title=f"accuracy, and what a token takes; {rows[0].num_answers} answers each", title_justify="left")
    for heading in ("contestant", "values found, %", "model, ms", "layer, ms", "layer, x dense"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for row in rows:
        name = _name(Contestant(row.system, row.budget_tokens))
        speedup = rows[0].layer_ms / row.layer_ms
        table.add_row(name, f"{100 * row.accuracy:.1f}", f"{row.model_ms:.1f}", f"{row.layer_ms:.2f}", f"{speedup:.1f}")
    console.print(table)


def main() -> None:
    """Run, print, draw, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument("--scores", type=Path, default=SCORES, help=f"of an evaluation (default: {SCORES})")
    arguments = parser.parse_args()
    console = Console(stderr=arguments.json)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    num_tokens, judged = read_accuracy(arguments.scores)
    context = 16_384 if arguments.quick else sparse.CONTEXT
    if arguments.quick:  # dense and two more
        judged = judged[:3]
    model_ms = model_times(judged, num_tokens, 2.0 if arguments.quick else 60.0)
    layer_ms = layer_times(judged, num_tokens, context, 2.0 if arguments.quick else 60.0)
    rows = []
    for who, accuracy, num_answers in judged:
        times = num_tokens, model_ms[_name(who)], context, scaled(who, num_tokens, context), layer_ms[_name(who)]
        rows.append(Row(who.system, who.budget_tokens, accuracy, num_answers, *times))
    print_rows(rows, console)
    if not arguments.quick or arguments.save:
        common.append_rows(common.RESULTS / "tradeoff.csv", [asdict(row) for row in rows], run)
        console.print(plot.draw_tradeoff([asdict(row) for row in rows], run, common.RESULTS / "tradeoff.png"))
    if arguments.json:
        common.print_json({**asdict(rows[-1]), "rows": [asdict(row) for row in rows], **asdict(run)})


if __name__ == "__main__":
    main()
