"""What is asked: generated formats at any length, rows of published benchmarks, and the surprise of plain text."""

import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandemkv.errors import InputError
from tandemkv.evaluate.formats import FORMATS, Question, kv_question, line_question
from tandemkv.evaluate.prompts import Asked, Author, Context, Encode

PERPLEXITY = "perplexity"
CONTINUATION_TOKENS = 256  # behind each passage, whose surprise is measured


@dataclass(frozen=True)
class Rows:
    """Published prompts: a file that users have, and how a line of it becomes a context and questions about it."""

    file_name: str
    read: Callable[[dict[str, Any]], tuple[str, list[Question]]]


def _kv_row(row: dict[str, Any]) -> tuple[str, list[Question]]:
    """lost-in-the-middle's kv-retrieval: a JSON object of UUIDs; the row's own key first."""
    records: list[list[str]] = row["ordered_kv_records"]
    pairs = {str(row["key"]): str(row["value"]), **dict(records)}
    listed = ",\n ".join(f'"{key}": "{value}"' for key, value in records)
    opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
    return f"{opening}{{{listed}}}\n", [kv_question(key, value) for key, value in pairs.items()]


def _lines_row(row: dict[str, Any]) -> tuple[str, list[Question]]:
    """LongChat's lines; the row's own line first."""
    prompt, own = str(row["prompt"]), str(row["correct_line"]).strip()
    context, _ = prompt.split("\nNow the record is over.", 1)
    written = [line for line in context.split("\n") if line.startswith("line ") and line.endswith(">")]
    pairs = dict(line[len("line ") : -1].split(": REGISTER_CONTENT is <") for line in [own, *written])
    return f"{context}\nNow the record is over.", [line_question(key, value) for key, value in pairs.items()]


ROWS: dict[str, Rows] = {
    "kv_rows": Rows("kv-retrieval-75_keys.jsonl.gz", _kv_row),
    "lines_rows": Rows("longchat_200_lines.jsonl", _lines_row),
}

TASKS = (PERPLEXITY, *FORMATS, *ROWS)

COUNTED = ("needle", "needle_multiquery", "needle_uuid", "kv", "mqar")
"""Tasks on which the shipped model, attending densely, answers at least 90 % at the length it judges at."""


def read_tasks(names: str, rows: Path | None) -> tuple[str, ...]:
    """Tasks named with commas, `counted`, or `all`: every one whose prompts are at hand."""
    if names == "counted":
        return COUNTED
    if names == "all":
        return tuple(task for task in TASKS if rows is not None or task not in ROWS)
    found = tuple(dict.fromkeys(names.split(",")))
    unknown = [task for task in found if task not in TASKS]
    if unknown:
        raise InputError(f"unknown task {unknown[0]!r}: the known ones are {', '.join(TASKS)}; or counted, or all")
    return found


def write_contexts(task: str, author: Author, num_contexts: int, num_questions: int, seed: int) -> list[Context]:
    """Contexts of a generated task, the same for everybody who has the same text, tokenizer and seed."""
    return [author.write(task, num_questions, f"{seed}/{task}/{index}") for index in range(num_contexts)]


def write_passages(author: Author, num_contexts: int, seed: int) -> list[Context]:
    """Plain passages; what follows each is the answer to a question without words."""
    return [author.passage(CONTINUATION_TOKENS + 1, f"{seed}/{PERPLEXITY}/{index}") for index in range(num_contexts)]


def read_rows(task: str, folder: Path | None, encode: Encode, num_contexts: int, num_questions: int) -> list[Context]:
    """Contexts of published rows; questions about each beside its own are drawn from its other records."""
    rows = ROWS[task]
    path = None if folder is None else folder / rows.file_name
    if path is None or not path.is_file():
        where = "give --rows FOLDER with it" if folder is None else f"--rows {folder} has no such file"
        raise InputError(f"{task} reads {rows.file_name}, which is not shipped: {where}")
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
        read = [rows.read(json.loads(line)) for line in text.splitlines()[:num_contexts]]
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not as published ({type(error).__name__}: {error}): fetch it again") from error
    if len(read) < num_contexts:
        raise InputError(f"{path} has {len(read)} rows, {num_contexts} were asked for: lower --contexts")
    contexts = []
    for index, (context, questions) in enumerate(read):
        if len(questions) < num_questions:
            raise InputError(
                f"{path} has {len(questions)} records, {num_questions} questions were asked for: lower --questions"
            )
        own, others = questions[0], random.Random(f"{task}/{index}").sample(questions[1:], num_questions - 1)
        asked = [Asked(tuple(encode(q.prompt)), tuple(encode(q.answer)), q.values) for q in (own, *others)]
        contexts.append(Context(tuple(encode(context)), tuple(asked)))
    return contexts
