"""What kernels compute is tested on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, which has to be chosen
before anything imports Triton: `make check` does so in a process of its own. What they compile to needs a compiler, and
CUDA C++ no interpreter."""

import os
from pathlib import Path

import torch

NEED_NO_DEVICE = {"test_variants.py", "test_paper.py"}

_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_NEED_A_DEVICE = {path.name for path in Path(__file__).parent.glob("test_*.py")} - NEED_NO_DEVICE
collect_ignore = sorted(NEED_NO_DEVICE if _INTERPRETS else set() if torch.cuda.is_available() else _NEED_A_DEVICE)
