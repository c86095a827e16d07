"""What `tandemkv explain` does: work and machine of every group of layers, steps where they may run, words, files."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from tandemkv import machine
from tandemkv.cache import CacheSpec, parse_far_dtype
from tandemkv.crews import crew_for, links_of, machine_for, parse_link, placement_for, read_plan, work_for
from tandemkv.errors import InputError, UnavailableError
from tandemkv.explain.gantt import draw
from tandemkv.explain.measure import Layer, Measured, run_steps
from tandemkv.explain.report import Explained, Explanation, Setting
from tandemkv.explain.shapes import Group, Shape, Told, shape_of
from tandemkv.integrations.transformers.folders import Dtype
from tandemkv.lanes.rig import require_two_processors
from tandemkv.lanes.timeline import write_trace
from tandemkv.profiling import profile_of_this_machine
from tandemkv.schedule import Machine, Plan, Solution, Work, predict
from tandemkv.schedule.placement import Placement
from tandemkv.schedule.reasons import gather
from tandemkv.schedule.scheduler import Scheduler
from tandemkv.systems import SYSTEMS, System

MAX_STEPS = 10_000
"""A trace of so many has some 50 MB."""


@dataclass(frozen=True)
class Settings:
    """What to explain, and how. told: a shape, where no model is given. runs: whether steps are run and measured.

    num_steps: that are measured. link, far_dtype, system, plan_file: as `generate` takes them.
    """

    context: int = 32_768
    near_tokens: int = 4096
    batch: int = 1
    system: str = "tandem"
    link: str | None = None
    far_dtype: str | None = None
    dtype: Dtype = "auto"
    plan_file: Path | None = None
    told: Told = field(default_factory=Told)
    num_steps: int = 30
    runs: bool = True
    gantt: Path | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        for name, value, most in (
            ("--context", self.context, 1 << 30),
            ("--batch", self.batch, 1 << 16),
            ("--steps", self.num_steps, MAX_STEPS),
        ):
            if not 1 <= value <= most:
                raise InputError(f"{name} must be 1 to {most:,}, got {value:,}")
        laned = [name for name, system in SYSTEMS.items() if system.lanes and not system.joins_logits]
        if self.system not in laned:
            raise InputError(
                f"only systems that split far tokens over lanes have a plan: {', '.join(laned)}; got {self.system!r}"
            )
        if self.link is not None:
            parse_link(self.link)
        if len(parse_far_dtype(self.far_dtype)) > 1:
            raise InputError(
                f"one format of far tokens is explained at a time: give int8 or int4, got {self.far_dtype!r}"
            )
        self._check_files()

    def _check_files(self) -> None:
        """Before anything has taken time."""
        for name, path in (("--gantt", self.gantt), ("--trace", self.trace)):
            if path is not None and not self.runs:
                raise InputError(f"{name} shows steps that ran: leave --no-run out")
            if path is not None:
                machine.check_can_write(name, path)
        if self.gantt is not None and find_spec("matplotlib") is None:
            raise UnavailableError("--gantt needs matplotlib: pip install 'tandemkv[plot]'")


class _Job(NamedTuple):
    """What the groups of a shape have in common."""

    settings: Settings
    shape: Shape
    system: System
    spec: CacheSpec
    machine: Machine
    placement: Placement
    plan: Plan | None


def explain(folder: Path | None, settings: Settings, console: Console) -> Explanation:
    """The plan of every group of layers of a model or a shape, measured where steps may run.

    folder: of a local model, whose weights are not read. console: for progress. Raises a TandemError for everything
    that a user can mend.
    """
    shape = shape_of(folder, settings.told, settings.dtype)
    if shape.max_positions is not None and settings.context > shape.max_positions:
        raise InputError(
            f"--context must be at most the model's {shape.max_positions:,} positions, got {settings.context:,}"
        )
    system = SYSTEMS[settings.system]
    plan = None if settings.plan_file is None else read_plan(settings.plan_file, system)
    spec = _spec(shape, settings, settings.near_tokens)  # refuses what cannot be, before a profile is measured
    require_two_processors()
    profile = profile_of_this_machine(console)
    speeds = machine_for(profile, spec, links_of(profile, settings.link))
    work = work_for(spec, shape.num_q_heads, settings.batch, settings.context)
    job = _Job(settings, shape, system, spec, speeds, placement_for(system, work, speeds, plan), plan)
    groups = []
    for group in shape.groups:
        with console.status(f"steps of {group.name}"):
            groups.append(_explained(job, group))
    gantt, trace = _written(settings, groups, console)
    setting = Setting(
        model=shape.name,
        heads=(shape.num_q_heads, shape.num_kv_heads, shape.head_dim),
        dtype=str(shape.dtype).removeprefix("torch."),
        far_dtype=settings.far_dtype or "model",
        context=settings.context,
        batch=settings.batch,
        system=settings.system,
        lanes=system.lanes,
        links=(speeds.up, speeds.down),
        processor=profile.measured_on["processor"],
        profiled=profile.date,
        others=shape.others,
        plan_is_given=plan is not None,
    )
    return Explanation(setting, groups, gantt, trace)


def _spec(shape: Shape, settings: Settings, near_tokens: int) -> CacheSpec:
    return CacheSpec(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        near_tokens=near_tokens,
        far_bytes=0,
        windows=shape.windows,
        far_formats=parse_far_dtype(settings.far_dtype),
        hidden_size=shape.hidden,
    )


def _work(job: _Job, group: Group) -> Work:
    """A step of a layer of this group, as the crew will see it: near tokens in whole pages."""
    settings, placement = job.settings, job.placement
    spec = _spec(job.shape, settings, placement.near_tokens if placement.num_inputs else settings.near_tokens)
    work = work_for(spec, job.shape.num_q_heads, settings.batch, settings.context)
    if group.window is not None:
        near = min(group.window, settings.context)
        work = replace(work, near_tokens=near, far_tokens=0)
    elif placement.num_inputs:
        num_inputs = min(placement.num_inputs, work.far_tokens)
        work = replace(work, num_inputs=num_inputs, inputs_are_near=placement.where == "near")
    return replace(work, near_tokens=-(-work.near_tokens // work.page_size) * work.page_size)


def _explained(job: _Job, group: Group) -> Explained:
    work, lanes = _work(job, group), job.system.lanes
    measured = _measured(job, work, group.window) if job.settings.runs else None
    if measured is None:
        plan, decided_on = Scheduler(job.machine, lanes, job.plan).plan(work).plan, job.machine
    else:
        plan, decided_on = measured.plan, measured.decided_on
    facts = gather(work, decided_on, plan, lanes)
    predicted = Solution(plan, predict(work, job.machine, plan))
    return Explained(group, work, predicted, facts, measured, decided_on.factors)


def _measured(job: _Job, work: Work, window: int | None) -> Measured:
    """Steps of a layer, on a rig of its own."""
    layer = Layer(work, job.spec, window)
    with closing(crew_for(job.system, job.machine, job.plan)) as crew, crew.rig.claimed():
        return run_steps(layer, crew, job.settings.num_steps)


def _written(settings: Settings, groups: list[Explained], console: Console) -> tuple[Path | None, Path | None]:
    """The picture and the trace, where they could be written: nobody loses the report for them."""
    runs = [group.measured for group in groups if group.measured is not None]

    def written(path: Path | None, write: Callable[[Path], None]) -> Path | None:
        try:
            if path is not None:
                write(path)
        except InputError as error:
            console.print(f"[red]error: {escape(str(error))}[/red]", highlight=False)
            return None
        return path

    trace = written(settings.trace, lambda path: write_trace(path, [step for run in runs for step in run.steps]))
    # Those that see everything come first.
    gantt = written(settings.gantt, lambda path: draw(runs[0].median_step, groups[0].title, path))
    return gantt, trace
