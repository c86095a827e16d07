"""What a step runs on: a device, which is the caller's thread, a host, and a link between them for each direction."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from tandemkv import kernels, machine
from tandemkv.errors import InputError, UnsupportedError
from tandemkv.lanes.host import Host
from tandemkv.lanes.links import Link
from tandemkv.lanes.tickets import Ticket, Trace
from tandemkv.schedule import Speed
from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import Call, WorkerPool

T = TypeVar("T")


def require_two_processors(num: int | None = None) -> None:
    """InputError where a rig has fewer; None counts those of this process."""
    num = machine.usable_cpus() if num is None else num
    if num < 2:
        raise InputError(
            f"a device and a host need two processors, this process may use {num}: give it more, or take system 'dense'"
        )


class Rig:
    """A device and a host that are processors of this machine, each with its memory, and a link in each direction.

    The device is the thread that calls; it may work on what lies in its memory, which is near pages and what came up.
    """

    def __init__(self, up: Speed, down: Speed, *, cpus: tuple[int, ...] | None = None, copies: bool = False) -> None:
        """up: from the host to the device. cpus: the device's, then the host's; None: all that this process may use.
        copies: pages that come up are really copied, into staging slots, as far as they are whole.

        InputError where there are fewer than two.
        """
        from tandemkv.kernels.cpu import Bell, WorkerPool

        cpus = tuple(sorted(os.sched_getaffinity(0))) if cpus is None else cpus
        require_two_processors(len(cpus))
        self.bell, self.trace = Bell(), Trace()
        self.device_pool = WorkerPool(1)
        self.done: Ticket[None] = Ticket(self.bell, is_patient=True)  # for work that waits for nobody
        self.done.set(lambda: None)
        self._scratches: dict[tuple[PageLayout, int, int, int], Arena] = {}
        self.device_cpu = cpus[0]
        self.host = Host(WorkerPool(len(cpus) - 1, list(cpus[1:])), self.bell, self.trace, cpus[1])
        self.up = Link("up", up, self.bell, self.trace, copies=copies)
        self._slots = _Slots() if copies else None
        self.down = Link("down", down, self.bell, self.trace)
        atexit.register(self.close)  # a thread in the middle of a call would end the process with an abort

    def ask_host(
        self, name: str, q: Tensor, work: Callable[[Tensor], T], up_bytes: int | Callable[[T], int]
    ) -> Ticket[T]:
        """q down, work in Python on the host, its answer up, of which up_bytes may tell the size."""
        answer: Ticket[T] = Ticket(self.bell)
        is_down_at = self.down.carry(name, q.nbytes)

        def send_up(value: T) -> None:
            num_bytes = up_bytes if isinstance(up_bytes, int) else up_bytes(value)
            self.up.send(name, num_bytes, lambda: value, answer)

        return self.host.submit(name, lambda: work(q), ticket=answer, not_before=is_down_at, then=send_up)

    def call_host(self, name: str, q: Tensor, prepare: "Callable[[Tensor], Call[T]]", up_bytes: int) -> Ticket[T]:
        """q down, a call of the kernel on the host, its result up; no Python runs there."""
        is_down_at = self.down.carry(name, q.nbytes)
        return self.host.call(name, prepare(q), is_down_at, partial(self.up.carry, name, up_bytes))

    def prepare_attend(self, q: Tensor, pages: PagedKV, rule: ScoreRule, mass: Tensor | None = None) -> "Call[Partial]":
        """A call on the device, over what will lie in its memory. mass: as `kernels.attend` fills it."""
        return kernels.prepare_attend(q, pages, rule=rule, mass=mass, pool=self.device_pool)

    def attend_rows(
        self, q: Tensor, kv: tuple[Tensor, Tensor], pages: PagedKV, rule: ScoreRule, mass: Tensor | None = None
    ) -> Partial:
        """On the device, over k and v `[num_seqs, num_kv_heads, num_tokens, head_dim]` in the place of these pages."""
        num_pages = pages.page_table.shape[2]
        arena = self._scratch(pages.arena.parts[0], q.shape[0] * num_pages)
        slots = torch.arange(q.shape[0] * num_pages, dtype=torch.int32, device="cpu").view(-1, 1, num_pages)
        table = slots.expand(q.shape[0], arena.num_kv_heads, num_pages)
        kernels.append(arena, table, 0, *kv, self.device_pool)
        rows = PagedKV(arena, table, pages.kv_start, pages.kv_len)
        return self.prepare_attend(q, rows, rule, mass).make()

    def _scratch(self, like: Arena, num_slots: int) -> Arena:
        """Pages of the device's own, kept between calls."""
        layout = PageLayout(like.layout.dtype, like.layout.page_size, "panels")
        key = layout, like.num_kv_heads, like.head_dim, like.v_head_dim
        arena = self._scratches.get(key)
        if arena is None or arena.num_slots < num_slots:
            arena = Arena.allocate(layout, num_slots, *key[1:3], v_head_dim=key[3])
            self._scratches[key] = arena
        return arena

    def landing(self, pages: PagedKV, slot: int) -> PagedKV:
        """Where pages that come up will lie: where they are, or, where links copy, in this staging slot."""
        return pages if self._slots is None or pages.of_blocks else self._slots.landing(pages, slot)

    def send_pages(self, name: str, pages: PagedKV, landing: PagedKV) -> Ticket[PagedKV]:
        """Far pages up, to where nobody reads any more."""
        get = (lambda: landing) if landing is pages else partial(_copied, pages, landing)
        return self.send_up(name, pages.num_bytes, get)

    def send_up(self, name: str, num_bytes: int, get: Callable[[], T], ticket: Ticket[T] | None = None) -> Ticket[T]:
        """So many bytes up, behind what the host has sent before."""
        self.host.note_ended()
        return self.up.send(name, num_bytes, get, ticket)

    @contextmanager
    def claimed(self) -> Iterator["Rig"]:
        """The calling thread is the device: on its processor alone, torch's products too, until the block ends."""
        cpus, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
        os.sched_setaffinity(0, {self.device_cpu})
        torch.set_num_threads(1)
        try:
            yield self
        finally:
            torch.set_num_threads(num_threads)
            os.sched_setaffinity(0, cpus)

    def clear(self) -> None:
        """Nobody waits for what is on its way."""
        self.up.clear()
        self.down.clear()

    def close(self) -> None:
        """End the threads."""
        atexit.unregister(self.close)
        for part in (self.host, self.up, self.down):
            part.close()


