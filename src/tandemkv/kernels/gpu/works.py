"""Whether these kernels work here."""

import math

import torch
import triton

from tandemkv.kernels.gpu.calls import attend
from tandemkv.kernels.gpu.config import Config
from tandemkv.kernels.gpu.moves import append
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on tensors in host memory."""
    return bool(triton.knobs.runtime.interpret)


def failure(device: torch.device) -> str:
    """Why these kernels do not work on a device; '' where they do: two pages of equal tokens, appended, attended in two
    parts and merged, whose attention is known, in bfloat16."""
    dtype = torch.bfloat16
    rows = PageLayout(dtype, 16)
    try:
        arena = Arena.allocate(rows, 2, 1, 16, device)
        x = torch.ones(1, 1, 32, 16, dtype=dtype, device=device)
        table = torch.tensor([[[1, 0]]], dtype=torch.int32, device="cpu")
        append(arena, table, 0, x, x)
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        kv = PagedKV(arena, table, zero, zero + 32)
        part = attend(x[:, :, :1], kv, rule=ScoreRule(1.0), config=Config(block_n=16, num_splits=2))
        lse, out = float(part.lse), part.out.flatten().tolist()
    except Exception as error:  # noqa: BLE001  no C compiler, a driver that is too old, whatever Triton raises
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"a kernel of Triton {triton.__version__} does not run on {device}: {why}"
    is_right = abs(lse - 16 - math.log(32)) < 1e-4 and all(abs(value - 1) < 1e-4 for value in out)
    return "" if is_right else f"a kernel on {device} computes {lse} and {out[0]} for 19.4657 and 1"
