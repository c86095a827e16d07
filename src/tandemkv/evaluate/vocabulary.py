"""Words, numbers and names that prompts are made of, split so that no test key or value occurs in training."""

import hashlib
import random
import re
import string
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Self

from tandemkv.errors import InputError

_HELD_OUT_SHARE = 4  # one in four words, numbers and variable names is kept for tests


def held_out(item: str) -> bool:
    """Whether a word, a number or a variable's name is kept for tests: by its hash, so that all agree for ever."""
    return hashlib.blake2s(item.encode(), digest_size=2).digest()[0] % _HELD_OUT_SHARE == 0


class Vocabulary:
    """What keys and values are drawn from: of tests (`held_out`), or of training, which shares nothing with it.

    `keep_out` names words and numbers that training must not draw although their hash allows it: those of published
    prompts that the model will be judged by.
    """

    def __init__(self, words: Iterable[str], *, held_out: bool, keep_out: frozenset[str] = frozenset()) -> None:
        self._held_out = held_out
        self._keep_out = keep_out
        self.words = tuple(sorted({word for word in words if self._may_use(word)}))
        if len(self.words) < 100:
            raise InputError(
                f"expected at least 100 words to draw keys from, got {len(self.words)}: give a longer text"
            )

    @classmethod
    def of_text(cls, text: str, *, held_out: bool, keep_out: frozenset[str] = frozenset()) -> Self:
        """The lower-case words of 3 to 9 letters that occur at least twice in a text."""
        counts = Counter(re.findall(r"\b[a-z]{3,9}\b", text))
        return cls((word for word, count in counts.items() if count > 1), held_out=held_out, keep_out=keep_out)

    def word(self, rng: random.Random) -> str:
        """One word."""
        return rng.choice(self.words)

    def key(self, rng: random.Random) -> str:
        """Two words with a hyphen: `torpid-kid`."""
        return f"{rng.choice(self.words)}-{rng.choice(self.words)}"

    def number(self, rng: random.Random, digits: int) -> str:
        """A number of so many digits, the first of them not 0."""
        return self._draw(lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)))

    def variable(self, rng: random.Random) -> str:
        """A name of three capitals."""
        return self._draw(lambda: "".join(rng.choices(string.ascii_uppercase, k=3)))

    def uuid(self, rng: random.Random) -> str:
        """A random UUID; of 2^122 none is met twice, so they need no split."""
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def few(self, rng: random.Random, count: int) -> "Vocabulary":
        """The same with at most `count` of the words, so that keys share words more often."""
        words = rng.sample(self.words, min(count, len(self.words)))
        return Vocabulary(words, held_out=self._held_out, keep_out=self._keep_out)

    def even(self, count_tokens: Callable[[str], int]) -> "Vocabulary":
        """The same, but all keys, all words, all names and all UUIDs that are drawn have the same number of tokens.

        It is the most frequent one of the kind. So questions about them fit into one batch. count_tokens: of a text.
        """
        return _Even(self, count_tokens)

    def _may_use(self, item: str) -> bool:
        return held_out(item) is self._held_out and item not in self._keep_out

    def _draw(self, once: Callable[[], str]) -> str:
        while not self._may_use(drawn := once()):
            pass
        return drawn


class _Even(Vocabulary):
    """Draws again until the number of tokens is the usual one of its kind."""

    def __init__(self, whole: Vocabulary, count_tokens: Callable[[str], int]) -> None:
        self._held_out, self._keep_out, self.words = whole._held_out, whole._keep_out, whole.words
        self._count_tokens = count_tokens
        self._num_tokens: dict[str, tuple[int, ...]] = {}

    def word(self, rng: random.Random) -> str:
        return self._alike("word", super().word, rng)

    def key(self, rng: random.Random) -> str:
        return self._alike("key", super().key, rng)

    def variable(self, rng: random.Random) -> str:
        return self._alike("variable", super().variable, rng)

    def uuid(self, rng: random.Random) -> str:
        return self._alike("uuid", super().uuid, rng, ' "')  # in JSON quotes join its first letters in a token

    def few(self, rng: random.Random, count: int) -> Vocabulary:
        return super().few(rng, count).even(self._count_tokens)

    def _alike(self, kind: str, draw: Callable[[random.Random], str], rng: random.Random, in_front: str = " ") -> str:
        if kind not in self._num_tokens:
            trial = random.Random(kind)  # the usual number must not hang on what was asked for before
            numbers = Counter(self._numbers(draw(trial), in_front) for _ in range(100))
            self._num_tokens[kind] = numbers.most_common(1)[0][0]
        while self._numbers(drawn := draw(rng), in_front) != self._num_tokens[kind]:
            pass
        return drawn

    def _numbers(self, item: str, in_front: str) -> tuple[int, ...]:
        """Tokens of an item behind each of these characters."""
        return tuple(self._count_tokens(before + item) for before in in_front)
