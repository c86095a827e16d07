"""Measures what a machine profile holds, within two minutes, and keeps it until hardware or versions change."""

import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from tandemkv import kernels, machine
from tandemkv.errors import CapacityError, ProfileError, ProfileWarning
from tandemkv.kernels import cpu, probes
from tandemkv.lanes import Rig
from tandemkv.schedule import Kernels, Products, Profile, Speed, Tier, Transfers
from tandemkv.schedule.profile import AGAIN
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, ScoreRule, format_bytes

FORMATS: dict[str, tuple[torch.dtype, Packing]] = {
    "bfloat16": (torch.bfloat16, "panels"),
    "float32": (torch.float32, "panels"),
    "float16": (torch.float16, "panels"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
"""What far tokens are kept in, by name."""

DTYPES = torch.bfloat16, torch.float32, torch.float16
"""What models compute products in."""

SHAPE = 32, 8, 128
"""Query heads, KV heads and head_dim of the pages that kernels are timed on: Llama-3-8B."""

HIDDEN_SIZES = 1024, 4096
PRODUCT_TOKENS = 16, 64, 256, 1024

_BUFFER_BYTES = 1 << 30
_LEAST_BUFFER_BYTES = 256 << 20
"""A smaller buffer would be read from cache."""

_SIZES_BYTES = 1 << 20, 8 << 20, 64 << 20
_ROUNDS = 9


def stored_profile_path() -> Path:
    """Where this user's profile is kept: in XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandemkv" / "profile.json"


def measured_on() -> dict[str, str]:
    """What a profile holds for: the processor, its memory, GPUs, and the versions of what was timed."""
    processor, memory = machine.processor(), machine.memory()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor.name,
        "flags": " ".join(processor.flags),
        "processors": str(machine.default_threads()),
        "memory": format_bytes(round(memory.total_bytes / (1 << 30)) << 30),
        "numa nodes": str(max(1, len(machine.numa_nodes()))),
        "gpus": ", ".join(gpus) or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tandemkv": _version(),
    }


def profile_of_this_machine(console: Console, path: Path | None = None, *, again: bool = False) -> Profile:
    """The stored profile, or a new one where there is none, it is damaged, or machine or versions have changed.

    path: a file instead, which must have been measured here (ProfileError), or is made where there is none. again:
    measure anyway.
    """
    if path is not None and not path.exists():
        machine.check_can_write("--file", path)
    elif path is not None and not again:
        profile = Profile.load(path)
        if differs := profile.differs_from(measured_on()):
            raise ProfileError(f"the profile {path} was measured on another machine: {differs}; leave it out")
        return profile
    path = path or stored_profile_path()
    if path.exists() and not again:
        try:
            profile = Profile.load(path)
            differs = profile.differs_from(measured_on())
            if not differs:
                return profile
            why = f"the profile {path} was measured on {differs}"
        except ProfileError as error:
            why = str(error).removesuffix(f"; {AGAIN}")
        warnings.warn(f"{why}: measuring anew", ProfileWarning, stacklevel=2)
    profile = measure(console)
    try:
        profile.save(path)
    except OSError as error:
        why = f"the profile cannot be kept in {path} ({error.strerror}), and will be measured again next time"
        warnings.warn(f"{why}: set XDG_CACHE_HOME to a folder that can be written", ProfileWarning, stacklevel=2)
    return profile


def print_profile(profile: Profile, console: Console) -> None:
    """Tables of what was measured, and of what the machine was."""
    table = Table("attention over", "threads", "K and V GB/s", "start us", "logits K GB/s", "weigh V GB/s", box=None)
    for name, by_threads in profile.kernels.items():
        for num_threads, each in by_threads.items():
            rates = (each.attend.gbps, each.attend.start_us, each.logits.gbps, each.weigh.gbps)
            table.add_row(name, str(num_threads), *(f"{rate:.1f}" for rate in rates))
    console.print(table)
    table = Table("products, 1 thread", "hidden", *(f"{num} tokens" for num in PRODUCT_TOKENS), box=None)
    for dtype, by_hidden in profile.products.items():
        for hidden, products in by_hidden.items():
            table.add_row(dtype, str(hidden), *(f"{products.gflops(num):.0f} GFLOP/s" for num in PRODUCT_TOKENS))
    console.print(table)
    for tier in profile.tiers:
        parts = f"{tier.read_gbps:.1f} GB/s read, {tier.copy_gbps:.1f} copied, {tier.latency_ns:.0f} ns a load"
        console.print(f"{tier.name}: {parts}", highlight=False)
    found = profile.transfers
    for name, up, down in (("pageable", found.up, found.down), ("pinned", found.pinned_up, found.pinned_down)):
        told = "no CUDA device" if up is None or down is None else f"{up.gbps:.1f} GB/s up, {down.gbps:.1f} down"
        console.print(f"transfers, {name}: {told}", highlight=False)
    console.print(f"from one thread to another: {profile.handoff_us:.0f} us", highlight=False)
    where = ", ".join(f"{name} {value}" for name, value in profile.measured_on.items() if name != "flags")
    console.print(f"measured {profile.date} on: {where}", highlight=False, soft_wrap=True)


def measure(console: Console) -> Profile:
    """Time this machine; CapacityError where too little memory is free to read from."""
    buffer_bytes = min(_BUFFER_BYTES, machine.available_bytes().num_bytes // 4)
    if buffer_bytes < _LEAST_BUFFER_BYTES:
        available = machine.available_bytes()
        raise CapacityError(
            f"a profile needs 4 x {format_bytes(_LEAST_BUFFER_BYTES)} of free memory, "
            f"{format_bytes(available.num_bytes)} are left ({available.limit}); free some"
        )
    columns = TextColumn("measuring"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(FORMATS) + 4)

        def begin(what: str) -> None:
            progress.update(task, advance=1, description=what)

        begin("memory")
        tier, memory_gbps = _memory(buffer_bytes)
        found = {}
        for name in FORMATS:
            begin(f"attention over {name}")
            found[name] = _kernels(name, buffer_bytes)
        begin("products")
        products = {str(dtype).removeprefix("torch."): _products(dtype) for dtype in DTYPES}
        begin("links")
        transfers, handoff_us = _transfers(buffer_bytes // 4), _handoff_us()
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return Profile(measured_on(), date, found, products, memory_gbps, (tier,), transfers, handoff_us)


def _memory(num_bytes: int) -> tuple[Tier, float]:
    buffer, pool = probes.probe_buffer(num_bytes), cpu.WorkerPool(machine.default_threads())
    read_gbps = statistics.median(probes.read_gbps(pool, buffer) for _ in range(5))
    half = num_bytes // 2
    seconds = _median(lambda: buffer[:half].copy_(buffer[half : 2 * half]), rounds=5)
    latency_ns = probes.load_latency_ns(num_bytes // 2)
    return Tier("dram", read_gbps, half / seconds / 1e9, latency_ns), read_gbps


def _kernels(name: str, num_bytes: int) -> dict[int, Kernels]:
    """By threads: one, and all."""
    dtype, packing = FORMATS[name]
    layout, (_, num_kv_heads, head_dim) = PageLayout(dtype, 64, packing), SHAPE
    num_slots = num_bytes // layout.page_bytes(num_kv_heads, head_dim, head_dim)
    arena = random_arena(layout, num_slots, num_kv_heads, head_dim, head_dim)
    k_bytes, v_bytes = (x.nbytes // arena.num_slots for x in (arena.k, arena.v))
    q = torch.randn((1, SHAPE[0], 1, SHAPE[2])).to(arena.layout.dtype)
    rule, found = ScoreRule(SHAPE[2] ** -0.5), {}
    for num_threads in sorted({1, machine.default_threads()}):
        pool = cpu.WorkerPool(num_threads)
        windows = _windows(arena)
        found[num_threads] = Kernels(
            attend=_speed(windows, k_bytes + v_bytes, partial(kernels.attend, q, rule=rule, pool=pool)),
            logits=_speed(windows, k_bytes, partial(kernels.logits, q, rule=rule, pool=pool)),
            weigh=_speed(windows, v_bytes, partial(_weigh, SHAPE[0], pool)),
        )
    return found


def _weigh(num_q_heads: int, pool: "cpu.WorkerPool", run: PagedKV) -> object:
    num_tokens = run.page_table.shape[2] * run.entry_tokens
    return kernels.weigh(torch.zeros((1, num_q_heads, 1, num_tokens), device="cpu"), run, pool=pool)


def random_arena(layout: PageLayout, num_slots: int, num_kv_heads: int, head_dim: int, v_head_dim: int) -> Arena:
    """Pages of random numbers: 64 that are made, and copies of them."""
    arena = Arena.allocate(layout, num_slots, num_kv_heads, head_dim, v_head_dim=v_head_dim)
    rows = PageLayout(layout.dtype, layout.page_size, "rows")
    made = Arena.allocate(rows, 64, num_kv_heads, head_dim, v_head_dim=v_head_dim)
    made.k.normal_()
    made.v.normal_()
    for begin in range(0, num_slots, 64):
        slots = list(range(begin, min(begin + 64, num_slots)))
        kernels.move_pages(made, arena, list(range(len(slots))), slots)
    return arena


def _windows(arena: Arena) -> Callable[[int], PagedKV]:
    """Runs of so many pages, each behind the last one, so that none is read from cache."""
    at = 0

    def window(num_pages: int) -> PagedKV:
        nonlocal at
        at = 0 if at + num_pages > arena.num_slots else at
        table = torch.arange(at, at + num_pages, dtype=torch.int32, device="cpu").expand(1, arena.num_kv_heads, -1)
        at += num_pages
        tokens = num_pages * arena.layout.page_size
        return PagedKV(arena, table, torch.zeros(1, dtype=torch.int64), torch.full((1,), tokens))

    return window


def _speed(windows: Callable[[int], PagedKV], page_bytes: int, call: Callable[[PagedKV], object]) -> Speed:
    """A line through what small and large runs take."""
    sizes = [max(1, num_bytes // page_bytes) for num_bytes in _SIZES_BYTES]
    seconds = []
    for num_pages in sizes:
        times = []
        for _ in range(_ROUNDS):
            run = windows(num_pages)
            times.append(_seconds(partial(call, run)))
        seconds.append(statistics.median(times))
    return _line([num * page_bytes for num in sizes], seconds)


def _line(sizes_bytes: list[int], seconds: list[float]) -> Speed:
    """The rate of the largest beyond the smallest; the start is what the smallest takes more than that."""
    rate = (sizes_bytes[-1] - sizes_bytes[0]) / max(1e-9, seconds[-1] - seconds[0])
    return Speed(max(0.0, seconds[0] - sizes_bytes[0] / rate) * 1e6, rate / 1e9)


def _products(dtype: torch.dtype) -> dict[int, Products]:
    """Of one thread, by hidden size: inputs with the weights of K and V of as many heads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {size: Products(tuple(_product_points(size, dtype))) for size in HIDDEN_SIZES}
    finally:
        torch.set_num_threads(num_threads)


def _product_points(hidden: int, dtype: torch.dtype) -> Iterator[tuple[int, float]]:
    weight = torch.randn((hidden, hidden)).to(dtype)
    for num_tokens in PRODUCT_TOKENS:
        x = torch.randn((num_tokens, hidden)).to(dtype)
        seconds = _median(partial(torch.nn.functional.linear, x, weight), rounds=3 if hidden > 1024 else 7)
        yield num_tokens, 2 * num_tokens * hidden * hidden / seconds / 1e9


def _transfers(num_bytes: int) -> Transfers:
    """To and from the near device: copies in memory where that is a processor, else over its link."""
    devices = torch.cuda.device_count()
    pageable = torch.empty(num_bytes, dtype=torch.uint8, device="cpu").fill_(1)
    near = torch.empty(num_bytes, dtype=torch.uint8, device="cuda" if devices else "cpu").fill_(1)
    up, down = _copy_speed(pageable, near), _copy_speed(near, pageable)
    if not devices:
        return Transfers(up, down, None, None)
    pinned = pageable.pin_memory()
    return Transfers(up, down, _copy_speed(pinned, near), _copy_speed(near, pinned))


def _copy_speed(source: Tensor, target: Tensor) -> Speed:
    sizes, seconds = [source.nbytes // 256, source.nbytes // 4], []

    def copy(size: int) -> None:
        target[:size].copy_(source[:size], non_blocking=True)
        if "cuda" in (source.device.type, target.device.type):
            torch.cuda.synchronize()

    for size in sizes:
        seconds.append(_median(partial(copy, size), rounds=5))
    return _line(sizes, seconds)


def _handoff_us() -> float:
    """A quarter of asking the host for attention to nothing over links that take no time: each way a link and a
    thread."""
    if machine.usable_cpus() < 2:
        return 0.0
    arena = random_arena(PageLayout(torch.bfloat16, 64, "panels"), 1, 1, 64, 64)
    nothing = PagedKV(arena, torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1).long(), torch.zeros(1).long())
    q, rule = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16), ScoreRule(1.0)
    rig = Rig(Speed(0, 1e6), Speed(0, 1e6))

    def ask() -> None:
        time.sleep(0.001)  # as long as other work of a model takes: threads sleep then
        rig.call_host("nothing", q, lambda q: kernels.prepare_attend(q, nothing, rule=rule), 4).wait(10)

    try:
        with rig.claimed():
            return 1e6 / 4 * (_median(ask, rounds=101) - _median(lambda: time.sleep(0.001), rounds=101))
    finally:
        rig.close()


def _median(call: Callable[[], object], rounds: int = _ROUNDS) -> float:
    call()
    return statistics.median(_seconds(call) for _ in range(rounds))


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _version() -> str:
    try:
        return version("tandemkv")
    except PackageNotFoundError:
        return "not installed"
