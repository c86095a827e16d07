"""`tandemkv generate`: the text of a file through a local model, written as it comes, and what it took.

What can be refused is refused before the weights are read: the model is first built without any (on torch's meta
device), to ask what its cache and its weights will need.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import tandemkv.integrations.transformers as tandem
from tandemkv import machine
from tandemkv.attention import use_threads
from tandemkv.cache import CacheSpec, TierUse
from tandemkv.crews import crew_for, links_of, machine_for, parse_link, placement_for, read_plan, work_for
from tandemkv.errors import CapacityError, InputError
from tandemkv.integrations.transformers.folders import (
    Dtype,
    blaming,
    load_model,
    quieten,
    read_config,
    read_tokenizer,
    special_tokens,
    tokenize,
)
from tandemkv.lanes.rig import require_two_processors
from tandemkv.lanes.timeline import Recorder, write_trace
from tandemkv.profiling import profile_of_this_machine
from tandemkv.schedule import Machine, Plan
from tandemkv.schedule.budget import BudgetRule
from tandemkv.schedule.placement import Placement
from tandemkv.select import MAX_SELECT_QUERIES, Tally
from tandemkv.selection import sparse_mode
from tandemkv.systems import SYSTEMS
from tandemkv.types import format_bytes, parse_bytes

MAX_TRACED_STEPS = 4096
"""Of layers: 128 tokens of a model of 32; a trace of so many has some 20 MB."""

MIN_TEMPERATURE = 1e-30  # logits divided by less leave float32
Finish = Literal["eos", "length", "interrupted"]


@dataclass(frozen=True)
class Settings:
    """How to generate.

    near_tokens: kept near per layer. far_bytes: None takes what the prompt and the new tokens need. far_dtype: as
    `TieredCache` takes it. temperature: 0 is greedy; top_p and seed belong to sampling. threads: None takes what this
    machine grants. link: of systems with lanes, GB/s or GB/s:us of the links between the processor that is the device
    and those that are the host; None is as fast as memory is copied. plan_file: the plan that every step has.
    trace_file: where the first steps of layers are written, as a Chrome trace.
    """

    near_tokens: int = 4096
    far_bytes: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    dtype: Dtype = "auto"
    threads: int | None = None
    system: str = "dense"
    budget_tokens: int | None = None
    far_dtype: str | None = None
    link: str | None = None
    plan_file: Path | None = None
    trace_file: Path | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(f"--temperature must be 0 (greedy), or {MIN_TEMPERATURE} or above, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_p is not None or self.seed is not None):
            raise InputError("--top-p and --seed are for sampling: give a --temperature above 0 too")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise InputError(f"--seed must be at least 0 and below 2**63, got {self.seed}")
        if sparse_mode(self.system, self.budget_tokens) is None and self.budget_tokens is not None:
            raise InputError(f"system {self.system!r} attends to every token: leave budget_tokens out")
        if not SYSTEMS[self.system].lanes and (self.link or self.plan_file or self.trace_file):
            options = "--link, --plan and --trace"
            raise InputError(f"{options} are for systems with lanes, such as 'tandem', got {self.system!r}")
        if self.trace_file is not None:
            machine.check_can_write("--trace", self.trace_file)
        if self.link is not None:
            parse_link(self.link)

    def for_transformers(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        rules = {"max_new_tokens": self.max_new_tokens, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
        if self.temperature == 0:
            return {**rules, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {**rules, "do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


@dataclass(frozen=True)
class Generation:
    """What came out and what it took. `finish`: at the end of text, at max_new_tokens, or by Ctrl-C.

    Seconds count from the start of prefill, when the model is loaded. Rates are None where nothing was timed. verified:
    what came of a promise about the error, by layer; none where nothing was promised. plan: that the last step had,
    where it had one. trace: the file that was written, and what is in it, or why it was not.
    """

    text: str
    new_ids: list[int]
    finish: Finish
    num_prompt_tokens: int
    token_seconds: list[float]
    tiers: list[TierUse]
    verified: dict[int, Tally] = field(default_factory=dict)
    plan: Plan | None = None
    trace: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        """Until the first new token."""
        return self.token_seconds[0] if self.token_seconds else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens over the time to the first new token."""
        return self.num_prompt_tokens / self.token_seconds[0] if self.token_seconds else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """New tokens after the first one, over their time."""
        if len(self.token_seconds) < 2:
            return None
        return (len(self.token_seconds) - 1) / (self.token_seconds[-1] - self.token_seconds[0])

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "text": self.text,
            "finish": self.finish,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_new_tokens": len(self.new_ids),
            "new_ids": self.new_ids,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "first_token_seconds": self.first_token_seconds,
            "tiers": [asdict(tier) for tier in self.tiers],
            "verified": _verified(self.verified) if self.verified else None,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "trace": self.trace,
        }


