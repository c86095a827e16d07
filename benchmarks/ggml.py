"""ggml's flash attention, the operation that llama.cpp runs in each layer, called by itself from llama-cpp-python.

Handles of ggml's objects and addresses of torch's memory are all that passes; ggml_init_params is the only struct.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ctypes import CFUNCTYPE, Structure, c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from itertools import cycle
from typing import Any

import torch
from llama_cpp._ggml import libggml
from torch import Tensor


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    return CFUNCTYPE(result, *arguments)((name, libggml))


_init = _function("ggml_init", c_void_p, _InitParams)
_free = _function("ggml_free", None, c_void_p)
_tensor_overhead = _function("ggml_tensor_overhead", c_size_t)
_new_tensor = _function("ggml_new_tensor_3d", c_void_p, c_void_p, c_int, *[c_int64] * 3)
_flash_attn = _function("ggml_flash_attn_ext", c_void_p, *[c_void_p] * 5, *[c_float] * 3)
_graph_overhead = _function("ggml_graph_overhead_custom", c_size_t, c_size_t, c_bool)
_new_graph = _function("ggml_new_graph_custom", c_void_p, c_void_p, c_size_t, c_bool)
_build_forward = _function("ggml_build_forward_expand", None, c_void_p, c_void_p)
_buffer_from_ptr = _function("ggml_backend_cpu_buffer_from_ptr", c_void_p, c_void_p, c_size_t)
_buffer_free = _function("ggml_backend_buffer_free", None, c_void_p)
_tensor_alloc = _function("ggml_backend_tensor_alloc", c_int, *[c_void_p] * 3)
_backend = _function("ggml_backend_cpu_init", c_void_p)
_backend_free = _function("ggml_backend_free", None, c_void_p)
_set_num_threads = _function("ggml_backend_cpu_set_n_threads", None, c_void_p, c_int)
_quantize_chunk = _function(
    "ggml_quantize_chunk", c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p
)
_row_size = _function("ggml_row_size", c_size_t, c_int, c_int64)
_compute = _function("ggml_backend_graph_compute", c_int, c_void_p, c_void_p)

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
QUANTISED = {"q8_0": 8, "q4_0": 2}
"""Types of KV that llama.cpp offers, by name: 32 numbers share a float16 scale."""

_NUM_TENSORS = 4
"""q, k, v and out, in one graph."""


def quantise(dense: Tensor, kind: str) -> Tensor:
    """float32 `[..., head_dim]` as ggml quantises it: uint8 `[..., bytes of a row]`."""
    dense, head_dim = dense.contiguous(), dense.shape[-1]
    row_bytes = _row_size(QUANTISED[kind], head_dim)
    found = torch.empty((*dense.shape[:-1], row_bytes), dtype=torch.uint8)
    num_rows = dense.numel() // head_dim
    _quantize_chunk(QUANTISED[kind], dense.data_ptr(), found.data_ptr(), 0, num_rows, head_dim, None)
    return found


class FlashAttention:
    """Each call attends over the next copy and returns the one output, which the next call overwrites.

    q: float32 `[1, num_q_heads, 1, head_dim]`. dense: float16 or bfloat16 `[num_copies, 2, 1, num_kv_heads, kv_len,
    head_dim]`, or where a kind of `QUANTISED` is given what `quantise` made of it. Output: float32 as q.
    """

    def __init__(self, q: Tensor, dense: Tensor, scale: float, num_threads: int, kind: str | None = None) -> None:
        self._kind = kind
        self._q, self._dense, self._out = q, dense, torch.empty_like(q)  # ggml keeps addresses, not tensors
        self._owned = ExitStack()
        weakref.finalize(self, self._owned.close)
        self._backend = _backend()
        self._owned.callback(_backend_free, self._backend)
        _set_num_threads(self._backend, num_threads)
        self._turns: Iterator[int] = cycle([self._graph(k, v, scale) for k, v in dense])

    def __call__(self) -> Tensor:
        status = _compute(self._backend, next(self._turns))
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute failed with status {status}")
        return self._out

    def _graph(self, k: Tensor, v: Tensor, scale: float) -> int:
        num_bytes = _NUM_TENSORS * _tensor_overhead() + _graph_overhead(_NUM_TENSORS, False)
        context = _init(_InitParams(num_bytes, None, True))
        self._owned.callback(_free, context)
        inputs = [_new_tensor(context, self._type(x), *self._sizes(x)) for x in (self._q, k, v)]
        out = _flash_attn(context, *inputs, None, scale, 0.0, 0.0)
        for tensor, x in zip((*inputs, out), (self._q, k, v, self._out), strict=True):
            buffer = _buffer_from_ptr(x.data_ptr(), x.nbytes)
            self._owned.callback(_buffer_free, buffer)
            _tensor_alloc(buffer, tensor, x.data_ptr())
        graph: int = _new_graph(context, _NUM_TENSORS, False)
        _build_forward(graph, out)
        return graph

    def _type(self, x: Tensor) -> int:
        return QUANTISED[self._kind] if self._kind is not None and x.dtype == torch.uint8 else _TYPES[x.dtype]

    def _sizes(self, x: Tensor) -> tuple[int, ...]:
        """ggml's order: the innermost first, without the batch; numbers, also where they are codes."""
        return self._q.shape[3], *reversed(x.shape[1:-1])
