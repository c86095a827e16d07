"""The paper's kernel as a C++ compiler compiles it: every thread block on one CPU thread (host_cuda.h)."""

import ctypes
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.paper import Paged, PaperKernel
from tandemkv.types import Partial

HERE = Path(__file__).parent
MAX_EVENTS = 1 << 17
READ, BULK, LINE = range(3)


class Launch(ctypes.Structure):
    """As host_paper.cc has it."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "lse", "q", "k_cache", "v_cache", "block_table")),
        *((name, ctypes.c_void_p) for name in ("context_lens", "events")),
        *((name, ctypes.c_int64) for name in ("cache_bytes", "chunk_bytes", "max_events", "num_events")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_seqs", "num_kv_heads", "max_blocks")),
        *((name, ctypes.c_int64) for name in ("shared_bytes", "descending")),
        ("scale", ctypes.c_double),
    ]


class Call(NamedTuple):
    """What `PaperKernel.attend` takes."""

    q: Tensor
    paged: Paged
    context_lens: Tensor
    scale: float


class HostPaper(NamedTuple):
    kernel: PaperKernel
    library: ctypes.CDLL

    @staticmethod
    def build(kernel: PaperKernel, bulk: bool, directory: Path) -> "HostPaper":
        """bulk: prefetches as on sm_90."""
        macros = [f"-D{name}={value}" for name, value in {**kernel.macros, "BULK_PREFETCH": int(bulk)}.items()]
        path = directory / "-".join(["paper", *(str(macro).partition("=")[2] for macro in macros)])
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, *macros, HERE / "host_paper.cc", "-o", path], check=True)
        library = ctypes.CDLL(str(path))
        library.launch.restype = ctypes.c_char_p
        return HostPaper(kernel, library)

    def attend(self, call: Call, descending: bool = False) -> tuple[Partial, NDArray[np.int64]]:
        """out, lse and the events: rows of block x and y, thread, kind, cache (0 K, 1 V), first byte, their number."""
        q, paged = call.q, call.paged
        num_seqs, num_heads, head_dim = q.shape
        out, lse = torch.full((num_seqs, num_heads, 1, head_dim), 7.0), torch.full((num_seqs, num_heads, 1), 7.0)
        events = np.zeros((MAX_EVENTS, 7), dtype=np.int64)
        tensors = (out, lse, q, *paged, call.context_lens)
        launch = Launch(
            *(tensor.data_ptr() for tensor in tensors),
            events=events.ctypes.data,
            cache_bytes=paged.k_cache.nbytes,
            chunk_bytes=self.kernel.block_bytes,
            max_events=MAX_EVENTS,
            num_heads=num_heads,
            num_seqs=num_seqs,
            num_kv_heads=paged.k_cache.shape[1],
            max_blocks=paged.block_table.shape[1],
            shared_bytes=self.kernel.shared_bytes(paged.block_table.shape[1]),
            descending=descending,
            scale=call.scale,
        )
        fault = self.library.launch(ctypes.byref(launch))
        assert fault is None, fault.decode()
        assert launch.num_events <= MAX_EVENTS
        return Partial(out, lse), events[: launch.num_events]
