"""The documents of the tasks in this folder, written on the spot: nothing is downloaded."""

from typing import Any

import datasets
from transformers import AutoTokenizer

from tandemkv import assets
from tandemkv.evaluate.prompts import Author, Text, encoder
from tandemkv.evaluate.tasks import write_contexts
from tandemkv.evaluate.vocabulary import Vocabulary


def needle(**told: Any) -> dict[str, datasets.Dataset]:
    """Numbers hidden in a novel."""
    return _documents("needle", **told)


def lines(**told: Any) -> dict[str, datasets.Dataset]:
    """A number in each of many lines."""
    return _documents("lines", **told)


def score(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 where the value stands in the answer."""
    return {"found": float(document["value"] in answers[0])}


def _documents(task: str, length: int = 2000, num_contexts: int = 4, **_: Any) -> dict[str, datasets.Dataset]:
    """Two questions about each context of `length` tokens of the shipped tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL)
    encode = encoder(tokenizer)
    text = assets.held_out_text()
    author = Author(encode, Text(encode(text), "the novel"), Vocabulary.of_text(text, held_out=True), length)
    rows = [
        {
            "context": tokenizer.decode(context.ids),
            "question": tokenizer.decode(asked.prompt),
            "value": asked.values[0],
        }
        for context in write_contexts(task, author, num_contexts, 2, 0)
        for asked in context.questions
    ]
    return {"test": datasets.Dataset.from_list(rows)}