def _verified(tallies: dict[int, Tally]) -> dict[str, Any]:
    """All layers together, then each."""
    layers = [{"layer": layer, **tally.to_dict()} for layer, tally in tallies.items()]
    return {**Tally.of([*tallies.values()]).to_dict(), "layers": layers}


def generate(
    folder: Path, prompt_file: Path, settings: Settings, console: Console, write: Callable[[str], None]
) -> Generation:
    """Continue the text of a file; `write` gets the new text piece by piece, `console` the progress.

    Raises a TandemError for everything that a user can mend, before anything is written. Ctrl-C ends it early.
    """
    quieten()
    use_threads(settings.threads)
    prompt = read_prompt(prompt_file)
    config = read_config(folder, settings.dtype)
    tokenizer = read_tokenizer(folder)
    ids = tokenize(tokenizer, prompt, config.vocab_size)
    special = special_tokens(folder, config)
    cache = reserve_cache(folder, config, ids.shape[1], settings, console)
    crew, recorder = cache.kv.crew, Recorder(MAX_TRACED_STEPS)
    if crew is not None and settings.trace_file is not None:
        crew.on_step = recorder
    with nullcontext() if crew is None else closing(crew), nullcontext() if crew is None else crew.rig.claimed():
        with console.status("loading the weights"):
            model = load_model(folder, config.dtype)
        model.generation_config = special
        found = _run(model, cache, ids, settings, console, TextStream(tokenizer, write))
    if settings.trace_file is None:
        return found
    try:
        write_trace(settings.trace_file, recorder.steps)
    except InputError as error:  # nobody loses the text for it
        return replace(found, trace=str(error))
    return replace(found, trace=f"{settings.trace_file}: {recorder.told}")


