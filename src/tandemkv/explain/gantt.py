"""A step as a picture: who was busy with what, over time."""

from pathlib import Path

from tandemkv.errors import InputError
from tandemkv.lanes.crew import Step
from tandemkv.lanes.timeline import lanes_of, row_of, rows_of
from tandemkv.schedule import COSTS

COLORS = {"near": "0.55", "recompute": "#5a9e3d", "attend": "#1f77b4", "logits": "#b58900", "stream": "#c1272d"}


def draw(step: Step, title: str, path: Path) -> None:
    """Save it as a PNG: a row for the near kernel, the device's work for each lane, the host and each link; needs
    matplotlib. InputError where it cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lanes = lanes_of([step])
    rows = rows_of(lanes)
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for span in step.spans:
        begin_ms, length_ms = 1e3 * (span.begin - step.begin), 1e3 * (span.end - span.begin)
        color = COLORS.get(span.name, "#7f6fb5")
        axes.broken_barh(
            [(begin_ms, length_ms)],
            (rows.index(row_of(span)) - 0.4, 0.8),
            color=color,
            edgecolor="white",
            linewidth=0.4,
        )
    axes.axvline(1e3 * (step.end - step.begin), color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms from the beginning of the step")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    shown = ["near", *(name for name in COSTS if name in lanes)]
    figure.legend(
        [Patch(color=COLORS[name]) for name in shown], shown, loc="outside lower center", ncols=6, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise InputError(f"the picture {path} cannot be written: {error.strerror}") from error
