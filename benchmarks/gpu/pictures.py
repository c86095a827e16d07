"""The pictures of the GPU's benchmark, where matplotlib is installed."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from benchmarks.common import Run
from benchmarks.gpu.peers import PEERS
from benchmarks.plot import COLORS, MISSING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.gpu.section import Row


def draw_speed(rows: Sequence["Row"], run: Run, path: Path) -> str:
    """Save GB/s over context, a column for each model and a row for each batch; dotted where K and V are small."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    models, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "batch"))
    batches.sort()
    figure = Figure(figsize=(max(8.5, 2 + 3.0 * len(models)), 1.6 + 2.2 * len(batches)), layout="constrained")
    panels = figure.subplots(len(batches), len(models), sharex=True, sharey=True, squeeze=False)
    for i, batch in enumerate(batches):
        for j, model in enumerate(models):
            panel = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
            _panel(panels[i, j], sorted(panel, key=lambda row: int(row["context"])))
            panels[i, j].set_title(f"{model}, batch {batch}", fontsize=9)
    panels[0, 0].set_ylim(bottom=0)
    for axes in panels[:, 0]:
        axes.set_ylabel("GB/s of K and V")
    for axes in panels[-1]:
        axes.set_xlabel("tokens of context")
    lines = {str(line.get_label()): line for axes in panels.flat for line in axes.get_lines()}
    named = {name: line for name, line in lines.items() if not name.startswith("_")}
    figure.legend(named.values(), list(named), loc="outside lower center", ncols=8, frameon=False)
    return _saved(figure, "Decode attention on a GPU; hollow: K and V below 4 times L2", run, path)


def draw_paper(rows: Sequence["Row"], run: Run, path: Path) -> str:
    """Save the share of the copy bandwidth of every variant, a panel for each model."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    models, contexts, variants = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "context", "variant")
    )
    contexts.sort()
    figure = Figure(figsize=(max(8.5, 2 + 1.3 * len(contexts)), 1.4 + 2.2 * len(models)), layout="constrained")
    width = 0.85 / len(variants)
    for axes, model in zip(figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0], models, strict=True):
        for i, variant in enumerate(variants):
            found = {row["context"]: row for row in rows if (row["model"], row["variant"]) == (model, variant)}
            heights = [_percent(found.get(context)) for context in contexts]
            places = [place + (i - len(variants) / 2 + 0.5) * width for place in range(len(contexts))]
            axes.bar(places, heights, width, label=variant, color=_shade(variant, variants))
        axes.axhline(100, color="black", linestyle="--", linewidth=0.8)
        axes.set(ylabel="% of copy", title=model)
        axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
        axes.spines[["top", "right"]].set_visible(False)
    bars, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(bars, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return _saved(figure, "K and V once over time, batch 64, float16: the paper's design and ours", run, path)


def _percent(row: "Row | None") -> float:
    return float("nan") if row is None or row["us"] is None else 100 * float(row["of_copy"])


def _shade(variant: str, variants: Sequence[str]) -> Any:
    """Greys for the baseline, reds for ours: darker with more asked for ahead."""
    from matplotlib import colormaps

    design = variant.partition(" ")[0]
    family = [name for name in variants if name.partition(" ")[0] == design]
    map_ = colormaps["Reds" if variant.startswith("ours") else "Greys"]
    return map_(0.35 + 0.6 * (family.index(variant) + 1) / len(family))


def _panel(axes: "Axes", rows: Sequence["Row"]) -> None:
    large = [row for row in rows if row["share_of_copy"] is not None]
    if large:
        contexts = [row["context"] for row in rows]
        copy = large[0]["gbps"] / large[0]["share_of_copy"]
        axes.plot(contexts, [copy] * len(contexts), color="black", linestyle="--", linewidth=0.8, label="copy")
    for name, key in {"tandemkv": "us", **{peer: f"{peer}_us" for peer in PEERS}}.items():
        points = [(row["context"], row["kv_bytes"] / row[key] / 1e3, row["is_large"]) for row in rows if row[key]]
        if points:
            color = COLORS.get(name, f"C{list(PEERS).index(name)}" if name in PEERS else None)
            (line,) = axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), color=color, label=name)
            for x, y, is_large in points:
                axes.plot(x, y, "o", markersize=4, color=line.get_color(), fillstyle="full" if is_large else "none")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["context"] for row in rows})
    axes.set_xticks(ticks, [f"{context // 1024}K" for context in ticks])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _saved(figure: "Figure", title: str, run: Run, path: Path) -> str:
    figure.suptitle("\n".join([title, *wrap(f"{run.machine}; {run.commit}", 110)]), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return f"picture: {path}"
