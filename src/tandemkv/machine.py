"""What this machine is: processor, threads, memory, the limits on both, NUMA nodes, huge pages, how OpenMP waits.

Standard library only: the command line asks before torch is imported. Everything is read from procfs and sysfs below
`root`, so that a made-up tree answers like a real one. A file that is missing sets no limit.
"""

import ctypes
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from tandemkv.errors import InputError, UnavailableError

ROOT = Path("/")

FLAGS = (
    *("f16c", "fma", "bmi2", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svebf16"),
)
"""The processor flags that decide how fast attention can be, in the kernel's spelling (x86, then Arm)."""

PIN_VARIABLE = "TANDEMKV_PIN_WORKERS"

HUGE_PAGE_BYTES = 2 << 20
"""Where kernels have larger ones (32 MiB and more with Arm's larger pages), one token would take that much memory."""

_MADV_HUGEPAGE = 14

_UNLIMITED_BYTES = 1 << 62
"""cgroup v1 writes "no limit" as the largest multiple of the page size in 63 bits, which differs between kernels."""


@dataclass(frozen=True)
class Processor:
    """Its name, and those of `FLAGS` that it has."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class CgroupMemory:
    """A memory limit on a control group, and what the group uses of it; inactive page cache is not counted as used."""

    group: str
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What the group may still take; 0 where it is over its limit."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class Available:
    """Bytes that this process may still take, and the name of the limit that decided, for an error to name."""

    num_bytes: int
    limit: Literal["physical memory", "cgroup limit", "device memory"]


@dataclass(frozen=True)
class Memory:
    """Physical memory, what of it is free or can be reclaimed (MemAvailable), and the tightest cgroup limit, if any."""

    total_bytes: int
    free_bytes: int
    cgroup: CgroupMemory | None

    @property
    def whole(self) -> Available:
        """What a process could have at most, were all of it free."""
        if self.cgroup is not None and self.cgroup.limit_bytes < self.total_bytes:
            return Available(self.cgroup.limit_bytes, "cgroup limit")
        return Available(self.total_bytes, "physical memory")

    @property
    def available(self) -> Available:
        """What a process may still take: the smaller of MemAvailable and what the cgroups above it leave."""
        if self.cgroup is not None and self.cgroup.free_bytes < self.free_bytes:
            return Available(self.cgroup.free_bytes, "cgroup limit")
        return Available(self.free_bytes, "physical memory")


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node: its processors, memory, distances to every node, and what firmware says about its own memory.

    A node with memory and without processors is CXL memory (or flat HBM). Speeds are None where firmware is silent.
    """

    node: int
    cpus: tuple[int, ...]
    total_bytes: int
    distances: dict[int, int]
    read_gbps: float | None
    write_gbps: float | None
    read_latency_ns: float | None
    write_latency_ns: float | None

    @property
    def memory_only(self) -> bool:
        """Whether it has memory, but no processor."""
        return self.total_bytes > 0 and not self.cpus


@dataclass(frozen=True)
class Spin:
    """Whether torch's OpenMP threads sleep between ops (passive) or spin, and the setting that decided ('' if none)."""

    passive: bool
    setting: str


@dataclass(frozen=True)
class HugePages:
    """What Linux says of transparent huge pages (always, madvise, never), their size, and whether our pools use them.

    Where it says nothing, that is never and 0.
    """

    enabled: str
    num_bytes: int

    @property
    def used(self) -> bool:
        """Whether advice is given and taken."""
        return self.enabled in ("always", "madvise") and self.num_bytes == HUGE_PAGE_BYTES


def processor(root: Path = ROOT) -> Processor:
    """The first processor of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    has = set((fields.get("flags") or fields.get("Features") or "").split())
    return Processor(fields.get("model name") or platform.machine(), tuple(flag for flag in FLAGS if flag in has))


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def quota_cpus(root: Path = ROOT) -> float | None:
    """Processors' worth of time that the tightest cgroup (v1 or v2) grants, None where there is no quota."""
    quota = min((_group_quota_cpus(group) for group in _groups("cpu", root)), default=math.inf)
    return None if math.isinf(quota) else quota


def default_threads(root: Path = ROOT) -> int:
    """Threads worth starting: usable processors, but no more than the cgroup quota rounded up; at least 1."""
    quota = quota_cpus(root)
    return usable_cpus() if quota is None else max(1, min(usable_cpus(), math.ceil(quota)))


def pinned_cpus(environ: Mapping[str, str] = os.environ) -> tuple[int, ...]:
    """Processors to pin our threads to, one each: those of this process where TANDEMKV_PIN_WORKERS is 1, else none.

    Raises InputError where it is neither 0 nor 1.
    """
    wanted = environ.get(PIN_VARIABLE, "0")
    if wanted not in ("0", "1"):
        raise InputError(f"{PIN_VARIABLE} must be 0 or 1, got {wanted!r}")
    return tuple(sorted(os.sched_getaffinity(0))) if wanted == "1" else ()


def memory(root: Path = ROOT) -> Memory:
    """Physical memory and the cgroup limit (v1 or v2) that leaves least.

    Raises UnavailableError where /proc/meminfo cannot be read.
    """
    fields = _kib_fields(root / "proc/meminfo")
    if "MemTotal" not in fields or "MemAvailable" not in fields:
        raise UnavailableError(f"{root / 'proc/meminfo'} does not tell MemTotal and MemAvailable: is /proc mounted?")
    limits = [limit for group in _groups("memory", root) if (limit := _group_memory(group)) is not None]
    tightest = min(limits, key=lambda limit: limit.free_bytes, default=None)
    return Memory(fields["MemTotal"], fields["MemAvailable"], tightest)


def available_bytes(root: Path = ROOT) -> Available:
    """What a process may still take, and the name of the limit that decided.

    Page cache that the kernel would drop counts as free; swap does not.
    Raises UnavailableError where /proc/meminfo cannot be read.
    """
    return memory(root).available


def numa_nodes(root: Path = ROOT) -> tuple[NumaNode, ...]:
    """The nodes that the kernel lists, by number; empty where it knows nothing of NUMA."""
    paths = {int(path.name[len("node") :]): path for path in (root / "sys/devices/system/node").glob("node[0-9]*")}
    return tuple(_numa_node(node, paths[node], sorted(paths)) for node in sorted(paths))


def huge_pages(root: Path = ROOT) -> HugePages:
    """The machine's setting of transparent huge pages."""
    settings = root / "sys/kernel/mm/transparent_hugepage"
    enabled = re.search(r"\[(\w+)\]", _read(settings / "enabled"))
    num_bytes = _read(settings / "hpage_pmd_size")
    return HugePages(enabled[1] if enabled else "never", int(num_bytes) if num_bytes.isdigit() else 0)


def advise_huge_pages(address: int, num_bytes: int, root: Path = ROOT) -> bool:
    """Ask Linux for huge pages in the aligned inside of a buffer, without touching it; whether it agreed.

    The buffer is still taken from the machine only as it is written, 2 MiB at a time. Where huge pages are off, or the
    buffer holds none, nothing happens.
    """
    begin = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + num_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if begin >= end or not huge_pages(root).used:
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE) == 0)


