"""Queries as int8 weights of codes, in the codes' own order (csrc/attend.h)."""

import torch
from torch import Tensor

from tandemkv.kernels.blocks import CodeQueries
from tandemkv.select.base import group_rows


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers to the nearest, and the float32 step of each row. rows: float32 `[..., n]`."""
    steps = rows.abs().amax(-1).clamp_(min=torch.finfo(torch.float32).tiny) / 127.0
    return (rows / steps[..., None]).round_().to(torch.int8), steps


def code_queries(rows: Tensor, num_kv_heads: int, lanes: tuple[int, int]) -> CodeQueries:
    """rows: float32 `[num_seqs, num_q_heads, q_len, n]`, a weight for each code of a lane, n a multiple of 4.

    lanes: words of one lane in a line, and lanes. `[..., words, 4]` becomes `[..., lines, words of a line, lanes, 4]`.
    """
    weights, scales = quantise_rows(group_rows(rows, num_kv_heads))
    line_words, num_lanes = lanes
    missing = -(rows.shape[-1] // 4) % line_words
    words = torch.nn.functional.pad(weights, (0, 4 * missing)).unflatten(-1, (-1, line_words, 1, 4))
    offsets = weights.sum(-1, dtype=torch.int32) * 128
    spread = words.expand(*words.shape[:-2], num_lanes, 4).contiguous()
    return CodeQueries(spread, offsets, scales)
