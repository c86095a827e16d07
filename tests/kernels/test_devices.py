"""Which backend attends on a device, and why not ours: without a GPU."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from tandemkv.errors import BackendWarning
from tandemkv.kernels import devices

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_FAILED", {})
    monkeypatch.setattr(devices, "_TOLD", set())
    devices._found.cache_clear()


def test_without_triton_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert devices.why_not_triton(CUDA) == "triton is not installed: pip install 'tandemkv[gpu]'"


def test_an_old_triton_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    assert devices.why_not_triton(CUDA) == "triton 3.5.1 is too old: 3.6 or newer is needed"


def test_an_old_gpu_is_named_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert devices.why_not_triton(CUDA) == "Tesla T4 has compute capability 7.5, 8.0 is needed"


def test_a_kernel_that_does_not_run_is_told_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert devices.why_not_triton(CUDA).startswith("a kernel of Triton")


def test_the_next_backend_is_told_by_name_once_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "why_not_triton", lambda device: "triton is not installed")
    with pytest.warns(BackendWarning, match="near tokens on cuda:0 are attended by torch: triton is not installed"):
        assert devices.backend_of(CUDA).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.backend_of(CUDA).name == "torch"
