"""The command line. A command is one small function; what it needs is imported when it runs, after `main` has chosen
how torch's threads wait.
"""

import errno
import json
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape

import tandemkv
from tandemkv import assets, machine
from tandemkv.errors import LaneWarning, PrecisionWarning, ProfileWarning, TandemError
from tandemkv.systems import EVALUATED, SYSTEMS

_SYSTEMS, _BUDGETS = ["window"], [528, 1024, 2048, 4096]
_FAR_DTYPES: list[str] = []

app = typer.Typer(name="tandemkv", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for programs.")]
Context = Annotated[int, typer.Option(help="Tokens of context. Up to 32768 are prefilled, more are filled in.")]
Batch = Annotated[int, typer.Option(help="Sequences that a step is for.")]
Budget = Annotated[
    int | None, typer.Option(help="Tokens per KV head that a sparse system attends to.", show_default="none")
]
Budgets = Annotated[list[int], typer.Option(help="Tokens per KV head that a sparse system attends to; repeat it.")]
Contexts = Annotated[int, typer.Option(help="Shared contexts of a task.")]
Dtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option(help="To run in; auto takes what config.json says."),
]
Forms = Annotated[
    str,
    typer.Option(help="requests: each question alone behind the context; turns: one after another, as a conversation."),
]
FarBytes = Annotated[
    str | None,
    typer.Option(
        help="Capacity for older tokens, such as 16GiB.", show_default="what the prompt and the new tokens need"
    ),
]
FarDtype = Annotated[
    str | None,
    typer.Option(
        help="What older tokens are kept in: int8, int4, model (its dtype), by age as int8:8192,int4, fewer channels "
        "of keys as int8/96.",
        show_default="the model's dtype",
    ),
]
FarFormat = Annotated[
    str | None,
    typer.Option("--far-dtype", help="What far tokens are kept in: int8, int4, or model.", show_default="model"),
]
FarDtypes = Annotated[
    list[str],
    typer.Option(help="Dense with older tokens in int8, int4, or by age, as int8:2048,int4; repeat it."),
]
GanttFile = Annotated[
    Path | None,
    typer.Option("--gantt", help="Draw the median step as a PNG: who was busy with what.", show_default="none"),
]
HeadDim = Annotated[int | None, typer.Option(help="Without MODEL.", show_default="128")]
Heads = Annotated[str | None, typer.Option(help="Query heads:KV heads, without MODEL.", show_default="32:8")]
Hidden = Annotated[
    int | None, typer.Option(help="Width of what enters a layer, without MODEL.", show_default="of all query heads")
]
Layers = Annotated[int | None, typer.Option(help="Without MODEL.", show_default="32")]
LanedSystem = Annotated[
    str,
    typer.Option(
        help="Whose lanes: "
        + ", ".join(name for name, each in SYSTEMS.items() if each.lanes and not each.joins_logits)
        + "."
    ),
]
Link = Annotated[
    str | None,
    typer.Option(
        help="Of systems with lanes: GB/s, or GB/s:us, of the links between the processor that is the device and those "
        "that are the host.",
        show_default="as memory is copied",
    ),
]
Judge = Annotated[
    Path | None,
    typer.Argument(metavar="[MODEL]", help="A local Hugging Face folder.", show_default="the shipped one"),
]
Length = Annotated[int, typer.Option(help="Tokens of a context; rows are as long as they are.")]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many, if the text does not end before.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A local Hugging Face folder of a supported family.")]
NoRun = Annotated[bool, typer.Option("--no-run", help="Predict alone: nothing is run, nothing is measured.")]
NearTokens = Annotated[int, typer.Option(help="Recent tokens kept near, per layer; at least 128.")]
OutFolder = Annotated[Path, typer.Option(help="Where scores and the picture go; a run that was stopped goes on there.")]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help='A JSON file with the plan that every step has: {"tokens": {"attend": 3, "stream": 1}} are shares.',
        show_default="found by measurement",
    ),
]
ProfileFile = Annotated[
    Path | None, typer.Option("--file", help="Where it is kept.", show_default="~/.cache/tandemkv/profile.json")
]
PromptFile = Annotated[
    Path, typer.Option(help="The text to continue, UTF-8, taken as it is (no chat template); - reads stdin.")
]
PromptSeed = Annotated[int, typer.Option(help="Of contexts and questions.")]
Questions = Annotated[int, typer.Option(help="About each context.")]
RowsFolder = Annotated[
    Path | None,
    typer.Option(help="With kv-retrieval-75_keys.jsonl.gz and longchat_200_lines.jsonl, for kv_rows and lines_rows."),
]
ShapeOf = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A local Hugging Face folder, of which config.json is read.",
        show_default="the shape of --heads, --head-dim, --layers and --hidden: Llama-3-8B",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default="none")]
Steps = Annotated[int, typer.Option(help="That are measured, behind some that let feedback settle.")]
System = Annotated[str, typer.Option(help=f"How to attend: {', '.join(SYSTEMS)}.")]
Systems = Annotated[list[str], typer.Option(help=f"Repeat it; dense always runs. Known: {', '.join(EVALUATED)}.")]
Tasks = Annotated[
    str, typer.Option(help="Names with commas; counted: those the shipped model is a judge of; all: every one.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")]
