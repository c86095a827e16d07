"""Trains the model that tandemkv ships, from nothing or from weights that lie in a folder, by stages of growing length."""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tandemkv.evaluate.formats import FORMATS
from tandemkv.evaluate.vocabulary import Vocabulary
from training.documents import ANSWER, REPEATED, TEXT, Document, Mixture, Writer, spread_positions
from training.texts import encode_texts, read_texts
from training.tokenizer import VOCAB_SIZE, load_tokenizer, train_tokenizer


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


STAGES = (
    Stage(128, 32, 2_000_000, 2e-3, 128, Mixture(text=0.2, repeats=0.8)),
    Stage(256, 16, 6_000_000, 2e-3, 256, Mixture(text=0.2, repeats=0.15)),
    Stage(512, 8, 6_000_000, 2e-3, 2048, Mixture(text=0.25, repeats=0.15)),
    Stage(1024, 6, 5_000_000, 1.5e-3, 8192, Mixture(text=0.25, repeats=0.1)),
    Stage(2048, 4, 5_000_000, 1.2e-3, 8192, Mixture(text=0.25, repeats=0.1)),
    Stage(4096, 2, 4_000_000, 1e-3, 10240, Mixture(text=0.25, repeats=0.1)),
    Stage(8192, 1, 4_000_000, 8e-4, 10240, Mixture(text=0.25, repeats=0.05), decay=True),
)


