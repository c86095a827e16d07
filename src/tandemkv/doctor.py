"""`tandemkv doctor`: what this machine and this installation offer, and why each way to compute is or is not used."""

import math
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tandemkv
from tandemkv import machine
from tandemkv.errors import UnavailableError

try:
    import torch
except ImportError as error:
    raise UnavailableError(f"torch cannot be imported ({error}): install it again") from error

from tandemkv.cache import FAR_PACKINGS
from tandemkv.kernels import devices, torch_ops
from tandemkv.types import PageLayout, ScoreRule, format_bytes

FAR_SHAPE = 32, 8, 128
"""Layers, KV heads and head_dim for which far tokens are counted: Llama-3-8B."""

PROBE_BYTES = 1 << 30
_LEAST_PROBE_BYTES = 256 << 20
"""A smaller buffer would be read from cache."""

_PROBE_SECONDS = 1.5
"""Rounds of the probe start only within this time, so that a slow machine is not kept busy; the first always runs."""


@dataclass(frozen=True)
class Choice:
    """A way to compute, whether it is used on this machine, and why."""

    name: str
    used: bool
    reason: str


@dataclass(frozen=True)
class Threads:
    """Processors that may be used, the cgroup's quota, what torch uses, what we use and where, how OpenMP waits."""

    usable_cpus: int
    quota_cpus: float | None
    torch_threads: int
    default_threads: int
    pinned_cpus: tuple[int, ...]
    spin: machine.Spin


@dataclass(frozen=True)
class ReadSpeed:
    """Plain loads from memory by so many threads."""

    num_threads: int
    read_gbps: float


@dataclass(frozen=True)
class ReadBandwidth:
    """Speeds over a buffer of `buffer_bytes`; none, and the reason why, where they could not be measured."""

    buffer_bytes: int
    speeds: tuple[ReadSpeed, ...]
    missing: str


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    total_bytes: int
    compute_capability: str


@dataclass(frozen=True)
class Gpus:
    """The CUDA devices that torch sees; none, and the reason why."""

    devices: tuple[Gpu, ...]
    missing: str


@dataclass(frozen=True)
class FarFormat:
    """What far tokens cost in a format, as `far_dtype` names it, for a model of `FAR_SHAPE`.

    num_tokens: that the memory available now would hold.
    """

    far_dtype: str
    token_bytes: float
    num_tokens: int


