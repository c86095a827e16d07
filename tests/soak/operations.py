"""What may happen to a sequence. Each operation ends with caches that are whole, or raises AssertionError."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tandemkv.errors import CacheError, CapacityError
from tests import models
from tests.integrations.agreement import Streamer, arenas_of, tiered
from tests.interrupts import OURS, STOCK_STATES, interrupted
from tests.soak.sequences import HYBRIDS, WORLDS, Sequence, World, inputs_of

MAX_SEQUENCES, MAX_TOKENS = 8, 500
LINES = (300, 3000, 12000)  # of our code that pass before a Ctrl-C: in the first layers, in a prompt, in an answer


@dataclass
class Garden:
    """All sequences that live, and what has happened."""

    seed: int
    pick: random.Random = field(init=False)
    worlds: list[World] = field(init=False)
    draft: Any = field(init=False)
    sequences: list[Sequence] = field(default_factory=list)
    journal: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    num_started: int = 0
    num_tokens: int = 0
    far_bytes: int = 0
    arenas: set[StorageWeakRef] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pick = random.Random(self.seed)
        self.worlds = [World(family) for family in WORLDS]
        self.draft = models.llama(num_hidden_layers=1)

    def step(self) -> None:
        """One operation, then everything is checked."""
        self._operate()
        for each in self.sequences:
            each.cache.check()
        self.check_arenas()

    def check_arenas(self) -> None:
        """The memory of pages goes with the last cache that uses it, and where a larger arena takes its place."""
        in_use = {arena for sequence in self.sequences for arena in arenas_of(sequence.cache)}
        leaked = {arena for arena in self.arenas if not arena.expired()} - in_use
        assert not leaked, f"{len(leaked)} arenas are alive that no cache uses"
        self.arenas = in_use

    def _operate(self) -> None:
        weights = [START_WEIGHT, *(weight for weight, _ in OPERATIONS.values())]
        name = self.pick.choices(["start", *OPERATIONS], weights)[0]
        if not self.sequences or (name == "fork" and len(self.sequences) >= MAX_SEQUENCES):
            name = "start"
        if name == "start" and len(self.sequences) >= MAX_SEQUENCES:
            name = "drop"
        sequence = None if name == "start" else self.pick.choice(self.sequences)
        self.journal.append(f"{len(self.journal)} {name} {sequence.name if sequence else ''}")
        before = _moved_bytes(sequence)
        outcome = start(self) if sequence is None else OPERATIONS[name][1](self, sequence)
        held = "" if sequence is None else f", {sequence.held} of {sequence.ids.shape[1]} tokens held"
        self.journal[-1] += f": {outcome}{held}"
        self.far_bytes += max(0, _moved_bytes(sequence) - before)
        row = self.counts.setdefault(name, {})
        row[outcome] = row.get(outcome, 0) + 1

    def note(self, text: str) -> None:
        self.journal[-1] += f" {text}"

    def lose(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)

    def more_ids(self, sequence: Sequence, at_most: int) -> None:
        """So that there is something to feed."""
        num_new = self.pick.randint(1, at_most)
        more = models.random_ids(len(sequence.ids), num_new, seed=self.pick.randrange(1 << 30))
        sequence.ids = torch.cat([sequence.ids, more], 1)

    def room(self, sequence: Sequence) -> bool:
        """Beyond `MAX_TOKENS` it is forgotten, so that stock does not take all the time."""
        if sequence.ids.shape[1] < MAX_TOKENS:
            return True
        forget(self, sequence)
        return False


def _moved_bytes(sequence: Sequence | None) -> int:
    use = sequence.cache.use() if sequence else []
    return use[1].moved_bytes if use else 0


def start(garden: Garden) -> str:
    pick = garden.pick
    weights = [WORLDS[world.family][0] for world in garden.worlds]
    world = pick.choices(garden.worlds, weights)[0]
    page_size = pick.choice([16, 32])
    sizes = {"page_size": page_size, "chunk_tokens": page_size * pick.randint(1, 3)}
    sizes["near_tokens"] = 2 * page_size + pick.randint(0, 40)
    far_bytes = pick.choice(["32MiB", "32MiB", "128KiB"])
    cache = tiered(world.ours, far_bytes=far_bytes, **sizes)
    garden.num_started += 1
    ids = models.random_ids(pick.choice([1, 1, 2, 3]), pick.randint(2, 150), seed=pick.randrange(1 << 30))
    padding = torch.zeros(len(ids), dtype=torch.int64)
    if world.family not in HYBRIDS and pick.random() < 0.7:  # of those stock masks batches only
        padding[1:] = torch.tensor([pick.randrange(ids.shape[1]) for _ in ids[1:]])
    garden.sequences.append(Sequence(world, cache, ids, padding, f"{world.family}-{garden.num_started}"))
    garden.note(f"{garden.sequences[-1].name} {list(ids.shape)} padding {padding.tolist()} {sizes} {far_bytes}")
    return "done"


def _options(garden: Garden, sequence: Sequence) -> dict[str, Any]:
    """One of the ways that stock itself has for this family and batch; the prompt at once or in pieces."""
    pick, is_new, is_one = garden.pick, sequence.held == 0, len(sequence.ids) == 1
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": pick.choice([0, 20])}
    ways: list[dict[str, Any]] = [{}, {}, sampled]
    if is_new:
        ways += [{"num_beams": pick.randint(2, 3)}]
    if is_new and is_one:
        ways += [sampled | {"num_return_sequences": 2}]
    # Stock feeds the whole prompt again to a cache in use, and does not look ahead with recurrent states.
    if is_new and is_one and sequence.world.family not in HYBRIDS:
        ways += 3 * [{"prompt_lookup_num_tokens": 3}, {"assistant_model": garden.draft}]
    options = {"do_sample": False, "max_new_tokens": pick.randint(1, 24), **pick.choice(ways)}
    if "num_beams" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], 10)
    if not options.keys() & {"prompt_lookup_num_tokens", "assistant_model"} and pick.random() < 0.3:
        options["prefill_chunk_size"] = pick.choice([7, 16, 50])
    return options


def generate(garden: Garden, sequence: Sequence) -> str:
    """A turn. After beams the cache holds what no tokens tell, and is forgotten."""
    if not garden.room(sequence):
        return "forgotten"
    if sequence.held >= sequence.ids.shape[1]:
        garden.more_ids(sequence, 20)
    options, seed = _options(garden, sequence), garden.pick.randrange(1 << 30)
    told = {name: "draft" if name == "assistant_model" else value for name, value in options.items()}
    garden.note(f"{told} {seed}")
    before = sequence.ids
    try:
        garden.num_tokens += sequence.generate(seed, options) * len(before)
    except CapacityError:
        return _refused(sequence, before)
    if "num_beams" in options:
        sequence.cache.reset()
    else:
        assert sequence.held == sequence.ids.shape[1] - 1
    return "done"


def _refused(sequence: Sequence, before: torch.Tensor) -> str:
    """What did not fit has not come to pass, and what is held is right."""
    sequence.ids = before
    assert sequence.held <= before.shape[1]
    return "refused"


def feed(garden: Garden, sequence: Sequence) -> str:
    """Without `generate`: nobody reserves."""
    if not garden.room(sequence):
        return "forgotten"
    if sequence.held >= sequence.ids.shape[1]:
        garden.more_ids(sequence, garden.pick.choice([1, 4, 100]))
    before = sequence.held
    try:
        sequence.assert_goes_on(sequence.cache, sequence.ids.shape[1])
    except CapacityError:
        assert sequence.held == before
        return "refused"
    return "done"


def fork(garden: Garden, sequence: Sequence) -> str:
    garden.num_started += 1
    name = f"{sequence.world.family}-{garden.num_started}"
    garden.sequences.append(replace(sequence, cache=copy.deepcopy(sequence.cache), name=name))
    garden.more_ids(garden.sequences[-1], 10)
    garden.note(name)
    return "done"


def crop(garden: Garden, sequence: Sequence) -> str:
    """Windows and linear attention refuse, with nothing changed."""
    held = sequence.held
    removed = min(held, garden.pick.choice([1, 5, 20, held]))
    try:
        sequence.cache.crop(-removed)
    except CacheError:
        assert sequence.held == held
        return "refused"
    assert sequence.held == held - removed
    return "done"


def select(garden: Garden, sequence: Sequence) -> str:
    """Rows change places, are dropped, or come twice."""
    if not sequence.held:
        return "empty"
    rows = garden.pick.choices(range(len(sequence.ids)), k=garden.pick.randint(1, 3))
    sequence.cache.reorder_cache(torch.tensor(rows))
    sequence.ids, sequence.padding = sequence.ids[rows], sequence.padding[rows]
    return "done"


def _cut_off(garden: Garden, sequence: Sequence, act: Callable[[], Any]) -> str:
    """Ctrl-C before a random line; what is held is what was held, or more of the same tokens."""
    before, line = sequence.held, garden.pick.randrange(garden.pick.choice(LINES))
    garden.note(f"line {line}")
    outcome = "finished before"
    try:
        with interrupted(line, (*OURS, *STOCK_STATES)):
            act()
    except KeyboardInterrupt:
        outcome = "cut off"
    except CapacityError:
        outcome = "refused"
    assert before <= sequence.held <= sequence.ids.shape[1]
    sequence.cache.check()
    return outcome


def cut_off_forward(garden: Garden, sequence: Sequence) -> str:
    if not garden.room(sequence):
        return "forgotten"
    garden.more_ids(sequence, garden.pick.choice([1, 60]))
    inputs, cache = inputs_of(sequence.ids, sequence.padding, sequence.held), sequence.cache
    with torch.no_grad():
        return _cut_off(garden, sequence, lambda: sequence.world.ours(**inputs, past_key_values=cache))


class Stop(Streamer):
    """Raises at the nth token."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.nth = nth

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.num_puts > self.nth:
            raise KeyboardInterrupt


