"""What was explained, as tables and sentences, and as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tandemkv.explain.measure import Measured
from tandemkv.explain.shapes import Group
from tandemkv.schedule import Prediction, Solution, Speed, Work
from tandemkv.schedule.costs import RESOURCES
from tandemkv.schedule.reasons import NAMES, Facts, loads_of, ms, percent, reasons
from tandemkv.schedule.speeds import ANY

NOTABLE = 0.05
"""Of a factor: what feedback corrected by less is noise."""


UNFORESEEN = 0.01
"""Of a step: what was not predicted and took less is not told."""


@dataclass(frozen=True)
class Setting:
    """What all groups of layers have in common. heads: query heads, KV heads, head_dim. links: up and down."""

    model: str
    heads: tuple[int, int, int]
    dtype: str
    far_dtype: str
    context: int
    batch: int
    system: str
    lanes: tuple[str, ...]
    links: tuple[Speed, Speed]
    processor: str
    profiled: str
    others: tuple[int, ...]
    plan_is_given: bool

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        up, down = ({"gbps": link.gbps, "start_us": link.start_us} for link in self.links)
        num_q_heads, num_kv_heads, head_dim = self.heads
        return {
            "model": self.model,
            "num_q_heads": num_q_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "dtype": self.dtype,
            "far_dtype": self.far_dtype,
            "context": self.context,
            "batch": self.batch,
            "system": self.system,
            "lanes": list(self.lanes),
            "links": {"up": up, "down": down},
            "processor": self.processor,
            "profiled": self.profiled,
            "layers_without_kv": list(self.others),
            "plan_is_given": self.plan_is_given,
        }


@dataclass(frozen=True)
class Explained:
    """A group of layers. predicted: from the profile alone; facts: from speeds as feedback has corrected them, by these
    factors of lanes and resources."""

    group: Group
    work: Work
    predicted: Solution
    facts: Facts
    measured: Measured | None
    factors: Mapping[tuple[str, str], float]

    @property
    def reasons(self) -> list[str]:
        """In words."""
        return reasons(self.facts)

    @property
    def plan(self) -> str:
        """`"attend 17,920 (62 %), stream 10,752 (38 %), stages of 1,024 tokens"`."""
        plan = self.predicted.plan
        if not plan.tokens:
            return "near tokens alone"
        told = [f"{name} {num:,} ({percent(num / self.work.far_tokens)})" for name, num in plan.tokens.items()]
        if plan.tokens.keys() & {"stream", "logits"}:
            told.append(f"stages of {plan.stage_tokens:,} tokens")
        if "recompute" in plan.tokens:
            told.append(f"pieces of {plan.piece_tokens:,}")
        return ", ".join(told)

    @property
    def title(self) -> str:
        """Of a picture of the median step."""
        predicted, found = self.predicted.prediction, self.measured
        took = "" if found is None else f", measured {ms(found.seconds)}"
        return (
            f"{self.group.name}: {self.plan}\npredicted {ms(predicted.seconds)}{took}; {NAMES[predicted.binds]} binds"
        )

    @property
    def notable(self) -> list[tuple[str, str, float]]:
        """What feedback has corrected: (lane, resource, how many times longer)."""
        pairs = [(lane, name, factor) for (lane, name), factor in self.factors.items() if lane != ANY]
        return sorted(each for each in pairs if abs(each[2] - 1) > NOTABLE)

    @property
    def doubts(self) -> list[str]:
        """What of the predictions the steps have shown to be wrong, and feedback cannot see: no clock is at memory."""
        reading = sum(seconds for _, seconds in loads_of(self.predicted.prediction, "memory"))
        if self.measured is None or self.measured.seconds >= reading:
            return []
        took = f"steps took {ms(self.measured.seconds)}, less than reading alone would at the profile's speed"
        return [
            f"The host's memory is faster than {ms(reading)} say: {took}; tandemkv profile --again measures it anew."
        ]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        work, found = self.work, self.measured
        shares = {name: num / work.far_tokens for name, num in self.predicted.plan.tokens.items()}
        return {
            "layers": list(self.group.layers),
            "window": self.group.window,
            "near_tokens": work.near_tokens,
            "far_tokens": work.far_tokens,
            "inputs": {"num_tokens": work.num_inputs, "where": "near" if work.inputs_are_near else "far"},
            "plan": {**self.predicted.plan.to_dict(), "shares": shares},
            "predicted": _prediction_dict(self.predicted.prediction),
            "corrected": None if found is None else _prediction_dict(self.facts.solution.prediction),
            "measured": None if found is None else _measured_dict(found),
            "ratio": None if found is None else found.seconds / self.predicted.prediction.seconds,
            "ratio_to_corrected": None if found is None else found.seconds / self.facts.solution.prediction.seconds,
            "factors": [{"lane": lane, "resource": name, "factor": num} for lane, name, num in self.notable],
            "alone": {name: _choice_dict(*choice) for name, choice in self.facts.alone.items()},
            "without": {name: _choice_dict(*choice) for name, choice in self.facts.without.items()},
            "beside": {name: _choice_dict(*choice) for name, choice in self.facts.beside.items()},
            "reasons": self.reasons,
            "doubts": self.doubts,
        }


@dataclass(frozen=True)
class Explanation:
    """All groups of layers, and the files that were written."""

    setting: Setting
    groups: list[Explained]
    gantt: Path | None = None
    trace: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        files = {name: None if path is None else str(path) for name, path in self._files.items()}
        return {**self.setting.to_dict(), "groups": [group.to_dict() for group in self.groups], **files}

    @property
    def _files(self) -> dict[str, Path | None]:
        return {"gantt": self.gantt, "trace": self.trace}


def print_explanation(found: Explanation, console: Console) -> None:
    """A paragraph on what was asked, then each group of layers."""
    setting = found.setting
    num_q_heads, num_kv_heads, head_dim = setting.heads
    links = [f"{link.gbps:.3g} GB/s{f' + {link.start_us:g} us' if link.start_us else ''}" for link in setting.links]
    link = links[0] if links[0] == links[1] else f"{links[0]} up, {links[1]} down"
    far = "" if setting.far_dtype == "model" else f", far tokens in {setting.far_dtype}"
    batch = "" if setting.batch == 1 else f", {setting.batch} sequences"
    shape = f"{num_q_heads}:{num_kv_heads} heads x {head_dim}, {setting.dtype}{far}"
    named = "" if setting.model in shape else f"{setting.model}: "
    _say(console, f"{named}{shape}, {setting.context:,} tokens{batch}; system {setting.system}, link {link}")
    _say(console, f"On {setting.processor}, as profiled {setting.profiled}.")
    if setting.others:
        layers = Group(setting.others).name
        _say(console, f"{layers[0].upper()}{layers[1:]}: without keys and values, as transformers has them.")
    for group in found.groups:
        console.print()
        _print_group(group, setting.plan_is_given, console)
    for name, path in found._files.items():
        if path is not None:
            _say(console, f"{name}: {path}{' (opens in ui.perfetto.dev)' if name == 'trace' else ''}")


def _print_group(found: Explained, is_given: bool, console: Console) -> None:
    work, window = found.work, found.group.window
    near = f"a sliding window of {window:,}: near only" if window is not None else "full attention"
    console.print(f"[bold]{found.group.name}[/bold]: {near}", highlight=False)
    about = Table.grid(padding=(0, 3, 0, 0))
    about.add_row("tokens", escape(f"{work.near_tokens:,} near, {work.far_tokens:,} far{_inputs(work)}"))
    about.add_row("plan", escape(found.plan + (", as given" if is_given else "")))
    about.add_row("a step", escape("\n".join(_step(found))))
    console.print(about)
    console.print(_resources(found))
    words = Table.grid(padding=(0, 1, 0, 0))
    for sentence in (*found.reasons, *found.doubts):
        words.add_row("-", escape(sentence))
    for lane, resource, factor in found.notable:
        told = f"{lane} takes {factor:.2f} times as long of {NAMES[resource]} as the profile says."
        words.add_row("-", escape(f"Feedback: {told}"))
    console.print(words)


def _inputs(work: Work) -> str:
    if not work.num_inputs:
        return ""
    return f"; layer inputs of {work.num_inputs:,} kept {'near' if work.inputs_are_near else 'far'}"


def _step(found: Explained) -> Iterator[str]:
    """Its seconds, and how far predictions were off."""
    predicted, measured = found.predicted.prediction, found.measured
    yield f"predicted {ms(predicted.seconds)}: {NAMES[predicted.binds]} binds"
    if measured is None:
        return
    corrected, took, busiest = found.facts.solution.prediction, measured.seconds, measured.busiest
    is_corrected = abs(corrected.seconds - predicted.seconds) > 0.005 * predicted.seconds
    if is_corrected:
        yield f"with what feedback has corrected {ms(corrected.seconds)}: {NAMES[corrected.binds]} binds"
    expected = corrected.seconds if is_corrected else predicted.seconds
    spread = f"median of {len(measured.steps)} steps, half of them {' to '.join(map(ms, measured.middle_half))}"
    busy = f"{NAMES[busiest]} was busiest, {percent(measured.resources[busiest] / took)}"
    yield f"measured {ms(took)}, {took / expected:.2f} times that ({spread}): {busy}"


def _resources(found: Explained) -> Table:
    """Seconds at work, predicted and measured; of whom."""
    table = Table("", "predicted", "measured", "ratio", "by whom", box=None, padding=(0, 2, 0, 0))
    predicted, measured = found.predicted.prediction, found.measured
    for name in RESOURCES:
        loads = dict(loads_of(predicted, name))
        told = sum(loads.values())
        took = None if measured is None else measured.resources.get(name)
        if not told and not took:
            continue
        ratio = f"{took / told:.2f}" if took is not None and told else ""
        mark = " (binds)" if name == predicted.binds else ""
        seen = "" if measured is None else "not seen" if took is None else ms(took)
        label = f"{NAMES[name].removeprefix('the ')}{mark}"
        table.add_row(
            label, ms(told) if told else "none", seen, ratio, escape(", ".join(_whose(loads, measured, name)))
        )
    return table


def _whose(loads: Mapping[str, float], measured: Measured | None, resource: str) -> Iterator[str]:
    """Seconds by lane: as predicted, and as they were; small ones only where they were predicted."""
    found = {} if measured is None else {lane: busy.get(resource, 0.0) for lane, busy in measured.busy.items()}
    for lane, seconds in loads.items():
        yield f"{lane} {ms(seconds)}{f' -> {ms(found[lane])}' if found.get(lane) else ''}"
    if measured is not None:
        yield from (
            f"{lane} none -> {ms(took)}"
            for lane, took in found.items()
            if lane not in loads and took > UNFORESEEN * measured.seconds
        )


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False)


def _prediction_dict(found: Prediction) -> dict[str, Any]:
    """busy: by lane and resource. at_work: by resource; needed: with what comes before and after that."""
    return {
        "seconds": found.seconds,
        "binds": found.binds,
        "needed": dict(found.resources),
        "at_work": {name: sum(seconds for _, seconds in loads_of(found, name)) for name in RESOURCES},
        "busy": {lane: dict(busy) for lane, busy in found.busy.items()},
    }


def _measured_dict(found: Measured) -> dict[str, Any]:
    """None for what no clock shows: how long the host's memory is read."""
    return {
        "seconds": found.seconds,
        "busiest": found.busiest,
        "at_work": {name: found.resources.get(name, None if name == "memory" else 0.0) for name in RESOURCES},
        "busy": {lane: dict(busy) for lane, busy in found.busy.items()},
        "num_steps": len(found.steps),
        "middle_half": list(found.middle_half),
    }


def _choice_dict(solution: Solution | None, condition: str) -> dict[str, Any] | None:
    if solution is None:
        return None
    told = solution.prediction
    return {
        "seconds": told.seconds,
        "binds": told.binds,
        "plan": solution.plan.to_dict(),
        "condition": condition or None,
    }
