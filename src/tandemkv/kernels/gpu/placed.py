"""Where kernels run: devices, what they have, and what lies on them of host memory's tables."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources, PTXASError

from tandemkv.errors import UnavailableError


class _Copy(NamedTuple):
    """Of a tensor as it was at a version."""

    version: int
    tensor: Tensor


_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of tensors in host memory, as long as those live


def placed(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, contiguous. Of one in host memory a copy, kept until x is written again or gone: of a layer's
    step only the lengths cross the link, a table when a page is new. Nobody waits: it goes through pinned memory."""
    if x.device == device:
        return x.contiguous()
    if x.is_inference():  # written without a trace
        return _sent(x, device)
    copy: _Copy | None = _COPIES.get(x)
    if copy is None or copy.version != x._version or copy.tensor.device != device:
        copy = _COPIES[x] = _Copy(x._version, _sent(x, device))
    return copy.tensor


def _sent(x: Tensor, device: torch.device) -> Tensor:
    x = x.contiguous()
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@contextmanager
def launching(x: Tensor) -> Iterator[None]:
    """Kernels on x's device: Triton launches on the current one. UnavailableError where a kernel does not compile."""
    try:
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
            yield
    except (CompilationError, OutOfResources, PTXASError) as error:
        raise UnavailableError(f"a kernel does not compile for {x.device}: {error}") from error


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors; 1 of the interpreter's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Of shared memory that a program can have; an H100's in the interpreter."""
    if device.type != "cuda":
        return 232_448
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@functools.cache
def capability(device: torch.device) -> int:
    """80 for sm_80; 0 where nothing is compiled for a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
