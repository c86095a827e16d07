"""Trains the model that tandemkv ships, by stages of growing length; goes on where the weights in --out stopped."""

import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import Qwen3ForCausalLM

from tandemkv.errors import TandemError
from tandemkv.evaluate.vocabulary import Vocabulary
from training.documents import Mixture, Writer, spread_positions
from training.judge import Judge, Log
from training.model import load_weights, make_model, save_model, weighted_loss
from training.texts import encode_texts, read_file, read_texts
from training.tokenizer import load_tokenizer, train_tokenizer

LOG_EVERY, JUDGE_EVERY = 40, 200  # steps
WARM_UP = 100  # steps, after every start: the optimisers' state is not saved


@dataclass(frozen=True)
class Stage:
    """`tokens` tokens in sequences of `length`, `num_seqs` of them a step; `reach` is how far positions are spread."""

    length: int
    num_seqs: int
    tokens: int
    learning_rate: float
    reach: int
    mixture: Mixture
    decay: bool = False


# Copying comes first: from nothing, repeats alone take 2.6 M tokens until the loss on them falls; with book text and
# questions in the mixture nothing had moved after 3.4 M. Positions are spread before lengths grow: it costs nothing.
STAGES = (
    Stage(128, 32, 3_200_000, 2e-3, 128, Mixture(text=0.2, repeats=0.8)),
    Stage(256, 16, 3_200_000, 2e-3, 256, Mixture(text=0.2, repeats=0.15)),
    Stage(512, 8, 2_400_000, 2e-3, 2048, Mixture(text=0.25, repeats=0.1)),
    Stage(1024, 6, 1_250_000, 1.5e-3, 8192, Mixture(text=0.25, repeats=0.05)),
    Stage(2048, 4, 1_600_000, 1.2e-3, 8192, Mixture(text=0.25, repeats=0.05)),
    Stage(4096, 2, 2_000_000, 1e-3, 10240, Mixture(text=0.25, repeats=0.05)),
    Stage(8192, 1, 3_000_000, 8e-4, 10240, Mixture(text=0.25, repeats=0.05), decay=True),
)


@dataclass
class Progress:
    """Where a training stands; saved beside the weights."""

    stage: int = 0
    tokens_in_stage: int = 0
    tokens: int = 0


class Trainer:
    """One model, its optimisers and the stages; `run` trains to the end and saves as it goes."""

    def __init__(self, model: Qwen3ForCausalLM, writer: Writer, judge: Judge, log: Log, out: Path) -> None:
        self._model, self._writer, self._judge, self._log, self._out = model, writer, judge, log, out
        self._body = model.model
        self._progress = Progress(**load_weights(model, out))
        self._steps = 0
        self._recent: list[tuple[float, ...]] = []
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        self._optimisers = [  # Muon for the matrices, with the step sizes of AdamW
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def compile(self) -> None:
        """A fifth faster on a CPU with AVX-512 BF16; needs a C++ compiler."""
        self._body = torch.compile(self._model.model)

    def run(self, seed: int) -> None:
        """All stages that are left."""
        progress = self._progress
        while progress.stage < len(STAGES):
            stage = STAGES[progress.stage]
            while progress.tokens_in_stage < stage.tokens:
                self._step(stage, random.Random(f"{seed}/{progress.stage}/{progress.tokens_in_stage}"))
                if self._steps % LOG_EVERY == 0:
                    self._log_recent(stage)
                if self._steps % JUDGE_EVERY == 0:
                    self._save(stage)
            progress.tokens_in_stage, progress.stage = 0, progress.stage + 1
            self._save(stage)

    def _step(self, stage: Stage, rng: random.Random) -> None:
        started = time.perf_counter()
        documents = [self._writer.write(rng, stage.length, stage.mixture) for _ in range(stage.num_seqs)]
        positions = [_positions(rng, stage) for _ in documents]
        self._set_learning_rate(stage)
        loss, means = weighted_loss(self._model, self._body, documents, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._steps += 1
        self._progress.tokens_in_stage += stage.length * stage.num_seqs
        self._progress.tokens += stage.length * stage.num_seqs
        self._recent.append((*means, time.perf_counter() - started))

    def _set_learning_rate(self, stage: Stage) -> None:
        done = self._progress.tokens_in_stage / stage.tokens
        rate = stage.learning_rate * min(1.0, (self._steps + 1) / WARM_UP) * (1.0 - 0.95 * done * stage.decay)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate

    def _log_recent(self, stage: Stage) -> None:
        sums, counts = np.nansum(self._recent, axis=0), np.isfinite(self._recent).sum(0)
        answer, repeat, text, seconds = (
            round(float(s / n), 4) if n else None for s, n in zip(sums, counts, strict=True)
        )
        self._recent.clear()
        told = {"answer_loss": answer, "repeat_loss": repeat, "text_loss": text}
        rate = round(stage.length * stage.num_seqs / (seconds or 1))
        self._log.write({"tokens": self._progress.tokens, "length": stage.length, **told, "tokens_per_s": rate})

    def _save(self, stage: Stage) -> None:
        save_model(self._model, self._out, asdict(self._progress))
        self._judge.report(self._model, stage.length, self._progress.tokens)


def _positions(rng: random.Random, stage: Stage) -> np.ndarray:
    if stage.reach > stage.length and rng.random() < 0.5:
        return spread_positions(rng, stage.length, stage.reach)
    return np.arange(stage.length, dtype=np.int64)


def _named_in(folder: Path | None) -> frozenset[str]:
    """Words, numbers of four and more digits, and names of three capitals in the files of a folder."""
    found: set[str] = set()
    for path in sorted(folder.iterdir()) if folder is not None else ():
        found |= set(re.findall(r"(?<!\w)[a-z]+(?!\w)|(?<![\w-])\d{4,}(?![\w-])|\b[A-Z]{3}\b", read_file(path)))
    return frozenset(found)


def train(
    texts: Annotated[Path, typer.Option(help="A folder of *.txt: books. One in twelve, by its name, is held out.")],
    out: Annotated[Path, typer.Option(help="For weights, tokenizer, progress and log.jsonl.")],
    keep_out: Annotated[
        Path | None, typer.Option(help="A folder of prompts to be judged by: their words and numbers are never drawn.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and documents.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    compile_model: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
) -> None:
    """Train from nothing, or from the weights in --out, with fresh optimisers and a warm-up.

    Example: python -m training.train --texts books --keep-out bench --out recall --compile
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    books, unseen = (read_texts(texts, held_out=held_out) for held_out in (False, True))
    words = Vocabulary.of_text("\n".join(books.values()), held_out=False, keep_out=_named_in(keep_out))
    test_words = Vocabulary.of_text("\n".join(unseen.values()), held_out=True)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(books, words).save(str(out / "tokenizer.json"))
    tokenizer, log = load_tokenizer(out), Log(out / "log.jsonl")
    writer = Writer(tokenizer, encode_texts(books, tokenizer), words)
    judge = Judge(Writer(tokenizer, encode_texts(unseen, tokenizer), test_words), log)
    trainer = Trainer(make_model().to(device), writer, judge, log, out)
    kept_out = None if keep_out is None else len(_named_in(keep_out))
    log.write(
        {
            "device": device,
            "seed": seed,
            "held_out": sorted(unseen),
            "words": len(words.words),
            "kept_out": kept_out,
            "compiled": compile_model,
        }
    )
    if compile_model:
        trainer.compile()
    trainer.run(seed)


if __name__ == "__main__":
    try:
        typer.run(train)
    except TandemError as error:
        raise SystemExit(f"error: {error}") from None
