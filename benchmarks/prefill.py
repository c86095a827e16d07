"""Time and memory of a prefill: tandemkv beside stock transformers."""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import common, plot

MODULE = "benchmarks.prefill"
CONTEXTS = (8192, 32_768)
SYSTEMS = ("stock", "ours")
MAX_LOGIT_DIFFERENCE = 0.25  # either is some 0.05 from float32 (stock_logit_error of benchmarks.decode)
HELP = """Seconds and peak memory of prefilling the demo's model (155 M parameters, bf16) with random tokens.

Each prefill runs in a process of its own, stock (DynamicCache, sdpa) and ours in turn, so that peak memory means
something; medians. `ratio` is ours_s / stock_s. `peak` is the process's peak resident memory, model and torch included.

Example: python -m benchmarks.prefill --context 8192 --json
"""


@dataclass(frozen=True)
class Row:
    """One context: medians of seconds and of peak bytes."""

    context: int
    stock_s: float
    ours_s: float
    ratio: float
    stock_peak_bytes: int
    ours_peak_bytes: int


def prefill_once(system: str, context: int) -> None:
    """In a fresh process: build, prefill, and print seconds and peak bytes."""
    import resource

    from tandemkv import machine

    machine.set_passive_spin()
    import torch

    import tandemkv.integrations.transformers as tandem
    from tandemkv.demo import speed as demo

    model = demo.demo_model()
    if system == "ours":
        tandem.attach(model)

    def prefill(num_tokens: int) -> torch.Tensor:
        ours, stock = demo.tiered_cache, demo.stock_cache
        cache = ours(model, num_tokens) if system == "ours" else stock(model, "dynamic", num_tokens, 0)
        generator = torch.Generator().manual_seed(3)
        return demo.next_logits(model, cache, torch.randint(0, 32_768, (1, num_tokens), generator=generator))

    prefill(256)  # the first run chooses and loads torch's kernels
    milliseconds, logits = demo.timed(lambda: prefill(context))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": milliseconds / 1e3, "peak_bytes": peak_bytes, "logits": logits.tolist()}))


def measure(context: int, repeats: int) -> Row:
    """Both systems in turn, each time in a fresh process."""
    found: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for _ in range(repeats):
        for system in SYSTEMS:
            command = [sys.executable, "-m", MODULE, "--once", system, "--context", str(context)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[system].append(json.loads(done.stdout.splitlines()[-1]))
    check([found[system][0]["logits"] for system in SYSTEMS], context)
    seconds = {system: statistics.median(run["seconds"] for run in runs) for system, runs in found.items()}
    peaks = {system: int(statistics.median(run["peak_bytes"] for run in runs)) for system, runs in found.items()}
    ratio = seconds["ours"] / seconds["stock"]
    return Row(context, seconds["stock"], seconds["ours"], ratio, peaks["stock"], peaks["ours"])


def check(logits: list[list[float]], context: int) -> None:
    """Both systems read the same prompt: WrongResultError where their logits are further apart than bf16 explains."""
    wrong = [abs(a - b) for a, b in zip(*logits, strict=True) if not abs(a - b) <= MAX_LOGIT_DIFFERENCE]
    if wrong:
        raise common.WrongResultError(
            f"{len(wrong)} logits of stock and tandemkv differ by {wrong[0]:.3g} and such after {context} tokens, "
            f"expected at most {MAX_LOGIT_DIFFERENCE}"
        )


def print_rows(rows: list[Row], console: Console) -> None:
    """The table for people."""
    table = Table(title="prefill")
    for heading in ("context", "stock s", "tandemkv s", "tandemkv / stock", "stock peak GiB", "tandemkv peak GiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        peaks = [f"{peak / 2**30:.2f}" for peak in (row.stock_peak_bytes, row.ours_peak_bytes)]
        table.add_row(f"{row.context:,}", f"{row.stock_s:.2f}", f"{row.ours_s:.2f}", f"{row.ratio:.3f}", *peaks)
    console.print(table)


def draw(rows: list[Row], run: common.Run) -> str:
    """The picture that README shows."""
    seconds = {"transformers": [row.stock_s for row in rows], "tandemkv": [row.ours_s for row in rows]}
    peaks = {
        "transformers": [row.stock_peak_bytes / 2**30 for row in rows],
        "tandemkv": [row.ours_peak_bytes / 2**30 for row in rows],
    }
    panels = {"seconds": seconds, "peak memory, GiB": peaks}
    title = "Prefill of a 155 M Llama, bf16, on the CPU"
    return plot.draw_over_context(panels, [row.context for row in rows], title, run, common.RESULTS / "prefill.png")


def main() -> None:
    """Run, print, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument(
        "--context", type=common.positive, action="append", help="prompt tokens; may be repeated (default: 8192, 32768)"
    )
    parser.add_argument("--repeats", type=common.positive, default=3, help="runs of each system (default: 3)")
    parser.add_argument("--once", choices=SYSTEMS, help="run one prefill in this process and print its numbers")
    arguments = parser.parse_args()
    contexts = arguments.context or ((2048,) if arguments.quick else CONTEXTS)
    if arguments.once:
        prefill_once(arguments.once, contexts[0])
        return
    console = Console(stderr=arguments.json)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    rows = [measure(context, 1 if arguments.quick else arguments.repeats) for context in contexts]
    print_rows(rows, console)
    if not arguments.quick or arguments.save:
        common.append_rows(common.RESULTS / "prefill.csv", [asdict(row) for row in rows], run)
    if set(CONTEXTS) <= set(contexts):
        console.print(draw(rows, run), highlight=False)
    if arguments.json:
        common.print_json({**asdict(rows[-1]), "rows": [asdict(row) for row in rows], **asdict(run)})


if __name__ == "__main__":
    main()
