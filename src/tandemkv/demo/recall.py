"""The demo's first half: the shipped model is asked for a number planted in a novel long before its near tokens."""

import copy
import random
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import tandemkv.integrations.transformers as tandem
from tandemkv import assets
from tandemkv.demo.speed import decode_in_turn, next_logits
from tandemkv.evaluate.answers import answer_greedily
from tandemkv.evaluate.formats import FORMATS
from tandemkv.evaluate.vocabulary import Vocabulary
from tandemkv.integrations.transformers.folders import load_model, quieten, read_config, read_tokenizer
from tandemkv.select import Tally
from tandemkv.selection import sparse_mode
from tandemkv.types import format_bytes

NEAR_TOKENS = 512
BUDGET = 1024
BESIDE = {"hgca": "salience (HGCA)", "tandem-verified": "verified", "window": "window"}
NEW_TOKENS = 10
DEPTH = 0.2  # of the text stands before the fact


@dataclass(frozen=True)
class Answered:
    """What a contestant said, and the median milliseconds of a token behind the question. verified: the estimated error
    and what was read for it, where there is a promise."""

    name: str
    text: str
    is_right: bool
    token_ms: float
    verified: dict[str, float] | None = None


@dataclass(frozen=True)
class Recall:
    """The fact, the question and the answers. distance: tokens between the fact and the question."""

    num_tokens: int
    distance: int
    fact: str
    question: str
    value: str
    far_bytes: int
    answers: tuple[Answered, ...]

    @property
    def holds(self) -> bool:
        """Stock and tandemkv agree and are right, so is the verified tail, and a window of the same text is not."""
        stock, exact, _, verified, window = self.answers
        return stock.text == exact.text and exact.is_right and verified.is_right and not window.is_right

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        return {**asdict(self), "holds": self.holds}


@dataclass(frozen=True)
class _Prompt:
    """Token ids `[1, num_tokens]` of the text with the fact in it, and of the question."""

    context: Tensor
    question: Tensor
    distance: int
    fact: str
    asked: str
    value: str


def ask_far_back(num_tokens: int, console: Console) -> Recall:
    """Read `num_tokens` of a novel with a fact in it, and ask for the fact: stock, tandemkv exact, and sparse ones."""
    quieten()
    with console.status(f"reading {num_tokens:,} tokens five times"):
        config = read_config(assets.MODEL, "float32")
        tokenizer = read_tokenizer(assets.MODEL)
        ours = load_model(assets.MODEL, config.dtype)
        stock = tandem.detach(copy.deepcopy(ours))
        prompt = _write_prompt(tokenizer, num_tokens)
        contestants: list[tuple[str, PreTrainedModel, Any]] = [
            ("transformers (DynamicCache, sdpa)", stock, DynamicCache(config=stock.config)),
            (f"tandemkv, exact, {NEAR_TOKENS} tokens near", ours, _cache(ours, num_tokens)),
        ]
        for system, label in BESIDE.items():
            cache = _cache(ours, num_tokens)
            cache.kv.sparse = sparse_mode(system, BUDGET)  # before the text is read: one of them watches
            contestants.append((f"tandemkv, {label}, {BUDGET}", ours, cache))
        for _, model, cache in contestants:
            next_logits(model, cache, prompt.context)
        said = [_answer(model, cache, prompt.question, tokenizer) for _, model, cache in contestants]
        times, _ = decode_in_turn({name: (model, cache) for name, model, cache in contestants})
    answers = tuple(
        Answered(name, text, prompt.value in text, statistics.median(times[name]), _promised(cache))
        for (name, _, cache), text in zip(contestants, said, strict=True)
    )
    far_bytes = contestants[1][2].use()[1].used_bytes
    return Recall(num_tokens, prompt.distance, prompt.fact, prompt.asked, prompt.value, far_bytes, answers)


def print_recall(recall: Recall, console: Console) -> None:
    """The question and a row for each answer, for people."""
    console.print(
        f"[bold]{recall.num_tokens:,} tokens of Persuasion[/bold], and {recall.distance:,} tokens before the end:"
        f"[cyan]{recall.fact}[/cyan]"
    )
    table = Table(title=recall.question.strip(), title_justify="left")
    for heading in ("", "answer", "", "ms per token", "estimated error"):
        table.add_column(heading, justify="right" if heading in ("ms per token", "estimated error") else "left")
    for answer in recall.answers:
        verdict = "[green]right[/green]" if answer.is_right else "[red]wrong[/red]"
        error = "" if answer.verified is None else f"{answer.verified['estimated_error_mean']:.1%}, at most "
        error += "" if answer.verified is None else f"{answer.verified['estimated_error_max']:.1%}"
        table.add_row(answer.name, escape(answer.text.strip()), verdict, f"{answer.token_ms:.1f}", error)
    console.print(table)
    console.print(f"{format_bytes(recall.far_bytes)} of its keys and values lay far.")


def _write_prompt(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> _Prompt:
    text = assets.held_out_text()
    episode = FORMATS["needle"](Vocabulary.of_text(text, held_out=True), random.Random(0), 1, 1)
    fact, question = episode.facts[0], episode.questions[0]
    fact_ids, question_ids = (tokenizer(part).input_ids for part in (fact, question.prompt))
    novel = tokenizer(text).input_ids[: num_tokens - len(fact_ids) - len(question_ids)]
    before = int(DEPTH * len(novel))
    context = novel[:before] + fact_ids + novel[before:]
    asked = torch.tensor([question_ids])
    return _Prompt(torch.tensor([context]), asked, len(novel) - before, fact, question.prompt, question.values[0])


def _cache(model: PreTrainedModel, num_tokens: int) -> tandem.TieredCache:
    cache = tandem.TieredCache(model.config, near_tokens=NEAR_TOKENS, far_bytes="1GiB")
    cache.reserve(1, num_tokens + 2 * NEW_TOKENS)
    return cache


def _promised(cache: Any) -> dict[str, float] | None:
    tallies = cache.kv.tallies if isinstance(cache, tandem.TieredCache) else []
    return Tally.of(tallies).to_dict() if tallies else None


def _answer(model: PreTrainedModel, cache: Cache, question: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first line that the model writes behind the question."""
    text: str = tokenizer.decode(answer_greedily(model, cache, question, NEW_TOKENS)[0])
    return text.split("\n", 1)[0]
