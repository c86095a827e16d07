"""Every format: the facts hold the answers, tests share no word or number with training, contexts are exact."""

import random
import re
from collections.abc import Callable

import pytest

from tandemkv import assets
from tandemkv.errors import InputError
from tandemkv.evaluate.formats import FORMATS, HELD_OUT_OF_TRAINING, Episode
from tandemkv.evaluate.prompts import Author, Text
from tandemkv.evaluate.vocabulary import Vocabulary, held_out
from training.documents import TRAINED

TEXT = assets.held_out_text()[:120_000]
TESTS = Vocabulary.of_text(TEXT, held_out=True)
TRAINING = Vocabulary.of_text(TEXT, held_out=False)


def encode(text: str) -> list[int]:
    """A token for every byte."""
    return list(text.encode())


def author(length: int = 6000, text: str = TEXT) -> Author:
    words = TESTS.even(lambda text: len(encode(text)))
    return Author(encode, Text(encode(text), "the text"), words, length)


def as_text(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode()


@pytest.mark.parametrize("name", FORMATS)
def test_facts_hold_what_is_asked(name: str) -> None:
    for seed in range(5):
        episode = FORMATS[name](TESTS, random.Random(seed), 12, 4)
        assert len(episode.questions) == 4
        assert len(episode.facts) >= 12
        told = "".join(episode.facts)
        for question in episode.questions:
            assert question.values
            assert all(value in told for value in question.values)
            assert all(value in question.answer for value in question.values)
            assert not any(f" {value}" in question.prompt for value in question.values)
            assert not question.prompt.endswith(" "), "the answer brings its own space"


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_seed_writes_the_same(name: str) -> None:
    made: list[Episode] = [FORMATS[name](TESTS, random.Random(seed), 12, 4) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_few_words_of_an_even_vocabulary_are_even() -> None:
    words, rng = TESTS.even(lambda text: len(encode(text))), random.Random(0)
    few = words.few(rng, 100)
    assert len(few.words) == 100
    assert len({len(few.word(rng)) for _ in range(50)}) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_context_has_its_length_and_even_questions(name: str) -> None:
    context = author().write(name, 5, "1")
    assert len(context.ids) == 6000
    assert len(context.questions) == 5
    assert len({(len(asked.prompt), len(asked.answer)) for asked in context.questions}) == 1
    for asked in context.questions:
        assert all(value in as_text(context.ids) for value in asked.values)
        assert all(value in as_text(asked.answer) for value in asked.values)


def test_a_context_does_not_hang_on_what_was_written_before() -> None:
    """Else a run that goes on, or asks for fewer tasks, would have other prompts."""
    alone = author().write("lines", 5, "7")
    writer = author()
    for name in FORMATS:
        writer.write(name, 5, "3")
    assert writer.write("lines", 5, "7") == alone


def test_needles_lie_at_every_depth() -> None:
    """In 40 contexts with 5 needles, each tenth of the length has some."""
    writer = author(4000)
    tenths = [0] * 10
    for seed in range(40):
        text = as_text(writer.write("needle", 5, str(seed)).ids)
        for place in re.finditer("One of the special", text):
            tenths[place.start() * 10 // len(text)] += 1
    assert min(tenths) >= 5, tenths


def test_variable_chains_stand_in_order() -> None:
    """Each name is assigned the one before it, or the number, and stands behind it."""
    episode = FORMATS["variables"](TESTS, random.Random(0), 12, 4)
    text = "".join(episode.facts)
    for question in episode.questions:
        number = re.findall(r"value (\d{5})", question.prompt)[0]
        places = [
            text.index(f" VAR {name} = {source}\n")
            for name, source in zip(question.values, (number, *(f"VAR {n}" for n in question.values)), strict=False)
        ]
        assert places == sorted(places)


@pytest.mark.parametrize(("name", "per_answer"), [("common_words", 2), ("frequent_words", 1)])
def test_the_asked_words_are_the_most_frequent(name: str, per_answer: int) -> None:
    episode = FORMATS[name](TESTS, random.Random(0), 6, 6)
    lists = {fact.split()[1].rstrip(":"): re.findall(r"[a-z]+", fact.split(":", 1)[1]) for fact in episode.facts}
    for question in episode.questions:
        words = next(lists[key] for key in lists if key in question.prompt)
        ranked = sorted(set(words), key=lambda word: -words.count(word))
        assert set(ranked[:per_answer]) == set(question.values)
        assert words.count(ranked[per_answer - 1]) > words.count(ranked[per_answer])


def drawn(vocabulary: Vocabulary) -> set[str]:
    rng = random.Random(3)
    kinds: list[Callable[[random.Random], str]] = [
        vocabulary.word,
        lambda r: vocabulary.number(r, 5),
        lambda r: vocabulary.number(r, 7),
        vocabulary.variable,
        vocabulary.uuid,
    ]
    return {draw(rng) for draw in kinds for _ in range(500)}


def test_tests_and_training_share_no_word_and_no_number() -> None:
    assert not drawn(TESTS) & drawn(TRAINING)
    assert all(held_out(word) for word in TESTS.words)
    assert not any(held_out(word) for word in TRAINING.words)
    assert 0.15 < len(TESTS.words) / (len(TESTS.words) + len(TRAINING.words)) < 0.35


def test_a_format_is_held_out_of_training() -> None:
    assert HELD_OUT_OF_TRAINING
    assert not set(HELD_OUT_OF_TRAINING) & set(TRAINED)
    assert set(FORMATS) - set(HELD_OUT_OF_TRAINING) <= set(TRAINED)


def test_training_keeps_out_what_it_is_told() -> None:
    told = frozenset([*TRAINING.words[:200], *map(str, range(100, 550))])
    vocabulary = Vocabulary.of_text(TEXT, held_out=False, keep_out=told)
    rng = random.Random(0)
    assert not {vocabulary.number(rng, 3) for _ in range(300)} & told
    assert not set(vocabulary.words) & told


def test_refusals() -> None:
    with pytest.raises(InputError, match="the text has 500 tokens, a context asks for 5"):
        author(text=TEXT[:500]).write("needle", 2, "0")
    with pytest.raises(InputError, match=r"needle: the facts alone take .* give a larger length or fewer questions"):
        author(300).write("needle", 10, "0")
    with pytest.raises(InputError, match="at least 100 words to draw keys from, got 1: give a longer text"):
        Vocabulary.of_text("hello hello", held_out=held_out("hello"))


def test_no_question_was_answered_in_an_earlier_turn() -> None:
    """As many facts as the questions ask for: none is asked for twice."""
    for seed in range(5):
        context = author().write("needle_multiquery", 5, str(seed))
        asked = [value for question in context.questions for value in question.values]
        assert len(set(asked)) == len(asked) == 10
