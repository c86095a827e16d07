"""The command line. A command is one small function; what it needs is imported when it runs, after `main` has chosen
how torch's threads wait.
"""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import tandemkv
from tandemkv import machine
from tandemkv.errors import TandemError

app = typer.Typer(name="tandemkv", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for programs.")]


def main() -> None:
    """Run the command line; an error that a user can mend is one line on stderr and exit code 2."""
    machine.set_passive_spin()
    try:
        app()
    except TandemError as error:
        Console(stderr=True).print(f"[red]error: {escape(str(error))}[/red]", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None


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

    Example: tandemkv doctor --json | jq .read_bandwidth
    """
    from tandemkv.doctor import collect, print_report

    report = collect()
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        print_report(report, Console())


@app.command()
def demo(
    context: Annotated[
        int, typer.Option(help="Tokens of context. Up to 32768 are prefilled, more are filled in.")
    ] = 131_072,
    as_json: AsJson = False,
) -> None:
    """Decode with stock transformers and with tandemkv on the same context; show speeds, the limit and agreement.

    The model is a Llama of 155 M fixed random weights. 131072 tokens take about 4 GiB and a minute.

    Example: tandemkv demo --context 32768
    """
    from tandemkv.demo import print_demo, run_demo

    console = Console(stderr=as_json)
    found = run_demo(context, console)
    print_demo(found, console)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    if not found.agreement.holds:
        raise typer.Exit(1)