def read_prompt(path: Path) -> str:
    """The text of a file as it is, of stdin for `-`."""
    try:
        text = (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise InputError(f"the prompt file {path} is empty")
    return text


def reserve_cache(
    folder: Path, config: PreTrainedConfig, num_prompt_tokens: int, settings: Settings, console: Console
) -> tandem.TieredCache:
    """A cache with room for the prompt and the new tokens, reserved; refuses what this machine could not finish."""
    _check_positions(num_prompt_tokens, settings.max_new_tokens, config.max_position_embeddings)
    with blaming(folder / "config.json"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        tandem.attach(skeleton)
    num_tokens = num_prompt_tokens + settings.max_new_tokens
    make = partial(tandem.TieredCache, skeleton.config, far_dtype=settings.far_dtype)
    far_bytes = 0 if settings.far_bytes is None else parse_bytes(settings.far_bytes)
    cache = make(settings.near_tokens, far_bytes)
    staff = _staff(
        cache.kv.spec, config.get_text_config(decoder=True).num_attention_heads, num_tokens, settings, console
    )
    moved = staff is not None and staff.placement.num_inputs > 0  # near tokens made room for layer inputs
    near_tokens = staff.placement.near_tokens if staff is not None and moved else settings.near_tokens
    spec = make(near_tokens, far_bytes).kv.spec
    needed_far_bytes = spec.far_bytes_of(spec.num_far_pages(1, num_tokens))
    kv_bytes = needed_far_bytes + spec.num_near_slots(1) * spec.near_page_bytes
    _check_memory(sum(weight.nbytes for weight in skeleton.parameters()), kv_bytes, num_tokens)
    cache = make(near_tokens, needed_far_bytes if settings.far_bytes is None else far_bytes)
    cache.kv.sparse = sparse_mode(settings.system, settings.budget_tokens)
    if staff is not None:
        cache.keep_inputs(staff.placement.num_inputs, staff.placement.where)
        floor = settings.budget_tokens
        budget = None if floor is None else BudgetRule(floor, max(floor, num_tokens))
        cache.kv.crew = crew_for(SYSTEMS[settings.system], staff.machine, staff.plan, budget)
    cache.reserve(1, num_tokens)
    return cache


class _Staff(NamedTuple):
    """What a system with lanes needs to know before there is a cache."""

    machine: Machine
    placement: Placement
    plan: Plan | None


def _staff(spec: CacheSpec, num_q_heads: int, num_tokens: int, settings: Settings, console: Console) -> _Staff | None:
    """None for systems without lanes."""
    system = SYSTEMS[settings.system]
    if not system.lanes:
        return None
    require_two_processors()  # before a profile is measured
    plan = None if settings.plan_file is None else read_plan(settings.plan_file, system)
    profile = profile_of_this_machine(console)
    speeds = machine_for(profile, spec, links_of(profile, settings.link))
    return _Staff(speeds, placement_for(system, work_for(spec, num_q_heads, 1, num_tokens), speeds, plan), plan)


class TextStream(BaseStreamer):
    """Takes the tokens of `generate` as they come: notes their times and writes their text, special tokens left out.

    The pieces together are `tokenizer.decode(ids)`: each is what its tokens add to the text of the piece before, and a
    character that spans tokens waits for the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._knows_prompt = False
        self._piece, self._shown = 0, 0  # ids[piece:shown] is the last piece written, ids[shown:] is not written

    def put(self, value: Tensor) -> None:
        """`generate` hands over the prompt first, then every new token."""
        if not self._knows_prompt:
            self._knows_prompt = True
            return
        self.times.append(time.perf_counter())
        self.ids.append(int(value))
        self._show(is_last=False)

    def end(self) -> None:
        """Write what was held back."""
        self._show(is_last=True)

    def _show(self, is_last: bool) -> None:
        before = self._decode(self.ids[self._piece : self._shown])
        text = self._decode(self.ids[self._piece :])
        if text == before or (text.endswith("\N{REPLACEMENT CHARACTER}") and not is_last):
            return
        self._piece, self._shown = (
            self._shown,
            len(self.ids),
        )  # first: after Ctrl-C in `write`, `end` writes no piece twice
        self.text += text[len(before) :]
        self._write(text[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def print_generation(generation: Generation, console: Console) -> None:
    """The closing table: speeds and bytes; for an interrupted one a line."""
    num_new_tokens = len(generation.new_ids)
    if generation.finish == "interrupted":
        console.print(f"[yellow]interrupted after {num_new_tokens} new tokens[/yellow]", highlight=False)
        return
    why = "end of text" if generation.finish == "eos" else "--max-new-tokens reached"
    rows = [
        ("prefill", f"{generation.num_prompt_tokens:,} tokens, {_rate(generation.prefill_tokens_per_s)}"),
        ("time to first token", f"{generation.first_token_seconds:.2f} s"),
        ("decode", f"{num_new_tokens:,} tokens, {_rate(generation.decode_tokens_per_s)} ({why})"),
    ]
    for tier in generation.tiers:
        moved = f", {format_bytes(tier.moved_bytes)} moved there" if tier.name != "near" else ""
        size = f"{format_bytes(tier.used_bytes)} of {format_bytes(tier.capacity_bytes)} used{moved}"
        rows.append((f"{tier.name} ({tier.device})", size))
    if generation.verified:
        worst = max(generation.verified, key=lambda layer: generation.verified[layer].to_dict()["share_read"])
        rows.append(("estimated error", Tally.of([*generation.verified.values()]).summary))
        rows.append((f"of them layer {worst}", f"{generation.verified[worst].summary}: --json has every layer"))
    if generation.trace is not None:
        rows.append(("trace", generation.trace))
    if generation.plan is not None:
        rows.append(("far tokens of the last step", generation.plan.summary))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in rows:
        table.add_row(escape(name), escape(text))
    console.print(table)


def _run(
    model: PreTrainedModel,
    cache: tandem.TieredCache,
    ids: Tensor,
    settings: Settings,
    console: Console,
    stream: TextStream,
) -> Generation:
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    begin = time.perf_counter()
    try:
        _prefill(model, cache, ids[:, :-1], console)
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, past_key_values=cache, streamer=stream, **settings.for_transformers())
        ends = model.generation_config.eos_token_id
        finish: Finish = "eos" if stream.ids[-1] in (ends if isinstance(ends, list) else [ends]) else "length"
    except KeyboardInterrupt:
        stream.end()
        finish = "interrupted"
    return Generation(
        text=stream.text,
        new_ids=stream.ids,
        finish=finish,
        num_prompt_tokens=ids.shape[1],
        token_seconds=[seconds - begin for seconds in stream.times],
        tiers=cache.use(),
        verified=dict(zip(cache.kv.full_layers, cache.kv.tallies, strict=False)),  # no tallies without a promise
        plan=None if cache.kv.crew is None else cache.kv.crew.plan,
    )


@torch.no_grad()
def _prefill(model: PreTrainedModel, cache: tandem.TieredCache, ids: Tensor, console: Console) -> None:
    """Work through `[1, num_tokens]` a chunk at a time, so that memory is bounded by a chunk and the bar moves; at once
    where a model's keys depend on it."""
    num_tokens, chunk_tokens = ids.shape[1], cache.kv.spec.chunk_tokens
    if num_tokens == 0:
        return
    if tandem.depends_on_length(model.config):
        chunk_tokens = num_tokens
    columns = (TextColumn("prefill"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("prefill", total=num_tokens, rate="")
        begin = time.perf_counter()
        done = 0
        while done < num_tokens:
            # A rest that one selection could serve goes along: a prompt attends to everything.
            is_rest = num_tokens - done - chunk_tokens <= MAX_SELECT_QUERIES
            chunk = ids[:, done:] if is_rest else ids[:, done : done + chunk_tokens]
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            rate = (done + chunk.shape[1]) / (time.perf_counter() - begin)
            progress.update(task, advance=chunk.shape[1], rate=_rate(rate))
            done += chunk.shape[1]


def _rate(tokens_per_s: float | None) -> str:
    return "not timed" if tokens_per_s is None else f"{tokens_per_s:,.1f} tokens/s"


def _check_positions(num_prompt_tokens: int, max_new_tokens: int, max_positions: int) -> None:
    left = max_positions - num_prompt_tokens
    if left < 1:
        raise InputError(
            f"the prompt has {num_prompt_tokens} tokens, the model {max_positions} positions: shorten the prompt by at "
            f"least {1 - left} tokens"
        )
    if max_new_tokens > left:
        raise InputError(
            f"{num_prompt_tokens} tokens of prompt and {max_new_tokens} new ones exceed the model's {max_positions} "
            f"positions: lower --max-new-tokens to {left} or shorten the prompt"
        )


def _check_memory(weight_bytes: int, kv_bytes: int, num_tokens: int) -> None:
    available = machine.available_bytes()
    if weight_bytes + kv_bytes > available.num_bytes:
        raise CapacityError(
            f"{format_bytes(weight_bytes)} of weights and {format_bytes(kv_bytes)} of keys and values for {num_tokens} "
            f"tokens are needed, {format_bytes(available.num_bytes)} available ({available.limit}): shorten the "
            "prompt, lower --near-tokens or --max-new-tokens, or free memory"
        )
