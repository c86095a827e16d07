"""What kernels compute is tested on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, which has to be chosen
before anything imports Triton: `make check` does so in a process of its own. What they compile to needs a compiler. The
benchmark's own logic needs the interpreter: on a GPU it is the benchmark that runs."""

import os

import torch

_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_ON_GPU = torch.cuda.is_available()
collect_ignore = (
    ["test_variants.py"]
    if _INTERPRETS
    else ["test_benchmark.py"]
    if _ON_GPU
    else ["test_decode.py", "test_benchmark.py"]
)
