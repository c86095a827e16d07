"""doctor.py: its report on this machine, and what it says where something is missing."""

import io
import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tandemkv import doctor, machine
from tandemkv.kernels import cpu, devices, probes, torch_ops
from tandemkv.types import Partial, ScoreRule

GIB = 1 << 30


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.collect(probe_bytes=256 << 20)


def printed(report: doctor.Report) -> str:
    out = io.StringIO()
    doctor.print_report(report, Console(file=out, width=300))
    return out.getvalue()


def shape_of(value: Any) -> Any:
    """The keys and types of a JSON value; lists by their first element."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(inner) for inner in value[:1]]
    return type(value)


def test_json_schema(report: doctor.Report) -> None:
    choice = {"name": str, "used": bool, "reason": str}
    data = json.loads(json.dumps(report.to_dict()))
    shape = shape_of(data)
    for node in data["numa_nodes"]:
        assert set(node) == set(machine.NumaNode.__dataclass_fields__)
    assert shape["isas"] == shape["backends"] == [choice]
    assert shape["versions"] == dict.fromkeys(("python", "torch", "transformers", "tandemkv"), str)
    assert shape["processor"]["name"] is str
    counts = {"usable_cpus", "quota_cpus", "torch_threads", "default_threads", "pinned_cpus", "spin"}
    assert set(data["threads"]) == counts
    assert shape["threads"]["spin"] == {"passive": bool, "setting": str}
    assert set(data["memory"]) == {"total_bytes", "free_bytes", "cgroup"}
    assert shape["available"] == {"num_bytes": int, "limit": str}
    speed = {"num_threads": int, "read_gbps": float}
    assert shape["read_bandwidth"] == {"buffer_bytes": int, "speeds": [speed], "missing": str}
    assert set(data["gpus"]) == {"devices", "missing"}
    assert isinstance(data["warnings"], list)
    assert shape["huge_pages"] == {"enabled": str, "num_bytes": int}
    assert shape["far_formats"] == [{"far_dtype": str, "token_bytes": float, "num_tokens": int}]
    assert len(data) == 13


def test_the_isa_in_use_is_the_one_that_attend_takes(report: doctor.Report) -> None:
    assert [isa.name for isa in report.isas if isa.used] == [cpu.resolve_isa()]
    assert [isa.name for isa in report.isas] == list(cpu.available_isas())


def test_an_isa_that_the_processor_lacks_says_what_is_missing(
    report: doctor.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    isas = {"fastest": "avx1024", "good": "", "portable": ""}
    monkeypatch.setattr(cpu, "available_isas", lambda: isas)
    monkeypatch.setattr(doctor, "_read_bandwidth", lambda *_: report.read_bandwidth)
    found = doctor.collect().isas
    assert [isa.used for isa in found] == [False, True, False]
    assert "lacks avx1024" in found[0].reason
    assert "good is faster" in found[2].reason


def test_bandwidth_is_measured_with_one_thread_and_with_the_default(report: doctor.Report) -> None:
    speeds = report.read_bandwidth.speeds
    assert [speed.num_threads for speed in speeds] == sorted({1, report.threads.default_threads})
    assert report.read_bandwidth.buffer_bytes == 256 << 20
    assert all(0.5 < speed.read_gbps < 5000 for speed in speeds)


def test_bandwidth_is_the_best_of_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([10.0, 20.0, 30.0, 15.0, 5.0, 25.0])
    monkeypatch.setattr(probes, "read_gbps", lambda pool, buffer: next(rounds))
    found = doctor._read_bandwidth(cpu, "", 2, 256 << 20, machine.Available(8 * GIB, "physical memory"))
    assert [speed.read_gbps for speed in found.speeds] == [30.0, 25.0]


def test_bandwidth_takes_no_more_than_a_quarter_of_what_is_left() -> None:
    small = doctor._read_bandwidth(cpu, "", 1, GIB, machine.Available(GIB + 4096, "cgroup limit"))
    assert small.buffer_bytes == (GIB + 4096) // 4
    none = doctor._read_bandwidth(cpu, "", 1, GIB, machine.Available(GIB - 4, "cgroup limit"))
    assert none.speeds == ()
    assert "cgroup limit" in none.missing


def test_backends_that_work_here_are_used(report: doctor.Report) -> None:
    used = {backend.name: backend.used for backend in report.backends}
    has_gpu = torch.cuda.is_available()
    assert used == {"native cpu": True, "torch cpu": True, "torch cuda": has_gpu, "triton": has_gpu}
    assert all(backend.reason for backend in report.backends)


@pytest.mark.parametrize(
    ("why_not", "capability", "used", "told"),
    [
        (
            "triton is not installed: pip install 'tandemkv[gpu]'",
            (9, 0),
            False,
            "tandemkv[gpu]' (cuda:0); torch attends near tokens there",
        ),
        ("", (9, 0), True, "pages can be asked for in L2 in bulk"),
        ("", (8, 6), True, "line by line (compute capability 8.6, bulk requests came with 9.0)"),
    ],
)
def test_of_a_gpu_one_line_says_who_attends_and_how(
    why_not: str, capability: tuple[int, int], used: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "why_not_triton", lambda device: why_not)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = doctor._triton_choice(doctor.Gpus((doctor.Gpu("a GPU", GIB, "9.0"),), ""))
    assert choice.used == used
    assert told in choice.reason


def test_without_a_gpu_the_line_of_triton_says_why() -> None:
    choice = doctor._triton_choice(doctor.Gpus((), "the driver is too old (found version 11040)"))
    assert choice == doctor.Choice("triton", False, "the driver is too old (found version 11040)")


def test_torch_cpu_is_not_used_where_its_lse_is_of_another_base(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch_ops.attend_dense

    def base_2(*args: torch.Tensor, **kwargs: ScoreRule) -> Partial:
        out, lse = right(*args, rule=kwargs["rule"])
        return Partial(out, lse / math.log(2))

    monkeypatch.setattr(torch_ops, "attend_dense", base_2)
    assert "natural logarithm" in doctor._torch_cpu_choice().reason


def test_torch_cpu_is_not_used_where_the_op_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> Partial:
        raise AttributeError("no such op")

    monkeypatch.setattr(torch_ops, "attend_dense", gone)
    choice = doctor._torch_cpu_choice()
    assert not choice.used
    assert "no such op" in choice.reason


def test_a_gpu_is_listed_with_its_memory(report: doctor.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Big GPU", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpus = doctor._gpus()
    assert gpus == doctor.Gpus((doctor.Gpu("Big GPU", 80 * GIB, "9.0"),) * 2, "")
    assert doctor._torch_cuda_choice(gpus).used
    assert "80.00 GiB, compute capability 9.0" in printed(replace(report, gpus=gpus))


def test_a_gpu_that_torch_cannot_use_is_explained_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_driver() -> bool:
        warnings.warn("driver [too] old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    assert doctor._gpus() == doctor.Gpus((), "driver [too] old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._gpus().missing == "torch finds no CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._gpus().missing == f"torch {torch.__version__} is built without CUDA"


def threads(quota_cpus: float | None, spin: machine.Spin) -> doctor.Threads:
    return doctor.Threads(16, quota_cpus, 8, 2, (), spin)


def test_warnings_name_the_knob() -> None:
    assert list(doctor._warnings(threads(None, machine.Spin(True, "GOMP_SPINCOUNT=0")), "")) == []
    (spins,) = doctor._warnings(threads(None, machine.Spin(False, "OMP_WAIT_POLICY=active")), "")
    assert "GOMP_SPINCOUNT=0" in spins
    assert "OMP_WAIT_POLICY=active" in spins
    (quota,) = doctor._warnings(threads(1.5, machine.Spin(True, "GOMP_SPINCOUNT=0")), "")
    assert "OMP_NUM_THREADS=2" in quota


def test_the_printed_report_holds_every_subject(report: doctor.Report) -> None:
    cxl = machine.NumaNode(1, (), 128 * GIB, {0: 50, 1: 10}, 28.0, 20.0, 250.0, None)
    cgroup = machine.CgroupMemory("/job", 8 * GIB, 3 * GIB)
    text = printed(
        replace(
            report,
            memory=machine.Memory(64 * GIB, 60 * GIB, cgroup),
            available=machine.Available(5 * GIB, "cgroup limit"),
            huge_pages=machine.HugePages("madvise", 2 << 20),
            far_formats=doctor._far_formats(machine.Available(5 * GIB, "cgroup limit")),
            numa_nodes=(cxl,),
            gpus=doctor.Gpus((), "driver [too] old"),
            warnings=("mend [this]",),
        )
    )
    for part in (
        *(f"{isa.name} " for isa in report.isas),
        *(backend.reason for backend in report.backends),
        "8.00 GiB, 3.00 GiB used",
        "5.00 GiB, limited by the cgroup limit",
        "transparent of 2.00 MiB, enabled: madvise; used by pools in host memory",
        "128.00 GiB, memory only (CXL or HBM), distances 0:50 1:10, 28 GB/s by firmware, 250 ns by firmware",
        f"{report.read_bandwidth.speeds[0].read_gbps:.1f} GB/s over 256.00 MiB",
        "far_dtype int4    37.25 KiB a token, ",
        "driver [too] old",
        "warning: mend [this]",
    ):
        assert part in text


def test_far_tokens_are_counted_in_every_format() -> None:
    """Llama-3-8B: 128 KiB a token in bf16; 24 GiB hold 3.4 times as many tokens in int4 as in bf16."""
    wide, int8, int4 = doctor._far_formats(machine.Available(24 * GIB, "physical memory"))
    assert (wide.far_dtype, wide.token_bytes, wide.num_tokens) == ("model", 131072, 24 * GIB // 131072)
    assert int8.num_tokens >= 1.9 * wide.num_tokens
    assert int4.num_tokens >= 3.4 * wide.num_tokens
