"""Documents to train on: book text, repeated random chunks, and facts with questions about them at every depth.

Values, keys and texts of tests do not occur here: words, numbers and names come from a `Vocabulary` of training, texts
from the books that are not held out. Answers weigh five times a word of a book: they are what the model is for.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from tandemkv.evaluate.formats import FORMATS, HELD_OUT_OF_TRAINING, Episode, Format, Question
from tandemkv.evaluate.prompts import random_gaps
from tandemkv.evaluate.vocabulary import Vocabulary

TEXT, REPEATED, ANSWER, WORDING, UNKNOWABLE = 1.0, 2.0, 5.0, 0.1, 0.0
"""Loss weights: of book text, of what was said before, of answers, of the formats' wording with its keys and values, of
random tokens."""


@dataclass(frozen=True)
class Document:
    """Token ids uint16 `[length]` and the loss weight of each token float32 `[length]`."""

    ids: np.ndarray
    weights: np.ndarray

    @staticmethod
    def join(parts: list["Document"]) -> "Document":
        """Behind each other."""
        return Document(np.concatenate([p.ids for p in parts]), np.concatenate([p.weights for p in parts]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Document":
        return Document(self.ids[part], self.weights[part])


# -- a format that only training uses: short, for the first stages, in many wordings, so that none is learnt by heart --


def plain(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """`key is value.` in one of many wordings, the key one word or two, the value digits, a word or a pair."""
    join = rng.choice(
        (" is", ":", " =", " ->", f" {vocabulary.word(rng)}", f" {vocabulary.word(rng)} {vocabulary.word(rng)}")
    )
    before = rng.choice(
        (
            "",
            "",
            f" the {vocabulary.word(rng)} of",
            f" {vocabulary.word(rng)}",
            f" {vocabulary.word(rng)} {vocabulary.word(rng)}",
        )
    )
    end = rng.choice((".", ";", ",", "\n"))
    short = (vocabulary.word, vocabulary.variable) if 2 * num_facts < len(vocabulary.words) else ()
    draw_key = rng.choice((vocabulary.key, *short))
    digits = rng.choice((3, 4, 5, 6, 7, 8))
    draw_value = rng.choice(
        (
            lambda r: vocabulary.number(r, digits),
            lambda r: vocabulary.number(r, digits),
            vocabulary.word,
            vocabulary.key,
        )
    )
    keys: dict[str, str] = {}
    while len(keys) < num_facts:
        keys[draw_key(rng)] = draw_value(rng)
    facts = tuple(f"{before} {key}{join} {value}{end}" for key, value in keys.items())
    asked = rng.sample(list(keys.items()), min(num_questions, len(keys)))
    ask = rng.choice(("", f"{before}"))
    questions = tuple(Question(f"\n{ask} {key}{join}", f" {value}{end}", (value,)) for key, value in asked)
    return Episode("\n", facts, questions, in_text=rng.random() < 0.5)


TRAINED: dict[str, tuple[Format, float, int]] = {
    # format, share, shortest document
    "plain": (plain, 4.0, 64),
    "mqar": (FORMATS["mqar"], 1.5, 64),
    "needle": (FORMATS["needle"], 2.5, 200),
    "needle_multikey": (FORMATS["needle_multikey"], 1.5, 200),
    "needle_multivalue": (FORMATS["needle_multivalue"], 1.0, 250),
    "needle_multiquery": (FORMATS["needle_multiquery"], 1.0, 250),
    "needle_uuid": (FORMATS["needle_uuid"], 1.0, 500),
    "kv": (FORMATS["kv"], 1.5, 250),
    "lines": (FORMATS["lines"], 1.5, 250),
    "variables": (FORMATS["variables"], 0.7, 250),
    "common_words": (FORMATS["common_words"], 0.3, 250),
    "frequent_words": (FORMATS["frequent_words"], 0.3, 250),
}
assert not set(TRAINED) & set(HELD_OUT_OF_TRAINING)


@dataclass(frozen=True)
class Mixture:
    """Shares of the kinds of documents; the rest is questions."""

    text: float
    repeats: float


class Writer:
    """Writes documents of any length from book tokens uint16 `[num_tokens]` and a vocabulary."""

    def __init__(self, tokenizer: Tokenizer, book_tokens: np.ndarray, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._books = book_tokens
        self._vocabulary = vocabulary

    def write(self, rng: random.Random, length: int, mixture: Mixture) -> Document:
        """A sequence of `length` tokens: one document, or several shorter ones behind each other."""
        parts: list[Document] = []
        missing = length
        while missing > 0:
            part = min(missing, length if rng.random() < 0.6 else max(256, length // rng.choice((2, 4))))
            kind = rng.random()
            if kind < mixture.text:
                parts.append(self.text(rng, part))
            elif kind < mixture.text + mixture.repeats:
                parts.append(self.repeats(rng, part))
            else:
                names = [name for name, (_, _, shortest) in TRAINED.items() if part >= shortest] or ["plain"]
                short = 3.0 if length < 512 else 1.0  # the first stage learns from the shortest formats
                name = rng.choices(names, [TRAINED[n][1] * (short if n in ("plain", "mqar") else 1.0) for n in names])[
                    0
                ]
                parts.append(self.questions(rng, part, TRAINED[name][0]))
            missing -= len(parts[-1])
        return Document.join(parts)[:length]

    def text(self, rng: random.Random, length: int) -> Document:
        """A passage of a book."""
        start = rng.randrange(max(1, len(self._books) - length))
        return self._weigh(self._books[start : start + length], TEXT)

    def repeats(self, rng: random.Random, length: int) -> Document:
        """Random chunks, then pieces of them again: what comes next was said before."""
        generator = np.random.default_rng(rng.getrandbits(32))
        size = rng.randint(8, max(16, min(128, length // 4)))
        chunks = [
            generator.integers(1, self._tokenizer.get_vocab_size(), size, dtype=np.uint16)
            if rng.random() < 0.7
            else self.text(rng, size).ids
            for _ in range(max(1, int(length * rng.uniform(0.2, 0.6)) // size))
        ]
        parts = [self._weigh(chunk, UNKNOWABLE) for chunk in chunks]
        written = sum(map(len, parts))
        while written < length:
            chunk = rng.choice(chunks)
            start = rng.randrange(0, max(1, size - 6))
            piece = self._weigh(chunk[start : start + rng.randint(6, size)], REPEATED)
            piece.weights[:2] = UNKNOWABLE
            parts.append(piece)
            written += len(piece)
        return Document.join(parts)[:length]

    def questions(self, rng: random.Random, length: int, make: Format, *, num_questions: int | None = None) -> Document:
        """Facts at every depth of a text, or one after the other, and at the end questions about some of them."""
        words = self._words(rng)
        trial = make(words, rng, 6, 3)
        per_fact = sum(len(self._encode(fact)) for fact in trial.facts) / len(trial.facts)
        per_question = max(len(self._encode(q.prompt + q.answer)) for q in trial.questions) + 2
        room = length - len(self._encode(trial.opening + trial.closing)) - 2
        most = max(1, int(room / (per_fact + per_question)))  # each asked fact stands there too
        asked = num_questions or max(1, min(most, int(room * rng.uniform(0.25, 0.5) / per_question)))
        places = max(asked, int((room - asked * per_question) / per_fact * (0.85 if trial.in_text else 0.97)))
        facts = places if not trial.in_text else round(math.exp(rng.uniform(math.log(asked), math.log(places))))
        episode = make(words, rng, max(facts, asked), asked)
        return self._assemble(rng, episode, length)

    def _words(self, rng: random.Random) -> Vocabulary:
        """Every word, or some hundreds: keys then share words, and both halves of a key have to be read."""
        if rng.random() < 0.5:
            return self._vocabulary
        return self._vocabulary.few(rng, round(math.exp(rng.uniform(math.log(200), math.log(2000)))))

    def _assemble(self, rng: random.Random, episode: Episode, length: int) -> Document:
        opening = self._weigh(self._encode(episode.opening), WORDING)
        facts = [self._weigh(self._encode(fact), WORDING) for fact in episode.facts]
        ending = [self._weigh(self._encode(episode.closing), WORDING)] if episode.closing else []
        for question in episode.questions:
            ending += [
                self._weigh(self._encode(question.prompt), WORDING),
                self._weigh(self._encode(question.answer), ANSWER),
            ]
        missing = length - len(opening) - sum(map(len, facts)) - sum(map(len, ending))
        if episode.in_text and missing > 0:
            first, *others = random_gaps(rng, missing, len(facts))
            text = self.text(rng, missing)
            woven = [text[first]]
            for fact, gap in zip(facts, others, strict=True):
                woven += [fact, text[gap]]
            facts = woven
        return Document.join([opening, *facts, *ending])

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, dtype=np.uint16)

    def _weigh(self, ids: np.ndarray, weight: float) -> Document:
        return Document(ids, np.full(len(ids), weight, dtype=np.float32))


def spread_positions(rng: random.Random, length: int, reach: int) -> np.ndarray:
    """Positions int64 `[length]` that skip ahead at up to four places and end below `reach` (PoSE, 2309.10400).

    Distances of a long context are met in a short one, for the price of the short one.
    """
    skips = sorted(rng.randrange(1, length) for _ in range(rng.randint(1, 4)))
    spare = reach - length
    sizes = [rng.random() for _ in skips]
    jumps = np.zeros(length, dtype=np.int64)
    for place, size in zip(skips, sizes, strict=True):
        jumps[place] += int(spare * size / (sum(sizes) + rng.random()))
    return np.arange(length, dtype=np.int64) + np.cumsum(jumps)
