"""What is asked while training goes on: held-out text, and questions whose words and numbers training never draws."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from tandemkv.evaluate.formats import FORMATS
from training.documents import Writer
from training.model import answers_right, weighted_loss

MAX_LENGTH = 8192
_TOKENS = 16384  # asked about in each format, in at least 4 and at most 24 documents


class Log:
    """Lines of JSON, on the terminal and behind one another in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, row: dict[str, object]) -> None:
        """One line."""
        line = json.dumps(row)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


class Judge:
    """Asks the same at every call."""

    def __init__(self, writer: Writer, log: Log) -> None:
        """writer: of held-out books and of the test vocabulary."""
        self._writer, self._log = writer, log

    def report(self, model: Qwen3ForCausalLM, length: int, tokens: int) -> None:
        """Loss on held-out text, and the share of answers right to the last token, here and at twice the length."""
        row: dict[str, object] = {"tokens": tokens, "judged_at": length, "text_loss": self._text_loss(model, length)}
        rng = random.Random(7)
        for at in (length, 2 * length):
            for name, make in FORMATS.items() if at <= MAX_LENGTH else ():
                documents = [self._writer.questions(rng, at, make) for _ in range(max(4, min(24, _TOKENS // at)))]
                right = [answer for document in documents for answer in answers_right(model, document)]
                row[f"{name}@{at}"] = round(float(np.mean(right)), 3)
        self._log.write(row)

    @torch.no_grad()
    def _text_loss(self, model: Qwen3ForCausalLM, length: int) -> float:
        rng = random.Random(7)
        each = max(1, MAX_LENGTH // length)
        plain = [np.arange(length, dtype=np.int64)] * each
        batches = [[self._writer.text(rng, length) for _ in range(each)] for _ in range(2 * _TOKENS // MAX_LENGTH)]
        return round(float(np.mean([weighted_loss(model, model.model, batch, plain)[1][2] for batch in batches])), 4)
