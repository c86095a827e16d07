"""The model's own byte-level BPE: digits stand alone, so that a number is copied digit by digit."""

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tandemkv.evaluate.formats import FORMATS, HELD_OUT_OF_TRAINING
from tandemkv.evaluate.vocabulary import Vocabulary

VOCAB_SIZE = 4096
END = "<|end|>"


def train_tokenizer(texts: dict[str, str], vocabulary: Vocabulary) -> Tokenizer:
    """A BPE of 4096 tokens over the texts and the formats' own wording."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts, vocabulary), trainer)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that lies in a folder as `tokenizer.json`."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _pieces(texts: dict[str, str], vocabulary: Vocabulary) -> Iterator[str]:
    yield from texts.values()
    rng = random.Random(0)
    for name, make in FORMATS.items():
        for _ in range(20 if name not in HELD_OUT_OF_TRAINING else 0):
            episode = make(vocabulary, rng, 20, 20)
            yield episode.opening + "".join(episode.facts) + episode.closing
            yield from (question.prompt + question.answer for question in episode.questions)
