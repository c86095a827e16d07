"""Training writes the documents it says, saves what transformers reads, and goes on where it stopped."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandemkv import assets
from tandemkv.errors import InputError
from tandemkv.evaluate.formats import FORMATS
from tandemkv.evaluate.vocabulary import Vocabulary
from training import judge, train
from training.documents import ANSWER, REPEATED, TEXT, TRAINED, UNKNOWABLE, Mixture, Writer, spread_positions
from training.model import answers_right, load_weights, make_model
from training.texts import encode_texts, read_texts
from training.tokenizer import load_tokenizer

NOVEL = assets.held_out_text()


@pytest.fixture(scope="module")
def writer() -> Writer:
    tokenizer = load_tokenizer(assets.MODEL)
    words = Vocabulary.of_text(NOVEL, held_out=False)
    return Writer(tokenizer, encode_texts({"novel": NOVEL[:200_000]}, tokenizer), words)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is trained here is too small to be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """30 books, of which at least one is held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(NOVEL[i * 13_000 : i * 13_000 + 60_000])
    return folder


@pytest.mark.parametrize("length", [128, 256, 1024, 4096])
def test_documents_have_their_length_and_weights(writer: Writer, length: int) -> None:
    rng = random.Random(1)
    seen: set[float] = set()
    for _ in range(40):
        document = writer.write(rng, length, Mixture(text=0.25, repeats=0.25))
        assert len(document) == len(document.ids) == len(document.weights) == length
        seen |= set(document.weights.tolist())
    assert {TEXT, REPEATED, ANSWER, UNKNOWABLE} <= seen


