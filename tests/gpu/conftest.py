"""What kernels compute is tested on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter, which has to be chosen
before anything imports Triton: `make check` does so in a process of its own. What they compile to needs a compiler, and
CUDA C++ no interpreter."""

import os
from pathlib import Path

import pytest
import torch

NEED_NO_DEVICE = {"test_variants.py", "test_paper.py"}

_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_NEED_A_DEVICE = {path.name for path in Path(__file__).parent.glob("test_*.py")} - NEED_NO_DEVICE
if _INTERPRETS:  # what a tile has beside its run may be anything, is multiplied, and then hidden

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """Numpy may say so."""
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


collect_ignore = sorted(NEED_NO_DEVICE if _INTERPRETS else set() if torch.cuda.is_available() else _NEED_A_DEVICE)