def make_model() -> Qwen3ForCausalLM:
    """Qwen3 with 3.4 M parameters: 4 layers x 256, 4 query and 2 KV heads of 64, tied embeddings."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=16384,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="sdpa",
        )
    )


# Plain causal attention: without this, positions that skip would be read as a pack of separate sequences.
_CAUSAL = {"full_attention": None}


@dataclass
class Progress:
    """Where a training stands; saved beside the weights."""

    stage: int = 0
    tokens_in_stage: int = 0
    tokens: int = 0


class Trainer:
    """One model, its optimisers and the stages; `run` trains to the end and saves as it goes."""

    def __init__(self, model: Qwen3ForCausalLM, writer: Writer, judge: "Judge", out: Path, progress: Progress) -> None:
        self.model, self.writer, self.judge, self.out, self.progress = model, writer, judge, out, progress
        self.device = next(model.parameters()).device
        self.body = model.model
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        # Muon for the matrices, with the step sizes of AdamW.
        self.optimisers = [
            torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.steps = 0
        self.recent: list[tuple[float, ...]] = []

    def run(self, seed: int, log_every: int, judge_every: int) -> None:
        """All stages that are left."""
        for index in range(self.progress.stage, len(STAGES)):
            self.progress.stage = index
            stage = STAGES[index]
            while self.progress.tokens_in_stage < stage.tokens:
                self._step(stage, random.Random(f"{seed}/{index}/{self.progress.tokens_in_stage}"))
                if self.steps % log_every == 0:
                    self._log(stage)
                if self.steps % judge_every == 0:
                    self.save()
                    self.judge.report(self.model, stage.length, self.progress.tokens)
            self.progress.tokens_in_stage = 0
            self.progress.stage = index + 1
            self.save()
            self.judge.report(self.model, stage.length, self.progress.tokens)

    def _step(self, stage: Stage, rng: random.Random) -> None:
        started = time.perf_counter()
        documents = [self.writer.write(rng, stage.length, stage.mixture) for _ in range(stage.num_seqs)]
        positions = [_positions(rng, stage) for _ in documents]
        self._set_learning_rate(stage)
        loss, *parts = weighted_loss(self.model, self.body, documents, positions, self.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        self.progress.tokens_in_stage += stage.length * stage.num_seqs
        self.progress.tokens += stage.length * stage.num_seqs
        self.recent.append((*parts, time.perf_counter() - started))

    def _set_learning_rate(self, stage: Stage) -> None:
        done = self.progress.tokens_in_stage / stage.tokens
        rate = stage.learning_rate * min(1.0, (self.steps + 1) / 100) * (1.0 - 0.95 * done if stage.decay else 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate

    def _log(self, stage: Stage) -> None:
        answer_loss, repeat_loss, text_loss, seconds = np.nanmean(np.asarray(self.recent), axis=0)
        self.recent.clear()
        self.judge.write(
            {
                "tokens": self.progress.tokens,
                "length": stage.length,
                "answer_loss": round(float(answer_loss), 4),
                "repeat_loss": round(float(repeat_loss), 4),
                "text_loss": round(float(text_loss), 4),
                "tokens_per_s": round(stage.length * stage.num_seqs / float(seconds)),
            }
        )

    def save(self) -> None:
        """fp16 weights, config and progress; a stop in the middle leaves what was there before."""
        new = self.out / "new"
        state = {n: p.detach().to("cpu", torch.float16).contiguous() for n, p in self.model.state_dict().items()}
        state.pop("lm_head.weight", None)
        from safetensors.torch import save_file

        new.mkdir(exist_ok=True)
        save_file(state, new / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(new)
        (new / "progress.json").write_text(json.dumps(asdict(self.progress)) + "\n")
        for path in new.iterdir():
            path.replace(self.out / path.name)
        new.rmdir()


def weighted_loss(model, body, documents: list[Document], positions: list[np.ndarray], device) -> tuple[torch.Tensor, float, float, float]:
    """The weighted mean of the losses of tokens with a weight, and the plain means over answers and over text."""
    ids = torch.from_numpy(np.stack([d.ids for d in documents]).astype(np.int64)).to(device)
    weights = torch.from_numpy(np.stack([d.weights for d in documents]))[:, 1:].to(device)
    position_ids = torch.from_numpy(np.stack(positions)).to(device)
    kept = weights > 0
    with torch.autocast(device.type, torch.bfloat16):
        hidden = body(input_ids=ids, position_ids=position_ids, attention_mask=_CAUSAL, use_cache=False).last_hidden_state[:, :-1][kept]
        logits = model.lm_head(hidden)
    losses = nn.functional.cross_entropy(logits.float(), ids[:, 1:][kept], reduction="none")
    weights = weights[kept]
    parts = [losses[weights == weight].detach().mean().item() for weight in (ANSWER, REPEATED, TEXT)]
    return (losses * weights).sum() / weights.sum(), *parts


def _positions(rng: random.Random, stage: Stage) -> np.ndarray:
    if stage.reach > stage.length and rng.random() < 0.5:
        return spread_positions(rng, stage.length, stage.reach)
    return np.arange(stage.length, dtype=np.int64)


class Judge:
    """Held-out text and questions, asked as training goes on; everything is appended to a log of JSON lines."""

    def __init__(self, writer: Writer, log: Path) -> None:
        self.writer, self.log = writer, log

    def write(self, row: dict[str, object]) -> None:
        """One line of the log, and of the terminal."""
        line = json.dumps(row)
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    @torch.no_grad()
    def report(self, model: Qwen3ForCausalLM, length: int, tokens: int) -> None:
        """Loss on held-out text, and the share of answers that are right to the last token, at this length and the double."""
        rng = random.Random(7)
        text = [self.writer.text(rng, length) for _ in range(max(1, 32768 // length))]
        device = next(model.parameters()).device
        plain = [np.arange(length, dtype=np.int64)]
        text_loss = float(np.mean([weighted_loss(model, model.model, [t], plain, device)[3] for t in text]))
        row: dict[str, object] = {"tokens": tokens, "judged_at": length, "text_loss": round(text_loss, 4)}
        for at in (length, 2 * length):
            if at > 8192:
                continue
            for name, make in FORMATS.items():
                right = [
                    r
                    for _ in range(max(4, min(24, 16384 // at)))
                    for r in answers_right(model, self.writer.questions(rng, at, make))
                ]
                row[f"{name}@{at}"] = round(float(np.mean(right)), 3)
        self.write(row)


def answers_right(model: Qwen3ForCausalLM, document: Document) -> list[bool]:
    """For each answer in a document whether every token of it is the most probable one, given those before."""
    ids = torch.from_numpy(document.ids.astype(np.int64))[None].to(next(model.parameters()).device)
    answer = document.weights == ANSWER
    starts = np.flatnonzero(answer & ~np.roll(answer, 1))
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, attention_mask=_CAUSAL, use_cache=False).last_hidden_state[0, :-1]
        best = model.lm_head(hidden[answer[1:]]).argmax(-1).cpu().numpy()
    right = best == document.ids[1:][answer[1:]]
    owners = np.cumsum(np.isin(np.flatnonzero(answer), starts))
    return [bool(right[owners == owner].all()) for owner in np.unique(owners)]


def train(
    texts: Annotated[Path, typer.Option(help="a folder of *.txt: books to train on")],
    out: Annotated[Path, typer.Option(help="where weights, tokenizer, progress and log.jsonl are written")],
    keep_out: Annotated[list[Path] | None, typer.Option(help="files whose words and numbers training never draws")] = None,
    seed: int = 0,
    threads: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    compile_model: Annotated[bool, typer.Option("--compile")] = False,
) -> None:
    """Train, or go on where the weights in --out stopped."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    books = read_texts(texts, held_out=False)
    import re

    kept_out = frozenset(w for path in keep_out or () for w in re.findall(r"(?<!\w)[a-z]+(?!\w)|(?<![\w-])\d{4,}(?![\w-])|\b[A-Z]{3}\b", path.read_text("utf-8")))
    vocabulary = Vocabulary.of_text("\n".join(books.values()), held_out=False, keep_out=kept_out)
    if not (out / "tokenizer.json").exists():
        train_tokenizer(books, vocabulary).save(str(out / "tokenizer.json"))
    tokenizer = load_tokenizer(out)
    writer = Writer(tokenizer, encode_texts(books, tokenizer), vocabulary)
    unseen = read_texts(texts, held_out=True)
    judge = Judge(Writer(tokenizer, encode_texts(unseen, tokenizer), Vocabulary.of_text("\n".join(unseen.values()), held_out=True)), out / "log.jsonl")
    progress = Progress()
    model = make_model()
    if (out / "model.safetensors").exists():
        progress = Progress(**json.loads((out / "progress.json").read_text()))
        from safetensors.torch import load_file

        missing, unexpected = model.load_state_dict(load_file(out / "model.safetensors"), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.to(device)
    judge.write({"parameters": sum(p.numel() for p in model.parameters()), "book_tokens": len(writer._books), "held_out": sorted(unseen), "words": len(vocabulary.words)})
    trainer = Trainer(model, writer, judge, out, progress)
    if compile_model:
        trainer.body = torch.compile(model.model)
    trainer.run(seed, log_every=40, judge_every=400)


if __name__ == "__main__":
    typer.run(train)