TextFile = Annotated[
    Path | None,
    typer.Option(help="What facts are hidden in: a text or a folder of *.txt.", show_default="a novel that is shipped"),
]
Threads = Annotated[int | None, typer.Option(help="Of the CPU.", show_default="what this machine grants")]
Tokens = Annotated[int, typer.Option(help="That each sequence has.")]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        help="Write the steps as a Chrome trace, which ui.perfetto.dev opens; needs lanes.",
        show_default="none",
    ),
]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this mass.", show_default="1")]


def main() -> None:
    """Run the command line; an error that a user can mend is one line on stderr and exit code 2."""
    machine.set_passive_spin()
    warnings.showwarning = _show_warning
    try:
        app()
    except TandemError as error:
        _stop(_as_options(str(error)))
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try to write it once more
        _stop(f"the output cannot be written: {error.strerror}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What we tell users is a line of its own; others' warnings say where they come from."""
    if issubclass(category, LaneWarning | PrecisionWarning | ProfileWarning):
        Console(stderr=True).print(f"[yellow]warning: {escape(str(message))}[/yellow]", soft_wrap=True, highlight=False)
    else:
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


def _stop(told: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error: {escape(told)}[/red]", soft_wrap=True, highlight=False)
    raise SystemExit(2) from None


def _as_options(text: str) -> str:
    """Errors name Python's knobs; here they are options."""
    knobs = {"budget_tokens": "--budget"}
    named = r"\b(near_tokens|far_bytes|far_dtype|max_new_tokens|budget_tokens)\b"
    return re.sub(named, lambda knob: knobs.get(knob[0], "--" + knob[0].replace("_", "-")), text)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(tandemkv.__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version)
    ] = False,
) -> None:
    """Run language models over keys and values that do not fit the device, exactly.

    Start with: tandemkv doctor
    """


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine offers and why each backend is or is not used.

    Takes a few seconds and up to 1 GiB, to measure how fast memory is read.

    Settings are environment variables: TANDEMKV_PIN_WORKERS=1 keeps each attention thread on a processor of its own;
    GOMP_SPINCOUNT and OMP_WAIT_POLICY say how torch's threads wait (the command line sets GOMP_SPINCOUNT=0).

    Example: tandemkv doctor --json | jq .read_bandwidth
    """
    from tandemkv.doctor import collect, print_report

    report = collect()
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        print_report(report, Console())


@app.command()
def profile(
    again: Annotated[bool, typer.Option("--again", help="Measure even where nothing has changed.")] = False,
    file: ProfileFile = None,
    as_json: AsJson = False,
) -> None:
    """Show how fast this machine's memories, processors and links are; measure them where that is not known.

    Takes half a minute and up to 1 GiB, once: the numbers are kept with a checksum, and measured anew when hardware or
    versions change. The scheduler splits work by them.

    Example: tandemkv profile --again
    """
    from tandemkv.profiling import print_profile, profile_of_this_machine

    found = profile_of_this_machine(Console(stderr=True), file, again=again)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        print_profile(found, Console())


@app.command()
def demo(
    context: Context = 131_072,
    as_json: AsJson = False,
) -> None:
    """Ask the shipped model for a number planted far back in a novel; then decode longer contexts. Stock runs beside.

    First half: the answer of stock transformers, of tandemkv, and of a window that forgets. Second half: --context
    tokens through a Llama of 155 M fixed random weights; speeds, the limit of memory, agreement with float64. 131072
    tokens take about 4 GiB and a minute.

    Example: tandemkv demo --context 32768
    """
    from tandemkv.demo.recall import ask_far_back, print_recall
    from tandemkv.demo.speed import print_demo, require_room, run_demo

    console = Console(stderr=as_json)
    require_room(context)
    recall = ask_far_back(assets.JUDGED_TOKENS, console)
    print_recall(recall, console)
    found = run_demo(context, console)
    print_demo(found, console)
    if as_json:
        typer.echo(json.dumps({**found.to_dict(), "recall": recall.to_dict()}))
    if not (found.agreement.holds and recall.holds):
        raise typer.Exit(1)


@app.command()
def explain(  # noqa: PLR0913  one argument per option
    folder: ShapeOf = None,
    *,
    context: Tokens = 32_768,
    near_tokens: NearTokens = 4096,
    link: Link = None,
    system: LanedSystem = "tandem",
    batch: Batch = 1,
    far_dtype: FarFormat = None,
    dtype: Dtype = "auto",
    plan: PlanFile = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    layers: Layers = None,
    hidden: Hidden = None,
    steps: Steps = 30,
    no_run: NoRun = False,
    gantt: GanttFile = None,
    trace: TraceFile = None,
    as_json: AsJson = False,
) -> None:
    """Tell how a decode step splits its far tokens over lanes, what that takes, and why it is not split otherwise.

    For each group of layers: the plan, seconds of device, host, memory and links as predicted and as measured here,
    what binds, and what every alternative would take. Steps of one layer run over random keys and values; weights are
    not read. Without a profile the machine is measured first (half a minute, once).

    Example: tandemkv explain --context 32768 --link 8 --gantt step.png

    Example: tandemkv explain ./Qwen3-0.6B --system kvpr --link 16 --no-run --json | jq .groups[0].reasons
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    from tandemkv.explain import Settings, print_explanation
    from tandemkv.explain import explain as run
    from tandemkv.explain.shapes import Told

    console = Console(stderr=True)
    settings = Settings(
        context=context,
        near_tokens=near_tokens,
        batch=batch,
        system=system,
        link=link,
        far_dtype=far_dtype,
        dtype=dtype,
        plan_file=plan,
        told=Told(heads, head_dim, layers, hidden),
        num_steps=steps,
        runs=not no_run,
        gantt=gantt,
        trace=trace,
    )
    try:
        found = run(folder, settings, console)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted[/yellow]")
        raise typer.Exit(130) from None
    print_explanation(found, Console(stderr=as_json))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))