def spin(environ: Mapping[str, str] = os.environ) -> Spin:
    """How libgomp, torch's OpenMP, waits under these variables: GOMP_SPINCOUNT decides, then OMP_WAIT_POLICY.

    Where neither is set, it spins (for about 3 ms).
    """
    for variable, passive in (("GOMP_SPINCOUNT", "0"), ("OMP_WAIT_POLICY", "passive")):
        if value := environ.get(variable, "").strip():
            return Spin(value.lower() == passive, f"{variable}={value}")
    return Spin(False, "")


def check_can_write(option: str, path: Path) -> None:
    """InputError where a file could not be written there; before anything has taken time."""
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder: expected a file to write")
    if not folder.is_dir():
        raise InputError(f"{option} {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"{option} {path} cannot be written: this user may not")


def set_passive_spin() -> bool:
    """Let torch's OpenMP threads sleep between ops, unless the user chose otherwise; returns whether they will.

    Spinning threads take the cores from ours for milliseconds after every op. libgomp reads its variables once, when
    torch loads it: where torch is already imported and nothing was chosen, nothing is set and the answer is False.
    """
    if not spin().setting and "torch" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = "0"
    return spin().passive


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Directories of this process's control group and its ancestors, wherever a v1 or v2 hierarchy is mounted.

    They need not exist, and a v1 hierarchy of another controller does no harm: it has none of this controller's files.
    """
    own = _own_groups(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        file_system = source.split(" ", 1)[0]
        if file_system not in ("cgroup", "cgroup2"):
            continue
        mounted, mount_point = mount.split()[3:5]
        group = own.get("" if file_system == "cgroup2" else controller, PurePosixPath(mounted))
        # In a container the group may be a path of the host's, or lead out of its namespace ("/../x"): then what is
        # mounted is the group.
        inside = group.is_relative_to(mounted) and ".." not in group.parts
        parts = group.relative_to(mounted).parts if inside else ()
        for length in range(len(parts), -1, -1):
            yield root.joinpath(mount_point.lstrip("/"), *parts[:length])


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    """This process's control group by v1 controller; that of v2 by ''."""
    lines = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    return {name: PurePosixPath(group) for _, controllers, group in lines for name in controllers.split(",")}


def _group_quota_cpus(group: Path) -> float:
    words = _read(group / "cpu.max").split()
    if not words:
        words = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    quota_us, period_us = words
    return int(quota_us) / int(period_us) if quota_us.isdigit() else math.inf  # v2 writes "max", v1 -1


def _group_memory(group: Path) -> CgroupMemory | None:
    # Above memory.high the kernel slows a group to a crawl instead of killing it: no less a limit.
    texts = [_read(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limit_bytes = min((int(text) for text in texts if text.isdigit()), default=_UNLIMITED_BYTES)
    if limit_bytes >= _UNLIMITED_BYTES:
        return None
    usage_bytes = int(_read(group / "memory.current") or _read(group / "memory.usage_in_bytes") or 0)
    stat = {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", _read(group / "memory.stat"))}
    # v1 counts subgroups only in the total_ lines, but always in the usage.
    cache_bytes = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    return CgroupMemory(str(group), limit_bytes, max(0, usage_bytes - cache_bytes))


def _numa_node(node: int, path: Path, all_nodes: list[int]) -> NumaNode:
    cpus = re.findall(r"(\d+)(?:-(\d+))?", _read(path / "cpulist"))
    distances = [int(word) for word in _read(path / "distance").split()]
    speeds = path / "access0/initiators"
    return NumaNode(
        node=node,
        cpus=tuple(cpu for first, last in cpus for cpu in range(int(first), int(last or first) + 1)),
        total_bytes=_kib_fields(path / "meminfo").get("MemTotal", 0),
        distances=dict(zip(all_nodes, distances, strict=False)),
        read_gbps=_speed(speeds / "read_bandwidth", 1e-3),
        write_gbps=_speed(speeds / "write_bandwidth", 1e-3),
        read_latency_ns=_speed(speeds / "read_latency", 1.0),
        write_latency_ns=_speed(speeds / "write_latency", 1.0),
    )


def _speed(path: Path, factor: float) -> float | None:
    """A number of sysfs (MB/s or ns) times a factor; the kernel writes 0 for what firmware does not tell."""
    text = _read(path)
    return int(text) * factor if text.isdigit() and int(text) else None


def _kib_fields(path: Path) -> dict[str, int]:
    """`MemTotal:  1 kB` lines in bytes."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", _read(path))}


def _read(path: Path) -> str:
    """The text of a file, '' where there is none to read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
