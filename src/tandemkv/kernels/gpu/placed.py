"""Where kernels run: devices, what they have, and what lies on them of host memory's tables."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


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


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors; 1 of the interpreter's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Of the device's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


@functools.cache
def capability(device: torch.device) -> int:
    """80 for sm_80; 0 where nothing is compiled for a GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
