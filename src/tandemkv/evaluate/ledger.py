"""Who takes part, and every score that was found: kept on disk, so that a run that was stopped goes on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tandemkv.cache import parse_far_dtype
from tandemkv.errors import InputError
from tandemkv.evaluate.answers import NEAR_TOKENS
from tandemkv.select import Selector, Sparse
from tandemkv.selection import sparse_mode
from tandemkv.systems import EVALUATED, SYSTEMS


@dataclass(frozen=True)
class Contestant:
    """A system with a budget in tokens per KV head; `dense` has none. far_dtype: what its far tokens are kept in, as
    `TieredCache` takes it; None is the model's dtype."""

    system: str
    budget_tokens: int | None = None
    far_dtype: str | None = None

    @property
    def sparse(self) -> Sparse | None:
        """As a cache takes it."""
        return sparse_mode(self.system, self.budget_tokens)

    @property
    def reader(self) -> Selector | None:
        """The selector, where it learns something of a context while it is read."""
        sparse = self.sparse
        return None if sparse is None else sparse.observer or sparse.digester


def contestants(systems: list[str], budgets: list[int], far_dtypes: Sequence[str] = ()) -> list[Contestant]:
    """Every system with every budget, and dense with every format of far tokens; dense as the model computes first.

    InputError for unknown names, for exact systems, whose answers are dense's, and for budgets that are too small.
    """
    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown:
        raise InputError(f"unknown system {unknown[0]!r}: the known ones are {', '.join(SYSTEMS)}")
    exact = [name for name in systems if name not in EVALUATED]
    if exact:
        raise InputError(f"system {exact[0]!r} attends to every token: its answers are those of 'dense', leave it out")
    found = [Contestant("dense")]
    for name in dict.fromkeys(systems):
        if name == "dense":
            continue
        if not budgets:
            raise InputError(f"system {name!r} needs a budget, in tokens per KV head: give --budget")
        found += [Contestant(name, budget) for budget in dict.fromkeys(budgets)]
    for contestant in found:
        if contestant.sparse is not None:
            contestant.sparse.check(NEAR_TOKENS)
    for far_dtype in dict.fromkeys(far_dtypes):
        parse_far_dtype(far_dtype)
        found.append(Contestant("dense", None, far_dtype))
    return found


@dataclass(frozen=True)
class Scores:
    """Of one context: a score for each question, 0 to 1, or the mean surprise of the text behind it in nats.

    share_read, share_fallbacks: of a verified system, tokens read and heads attended exactly, as `Tally` has them, of
    all contexts together that shared a cache.
    """

    task: str
    form: str
    context: int
    system: str
    budget_tokens: int | None
    scores: tuple[float, ...]
    digest: str  # of the context and its questions
    share_read: float | None = None
    share_fallbacks: float | None = None
    far_dtype: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What a run does once."""
        return self.task, self.form, self.context, Contestant(self.system, self.budget_tokens, self.far_dtype)


@dataclass
class Ledger:
    """All scores of a run: `scores.jsonl` in a folder, its first line the settings; one line for each `Scores`.

    digests: of what is asked in each task and place. Scores of other prompts stay in the file, and out of `found`.
    """

    folder: Path
    settings: dict[str, Any]
    digests: dict[tuple[str, int], str]
    found: dict[tuple[object, ...], Scores] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._path = self.folder / "scores.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                self._read(*self._path.read_text().split("\n"))
            else:
                self._path.write_text(json.dumps(self.settings) + "\n")
        except InputError:
            raise
        except OSError as error:
            raise self._cannot_be_kept(error) from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            told = f"{type(error).__name__}: {error}"
            raise InputError(f"{self._path} is damaged ({told}): delete it, or give another --out") from error

    def _read(self, first: str, *lines: str) -> None:
        before = json.loads(first)
        differing = [name for name in self.settings if before.get(name) != self.settings[name]]
        if differing and not any(lines):  # nothing was found with them
            self._path.write_text(json.dumps(self.settings) + "\n")
            return
        if differing:
            name = differing[0]
            raise InputError(
                f"{self._path} was made with {name} {before.get(name)!r}, this run has {self.settings[name]!r}: "
                "give another --out, or delete it"
            )
        whole = [line for line in lines if line.endswith("}")]  # a last line may have been cut off
        rows = [json.loads(line) for line in whole]
        for scores in (Scores(**{**row, "scores": tuple(row["scores"])}) for row in rows):
            if self.digests.get((scores.task, scores.context)) == scores.digest:
                self.found[scores.key] = scores
        beside = self._path.with_suffix(".new")
        beside.write_text("\n".join([first, *whole]) + "\n")
        beside.replace(self._path)

    @property
    def num_contexts(self) -> int:
        """Contexts of each task."""
        num_contexts: int = self.settings["num_contexts"]
        return num_contexts

    @property
    def num_questions(self) -> int:
        """Questions about each context."""
        return int(self.settings.get("num_questions", 1))

    def add(self, scores: Scores) -> None:
        """Note what was found, once."""
        if scores.key in self.found:
            return
        self.found[scores.key] = scores
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(scores)) + "\n")
        except OSError as error:
            raise self._cannot_be_kept(error) from error

    def _cannot_be_kept(self, error: OSError) -> InputError:
        return InputError(f"scores cannot be kept in --out {self.folder} ({error.strerror}): give another folder")
