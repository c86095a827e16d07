"""Contexts and questions in tokens: the same for every system, from a seed."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandemkv.errors import InputError
from tandemkv.evaluate.formats import FORMATS, Episode, Format, Question
from tandemkv.evaluate.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]
"""Text to token ids, nothing added."""


def encoder(tokenizer: "PreTrainedTokenizerBase") -> Encode:
    """Of a tokenizer."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    return encode


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What a tokenizer puts in front of every text: the token that begins one, or nothing."""
    ids: list[int] = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def random_gaps(rng: random.Random, num_tokens: int, num_facts: int) -> list[slice]:
    """Where a text of so many tokens is cut to take facts between: one stretch more than facts."""
    cuts = sorted(rng.randrange(num_tokens + 1) for _ in range(num_facts))
    return [slice(begin, end) for begin, end in zip([0, *cuts], [*cuts, num_tokens], strict=True)]


FACTS_PER_QUESTION = {"needle": 1, "telephone": 1, "needle_multiquery": 2, "needle_multivalue": 4, "variables": 3}
"""Facts that a context of a format planted in text holds, for each question; other contexts are full of facts."""


@dataclass(frozen=True)
class Asked:
    """A question in tokens; `answer` is what a perfect model writes, `values` what has to be found in an answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """Token ids that all questions share."""

    ids: tuple[int, ...]
    questions: tuple[Asked, ...]

    @property
    def digest(self) -> str:
        """Tells contexts and their questions apart."""
        return hashlib.blake2s(repr((self.ids, self.questions)).encode(), digest_size=8).hexdigest()


class Text:
    """A long text in tokens, in which facts are hidden."""

    def __init__(self, ids: list[int], name: str) -> None:
        self.ids, self.name = ids, name

    def require(self, num_tokens: int) -> None:
        """InputError where the text is shorter."""
        if len(self.ids) < num_tokens:
            raise InputError(
                f"{self.name} has {len(self.ids)} tokens, a context asks for {num_tokens}: "
                "give a longer text or a smaller length"
            )

    def passage(self, rng: random.Random, num_tokens: int) -> list[int]:
        """So many tokens from anywhere; InputError where the text is shorter."""
        self.require(num_tokens)
        start = rng.randrange(len(self.ids) - num_tokens + 1)
        return self.ids[start : start + num_tokens]


class Author:
    """Writes the contexts of tasks of one length."""

    def __init__(self, encode: Encode, text: Text, words: Vocabulary, length: int) -> None:
        """encode: of the model's tokenizer. words: of tests. length: tokens of a context, exactly."""
        self._encode, self._text, self._words, self._length = encode, text, words, length

    def write(self, task: str, num_questions: int, seed: str) -> Context:
        """One context of a generated task; where the words are even, so are its questions and their answers."""
        rng = random.Random(seed)
        words, make = self._words, FORMATS[task]
        if task in FACTS_PER_QUESTION:
            episode = make(words, rng, FACTS_PER_QUESTION[task] * num_questions, num_questions)
        else:
            episode = self._full(make, words, rng, num_questions)
        return self.lay_out(episode, rng, task)

    def passage(self, num_more: int, seed: str) -> Context:
        """A passage of the text, and the `num_more` tokens behind it as the answer to a question without words."""
        ids = self._text.passage(random.Random(seed), self._length + num_more)
        return Context(tuple(ids[: self._length]), (Asked((), tuple(ids[self._length :]), ()),))

    def lay_out(self, episode: Episode, rng: random.Random, task: str) -> Context:
        """Facts at random depths of a passage, or behind one another with what is left of the passage in front."""
        opening, closing = self._encode(episode.opening), self._encode(episode.closing)
        facts = [self._encode(fact) for fact in episode.facts]
        missing = self._length - len(opening) - len(closing) - sum(map(len, facts))
        if missing < 0:
            raise InputError(
                f"{task}: the facts alone take {self._length - missing} tokens, the length is {self._length}: "
                "give a larger length or fewer questions"
            )
        passage = self._text.passage(rng, missing)
        if episode.in_text:
            first, *others = random_gaps(rng, missing, len(facts))
            body = passage[first]
            for fact, gap in zip(facts, others, strict=True):
                body += fact + passage[gap]
        else:
            opening = passage + opening
            body = [token for fact in facts for token in fact]
        return Context(tuple(opening + body + closing), tuple(map(self._asked, episode.questions)))

    def _full(self, make: Format, words: Vocabulary, rng: random.Random, num_questions: int) -> Episode:
        """As many facts as fit."""
        trial = make(words, rng, 16, 1)
        frame = len(self._encode(trial.opening + trial.closing))
        per_fact = max(len(self._encode(fact)) for fact in trial.facts)
        return make(words, rng, max(num_questions, (self._length - frame) // per_fact), num_questions)

    def _asked(self, question: Question) -> Asked:
        return Asked(tuple(self._encode(question.prompt)), tuple(self._encode(question.answer)), question.values)
