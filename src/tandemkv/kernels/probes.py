"""How fast this machine reads memory and multiplies, by the native module: the limits that kernels are judged by."""

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.kernels.cpu import WorkerPool, native, resolve_isa


def probe_buffer(num_bytes: int) -> Tensor:
    """Memory for `read_gbps`, as pools have it: in huge pages where allowed."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    machine.advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer.fill_(1)  # or every page would be the kernel's one page of zeros


def read_gbps(pool: WorkerPool, buffer: Tensor) -> float:
    """Gigabytes (1e9) per second of plain loads over a tensor, best of three prefetch distances, one pass each."""
    offset = -buffer.data_ptr() % 64
    return native.read_gbps(pool, resolve_isa(), buffer.data_ptr() + offset, buffer.nbytes - offset)


def dot_gops(pool: WorkerPool, isa: str | None = None) -> float:
    """1e9 multiply-adds per second of the instruction that bf16 products use, from registers alone, on all threads.

    vdpbf16ps in avx512_bf16, bfdot in neon_bf16, else float32 multiply-adds. Best of a few passes of a millisecond.
    """
    return native.dot_gops(pool, resolve_isa(isa))


def multiply_adds(group_size: int, isa: str | None = None) -> int:
    """Multiply-adds that attending to an element of K and one of V costs, in bf16 with one bf16 query per head.

    For each query head of the group one for q.k, and one for p.v, or two where p is a high and a low bf16 part.
    0 where AMX tiles do them, which `dot_gops` does not measure.
    """
    return native.multiply_adds(resolve_isa(isa), group_size)


def load_latency_ns(num_bytes: int, num_steps: int = 200_000) -> float:
    """Nanoseconds of a load whose address the one before read, over so much memory: nothing can be asked for ahead."""
    lines = torch.zeros((num_bytes // 64, 8), dtype=torch.int64, device="cpu")  # 64 bytes each
    machine.advise_huge_pages(lines.data_ptr(), lines.nbytes)
    order = torch.randperm(len(lines))
    lines[order, 0] = order.roll(-1) * 8
    return native.load_latency_ns(lines.data_ptr(), num_steps)