@app.command()
def generate(  # noqa: PLR0913  one argument per option
    folder: Model,
    *,
    prompt_file: PromptFile,
    near_tokens: NearTokens = 4096,
    far_bytes: FarBytes = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    system: System = "dense",
    budget: Budget = None,
    far_dtype: FarDtype = None,
    link: Link = None,
    plan: PlanFile = None,
    trace: TraceFile = None,
    as_json: AsJson = False,
) -> None:
    """Continue the text of a file with a local model; nothing is downloaded.

    The new text goes to stdout as it comes, progress and a closing table to stderr. With --json the text comes at the
    end, in the object. Ctrl-C stops and keeps what is written (exit code 130).

    Example: tandemkv generate ./Qwen3-0.6B --prompt-file a.txt --near-tokens 1024

    Example: tandemkv generate ./Qwen3-0.6B --prompt-file a.txt --far-dtype int8:8192,int4

    Example: tandemkv generate ./Qwen3-0.6B --prompt-file a.txt --system tandem-verified --near-tokens 512 --budget 2048

    Example: tandemkv generate ./Qwen3-0.6B --prompt-file a.txt --system tandem --link 8
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    console = Console(stderr=True)
    try:
        from tandemkv.generate import Settings, print_generation
        from tandemkv.generate import generate as run

        settings = Settings(
            near_tokens,
            far_bytes,
            max_new_tokens,
            temperature,
            top_p,
            seed,
            dtype,
            threads,
            system,
            budget,
            far_dtype,
            link,
            plan,
            trace,
        )
        write = (lambda text: None) if as_json else partial(typer.echo, nl=False)
        found = run(folder, prompt_file, settings, console, write)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted before the model was ready[/yellow]")
        raise typer.Exit(130) from None
    typer.echo(json.dumps(found.to_dict()) if as_json else "")
    print_generation(found, console)
    if found.finish == "interrupted":
        raise typer.Exit(130)


@app.command(name="eval")
def evaluate(  # noqa: PLR0913  one argument per option
    folder: Judge = None,
    *,
    system: Systems = _SYSTEMS,
    budget: Budgets = _BUDGETS,
    far_dtype: FarDtypes = _FAR_DTYPES,
    tasks: Tasks = "counted",
    length: Length = assets.JUDGED_TOKENS,
    forms: Forms = "requests,turns",
    contexts: Contexts = 50,
    questions: Questions = 10,
    seed: PromptSeed = 0,
    text: TextFile = None,
    rows: RowsFolder = None,
    out: OutFolder = Path("tandemkv-eval"),
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a system loses to dense attention: retrieval at every depth of a long context, and perplexity.

    Every context is prefilled densely once and forked; question and answer run under the system, with one selection
    for at most 16 tokens. Tasks on which dense attention answers less than 90 % do not count in averages.

    Example: tandemkv eval --system window --budget 512 --budget 2048 --tasks needle,lines

    Example: tandemkv eval --system dense --far-dtype int8 --far-dtype int4 --far-dtype int8:2048,int4
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
    from tandemkv.evaluate.command import evaluate_folder, read_text
    from tandemkv.evaluate.ledger import contestants
    from tandemkv.evaluate.report import print_report
    from tandemkv.evaluate.run import Settings, read_forms
    from tandemkv.evaluate.tasks import read_tasks

    console = Console(stderr=as_json)
    settings = Settings(
        tasks=read_tasks(tasks, rows),
        contestants=tuple(contestants(system, budget, far_dtype)),
        length=length,
        text=read_text(text),
        out=out,
        forms=read_forms(forms),
        num_contexts=contexts,
        num_questions=questions,
        seed=seed,
        rows=rows,
    )
    try:
        found = evaluate_folder(folder or assets.MODEL, settings, dtype, threads, console)
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted; the same command goes on from {out / 'scores.jsonl'}[/yellow]")
        raise typer.Exit(130) from None
    print_report(found.report, console)
    console.print(f"Scores: {out / 'scores.jsonl'}. Picture: {found.picture}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(found.report.to_dict()))
