"""Whose steps are explained: the layers of a model's configuration, or of a shape that options tell."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from tandemkv.errors import InputError
from tandemkv.integrations.transformers.configs import kv_shape, layers_of
from tandemkv.integrations.transformers.folders import Dtype, quieten, read_config
from tandemkv.types import MAX_HEAD_DIM

DEFAULT_HEADS, DEFAULT_HEAD_DIM, DEFAULT_LAYERS, DEFAULT_HIDDEN = "32:8", 128, 32, 4096
"""Llama-3-8B."""

MAX_LAYERS, MAX_HIDDEN = 10_000, 1 << 20
"""Far more than any model has."""


@dataclass(frozen=True)
class Group:
    """Layers that share a plan. window: tokens that their queries see, None for all."""

    layers: tuple[int, ...]
    window: int | None = None

    @property
    def name(self) -> str:
        """`"layers 0-4, 6"`."""
        runs = [
            [layer for _, layer in run] for _, run in groupby(enumerate(self.layers), lambda each: each[1] - each[0])
        ]
        told = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
        return f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(told)}"


@dataclass(frozen=True)
class Shape:
    """What a model's layers are. others: layers without keys and values."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    dtype: torch.dtype
    groups: tuple[Group, ...]
    others: tuple[int, ...] = ()
    max_positions: int | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of every layer with keys and values, by number; none at all where every one sees everything."""
        found = {layer: group.window for group in self.groups for layer in group.layers}
        return tuple(found[layer] for layer in sorted(found)) if any(found.values()) else ()

    @property
    def num_layers(self) -> int:
        """Those with keys and values."""
        return sum(len(group.layers) for group in self.groups)


@dataclass(frozen=True)
class Told:
    """A shape as options tell it; None for what they do not."""

    heads: str | None = None
    head_dim: int | None = None
    layers: int | None = None
    hidden: int | None = None


def shape_of(folder: Path | None, told: Told, dtype: Dtype) -> Shape:
    """The shape of a local model, of which config.json alone is read; without one, what is told, else Llama-3-8B's."""
    options = {"--heads": told.heads, "--head-dim": told.head_dim, "--layers": told.layers, "--hidden": told.hidden}
    if folder is not None:
        if given := [name for name, value in options.items() if value is not None]:
            raise InputError(f"{', '.join(given)}: {folder} says what its layers are; leave MODEL or these out")
        return _of_folder(folder, dtype)
    for name, most in (("--head-dim", MAX_HEAD_DIM), ("--layers", MAX_LAYERS), ("--hidden", MAX_HIDDEN)):
        value = options[name]
        if isinstance(value, int) and not 1 <= value <= most:
            raise InputError(f"{name} must be 1 to {most:,}, got {value:,}")
    num_q_heads, num_kv_heads = parse_heads(told.heads or DEFAULT_HEADS)
    head_dim = told.head_dim or DEFAULT_HEAD_DIM
    default_hidden = num_q_heads * head_dim if told.heads or told.head_dim else DEFAULT_HIDDEN
    return Shape(
        name=f"{num_q_heads}:{num_kv_heads} heads x {head_dim}",
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden=told.hidden or default_hidden,
        dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        groups=(Group(tuple(range(told.layers or DEFAULT_LAYERS))),),
    )


def parse_heads(text: str) -> tuple[int, int]:
    """`"32:8"`: query heads and KV heads; `"32"`: as many of both. InputError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*(?::\s*(\d{1,5})\s*)?", text, re.ASCII)
    num_q_heads, num_kv_heads = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not num_q_heads or not num_kv_heads or num_q_heads % num_kv_heads:
        raise InputError(f"expected --heads as query heads:KV heads, a multiple of them, such as '32:8', got {text!r}")
    return num_q_heads, num_kv_heads


def _of_folder(folder: Path, dtype: Dtype) -> Shape:
    quieten()
    config = read_config(folder, dtype)
    layers, windows = layers_of(config)
    ours = [number for number, stock in enumerate(layers) if stock is None]
    num_kv_heads, head_dim = kv_shape(config)
    return Shape(
        name=folder.resolve().name,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        dtype=config.dtype,
        groups=_groups(ours, windows),
        others=tuple(number for number, stock in enumerate(layers) if stock is not None),
        max_positions=getattr(config, "max_position_embeddings", None),
    )


def _groups(layers: Sequence[int], windows: Sequence[int | None]) -> tuple[Group, ...]:
    """Those that see everything first."""
    kinds = sorted(set(windows), key=lambda window: window or 0)
    pairs = list(zip(layers, windows, strict=True))
    return tuple(Group(tuple(layer for layer, its in pairs if its == window), window) for window in kinds)
