"""machine.py on made-up procfs and sysfs trees, and on the machine itself."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandemkv import machine
from tandemkv.errors import InputError, UnavailableError

GIB = 1 << 30

V1_UNLIMITED = "9223372036854771712\n"
V1_MOUNTS = """\
30 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
31 23 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
32 23 0:29 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
33 23 0:30 / /tmp rw - tmpfs tmpfs rw
"""
V2_MOUNTS = "30 23 0:27 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def host(root: Path) -> Path:
    meminfo = f"MemTotal:       {64 << 20} kB\nMemFree:  1024 kB\nMemAvailable:   {60 << 20} kB\nHugePages_Total: 0\n"
    return write(root, {"proc/meminfo": meminfo})


def v2(root: Path, group: str, files: dict[str, str], mounts: str = V2_MOUNTS) -> Path:
    write(host(root), {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mounts})
    return write(root / "sys/fs/cgroup", files)


def v1(root: Path, group: str, files: dict[str, str], mounts: str = V1_MOUNTS) -> Path:
    own = f"9:name=systemd:/\n4:cpu,cpuacct:{group}\n3:memory:{group}\n0::/elsewhere\n"
    write(host(root), {"proc/self/cgroup": own, "proc/self/mountinfo": mounts})
    return write(root / "sys/fs/cgroup", files)


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def test_processor_reads_the_first_one_and_keeps_only_flags_that_matter(tmp_path: Path) -> None:
    text = "model name\t: Fast One\nflags\t\t: fpu avx2 fma avx512_bf16x\n\nmodel name\t: Other\nflags\t: avx512f\n"
    assert machine.processor(write(tmp_path, {"proc/cpuinfo": text})) == machine.Processor("Fast One", ("fma", "avx2"))


def test_processor_of_an_arm_machine_has_features_and_no_name(tmp_path: Path) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU implementer\t: 0x41\n"
    found = machine.processor(write(tmp_path, {"proc/cpuinfo": text}))
    assert found.flags == ("asimd", "bf16", "sve")
    assert found.name


@pytest.mark.usefixtures("sixteen_cpus")
@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"a/cpu.max": "max 100000\n"}, 16),
        ({"a/cpu.max": "250000 100000\n"}, 3),
        ({"a/cpu.max": "10000 100000\n"}, 1),
        ({"a/cpu.max": "6400000 100000\n"}, 16),
        ({"a/cpu.max": "max 100000\n", "cpu.max": "400000 200000\n"}, 2),
        ({"a/b/c/cpu.max": "800000 100000\n", "a/b/cpu.max": "300000 100000\n", "a/cpu.max": "700000 100000\n"}, 3),
        ({}, 16),
    ],
)
def test_threads_follow_the_tightest_v2_quota(tmp_path: Path, files: dict[str, str], threads: int) -> None:
    v2(tmp_path, "/a/b/c", files)
    assert machine.default_threads(tmp_path) == threads


@pytest.mark.usefixtures("sixteen_cpus")
@pytest.mark.parametrize(("quota", "cpus", "threads"), [("-1\n", None, 16), ("150000\n", 1.5, 2)])
def test_threads_follow_a_v1_quota(tmp_path: Path, quota: str, cpus: float | None, threads: int) -> None:
    group = "cpu,cpuacct/docker/x"
    v1(tmp_path, "/docker/x", {f"{group}/cpu.cfs_quota_us": quota, f"{group}/cpu.cfs_period_us": "100000\n"})
    assert machine.quota_cpus(tmp_path) == cpus
    assert machine.default_threads(tmp_path) == threads


def test_default_threads_here_are_those_of_this_process() -> None:
    assert 1 <= machine.default_threads() <= len(os.sched_getaffinity(0))
    assert machine.usable_cpus() == len(os.sched_getaffinity(0))


def test_without_cgroup_physical_memory_decides(tmp_path: Path) -> None:
    host(tmp_path)
    assert machine.memory(tmp_path) == machine.Memory(64 * GIB, 60 * GIB, None)
    assert machine.available_bytes(tmp_path) == machine.Available(60 * GIB, "physical memory")


@pytest.mark.parametrize("files", [{}, {"proc/meminfo": "MemTotal: 1 kB\n"}])
def test_memory_that_the_kernel_does_not_tell_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    with pytest.raises(UnavailableError, match="MemAvailable"):
        machine.available_bytes(tmp_path)


def test_v2_limit_counts_inactive_page_cache_as_free(tmp_path: Path) -> None:
    files = {
        "job/memory.max": f"{8 * GIB}\n",
        "job/memory.current": f"{6 * GIB}\n",
        "job/memory.stat": f"anon {3 * GIB}\ninactive_anon {5 * GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\n",
    }
    v2(tmp_path, "/job", files)
    cgroup = machine.memory(tmp_path).cgroup
    assert cgroup == machine.CgroupMemory(str(tmp_path / "sys/fs/cgroup/job"), 8 * GIB, 4 * GIB)
    assert machine.available_bytes(tmp_path) == machine.Available(4 * GIB, "cgroup limit")


@pytest.mark.parametrize("limit", ["max\n", V1_UNLIMITED])
def test_no_limit_is_no_limit(tmp_path: Path, limit: str) -> None:
    v2(tmp_path, "/job", {"job/memory.max": limit, "job/memory.high": "max\n", "job/memory.current": "4096\n"})
    assert machine.memory(tmp_path).cgroup is None


def test_v2_memory_high_limits_too(tmp_path: Path) -> None:
    v2(
        tmp_path,
        "/job",
        {"job/memory.max": f"{8 * GIB}\n", "job/memory.high": f"{5 * GIB}\n", "job/memory.current": "0\n"},
    )
    assert machine.available_bytes(tmp_path).num_bytes == 5 * GIB


def test_a_limit_above_what_is_free_does_not_decide(tmp_path: Path) -> None:
    v2(tmp_path, "/job", {"job/memory.max": f"{63 * GIB}\n", "job/memory.current": f"{GIB}\n"})
    assert machine.available_bytes(tmp_path) == machine.Available(60 * GIB, "physical memory")
    assert machine.memory(tmp_path).cgroup is not None


def test_the_group_that_leaves_least_decides_not_the_smallest_limit(tmp_path: Path) -> None:
    files = {
        "pod/memory.max": f"{16 * GIB}\n",
        "pod/memory.current": f"{15 * GIB}\n",
        "pod/job/memory.max": f"{8 * GIB}\n",
        "pod/job/memory.current": f"{2 * GIB}\n",
    }
    v2(tmp_path, "/pod/job", files)
    cgroup = machine.memory(tmp_path).cgroup
    assert cgroup is not None
    assert cgroup.group.endswith("/pod")
    assert machine.available_bytes(tmp_path).num_bytes == GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    v2(tmp_path, "/job", {"job/memory.max": f"{GIB}\n", "job/memory.current": f"{2 * GIB}\n"})
    assert machine.available_bytes(tmp_path) == machine.Available(0, "cgroup limit")


def test_v1_limit_counts_the_page_cache_of_subgroups(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": V1_UNLIMITED,
        "memory/docker/x/memory.limit_in_bytes": f"{8 * GIB}\n",
        "memory/docker/x/memory.usage_in_bytes": f"{6 * GIB}\n",
        "memory/docker/x/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
    }
    v1(tmp_path, "/docker/x", files)
    assert machine.available_bytes(tmp_path) == machine.Available(3 * GIB, "cgroup limit")


@pytest.mark.parametrize(
    ("mounted", "group"),
    [
        ("/docker/x", "/docker/x"),  # the host's path, without a cgroup namespace
        ("/docker/x", "/"),
        ("/", "/../y"),  # a process moved out of its namespace
        ("/..", "/"),
        ("/", "/docker/x"),  # the host's path, which the container does not see
    ],
)
def test_in_a_container_the_mount_is_the_group(tmp_path: Path, mounted: str, group: str) -> None:
    mounts = f"31 23 0:28 {mounted} /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    v2(tmp_path, group, {"memory.max": f"{2 * GIB}\n", "memory.current": "0\n"}, mounts)
    write(tmp_path / "sys/fs/y", {"memory.max": "1\n"})
    assert machine.available_bytes(tmp_path) == machine.Available(2 * GIB, "cgroup limit")


def test_a_mount_of_a_subtree_is_followed_from_its_root(tmp_path: Path) -> None:
    mounts = "31 23 0:28 /docker/x /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    v2(tmp_path, "/docker/x/inner", {"inner/memory.max": f"{3 * GIB}\n", "inner/memory.current": "0\n"}, mounts)
    assert machine.available_bytes(tmp_path).num_bytes == 3 * GIB


def test_available_here_is_no_more_than_the_machine_has() -> None:
    assert 0 < machine.available_bytes().num_bytes <= machine.memory().total_bytes
    assert machine.memory().total_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def node(number: int, cpus: str, gib: int, distance: str) -> dict[str, str]:
    base = f"sys/devices/system/node/node{number}"
    meminfo = f"Node {number} MemTotal:  {gib << 20} kB\nNode {number} MemFree:  1 kB\n"
    return {f"{base}/cpulist": f"{cpus}\n", f"{base}/meminfo": meminfo, f"{base}/distance": f"{distance}\n"}


def test_numa_nodes_with_a_cxl_node(tmp_path: Path) -> None:
    access = "sys/devices/system/node/node2/access0/initiators"
    files = {
        **node(0, "0-2,8", 32, "10 21 50"),
        **node(1, "3", 32, "21 10 60"),
        **node(2, "", 128, "50 60 10"),
        f"{access}/read_bandwidth": "28000\n",
        f"{access}/write_bandwidth": "0\n",
        f"{access}/read_latency": "250\n",
        "sys/devices/system/node/online": "0-2\n",
    }
    first, second, cxl = machine.numa_nodes(write(tmp_path, files))
    assert first == machine.NumaNode(0, (0, 1, 2, 8), 32 * GIB, {0: 10, 1: 21, 2: 50}, None, None, None, None)
    assert second.cpus == (3,)
    assert (first.memory_only, second.memory_only, cxl.memory_only) == (False, False, True)
    assert cxl == machine.NumaNode(2, (), 128 * GIB, {0: 50, 1: 60, 2: 10}, 28.0, None, 250.0, None)


def test_numa_nodes_are_ordered_by_number_and_may_have_gaps(tmp_path: Path) -> None:
    nodes = machine.numa_nodes(write(tmp_path, {**node(10, "1", 1, "20 10"), **node(2, "0", 1, "10 20")}))
    assert [found.node for found in nodes] == [2, 10]
    assert nodes[1].distances == {2: 20, 10: 10}


def test_a_kernel_without_numa_lists_no_node(tmp_path: Path) -> None:
    assert machine.numa_nodes(tmp_path) == ()


@pytest.mark.parametrize("value", [None, "0"])
def test_no_worker_is_pinned_unless_asked(value: str | None) -> None:
    assert machine.pinned_cpus({} if value is None else {"TANDEMKV_PIN_WORKERS": value}) == ()


def test_workers_are_pinned_to_what_this_process_may_use(sixteen_cpus: None) -> None:
    assert machine.pinned_cpus({"TANDEMKV_PIN_WORKERS": "1"}) == tuple(range(16))


@pytest.mark.parametrize("value", ["", "yes", "2", " 1"])
def test_other_values_of_pinning_are_refused(value: str) -> None:
    with pytest.raises(InputError, match=f"TANDEMKV_PIN_WORKERS must be 0 or 1, got '{value}'"):
        machine.pinned_cpus({"TANDEMKV_PIN_WORKERS": value})


HUGE = "sys/kernel/mm/transparent_hugepage/"


@pytest.mark.parametrize(
    ("enabled", "num_bytes", "expected", "used"),
    [
        ("always [madvise] never\n", "2097152\n", ("madvise", 2 << 20), True),
        ("[always] madvise never\n", "2097152\n", ("always", 2 << 20), True),
        ("always madvise [never]\n", "2097152\n", ("never", 2 << 20), False),
        ("[always] madvise never\n", "536870912\n", ("always", 512 << 20), False),  # Arm with pages of 64 KiB
        ("", "", ("never", 0), False),
    ],
)
def test_huge_pages_are_used_where_they_are_allowed_and_small(
    tmp_path: Path, enabled: str, num_bytes: str, expected: tuple[str, int], used: bool
) -> None:
    found = machine.huge_pages(write(tmp_path, {HUGE + "enabled": enabled, HUGE + "hpage_pmd_size": num_bytes}))
    assert (found.enabled, found.num_bytes) == expected
    assert found.used == used
    assert machine.huge_pages(tmp_path / "nowhere") == machine.HugePages("never", 0)


def test_advice_is_no_error_where_huge_pages_are_off_or_the_buffer_is_small(tmp_path: Path) -> None:
    with mmap.mmap(-1, 8 << 20) as memory:
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        assert not machine.advise_huge_pages(address, 8 << 20, tmp_path)
        assert not machine.advise_huge_pages(address, (2 << 20) - 1)
        assert not machine.advise_huge_pages(address, 0)
        del view


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (False, "")),
        ({"GOMP_SPINCOUNT": "0"}, (True, "GOMP_SPINCOUNT=0")),
        ({"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "passive"}, (False, "GOMP_SPINCOUNT=1000")),
        ({"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": " PASSIVE"}, (True, "OMP_WAIT_POLICY=PASSIVE")),
        ({"OMP_WAIT_POLICY": "active"}, (False, "OMP_WAIT_POLICY=active")),
    ],
)
def test_spin_reads_what_libgomp_reads(environ: dict[str, str], expected: tuple[bool, str]) -> None:
    assert machine.spin(environ) == machine.Spin(*expected)


def import_torch_after(statements: str, **environ: str) -> tuple[list[str], str]:
    """What statements print, and the spin count that libgomp shows when torch loads it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", f"from tandemkv import machine\n{statements}\nimport torch"],
        env={**clean, "OMP_DISPLAY_ENV": "verbose", **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    count = next(line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    return done.stdout.split(), count


def test_set_passive_spin_reaches_libgomp() -> None:
    assert import_torch_after("print(machine.set_passive_spin())") == (["True"], "0")


def test_set_passive_spin_leaves_the_users_choice() -> None:
    assert import_torch_after("print(machine.set_passive_spin())", GOMP_SPINCOUNT="77") == (["False"], "77")


def test_set_passive_spin_after_torch_is_false_and_sets_nothing() -> None:
    statements = "import os, torch; print(machine.set_passive_spin(), 'GOMP_SPINCOUNT' in os.environ)"
    printed, count = import_torch_after(statements)
    assert printed == ["False", "False"]
    assert count != "0"


def test_machine_needs_neither_torch_nor_the_native_module() -> None:
    code = "import sys; from tandemkv import machine; print({'torch', 'tandemkv._native'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
