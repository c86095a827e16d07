"""The pictures of the benchmarks, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import Run
from benchmarks.contest import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "tandemkv": "#c1272d",
    "torch_matmul": "#1f77b4",
    "torch_sdpa": "#17a2a2",
    "flex_attention": "#7f6fb5",
    "transformers": "#8c8c8c",
    "onnxruntime": "#b58900",
    "llama.cpp": "#5a9e3d",
    "limit": "black",
    "stock: sdpa, DynamicCache": "#1f77b4",
    "stock: eager, DynamicCache": "#8fbbdb",
    "stock: sdpa, StaticCache": "#5a9e3d",
    "stock: eager, StaticCache": "#aed09f",
}
MISSING = "no picture: matplotlib is missing, pip install 'tandemkv[plot]'"


def draw(rows: Sequence[Row], run: Run, path: Path) -> str:
    """Save GB/s over KV length, a panel for each heads and head_dim, and say where, or which extra to install."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.num_threads == max(row.num_threads for row in rows)]
    dims = sorted({row.shape.head_dim for row in rows})
    heads = list(dict.fromkeys((row.shape.num_q_heads, row.shape.num_kv_heads) for row in rows))
    figure = Figure(figsize=(2 + 2.6 * len(heads), 1.6 + 2.5 * len(dims)), layout="constrained")
    panels = figure.subplots(len(dims), len(heads), sharex=True, sharey=True, squeeze=False)
    for i, head_dim in enumerate(dims):
        for j, (num_q_heads, num_kv_heads) in enumerate(heads):
            panel = [row for row in rows if _key(row) == (num_q_heads, num_kv_heads, head_dim)]
            _panel(panels[i, j], sorted(panel, key=lambda row: row.shape.kv_len))
            panels[i, j].set_title(f"{num_q_heads}:{num_kv_heads} heads x {head_dim}", fontsize=10)
    panels[0, 0].set_ylim(bottom=0)  # shared; only now, or the first panel alone would fix the top
    for axes in panels[:, 0]:
        axes.set_ylabel("GB/s of K and V")
    for axes in panels[-1]:
        axes.set_xlabel("KV tokens")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(lines.values(), [str(name) for name in lines], loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(
        f"Decode attention on the CPU, bf16, {rows[0].num_threads} threads\n{run.machine}; {run.commit}", fontsize=10
    )
    return _save(figure, path)


def draw_lanes(rows: Sequence[Mapping[str, Any]], run: Run, path: Path) -> str:
    """Save ms over context of every lane and of their mixture, a panel for each shape and link."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    heads, ratios = (list(dict.fromkeys(row[key] for row in rows)) for key in ("heads", "link_ratio"))
    figure = Figure(figsize=(1.5 + 3.6 * len(ratios), 1.6 + 3.0 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), len(ratios), sharex=True, squeeze=False)
    for i, shape in enumerate(heads):
        for j, ratio in enumerate(ratios):
            axes, found = panels[i, j], [row for row in rows if (row["heads"], row["link_ratio"]) == (shape, ratio)]
            contexts = [row["context"] for row in found]
            for name in ("attend", "logits", "stream", "swept", "tandem"):
                style = "--" if name == "swept" else "-"
                axes.plot(contexts, [row[f"{name}_ms"] for row in found], style, marker="o", markersize=4, label=name)
            axes.set(yscale="log", title=f"{shape} heads, link {ratio:g} times the host")
            axes.set_xscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="both", labelsize=8)
            axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
            axes.grid(alpha=0.25, which="both")
    panels[0, 0].legend(frameon=False, fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("ms of a step of one layer")
    figure.suptitle(
        f"Far tokens over every lane; swept: the best of nine frozen splits\n{run.machine}; {run.commit}", fontsize=10
    )
    return _save(figure, path)


def draw_kvpr(rows: Sequence[Mapping[str, Any]], run: Run, path: Path) -> str:
    """Save what recomputation gains over streaming, beside what is ideal."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar(
        [place - 0.2 for place in places],
        [row["gain"] for row in rows],
        0.4,
        label="measured",
        color=COLORS["tandemkv"],
    )
    axes.bar([place + 0.2 for place in places], [row["ideal"] for row in rows], 0.4, label="ideal", color="0.75")
    axes.set_xticks(places, [f"{row['schedule']}\nf = {row['f']:g}" for row in rows])
    axes.set_ylabel("times as fast as streaming everything")
    axes.legend(frameon=False)
    figure.suptitle(f"KVPR's recomputation, multi-head, hidden 1024\n{run.machine}; {run.commit}", fontsize=10)
    return _save(figure, path)


def draw_over_context(
    panels: Mapping[str, Mapping[str, Sequence[float]]], contexts: Sequence[int], title: str, run: Run, path: Path
) -> str:
    """Save a panel for each quantity (its y label), a line for each contestant over the context, both axes in logs."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    for axes, (label, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, values in series.items():
            style = "--" if name == "limit" else "-"
            axes.plot(contexts, values, style, marker="o", markersize=4, color=COLORS.get(name), label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
        axes.set(xlabel="tokens of context", ylabel=label)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{title}\n{run.machine}; {run.commit}", fontsize=10)
    return _save(figure, path)


def draw_tradeoff(rows: Sequence[Mapping[str, Any]], run: Run, path: Path) -> str:
    """Save accuracy over time, left of a token of the shipped model, right of a layer; a line for each system."""
    if find_spec("matplotlib") is None:
        return MISSING
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    dense = next(row for row in rows if row["budget_tokens"] is None)
    panels = {
        "model_ms": f"ms for a token of the shipped model, {dense['context']:,} tokens",
        "layer_ms": f"ms for one layer 32:8 x 128, {dense['layer_context'] // 1024}K tokens, same share",
    }
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        axes.axvline(dense[name], color="0.6", linestyle="--")
        axes.plot(dense[name], 100 * dense["accuracy"], "*", color="black", markersize=14, label="dense")
        systems = dict.fromkeys(row["system"] for row in rows if row is not dense)
        for i, system in enumerate(systems):
            points = sorted((row for row in rows if row["system"] == system), key=lambda row: int(row["budget_tokens"]))
            times, found = [row[name] for row in points], [100 * row["accuracy"] for row in points]
            axes.plot(times, found, "-", marker="osD^vPX<>h"[i % 10], color=f"C{i % 10}", markersize=5, label=system)
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="values found, %", ylim=(-3, 103))
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(
        f"Accuracy against time per token; budgets rise along a line\n{run.machine}; {run.commit}", fontsize=10
    )
    return _save(figure, path)


def _save(figure: "Figure", path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"picture: {path}"


def _key(row: Row) -> tuple[int, int, int]:
    return row.shape.num_q_heads, row.shape.num_kv_heads, row.shape.head_dim


def _panel(axes: "Axes", rows: Sequence[Row]) -> None:
    lengths = [row.shape.kv_len for row in rows]
    axes.plot(lengths, [row.read_gbps for row in rows], color="black", linestyle="--", label="read limit")
    series = {"tandemkv": [row.gbps(row.ours_ms) for row in rows]}
    for name in dict.fromkeys(name for row in rows for name in row.peers_ms):
        series[name] = [row.gbps(row.peers_ms[name]) if name in row.peers_ms else float("nan") for row in rows]
    for name, gbps in series.items():
        axes.plot(lengths, gbps, marker="o", markersize=4, color=COLORS.get(name), label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
