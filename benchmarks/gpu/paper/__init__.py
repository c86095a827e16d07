"""The kernel that asynchronous KV prefetch (2504.06319) starts from, and the prefetch as a switch: what the paper's
gain is measured on. kernel.cu, compiled by NVRTC for the GPU at hand.

Faithful to the design: a thread block of 4 warps for each query head of each sequence, vLLM's cache layouts, plain
loads, all logits in shared memory, one softmax, one V loop. Other than there: out is float32, weights stay float32 when
they meet V, the table's entries for what comes next are looked up before the wait for what is there, and by default a
block's loads are kept in front of its arithmetic at every distance, where the compiler would mix them (`loads_first`;
the benchmark measures both). Left out:
ALiBi, quantised caches, and the variant that splits long contexts.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tandemkv.errors import InputError, UnavailableError
from tandemkv.kernels.gpu import l2

NUM_WARPS = 4
ELEMENTS = 8
"""Of 16 bytes: what vLLM calls x."""

_DTYPES = {torch.float16: 0, torch.bfloat16: 1}
_SOURCE = Path(__file__).with_name("kernel.cu")


class Attended(NamedTuple):
    """out `[B, H, D]` and the natural log-sum-exp `[B, H]`, both float32. Nothing to attend to: 0 and -inf."""

    out: Tensor
    lse: Tensor


class Paged(NamedTuple):
    """k_cache `[num_blocks, Hkv, D / 8, block_tokens, 8]`, v_cache `[num_blocks, Hkv, D, block_tokens]` and block_table
    int32 `[B, max_blocks]`: a block for one KV head is contiguous in both caches."""

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor


class Compiled(NamedTuple):
    """For one architecture. log: what the assembler says of registers and spills."""

    cubin: bytes
    ptx: str
    log: str


@dataclass(frozen=True)
class PaperKernel:
    """A compiled-in shape of the kernel.

    head_dim: 64 to 256, a multiple of 16. dtype: of q, K and V, float16 or bfloat16. block_tokens: 16, 32 or 64.
    distance: how many of its own iterations ahead a warp asks L2 for a block; 0 not at all, 1 as the paper. prologue:
    the first `distance` blocks of each warp, which no iteration can ask for, are asked for before q is read and before
    the softmax. loads_first: a block's loads are all issued before any is waited for, then the prefetch, at every
    distance alike; else the compiler orders them, and another way with a prefetch than without.
    """

    head_dim: int
    dtype: torch.dtype
    block_tokens: int = 16
    distance: int = 0
    prologue: bool = False
    loads_first: bool = True

    def __post_init__(self) -> None:
        if self.head_dim not in range(64, 257, 16):
            raise InputError(f"expected head_dim 64, 80, ..., 256, got {self.head_dim}")
        if self.dtype not in _DTYPES:
            raise InputError(f"expected float16 or bfloat16, got {self.dtype}")
        if self.block_tokens not in (16, 32, 64):
            raise InputError(f"expected blocks of 16, 32 or 64 tokens, got {self.block_tokens}")
        if self.distance < 0 or (self.prologue and not self.distance):
            raise InputError(f"expected a distance >= 0, and > 0 with a prologue, got {self.distance}")

    @property
    def macros(self) -> dict[str, int]:
        """What kernel.cu is compiled with."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_TOKENS": self.block_tokens,
            "BF16": _DTYPES[self.dtype],
            "PREFETCH_DISTANCE": self.distance,
            "PROLOGUE": int(self.prologue),
            "LOADS_FIRST": int(self.loads_first),
        }

    @property
    def block_bytes(self) -> int:
        """K, or V, of one block for one KV head: the paper's M_block, and what one request asks for."""
        return self.head_dim * self.block_tokens * self.dtype.itemsize

    def fits_l2(self, num_heads: int, num_seqs: int, l2_bytes: int) -> bool:
        """The paper's M_total = M_block * warps * H * B <= L2, times the distance. Reported: `attend` does not ask."""
        return l2.fits_l2(self.block_bytes, self.distance, NUM_WARPS * num_heads * num_seqs, l2_bytes)

    def shared_bytes(self, max_blocks: int) -> int:
        """Shared memory of a thread block for contexts of so many blocks: q, two floats for each warp, and the logits
        or, where they are more, partial outs of all warps."""
        logits = max(max_blocks * self.block_tokens, NUM_WARPS * self.head_dim)
        return self._fixed_bytes + 4 * logits

    def max_context(self, shared_limit_bytes: int) -> int:
        """Tokens of the longest context that shared memory has room for, in whole blocks."""
        return max(0, (shared_limit_bytes - self._fixed_bytes) // 4 // self.block_tokens * self.block_tokens)

    def compiled(self, capability: int) -> Compiled:
        """The kernel for an architecture, 90 for sm_90; needs NVRTC, but neither GPU nor driver."""
        return _compiled(self, capability)

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor, scale: float
    ) -> Attended:
        """Attention of q `[B, H, D]` over the first context_lens `[B]` (int32) tokens of each sequence; see `Paged`.

        Everything contiguous on q's GPU; launched on torch's current stream, and nobody waits: table entries are not
        checked, and a length beyond the table gives NaN. Shared memory is as large as the table is wide.
        InputError: for shapes, dtypes and devices, and where logits of a table so wide do not fit shared memory.
        """
        self._check(q, Paged(k_cache, v_cache, block_table), context_lens)
        if q.device.type != "cuda":
            raise InputError(f"expected tensors on a CUDA device, got {q.device}")
        (num_seqs, num_heads, _), (_, max_blocks) = q.shape, block_table.shape
        loaded = _loaded(self, q.device)
        self.check_context(max_blocks, loaded.shared_limit_bytes)
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        if lse.numel():
            tensors = (out, lse, q, k_cache, v_cache, block_table, context_lens)
            counts = map(ctypes.c_int32, (k_cache.shape[1], max_blocks))
            arguments = (*(tensor.data_ptr() for tensor in tensors), ctypes.c_float(scale), *counts)
            loaded.launch((num_heads, num_seqs), self.shared_bytes(max_blocks), *arguments)
        return Attended(out, lse)

    def check_context(self, max_blocks: int, shared_limit_bytes: int) -> None:
        """InputError where logits of so many blocks do not fit."""
        if self.shared_bytes(max_blocks) > shared_limit_bytes:
            raise InputError(
                f"expected a block table of at most {self.max_context(shared_limit_bytes)} tokens, whose logits fit "
                f"{shared_limit_bytes} bytes of shared memory, got one of {max_blocks * self.block_tokens}"
            )

    @property
    def _fixed_bytes(self) -> int:
        return self.head_dim * 2 + 2 * 4 * NUM_WARPS

    def _check(self, q: Tensor, paged: Paged, context_lens: Tensor) -> None:
        if q.dim() != 3 or paged.k_cache.dim() != 5 or paged.block_table.dim() != 2:
            raise InputError(
                "expected q [B, H, D], k_cache [num_blocks, Hkv, D / 8, block_tokens, 8] and block_table "
                f"[B, max_blocks], got {[*q.shape]}, {[*paged.k_cache.shape]} and {[*paged.block_table.shape]}"
            )
        num_seqs, num_heads, _ = q.shape
        num_blocks, num_kv_heads = paged.k_cache.shape[:2]
        k_shape = (num_blocks, num_kv_heads, self.head_dim // ELEMENTS, self.block_tokens, ELEMENTS)
        for name, tensor, shape, dtype in (
            ("q", q, (num_seqs, num_heads, self.head_dim), self.dtype),
            ("k_cache", paged.k_cache, k_shape, self.dtype),
            ("v_cache", paged.v_cache, (num_blocks, num_kv_heads, self.head_dim, self.block_tokens), self.dtype),
            ("block_table", paged.block_table, (num_seqs, paged.block_table.shape[1]), torch.int32),
            ("context_lens", context_lens, (num_seqs,), torch.int32),
        ):
            is_right = tensor.shape == shape and tensor.dtype == dtype and tensor.device == q.device
            if not is_right or not tensor.is_contiguous() or (dtype == self.dtype and tensor.data_ptr() % 16):
                raise InputError(
                    f"{name} must be contiguous {dtype} {[*shape]} on {q.device}, aligned to 16 bytes, got "
                    f"{tensor.dtype} {[*tensor.shape]} on {tensor.device}"
                )
        if not num_kv_heads or num_heads % num_kv_heads:
            raise InputError(f"expected a multiple of {num_kv_heads} KV heads, got {num_heads} query heads")


def paged(k: Tensor, v: Tensor, block_tokens: int = 16, seed: int = 0) -> Paged:
    """Dense k and v `[B, Hkv, T, D]` in blocks at shuffled places, on k's device. Tokens behind T are NaN."""
    num_seqs, _, num_tokens, head_dim = k.shape
    if k.shape != v.shape or k.dtype not in _DTYPES or head_dim % ELEMENTS:
        raise InputError(
            f"expected k and v [B, Hkv, T, D] in float16 or bfloat16, D a multiple of {ELEMENTS}, got "
            f"{k.dtype} {[*k.shape]} and {v.dtype} {[*v.shape]}"
        )
    num_blocks = -(-num_tokens // block_tokens)
    behind = (0, 0, 0, num_blocks * block_tokens - num_tokens)
    k, v = (pad(x, behind, value=torch.nan).unflatten(2, (num_blocks, block_tokens)) for x in (k, v))
    order = torch.randperm(num_seqs * num_blocks, generator=torch.Generator().manual_seed(seed)).to(k.device)
    k = k.unflatten(4, (-1, ELEMENTS)).permute(0, 2, 1, 4, 3, 5).flatten(0, 1)
    v = v.permute(0, 2, 1, 4, 3).flatten(0, 1)
    k_cache, v_cache = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    k_cache[order], v_cache[order] = k, v
    return Paged(k_cache, v_cache, order.view(num_seqs, num_blocks).to(torch.int32))


class _Loaded(NamedTuple):
    """A kernel on its device, and the shared memory that a thread block may have there."""

    function: Any
    device: torch.device
    shared_limit_bytes: int

    def launch(self, grid: tuple[int, int], shared_bytes: int, *arguments: object) -> None:
        """On torch's current stream."""
        from cuda.core import LaunchConfig, Stream, launch

        with torch.cuda.device(self.device):
            stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
            config = LaunchConfig(grid=grid, block=32 * NUM_WARPS, shmem_size=shared_bytes)
            launch(stream, config, self.function, *arguments)


@cache
def _compiled(kernel: PaperKernel, capability: int) -> Compiled:
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise UnavailableError("the paper's kernel needs cuda-core, cuda-bindings and nvidia-cuda-nvrtc") from error
    macros = [(name, str(value)) for name, value in kernel.macros.items()]
    options = ProgramOptions(arch=f"sm_{capability}", std="c++17", define_macro=macros, ptxas_options=["-v"])
    program, log = Program(_SOURCE.read_text(), "c++", options), StringIO()
    cubin = bytes(program.compile("cubin", logs=log).code)
    # cuda.core makes PTX too, but asks a driver then whether it could load it. NVRTC has it from the same run.
    _, num_bytes = nvrtc.nvrtcGetPTXSize(program.handle)
    ptx = bytes(num_bytes)
    (result,) = nvrtc.nvrtcGetPTX(program.handle, ptx)
    assert result == nvrtc.nvrtcResult.NVRTC_SUCCESS
    return Compiled(cubin, ptx.rstrip(b"\0").decode(), log.getvalue())


@cache
def _loaded(kernel: PaperKernel, device: torch.device) -> _Loaded:
    """Beyond 48 KiB of shared memory, a kernel has to be allowed them by name."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    with torch.cuda.device(device):  # whatever was current before is so again afterwards
        at = Device(device.index)
        at.set_current()
        major, minor = at.compute_capability
        function = ObjectCode.from_cubin(kernel.compiled(10 * major + minor).cubin).get_kernel("attend")
        limit = at.properties.max_shared_memory_per_block_optin
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuKernelSetAttribute(attribute, limit, function.handle, driver.CUdevice(device.index))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise UnavailableError(f"no {limit} bytes of shared memory on {device}: {error.name}")
    return _Loaded(function, device, limit)
