"""The evaluation: tasks for systems and budgets, every score kept, so that a run that was stopped goes on."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tandemkv import machine
from tandemkv.errors import InputError
from tandemkv.evaluate.answers import (
    NEAR_TOKENS,
    PAGE_SIZE,
    SPARE_TOKENS,
    Answers,
    Questions,
    SharedContexts,
    are_even,
    bytes_of_context,
)
from tandemkv.evaluate.ledger import Contestant, Ledger, Scores
from tandemkv.evaluate.prompts import Asked, Author, Context, Encode, Text, encoder, opening_ids
from tandemkv.evaluate.tasks import (
    CONTINUATION_TOKENS,
    PERPLEXITY,
    ROWS,
    read_rows,
    write_contexts,
    write_passages,
)
from tandemkv.evaluate.vocabulary import Vocabulary
from tandemkv.integrations.transformers.folders import refuse_foreign_tokens
from tandemkv.select import Selector, Sparse, Tally

Form = Literal["requests", "turns"]
"""Questions about a shared context, each alone behind it, or one after another in one conversation."""

BATCHED_CONTEXTS = 25  # that share a cache, where their questions are even: a pass costs 10 ms whatever it holds


def read_forms(names: str) -> tuple[Form, ...]:
    """Forms named with commas."""
    forms: tuple[Form, ...] = get_args(Form)
    found = tuple(form for form in forms if form in names.split(","))
    if not found or set(names.split(",")) - set(forms):
        raise InputError(f"forms are {', '.join(forms)}, named with commas, got {names!r}")
    return found


@dataclass(frozen=True)
class Settings:
    """What is asked of whom. tasks: names of `TASKS`.

    length: tokens of a generated context. text: what facts are hidden in and perplexity is measured on. rows: a folder
    with published prompts, for the tasks that read them. out: where scores are kept.
    """

    tasks: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    length: int
    text: str
    out: Path
    forms: tuple[Form, ...] = get_args(Form)
    num_contexts: int = 50
    num_questions: int = 10
    seed: int = 0
    rows: Path | None = None

    def __post_init__(self) -> None:
        least = 2 * NEAR_TOKENS
        for name, value, at_least in (
            ("--length", self.length, least),
            ("--contexts", self.num_contexts, 2),  # intervals are over contexts
            ("--questions", self.num_questions, 1),
        ):
            if value < at_least:
                raise InputError(f"{name} must be at least {at_least}, got {value}")

    def identity(self, model: str) -> dict[str, Any]:
        """What scores depend on, beside task, form, context and contestant."""
        kept = ("length", "num_contexts", "num_questions", "seed")
        text = hashlib.blake2s(self.text.encode(), digest_size=8).hexdigest()
        limits = {"near_tokens": NEAR_TOKENS, "page_size": PAGE_SIZE}
        return {"model": model, "text": text, **limits, **{name: getattr(self, name) for name in kept}}


class Prompts(NamedTuple):
    """What is asked in every task, in tokens, and how an answer becomes text again."""

    contexts: dict[str, list[Context]]
    decode: Callable[[list[int]], str]


def write_prompts(
    tokenizer: PreTrainedTokenizerBase, settings: Settings, config: PreTrainedConfig, console: Console
) -> Prompts:
    """All contexts of all tasks. Raises InputError for what could not be asked of a model with this config."""
    encode = encoder(tokenizer)
    ids, begin = encode(settings.text), opening_ids(tokenizer)
    refuse_foreign_tokens(ids, config.vocab_size)
    text = Text(ids, "the text")
    text.require(settings.length)
    words = Vocabulary.of_text(settings.text, held_out=True).even(lambda text: len(encode(text)))
    author = Author(encode, text, words, settings.length)
    contexts = {}
    for task in settings.tasks:
        with console.status(f"writing the contexts of {task}"):
            written = _contexts(task, author, settings, encode)
        contexts[task] = [replace(each, ids=(*begin, *each.ids)) for each in written]
        for context in contexts[task]:
            _require_positions(task, context, config.max_position_embeddings)
    return Prompts(contexts, tokenizer.decode)


def evaluate(model: PreTrainedModel, name: str, prompts: Prompts, settings: Settings, console: Console) -> Ledger:
    """Ask an attached model all that the ledger in `settings.out` does not hold yet; `name` tells models apart."""
    ledger = open_ledger(name, prompts, settings)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        todo = [
            _Batch(task, contexts, places, prompts.decode)
            for task, contexts in prompts.contexts.items()
            for places in batches(contexts, model)
        ]
        bar = progress.add_task("", total=sum(len(batch.places) * len(batch.asks(settings)) for batch in todo))
        for batch in todo:
            progress.update(bar, description=batch.task)
            _fill(ledger, model, batch, settings, partial(progress.advance, bar, len(batch.places)))
    return ledger


def open_ledger(name: str, prompts: Prompts, settings: Settings) -> Ledger:
    """What was found before for these prompts. InputError where it was found for other settings."""
    digests = {(task, i): each.digest for task, found in prompts.contexts.items() for i, each in enumerate(found)}
    return Ledger(settings.out, settings.identity(name), digests)


def _contexts(task: str, author: Author, settings: Settings, encode: Encode) -> list[Context]:
    num_contexts, num_questions = settings.num_contexts, settings.num_questions
    if task == PERPLEXITY:
        return write_passages(author, num_contexts, settings.seed)
    if task in ROWS:
        return read_rows(task, settings.rows, encode, num_contexts, num_questions)
    return write_contexts(task, author, num_contexts, num_questions, settings.seed)


class _Batch(NamedTuple):
    """Contexts of a task that share a cache."""

    task: str
    contexts: list[Context]
    places: range
    decode: Callable[[list[int]], str]

    def asks(self, settings: Settings) -> list[tuple[str, Contestant]]:
        """Every form for every contestant."""
        forms = settings.forms if self.task != PERPLEXITY else ("text",)
        return [(form, who) for form in forms for who in settings.contestants]

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [self.contexts[place].ids for place in self.places]

    @property
    def questions(self) -> list[tuple[Asked, ...]]:
        return [self.contexts[place].questions for place in self.places]

    @property
    def num_new_tokens(self) -> int:
        """That a fork may add, all its sequences together; near tokens of each sequence may become far too."""
        each = [len(q.prompt) + len(q.answer) + SPARE_TOKENS + NEAR_TOKENS for asked in self.questions for q in asked]
        return 2 * sum(each) + CONTINUATION_TOKENS * len(self.places)

    def scores(self, shared: SharedContexts, form: str, sparse: Sparse | None) -> list[tuple[float, ...]]:
        """For each context what a contestant's answers are worth."""
        if self.task == PERPLEXITY:
            return [(loss,) for loss in shared.surprise([asked[0].answer for asked in self.questions], sparse)]
        answer = shared.ask if form == "requests" else shared.converse
        return score(self.questions, answer(self.questions, sparse), self.decode)