def cut_off_generate(garden: Garden, sequence: Sequence) -> str:
    """By a line or by the streamer. Greedy, so that the tokens are known: as far as they went, they are stock's."""
    if not garden.room(sequence):
        return "forgotten"
    garden.more_ids(sequence, 20)
    prompt, world, cache = sequence.ids, sequence.world, sequence.cache
    streamer = Stop(garden.pick.randint(0, 8)) if len(prompt) == 1 else None
    options: dict[str, Any] = {"attention_mask": sequence.mask, "do_sample": False, "max_new_tokens": 10}
    sequence.ids = world.stock.generate(prompt, **options)
    outcome = _cut_off(
        garden, sequence, lambda: world.ours.generate(prompt, past_key_values=cache, streamer=streamer, **options)
    )
    if sequence.held < sequence.ids.shape[1]:
        feed(garden, sequence)
    return outcome


def cut_off_change(garden: Garden, sequence: Sequence) -> str:
    """A crop or a reset that is cut off has happened or not."""
    held, line = sequence.held, garden.pick.randrange(150)
    after = garden.pick.choice([0, max(0, held - 3)])
    garden.note(f"line {line}, to {after}")
    try:
        with interrupted(line, (*OURS, *STOCK_STATES)):
            sequence.cache.crop(after - held) if after else sequence.cache.reset()
    except KeyboardInterrupt:
        pass
    except CacheError:
        return "refused"
    sequence.cache.check()
    assert sequence.held in {held, after}
    return "cut off"


