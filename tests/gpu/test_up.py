"""Pages of host memory that come up to a device: the same bits as gathered on the host. In Triton's interpreter the
device is one more CPU."""

import math

import pytest
import torch

from tandemkv.errors import BackendWarning, UnavailableError
from tandemkv.kernels import cpu, devices, gpu, torch_ops
from tandemkv.lanes import bring_up
from tandemkv.types import Arenas
from tests.gpu.test_packed import DEVICE, LAYOUTS, NUM_HEADS, packed


def room(name: str, num_tokens: int) -> list[torch.Tensor]:
    arena = packed(name)[0]
    return [
        torch.full((2, NUM_HEADS, num_tokens, dim), math.nan, dtype=arena.layout.dtype, device=DEVICE)
        for dim in (arena.head_dim, arena.v_head_dim)
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_that_the_host_would_gather(name: str) -> None:
    arena = packed(name)[0]
    page = arena.layout.page_size
    table = torch.tensor([[5, 0, 3], [1, 6, 2]], dtype=torch.int32)[:, None].expand(2, NUM_HEADS, 3)
    begin, num_tokens = 7, 3 * page - 12
    (k, v), (host_k, host_v) = room(name, num_tokens), (x.cpu() for x in room(name, num_tokens))
    bring_up(arena, table, begin, k, v)
    cpu.gather(arena, table, begin, host_k, host_v, None)
    assert torch.equal(k.cpu(), host_k)
    assert torch.equal(v.cpu(), host_v)


@pytest.mark.parametrize("why", ["several packings", "no kernels of ours"])
def test_what_the_device_cannot_unpack_is_unpacked_on_the_host(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arena, rows = packed("int8")
    k, v = room("int8", 100)
    if why == "no kernels of ours":
        failed = devices.Backend("torch", torch_ops, "no Triton")
        monkeypatch.setattr(devices, "_FAILED", {k.device: failed})
        monkeypatch.setattr(devices, "_TOLD", {k.device})
    table = torch.tensor([[5, 0], [1, 6]], dtype=torch.int32)[:, None].expand(2, NUM_HEADS, 2)
    bring_up(Arenas((arena, rows)) if why == "several packings" else arena, table, 3, k, v)
    host_k, host_v = (x.cpu() for x in room("int8", 100))
    cpu.gather(arena, table, 3, host_k, host_v, None)
    assert torch.equal(k.cpu(), host_k)
    assert torch.equal(v.cpu(), host_v)


def test_an_unpack_that_does_not_compile_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object) -> None:
        raise UnavailableError("a kernel does not compile: shared memory")

    monkeypatch.setattr(devices, "_WITHOUT", set())
    monkeypatch.setattr(gpu, "unpack", failing)
    arena = packed("int8")[0]
    table = torch.tensor([[5, 0], [1, 6]], dtype=torch.int32)[:, None].expand(2, NUM_HEADS, 2)
    (k, v), (host_k, host_v) = room("int8", 100), (x.cpu() for x in room("int8", 100))
    with pytest.warns(BackendWarning, match="unpack is done without on .*: a kernel does not compile"):
        bring_up(arena, table, 3, k, v)
    cpu.gather(arena, table, 3, host_k, host_v, None)
    assert torch.equal(k.cpu(), host_k)
    assert torch.equal(v.cpu(), host_v)