@pytest.mark.parametrize("name", TRAINED)
def test_answers_alone_weigh_as_answers(writer: Writer, name: str) -> None:
    tokenizer = load_tokenizer(assets.MODEL)
    make, _, shortest = TRAINED[name]
    document = writer.questions(random.Random(2), max(600, shortest), make)
    is_answer = document.weights == ANSWER
    answered = tokenizer.decode(document.ids[is_answer].tolist())
    others = tokenizer.decode(document.ids[~is_answer].tolist())
    before = tokenizer.decode(document.ids[: np.flatnonzero(is_answer)[0]].tolist())
    assert 0 < is_answer.mean() < 0.5
    values = [part for part in re.split(r"[ .,;:<>\n]+|and", answered) if part]
    assert values
    assert all(value in before for value in values)
    assert not any(weight == ANSWER for weight in document.weights[: len(document) // 4]), "questions come last"
    assert len(others) > len(answered)


def test_what_repeats_was_there_before(writer: Writer) -> None:
    document = writer.repeats(random.Random(3), 512)
    ids = document.ids.tolist()
    places = np.flatnonzero(document.weights == REPEATED)
    assert len(places) > 100
    for place in places[places > 0]:
        first = next(i for i in range(1, len(ids)) if (ids[i - 1], ids[i]) == (ids[place - 1], ids[place]))
        assert first < place


def test_positions_are_spread_forwards_and_not_too_far() -> None:
    rng = random.Random(4)
    ends = []
    for _ in range(200):
        positions = spread_positions(rng, 512, 8192)
        steps = np.diff(positions)
        assert positions[0] == 0
        assert (steps >= 1).all()
        assert 1 <= (steps > 1).sum() <= 4
        assert positions[-1] < 8192
        ends.append(int(positions[-1]))
    assert max(ends) > 7000


def test_books_are_split_by_name(texts: Path) -> None:
    trained, unseen = (set(read_texts(texts, held_out=held_out)) for held_out in (False, True))
    assert len(trained | unseen) == 30
    assert not trained & unseen
    assert unseen
    for path in list(texts.iterdir())[2:]:
        path.unlink()
    assert [len(read_texts(texts, held_out=held_out)) for held_out in (False, True)] == [1, 1]
    with pytest.raises(InputError, match=r"expected at least 2 \*\.txt in .*, one to hold out, found 0"):
        read_texts(texts.parent, held_out=False)


class StoppedError(Exception):
    """A training is cut off."""


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short stages, judged quickly."""
    plain = Mixture(text=0.5, repeats=0.3)
    stages = (train.Stage(128, 2, 1024, 1e-3, 128, plain), train.Stage(256, 1, 1024, 1e-3, 1024, plain, decay=True))
    monkeypatch.setattr(train, "STAGES", stages)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "JUDGE_EVERY", 2)
    monkeypatch.setattr(judge, "FORMATS", {"needle": FORMATS["needle"]})
    monkeypatch.setattr(judge, "MAX_LENGTH", 512)
    monkeypatch.setattr(judge, "_TOKENS", 512)


@pytest.mark.usefixtures("one_thread")
def test_a_training_goes_on_from_its_weights(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the second stage, it starts there again, with fresh optimisers."""
    shorten(monkeypatch)
    keep, out = tmp_path / "keep", tmp_path / "out"
    keep.mkdir()
    (keep / "prompts.txt").write_text("kept 12345 apart")
    step = train.Trainer._step

    def stop_in_the_second(trainer: train.Trainer, stage: train.Stage, rng: random.Random) -> None:
        if trainer._progress.tokens == 1024 + 768:
            raise StoppedError
        step(trainer, stage, rng)

    monkeypatch.setattr(train.Trainer, "_step", stop_in_the_second)
    with pytest.raises(StoppedError):
        train.train(texts, out, keep, device="cpu")
    assert json.loads((out / "progress.json").read_text()) == {"stage": 1, "tokens_in_stage": 512, "tokens": 1536}
    before = (out / "model.safetensors").read_bytes()
    saved = load_file(out / "model.safetensors")
    rates: list[float] = []

    def watched(trainer: train.Trainer, stage: train.Stage, rng: random.Random) -> None:
        if not rates:
            weights = dict(trainer._model.named_parameters())
            assert all(torch.equal(weights[name], saved[name].float()) for name in saved)
            assert not any(optimiser.state for optimiser in trainer._optimisers)
        step(trainer, stage, rng)
        rates.append(trainer._optimisers[0].param_groups[0]["lr"])

    monkeypatch.setattr(train.Trainer, "_step", watched)
    train.train(texts, out, keep, device="cpu")
    assert rates[0] == pytest.approx(1e-3 / train.WARM_UP * (1 - 0.95 * 0.5)), "a warm-up from the start"
    assert json.loads((out / "progress.json").read_text()) == {"stage": 2, "tokens_in_stage": 0, "tokens": 2048}
    assert (out / "model.safetensors").read_bytes() != before
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows if "tokens_per_s" in row][-2:] == [1792, 2048]
    assert all(row["text_loss"] > 0 for row in rows if "judged_at" in row)
    assert [row["kept_out"] for row in rows if "device" in row] == [3, 3], "kept, apart and 12345"
    with pytest.raises(InputError, match="holds another model"):
        load_weights(torch.nn.Linear(2, 2), out)


@pytest.mark.usefixtures("one_thread")
def test_transformers_reads_what_training_writes(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    out = tmp_path / "out"
    train.train(texts, out, None, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).decode(AutoTokenizer.from_pretrained(out)("as 12").input_ids) == "as 12"


def test_answers_are_right_where_every_token_is(writer: Writer) -> None:
    """A model that gives the next token of a document is right there; one wrong token spoils its answer only."""
    document = writer.questions(random.Random(5), 800, FORMATS["needle"], num_questions=3)
    model = make_model()
    says = torch.from_numpy(np.roll(document.ids, -1).astype(np.int64))

    class Parrot(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            answer = torch.from_numpy(document.weights == ANSWER)
            return torch.nn.functional.one_hot(says[:-1][answer[1:]], 4096).float()

    model.lm_head = Parrot()
    assert answers_right(model, document) == [True, True, True]
    second = np.flatnonzero(document.weights == ANSWER)[len(np.flatnonzero(document.weights == ANSWER)) // 2]
    says[second - 1] = 0
    assert sum(answers_right(model, document)) == 2