def verify(garden: Garden, sequence: Sequence) -> str:
    """On a fork, which is dropped: the next token's logits are stock's."""
    if sequence.held >= sequence.ids.shape[1]:
        garden.more_ids(sequence, 1)
    try:
        sequence.assert_goes_on(copy.deepcopy(sequence.cache), sequence.held + 1)
    except CapacityError:
        return "refused"
    return "done"


def forget(_: Garden, sequence: Sequence) -> str:
    """The same cache serves another prompt."""
    sequence.cache.reset()
    sequence.ids = sequence.ids[:, :40]
    sequence.padding = sequence.padding.clamp(max=sequence.ids.shape[1] - 1)
    return "done"


def close(garden: Garden, sequence: Sequence) -> str:
    sequence.cache.close()
    garden.lose(sequence)
    return "done"


def drop(garden: Garden, sequence: Sequence) -> str:
    """Its last reference goes when this returns."""
    garden.lose(sequence)
    return "done"


START_WEIGHT = 10
OPERATIONS: dict[str, tuple[int, Callable[[Garden, Sequence], str]]] = {
    "generate": (20, generate),
    "feed": (10, feed),
    "fork": (8, fork),
    "crop": (8, crop),
    "select": (4, select),
    "cut off forward": (10, cut_off_forward),
    "cut off generate": (10, cut_off_generate),
    "cut off change": (4, cut_off_change),
    "verify": (10, verify),
    "reset": (3, forget),
    "close": (3, close),
    "drop": (4, drop),
}
"""How often each is chosen, beside `start`."""
