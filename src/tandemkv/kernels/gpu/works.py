"""Whether these kernels work here."""

import math

import torch
import triton

from tandemkv.kernels.gpu.calls import attend
from tandemkv.kernels.gpu.moves import append
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, on tensors in host memory."""
    return bool(triton.knobs.runtime.interpret)


def failure(device: torch.device) -> str:
    """Why these kernels do not work on a device; '' where they do: a call over 16 equal tokens, whose lse is known."""
    rows = PageLayout(torch.float32, 16)
    try:
        arena = Arena.allocate(rows, 1, 1, 16, device)
        x = torch.ones(1, 1, 16, 16, device=device)
        arena.k.zero_()
        append(arena, torch.zeros(1, 1, 1, dtype=torch.int32, device="cpu"), 0, x, x)
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        kv = PagedKV(arena, torch.zeros(1, 1, 1, dtype=torch.int32, device="cpu"), zero, zero + 16)
        lse = float(attend(x[:, :, :1], kv, rule=ScoreRule(1.0)).lse)
    except Exception as error:  # noqa: BLE001  no C compiler, a driver that is too old, whatever Triton raises
        return f"a kernel of Triton {triton.__version__} does not run on {device}: {error or type(error).__name__}"
    return "" if abs(lse - 16 - math.log(16)) < 1e-4 else f"a kernel on {device} computes {lse} for 18.7726"