@dataclass(frozen=True)
class Report:
    """All that doctor knows. `warnings` are what a user should mend, each with the way to do it."""

    versions: dict[str, str | None]
    processor: machine.Processor
    isas: tuple[Choice, ...]
    threads: Threads
    memory: machine.Memory
    available: machine.Available
    far_formats: tuple[FarFormat, ...]
    huge_pages: machine.HugePages
    numa_nodes: tuple[machine.NumaNode, ...]
    read_bandwidth: ReadBandwidth
    gpus: Gpus
    backends: tuple[Choice, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report in plain types, ready for JSON."""
        return asdict(self)


def collect(probe_bytes: int = PROBE_BYTES) -> Report:
    """Look at the machine and measure it, within about 5 seconds; the read probe takes `probe_bytes` of memory."""
    cpu, native_missing = _native_backend()
    threads = _threads()
    gpus = _gpus()
    memory = machine.memory()
    on_gpu = _torch_cuda_choice(gpus), _triton_choice(gpus)
    return Report(
        versions=_versions(),
        processor=machine.processor(),
        isas=_isas(cpu) if cpu else (),
        threads=threads,
        memory=memory,
        available=memory.available,
        far_formats=_far_formats(memory.available),
        huge_pages=machine.huge_pages(),
        numa_nodes=machine.numa_nodes(),
        read_bandwidth=_read_bandwidth(cpu, native_missing, threads.default_threads, probe_bytes, memory.available),
        gpus=gpus,
        backends=(_native_choice(cpu, native_missing), _torch_cpu_choice(), *on_gpu),
        warnings=tuple(_warnings(threads, native_missing)),
    )


def _far_formats(available: machine.Available) -> tuple[FarFormat, ...]:
    num_layers, num_kv_heads, head_dim = FAR_SHAPE
    found = []
    for name, packing in FAR_PACKINGS.items():
        layout = PageLayout(torch.bfloat16, packing=packing)
        token_bytes = num_layers * layout.page_bytes(num_kv_heads, head_dim, head_dim) / layout.page_size
        found.append(FarFormat(name, token_bytes, int(available.num_bytes / token_bytes)))
    return tuple(found)


def print_report(report: Report, console: Console) -> None:
    """Print a report for people: a table per subject, then the warnings."""
    for title, rows in _sections(report).items():
        console.print(f"[bold]{title}[/bold]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for name, text in rows:
            table.add_row(escape(name), text)
        console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def _native_backend() -> tuple[ModuleType | None, str]:
    """The native backend's Python door, or None and the reason why it is not there."""
    try:
        from tandemkv.kernels import cpu
    except UnavailableError as error:
        return None, str(error)
    return cpu, ""


def _isas(cpu: ModuleType) -> tuple[Choice, ...]:
    best = cpu.resolve_isa()

    def reason(name: str, missing: str) -> str:
        if missing:
            return f"this processor lacks {missing}"
        return "the fastest here" if name == best else f"available, but {best} is faster here"

    return tuple(Choice(name, name == best, reason(name, missing)) for name, missing in cpu.available_isas().items())


def _threads() -> Threads:
    return Threads(
        usable_cpus=machine.usable_cpus(),
        quota_cpus=machine.quota_cpus(),
        torch_threads=torch.get_num_threads(),
        default_threads=min(machine.default_threads(), torch.get_num_threads()),
        pinned_cpus=machine.pinned_cpus(),
        spin=machine.spin(),
    )


def _read_bandwidth(
    cpu: ModuleType | None, native_missing: str, num_threads: int, probe_bytes: int, available: machine.Available
) -> ReadBandwidth:
    if cpu is None:
        return ReadBandwidth(0, (), native_missing)
    from tandemkv.kernels import probes

    num_bytes = min(probe_bytes, available.num_bytes // 4)
    if num_bytes < _LEAST_PROBE_BYTES:
        left = f"{format_bytes(available.num_bytes)} left ({available.limit})"
        return ReadBandwidth(0, (), f"needs 4 x {format_bytes(_LEAST_PROBE_BYTES)} of free memory, {left}")
    buffer = probes.probe_buffer(num_bytes)
    pools = [cpu.WorkerPool(count) for count in sorted({1, num_threads})]
    best = [0.0] * len(pools)
    deadline = time.monotonic() + _PROBE_SECONDS
    for _ in range(3):
        best = [max(gbps, probes.read_gbps(pool, buffer)) for gbps, pool in zip(best, pools, strict=True)]
        if time.monotonic() > deadline:
            break
    speeds = tuple(ReadSpeed(pool.num_threads, gbps) for pool, gbps in zip(pools, best, strict=True))
    return ReadBandwidth(num_bytes, speeds, "")


def _gpus() -> Gpus:
    with warnings.catch_warnings(record=True) as caught:  # torch says there why a driver does not work
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        built = f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else ""
        told = "; ".join(str(warning.message) for warning in caught)
        return Gpus((), built or told or "torch finds no CUDA device")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Gpus(tuple(Gpu(gpu.name, gpu.total_memory, f"{gpu.major}.{gpu.minor}") for gpu in devices), "")


def _native_choice(cpu: ModuleType | None, native_missing: str) -> Choice:
    if cpu is None:
        return Choice("native cpu", False, native_missing)
    return Choice("native cpu", True, f"decode over pages in host memory, merge: instruction set {cpu.resolve_isa()}")


def _torch_cpu_choice() -> Choice:
    """Try torch's flash op, which is not a public interface, on two equal tokens, whose lse is known."""
    x = torch.ones(1, 1, 2, 16)
    try:
        lse = torch_ops.attend_dense(x, x, x, rule=ScoreRule(1.0)).lse
    except (AttributeError, RuntimeError) as error:
        return Choice("torch cpu", False, f"torch {torch.__version__} has no flash attention that returns lse: {error}")
    if not torch.allclose(lse, torch.tensor(16 + math.log(2))):
        return Choice("torch cpu", False, f"torch {torch.__version__} returns another lse than the natural logarithm")
    return Choice("torch cpu", True, "prefill on the CPU: torch's flash attention returns lse")


def _torch_cuda_choice(gpus: Gpus) -> Choice:
    if gpus.missing:
        return Choice("torch cuda", False, gpus.missing)
    return Choice("torch cuda", True, "prefill on CUDA: torch's flash attention returns lse")


def _triton_choice(gpus: Gpus) -> Choice:
    """Compile a small kernel and run it, where there is a GPU."""
    if gpus.missing:
        return Choice("triton", False, gpus.missing)
    found = [torch.device("cuda", index) for index in range(len(gpus.devices))]
    why_not = [
        f"{why} ({device}); torch attends near tokens there"
        for device in found
        if (why := devices.why_not_triton(device))
    ]
    if len(why_not) == len(found):
        return Choice("triton", False, why_not[0])
    capabilities = [torch.cuda.get_device_capability(device) for device in found]
    old = [f"{major}.{minor}" for major, minor in capabilities if major < 9]
    l2 = f"line by line (compute capability {old[0]}, bulk requests came with 9.0)" if old else "in bulk"
    attends = f"decode over near pages on CUDA, merge: triton {_installed('triton')}"
    return Choice("triton", True, "; ".join([attends, f"pages can be asked for in L2 {l2}", *why_not]))


def _versions() -> dict[str, str | None]:
    """Version by package; None where it is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "tandemkv": tandemkv.__version__,
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _warnings(threads: Threads, native_missing: str) -> Iterator[str]:
    if native_missing:
        yield native_missing
    if not threads.spin.passive:
        setting = threads.spin.setting or "neither GOMP_SPINCOUNT nor OMP_WAIT_POLICY is set"
        yield (
            f"torch's OpenMP threads spin after every op and take the cores from attention ({setting}): "
            "set GOMP_SPINCOUNT=0 before torch is imported"
        )
    if threads.quota_cpus is not None and threads.torch_threads > math.ceil(threads.quota_cpus):
        quota = math.ceil(threads.quota_cpus)
        yield (
            f"torch uses {threads.torch_threads} threads, but the cgroup grants {threads.quota_cpus:g} processors: "
            f"set OMP_NUM_THREADS={quota}"
        )


def _sections(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Rows (name, rich markup) by title."""
    return {
        "Versions": [(name, found or "not installed") for name, found in report.versions.items()],
        "Processor": [
            ("name", escape(report.processor.name)),
            ("flags", " ".join(report.processor.flags)),
            *(_choice_row(choice) for choice in report.isas),
        ],
        "Threads": _thread_rows(report.threads),
        "Memory": _memory_rows(report),
        "Far tokens": _far_rows(report.far_formats),
        "Read bandwidth": _bandwidth_rows(report.read_bandwidth),
        "GPU": [
            (gpu.name, f"{format_bytes(gpu.total_bytes)}, compute capability {gpu.compute_capability}")
            for gpu in report.gpus.devices
        ]
        or [("none", escape(report.gpus.missing))],
        "Backends": [_choice_row(choice) for choice in report.backends],
    }


def _choice_row(choice: Choice) -> tuple[str, str]:
    mark = "[green]used[/green]" if choice.used else "[dim]not used[/dim]"
    return choice.name, f"{mark}: {escape(choice.reason)}"


def _thread_rows(threads: Threads) -> list[tuple[str, str]]:
    quota = "no cgroup quota" if threads.quota_cpus is None else f"cgroup quota {threads.quota_cpus:g}"
    waits = "passively" if threads.spin.passive else "[yellow]spinning[/yellow]"
    setting = f" ({escape(threads.spin.setting)})" if threads.spin.setting else ""
    cpus = " ".join(map(str, threads.pinned_cpus))
    return [
        ("processors", f"{threads.usable_cpus} usable, {quota}"),
        ("threads", f"{threads.default_threads} for attention, {threads.torch_threads} for torch"),
        ("workers", f"pinned to one processor each: {cpus}" if cpus else f"not pinned; {machine.PIN_VARIABLE}=1 pins"),
        ("OpenMP waits", f"{waits}{setting}; programs of your own set GOMP_SPINCOUNT=0 before torch is imported"),
    ]


def _memory_rows(report: Report) -> list[tuple[str, str]]:
    cgroup = report.memory.cgroup
    limit = f"{format_bytes(cgroup.limit_bytes)}, {format_bytes(cgroup.used_bytes)} used" if cgroup else "none"
    return [
        ("physical", format_bytes(report.memory.total_bytes)),
        ("cgroup limit", limit),
        ("available", f"{format_bytes(report.available.num_bytes)}, limited by the {report.available.limit}"),
        ("huge pages", _huge_page_text(report.huge_pages)),
        *(_node_row(node) for node in report.numa_nodes),
    ]


def _huge_page_text(huge_pages: machine.HugePages) -> str:
    size = f" of {format_bytes(huge_pages.num_bytes)}" if huge_pages.num_bytes else ""
    use = "used by pools in host memory" if huge_pages.used else "not used by pools"
    return f"transparent{size}, enabled: {huge_pages.enabled}; {use}"


def _far_rows(formats: tuple[FarFormat, ...]) -> list[tuple[str, str]]:
    layers, heads, dim = FAR_SHAPE
    rows = [
        (
            "bfloat16" if each.far_dtype == "model" else f"far_dtype {each.far_dtype}",
            f"{format_bytes(each.token_bytes)} a token, {each.num_tokens:,} in the memory available now",
        )
        for each in formats
    ]
    return [("counted for", f"{layers} layers, {heads} KV heads x {dim} (Llama-3-8B)"), *rows]


def _node_row(node: machine.NumaNode) -> tuple[str, str]:
    parts = [format_bytes(node.total_bytes)]
    parts.append("memory only (CXL or HBM)" if node.memory_only else f"{len(node.cpus)} processors")
    parts.append("distances " + " ".join(f"{other}:{distance}" for other, distance in node.distances.items()))
    if node.read_gbps is not None:
        parts.append(f"{node.read_gbps:g} GB/s by firmware")
    if node.read_latency_ns is not None:
        parts.append(f"{node.read_latency_ns:g} ns by firmware")
    return f"NUMA node {node.node}", ", ".join(parts)


def _bandwidth_rows(bandwidth: ReadBandwidth) -> list[tuple[str, str]]:
    if bandwidth.missing:
        return [("not measured", escape(bandwidth.missing))]
    over = f"over {format_bytes(bandwidth.buffer_bytes)}"
    return [(f"threads: {speed.num_threads}", f"{speed.read_gbps:.1f} GB/s {over}") for speed in bandwidth.speeds]
