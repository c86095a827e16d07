"""What kernels compute is tested on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, which has to be chosen
before anything imports Triton: `make check` does so in a process of its own. What they compile to needs a compiler, and
CUDA C++ no interpreter."""

import os

import torch

_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_WITHOUT_GPU = [] if torch.cuda.is_available() else ["test_decode.py"]
collect_ignore = ["test_variants.py", "test_paper.py"] if _INTERPRETS else _WITHOUT_GPU