class _Slots:
    """Memory of the device for pages that come up: one slot is filled while it reads another."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}

    def landing(self, pages: PagedKV, slot: int) -> PagedKV:
        """Pages of a slot for as many."""
        source, table = pages.arena.parts[0], pages.page_table
        if len(pages.arena.parts) > 1 or table.stride(1) != 0:
            raise UnsupportedError("pages of one format that heads share can be copied over a link, got others")
        arena = self._slot(source, table[:, 0].numel(), slot)
        slots = torch.arange(table[:, 0].numel(), dtype=torch.int32, device="cpu").view(table[:, 0].shape)
        return PagedKV(arena, slots[:, None].expand(table.shape), pages.kv_start, pages.kv_len)

    def _slot(self, like: Arena, num_pages: int, number: int) -> Arena:
        arena = self._arenas.get(number)
        if arena is None or arena.num_slots < num_pages or arena.k.shape[1:] != like.k.shape[1:]:
            arena = Arena.allocate(like.layout, num_pages, like.num_kv_heads, like.head_dim, v_head_dim=like.v_head_dim)
            self._arenas[number] = arena
        return arena


def _copied(pages: PagedKV, landing: PagedKV) -> PagedKV:
    source, target = (run.page_table[:, 0].flatten().tolist() for run in (pages, landing))
    kernels.move_pages(pages.arena, landing.arena, source, target)
    return landing


class TorchRig:
    """A device that torch computes on, and the host beside it.

    Copies are enqueued by the caller's thread, on the stream it computes on, so that they are ordered with the kernels
    that made q and with the merge; the host's thread only waits until q is down.
    """

    def __init__(self, pool: "WorkerPool") -> None:
        from tandemkv.kernels.cpu import Bell

        self.bell, self.trace = Bell(), Trace()
        self.host = Host(pool, self.bell, self.trace)

    def ask_host(
        self, name: str, q: Tensor, work: Callable[[Tensor], T], up_bytes: int | Callable[[T], int]
    ) -> Ticket[T]:
        """q down, work on the host; the caller brings its answer up."""
        is_cuda = q.device.type == "cuda"
        host_q = torch.empty(q.shape, dtype=q.dtype, device="cpu", pin_memory=is_cuda).copy_(q, non_blocking=is_cuda)
        is_down = torch.cuda.current_stream(q.device).record_event() if is_cuda else None

        def job() -> T:
            if is_down is not None:
                is_down.synchronize()
            return work(host_q)

        return self.host.submit(name, job)

    def call_host(self, name: str, q: Tensor, prepare: "Callable[[Tensor], Call[T]]", up_bytes: int) -> Ticket[T]:
        """q down, a call of the kernel on the host; the caller brings its result up."""
        return self.ask_host(name, q, lambda q: prepare(q).make(), up_bytes)

    def clear(self) -> None:
        """Torch's own copies are ordered by its streams."""


AnyRig = Rig | TorchRig
