"""Formats of retrieval: facts to plant in a text, and questions about them. Tests and training share the formats only.

After RULER (2404.06654: needles, variable tracking, common and frequent words), lost-in-the-middle (2307.03172: UUID
pairs), LongChat (lines) and Zoology (2312.04927: MQAR), in words close to theirs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tandemkv.errors import InputError
from tandemkv.evaluate.vocabulary import Vocabulary


@dataclass(frozen=True)
class Question:
    """`prompt` ends where the answer begins; `answer` is the text that a perfect model writes next.

    An answer counts by the share of `values` found in it (RULER's string match).
    """

    prompt: str
    answer: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Episode:
    """Facts, in the order in which they stand, and questions about them.

    `in_text` tells whether the facts are planted into a text, each at a place of its own, or follow one another.
    """

    opening: str
    facts: tuple[str, ...]
    questions: tuple[Question, ...]
    in_text: bool
    closing: str = ""


Format = Callable[[Vocabulary, random.Random, int, int], Episode]
"""(vocabulary, rng, num_facts, num_questions) -> Episode with at least `num_facts` facts."""


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(100 * count + 1000):
        if len(found) == count:
            return list(found)
        found.setdefault(draw())
    raise InputError(
        f"{count} different keys cannot be drawn from this text's words: give a longer text or a smaller length"
    )


def _listed(values: tuple[str, ...]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


# -- needles -----------------------------------------------------------------------------------------------------------

_NEEDLES = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize them. I will quiz you "
    "about the {kind}s afterwards.\n"
)


def _needle(kind: str, key: str, value: str) -> str:
    return f" One of the special magic {kind}s for {key} is: {value}."


def _needle_question(kind: str, key: str, value: str) -> Question:
    asked = f"the special magic {kind} for {key} mentioned in the provided text"
    return Question(f"\nWhat is {asked}? T{asked[1:]} is", f" {value}.", (value,))


def needle(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Numbers for keys, planted in a text (RULER's niah_single and niah_multikey_1)."""
    keys = _distinct(lambda: vocabulary.key(rng), num_facts)
    values = [vocabulary.number(rng, 7) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    return Episode(
        _NEEDLES.format(kind="number"),
        tuple(_needle("number", *pair) for pair in pairs),
        tuple(_needle_question("number", *pair) for pair in rng.sample(pairs, num_questions)),
        in_text=True,
    )


def needle_multikey(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Nothing but needles (RULER's niah_multikey_2)."""
    episode = needle(vocabulary, rng, num_facts, num_questions)
    return Episode(episode.opening, tuple(f"{fact[1:]}\n" for fact in episode.facts), episode.questions, in_text=False)


def needle_multivalue(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Up to four numbers for one key, all of them asked for (RULER's niah_multivalue)."""
    keys = _distinct(lambda: vocabulary.key(rng), max(num_questions, -(-num_facts // 4)))
    per_key = max(2, min(4, num_facts // len(keys)))
    order = [key for key in keys for _ in range(per_key)]
    rng.shuffle(order)
    pairs = [(key, vocabulary.number(rng, 7)) for key in order]
    questions = []
    for key in rng.sample(keys, num_questions):
        values = tuple(value for other, value in pairs if other == key)
        asked = f"the special magic numbers for {key} mentioned in the provided text"
        questions.append(Question(f"\nWhat are all {asked}? T{asked[1:]} are", f" {_listed(values)}.", values))
    facts = tuple(_needle("number", *pair) for pair in pairs)
    return Episode(_NEEDLES.format(kind="number"), facts, tuple(questions), in_text=True)


def needle_multiquery(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Two keys in one question; unlike in RULER's niah_multiquery the answer names each before its number."""
    keys = _distinct(lambda: vocabulary.key(rng), max(num_facts, 2))
    value_of = {key: vocabulary.number(rng, 7) for key in keys}
    questions = []
    for asked in _pairs(keys, rng, num_questions):
        values = tuple(value_of[key] for key in asked)
        told = _listed(tuple(f"{key}: {value_of[key]}" for key in asked))
        what = f"the special magic numbers for {_listed(asked)} mentioned in the provided text"
        questions.append(Question(f"\nWhat are {what}? T{what[1:]} are", f" {told}.", values))
    facts = tuple(_needle("number", key, value) for key, value in value_of.items())
    return Episode(_NEEDLES.format(kind="number"), facts, tuple(questions), in_text=True)


def _pairs(keys: list[str], rng: random.Random, count: int) -> list[tuple[str, ...]]:
    """None is asked for again before all were: the answer would stand in an earlier turn."""
    drawn: list[str] = []
    while len(drawn) < 2 * count:
        drawn += rng.sample(keys, len(keys) // 2 * 2)
    return [tuple(drawn[i : i + 2]) for i in range(0, 2 * count, 2)]


def needle_uuid(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Nothing but needles, UUIDs for UUIDs (RULER's niah_multikey_3)."""
    pairs = [(vocabulary.uuid(rng), vocabulary.uuid(rng)) for _ in range(num_facts)]
    return Episode(
        _NEEDLES.format(kind="uuid"),
        tuple(f"{_needle('uuid', *pair)[1:]}\n" for pair in pairs),
        tuple(_needle_question("uuid", *pair) for pair in rng.sample(pairs, num_questions)),
        in_text=False,
    )


# -- tables ------------------------------------------------------------------------------------------------------------


def kv_question(key: str, value: str) -> Question:
    """For the value of a key in a JSON object."""
    return Question(f'\nKey: "{key}"\nCorresponding value:', f" {value}", (value,))


def line_question(key: str, value: str) -> Question:
    """For the number in a line."""
    asked = f"the <REGISTER_CONTENT> in line {key}"
    return Question(f"\nTell me what is {asked}? I need the number.\nT{asked[1:]} is", f" <{value}>.", (value,))


def kv(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """A JSON object of UUIDs (lost in the middle)."""
    pairs = [(vocabulary.uuid(rng), vocabulary.uuid(rng)) for _ in range(num_facts)]
    return Episode(
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{",
        tuple(f'"{key}": "{value}",\n ' for key, value in pairs),
        tuple(kv_question(*pair) for pair in rng.sample(pairs, num_questions)),
        in_text=False,
        closing="}\n",
    )


def lines(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Lines that each hold a number (LongChat)."""
    keys = _distinct(lambda: vocabulary.key(rng), num_facts)
    pairs = [(key, vocabulary.number(rng, 5)) for key in keys]
    return Episode(
        "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
        "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
        "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
        "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n",
        tuple(f"line {key}: REGISTER_CONTENT is <{value}>\n" for key, value in pairs),
        tuple(line_question(*pair) for pair in rng.sample(pairs, num_questions)),
        in_text=False,
        closing="\nNow the record is over.",
    )


def mqar(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Keys with a word each, then keys alone (Zoology's multi-query associative recall)."""
    keys = _distinct(lambda: vocabulary.key(rng), num_facts)
    pairs = [(key, vocabulary.word(rng)) for key in keys]
    return Episode(
        "Pairs:\n",
        tuple(f" {key} {value};" for key, value in pairs),
        tuple(Question(f"\n {key}", f" {value};", (value,)) for key, value in rng.sample(pairs, num_questions)),
        in_text=False,
    )


# -- chains and counts -------------------------------------------------------------------------------------------------


def _chain_of_assignments(number: str, names: tuple[str, ...]) -> list[str]:
    return [
        f" VAR {name} = {value}\n" for name, value in zip(names, (number, *(f"VAR {n}" for n in names)), strict=False)
    ]


def variables(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Chains of assignments; all names that hold a number are asked for (RULER's variable tracking, 2 hops)."""
    hops = 2
    names = _distinct(lambda: vocabulary.variable(rng), (hops + 1) * max(num_questions, num_facts // (hops + 1)))
    numbers = _distinct(lambda: vocabulary.number(rng, 5), len(names) // (hops + 1))
    chains = [(number, tuple(names[i :: len(numbers)])) for i, number in enumerate(numbers)]
    waiting = [_chain_of_assignments(number, chain) for number, chain in chains]
    facts = []
    while any(waiting):
        facts.append(rng.choice([chain for chain in waiting if chain]).pop(0))
    questions = [
        Question(
            f"\nQuestion: Find all variables that are assigned the value {number} in the text above. Answer: According "
            f"to the chain(s) of variable assignment in the text above, {len(chain)} variables are assigned the value "
            f"{number}, they are:",
            f" {' '.join(chain)}.",
            chain,
        )
        for number, chain in rng.sample(chains, num_questions)
    ]
    return Episode(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n",
        tuple(facts),
        tuple(questions),
        in_text=True,
    )


def _list_of_words(words: list[str], rng: random.Random, counts: list[int]) -> str:
    written = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(written)
    return " ".join(written)


def common_words(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Lists of words in which two come often and the others once (RULER's common words), many lists in a context."""
    keys = _distinct(lambda: vocabulary.key(rng), max(num_facts, num_questions))
    facts, questions = [], []
    for key in keys:
        words = _distinct(lambda: vocabulary.word(rng), 12)
        facts.append(f"List {key}: {_list_of_words(words, rng, [6, 6, *[1] * 10])}.\n")
        common = tuple(sorted(words[:2]))
        prompt = f"\nWhat are the 2 most common words in list {key}? The most common words in list {key} are:"
        questions.append(Question(prompt, f" {' '.join(common)}.", common))
    return Episode(
        "Below are lists of words. Memorize the ones that appear most often.\n",
        tuple(facts),
        tuple(rng.sample(questions, num_questions)),
        in_text=False,
    )


def frequent_words(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Coded texts whose words follow a Zipf law (RULER's frequent words); the most frequent one is asked for."""
    keys = _distinct(lambda: vocabulary.key(rng), max(num_facts, num_questions))
    facts, questions = [], []
    for key in keys:
        words = _distinct(lambda: vocabulary.word(rng), 8)
        counts = [max(1, round(12 / rank**2)) for rank in range(1, 9)]
        facts.append(f"Text {key}: {_list_of_words(words, rng, counts).replace(' ', ' ... ')}.\n")
        asked = f"the most frequently appeared word in coded text {key}"
        prompt = f"\nWhat is {asked}? T{asked[1:]} is:"
        questions.append(Question(prompt, f" {words[0]}.", (words[0],)))
    return Episode(
        "Read the following coded texts and track the frequency of each coded word.\n",
        tuple(facts),
        tuple(rng.sample(questions, num_questions)),
        in_text=False,
    )


# -- held out of training ----------------------------------------------------------------------------------------------


def telephone(vocabulary: Vocabulary, rng: random.Random, num_facts: int, num_questions: int) -> Episode:
    """Telephone numbers of offices, planted in a text. Held out: training never sees this format."""
    offices = _distinct(lambda: vocabulary.key(rng), num_facts)
    pairs = [(office, f"{vocabulary.number(rng, 3)}-{vocabulary.number(rng, 4)}") for office in offices]
    return Episode(
        "Somebody wrote telephone numbers into this text.\n",
        tuple(f" To reach the {office} office, please dial {number}." for office, number in pairs),
        tuple(
            Question(
                f"\nHow is the {office} office reached? To reach the {office} office, please dial",
                f" {number}.",
                (number,),
            )
            for office, number in rng.sample(pairs, num_questions)
        ),
        in_text=True,
    )


FORMATS: dict[str, Format] = {
    "needle": needle,
    "needle_multikey": needle_multikey,
    "needle_multivalue": needle_multivalue,
    "needle_multiquery": needle_multiquery,
    "needle_uuid": needle_uuid,
    "kv": kv,
    "lines": lines,
    "mqar": mqar,
    "variables": variables,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "telephone": telephone,
}

HELD_OUT_OF_TRAINING = ("telephone",)
