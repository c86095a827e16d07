"""Attention over pages in a GPU's memory, by Triton kernels. Run by Triton's interpreter where `TRITON_INTERPRET=1`."""

from tandemkv.kernels.gpu.calls import attend, merge
from tandemkv.kernels.gpu.config import Config, config_for
from tandemkv.kernels.gpu.moves import Pull, append, prepare_pull, unpack
from tandemkv.kernels.gpu.works import failure, is_interpreted

__all__ = [
    "Config",
    "Pull",
    "append",
    "attend",
    "config_for",
    "failure",
    "is_interpreted",
    "merge",
    "prepare_pull",
    "unpack",
]