def _fill(
    ledger: Ledger, model: PreTrainedModel, batch: _Batch, settings: Settings, advance: Callable[[], None]
) -> None:
    """What the ledger lacks of a batch; the contexts are prefilled only where something is."""
    missing: dict[tuple[Selector | None, str | None], list[tuple[str, Contestant]]] = {}
    for form, who in batch.asks(settings):
        if any((batch.task, form, i, who) not in ledger.found for i in batch.places):
            missing.setdefault((who.reader, who.far_dtype), []).append((form, who))
        else:
            advance()
    for (reader, far_dtype), asked in missing.items():
        shared = SharedContexts(model, batch.ids, batch.num_new_tokens, reader, far_dtype)
        for form, who in asked:
            shared.tally = Tally()
            found = batch.scores(shared, form, who.sparse)
            told = shared.tally.to_dict()
            shares = (told["share_read"], told["share_fallbacks"]) if shared.tally.num_steps else (None, None)
            for place, scores in zip(batch.places, found, strict=True):
                digest = batch.contexts[place].digest
                found_of = Scores(batch.task, form, place, who.system, who.budget_tokens, scores, digest, *shares)
                ledger.add(replace(found_of, far_dtype=who.far_dtype))
            advance()
        shared.close()


def _require_positions(task: str, context: Context, num_positions: int) -> None:
    """A conversation must end before the model's positions do."""
    needed = len(context.ids) + sum(len(q.prompt) + len(q.answer) for q in context.questions) + SPARE_TOKENS
    if needed > num_positions:
        raise InputError(
            f"{task}: a context and its questions take {needed} tokens, the model has {num_positions} positions: "
            "lower --length or --questions"
        )


def batches(contexts: list[Context], model: PreTrainedModel) -> Iterator[range]:
    """Places of contexts that share a cache: several where lengths are even, as many as half of the free memory holds
    and at most BATCHED_CONTEXTS; one where not."""
    questions: Questions = [context.questions for context in contexts]
    even = are_even(questions) and len({len(context.ids) for context in contexts}) == 1
    num_bytes = bytes_of_context(model, len(contexts[0].ids))
    size = max(1, min(BATCHED_CONTEXTS, machine.available_bytes().num_bytes // 2 // num_bytes)) if even else 1
    for begin in range(0, len(contexts), size):
        yield range(begin, min(begin + size, len(contexts)))


def score(questions: Questions, answers: Answers, decode: Callable[[list[int]], str]) -> list[tuple[float, ...]]:
    """For each question the share of its values that stand in the first line of the answer (RULER's string match)."""
    return [
        tuple(_share_found(question.values, decode(answer)) for question, answer in zip(asked, given, strict=True))
        for asked, given in zip(questions, answers, strict=True)
    ]


def _share_found(values: tuple[str, ...], answer: str) -> float:
    line = answer.lstrip("\n").split("\n", 1)[0]
    return sum(value in line for value in values) / len(values)
