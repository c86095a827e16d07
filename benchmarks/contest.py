"""The contest of benchmarks.attend: one sequence laid out for everybody, checked against float64, timed in turn."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common import WrongResultError, in_ms, medians_in_turn
from benchmarks.peers import PEERS, Call, PeerUnavailableError, Problem
from tandemkv import kernels, machine
from tandemkv.kernels import cpu, probes
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule

PAGE_SIZE = 64
PROBE_THREADS = (1, 2)
AFTER_OURS = f"read {PROBE_THREADS[-1]}, after ours"


@dataclass(frozen=True)
class Shape:
    """One decode step of one layer: one query token over kv_len tokens, a multiple of PAGE_SIZE, in bf16."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    kv_len: int

    def __str__(self) -> str:
        return f"{self.num_q_heads}:{self.num_kv_heads}x{self.head_dim} at {self.kv_len / 1024:g}K"

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_bytes(self) -> int:
        """K and V of the sequence."""
        return 2 * self.num_kv_heads * self.kv_len * self.head_dim * torch.bfloat16.itemsize


@dataclass(frozen=True)
class Rules:
    """How a contest is held.

    budget_s: seconds of turns for each row. rotate_bytes: copies of the sequence fill at least this much, and the
    probe reads as much; 1 GiB is more than twice the largest cache known here (480 MiB, shared by many machines).
    """

    budget_s: float
    rotate_bytes: int = 1 << 30
    peers: Mapping[str, Callable[[Problem], Call]] = field(default_factory=lambda: PEERS)


@dataclass(frozen=True)
class Row:
    """One shape with one number of threads. Times are medians, errors the largest deviation from float64."""

    shape: Shape
    num_threads: int
    read_gbps_by_threads: dict[int, float]
    dot_gops: float  # 1e9 multiply-adds a second, from registers
    multiply_adds: int  # for an element of K and one of V; 0 where dot_gops is not what does them
    ours_ms: float
    max_error: float
    peers_ms: dict[str, float]
    peers_max_error: dict[str, float]
    peers_missing: dict[str, str]  # name -> why

    @property
    def read_gbps(self) -> float:
        """The limit of memory."""
        return max(self.read_gbps_by_threads.values())

    @property
    def arithmetic_limit_us(self) -> float | None:
        """What the multiply-adds of ours take from registers; None where AMX tiles do them."""
        num_pairs = self.shape.kv_bytes / (2 * torch.bfloat16.itemsize)
        return num_pairs * self.multiply_adds / self.dot_gops / 1e3 or None

    @property
    def share_of_limit(self) -> float:
        """How much ours reaches of the lower limit, that of memory or that of arithmetic."""
        read_us = self.shape.kv_bytes / self.read_gbps / 1e3
        return max(read_us, self.arithmetic_limit_us or 0.0) / (self.ours_ms * 1e3)

    def gbps(self, ms: float) -> float:
        """The speed of reading K and V once in that time."""
        return self.shape.kv_bytes / ms / 1e6

    def share_of_read(self, ms: float) -> float:
        """How much of the limit that is."""
        return self.gbps(ms) / self.read_gbps

    @property
    def probe_at_fault(self) -> bool:
        """Nothing is faster than memory: the probe was disturbed."""
        return any(self.share_of_read(ms) > 1 for ms in (self.ours_ms, *self.peers_ms.values()))

    @property
    def ratio_to_fastest_peer(self) -> float | None:
        """How many times faster than the fastest peer; None without peers."""
        return min(self.peers_ms.values()) / self.ours_ms if self.peers_ms else None

    @property
    def ratio_to_transformers(self) -> float | None:
        """How many times faster than transformers as shipped; None where it did not take part."""
        return self.peers_ms["transformers"] / self.ours_ms if "transformers" in self.peers_ms else None

    def to_json(self) -> dict[str, object]:
        """The row with everything that follows from it."""
        return {
            **asdict(self),
            **asdict(self.shape),
            "shape": str(self.shape),
            "read_gbps": self.read_gbps,
            "ours_gbps": self.gbps(self.ours_ms),
            "share_of_read": self.share_of_read(self.ours_ms),
            "arithmetic_limit_us": self.arithmetic_limit_us,
            "share_of_limit": self.share_of_limit,
            "probe_at_fault": self.probe_at_fault,
            "ratio_to_fastest_peer": self.ratio_to_fastest_peer,
            "ratio_to_transformers": self.ratio_to_transformers,
        }


class Copies(NamedTuple):
    """One sequence of random K and V, many times over: for peers, for ours and for the probe.

    dense: bf16 `[num_copies, 2, 1, num_kv_heads, kv_len, head_dim]`. paged: the same values in panels, in pages at
    random slots. arena: the memory of all these pages, in one piece.
    """

    dense: Tensor
    paged: list[PagedKV]
    arena: Tensor


class Judge(NamedTuple):
    """What is right for the first and the last KV head, and how far from it bf16 may be.

    out: float64 `[2, group_size, head_dim]`. tolerance: twice the error of plain torch in bf16, and the last rounding.
    """

    out: Tensor
    tolerance: float

    def error(self, out: Tensor) -> float:
        """The largest deviation of an output whose order is head, dim; nan where these heads hold a NaN."""
        heads = out.reshape(-1, *self.out.shape[1:])[[0, -1]]
        return float((heads.double() - self.out).abs().max())


class Entrants(NamedTuple):
    """Who may be timed, what each got wrong, and who stays out with the reason."""

    calls: dict[str, Call]
    errors: dict[str, float]
    missing: dict[str, str]


@dataclass(frozen=True, eq=False)
class Contest:
    """Everything of one shape that does not depend on the number of threads."""

    shape: Shape
    rules: Rules
    problem: Problem
    copies: Copies
    judge: Judge

    def row(self, num_threads: int) -> Row:
        """Ours, peers and the probe in turn.

        Raises WrongResultError where our own output is wrong; a peer that is wrong, or cannot run, stays out.
        """
        pool = cpu.WorkerPool(num_threads)
        ours = _ours(self.problem, self.copies.paged, pool)
        torch.set_num_threads(num_threads)
        max_error = self.judge.error(ours())
        if not max_error <= self.judge.tolerance:
            raise WrongResultError(f"{self.shape}: off by {max_error:.1e}, tolerance {self.judge.tolerance:.1e}")
        peers = _admit(self.problem, self.judge, self.rules.peers)
        # The probe leaves the end of our arena in the cache, so the peers, who read other memory, run before ours.
        limits = {f"read {n}": _probe(n, self.copies.arena, self.rules.rotate_bytes) for n in PROBE_THREADS}
        calls = {name: in_ms(call) for name, call in (*peers.calls.items(), ("ours", ours))}
        limits["dot"] = lambda: probes.dot_gops(pool)
        # In one row memory was slower before ours than during it (a share of 1.04): once more after it, and the better.
        again = {AFTER_OURS: limits[f"read {PROBE_THREADS[-1]}"]}
        median = medians_in_turn(limits | calls | again, self.rules.budget_s)
        read_gbps = {n: median[f"read {n}"] for n in PROBE_THREADS}
        read_gbps[PROBE_THREADS[-1]] = max(read_gbps[PROBE_THREADS[-1]], median[AFTER_OURS])
        return Row(
            shape=self.shape,
            num_threads=num_threads,
            read_gbps_by_threads=read_gbps,
            dot_gops=median["dot"],
            multiply_adds=probes.multiply_adds(self.shape.group_size),
            ours_ms=median["ours"],
            max_error=max_error,
            peers_ms={name: median[name] for name in peers.calls},
            peers_max_error=peers.errors,
            peers_missing=peers.missing,
        )

    def peers_ms(self, num_threads: int) -> dict[str, float]:
        """The peers alone: for a process in which torch's threads spin, which would disturb ours."""
        torch.set_num_threads(num_threads)
        peers = _admit(self.problem, self.judge, self.rules.peers)
        return medians_in_turn({name: in_ms(call) for name, call in peers.calls.items()}, self.rules.budget_s)


def prepare(shape: Shape, rules: Rules) -> Contest:
    """Random q, K and V, always the same, laid out for everybody."""
    torch.set_num_threads(machine.default_threads())
    generator = torch.Generator().manual_seed(0)
    copies = _lay_out(shape, rules.rotate_bytes, generator)
    # Scores with a deviation of 2 let some 2 % of the tokens carry the weight: a flat softmax would hide errors.
    q = (2 * torch.randn((1, shape.num_q_heads, 1, shape.head_dim), generator=generator)).bfloat16()
    problem = Problem(q, copies.dense)
    return Contest(shape, rules, problem, copies, _appoint(problem))


def _lay_out(shape: Shape, rotate_bytes: int, generator: torch.Generator) -> Copies:
    num_copies, num_pages = math.ceil(rotate_bytes / shape.kv_bytes), shape.kv_len // PAGE_SIZE
    dense = _allocate(num_copies, 2, 1, shape.num_kv_heads, shape.kv_len, shape.head_dim)
    dense[0].normal_(generator=generator)
    dense[1:] = dense[0]

    layout, num_slots = PageLayout(torch.bfloat16, PAGE_SIZE, "panels"), num_copies * num_pages
    memory = _allocate(2, num_slots, shape.num_kv_heads, PAGE_SIZE, layout.stored_dim(shape.head_dim))
    arena = Arena(memory[0], memory[1], layout, shape.head_dim, shape.head_dim)
    slots = torch.randperm(num_slots, generator=generator).to(torch.int32).view(num_copies, num_pages)
    _pack(dense[0], arena, slots)
    start, end = torch.tensor([0]), torch.tensor([shape.kv_len])
    tables = (row.view(1, 1, num_pages).expand(1, shape.num_kv_heads, num_pages) for row in slots)
    return Copies(dense, [PagedKV(arena, table, start, end) for table in tables], memory)


def _allocate(*shape: int) -> Tensor:
    """In huge pages where the machine allows them, as our pools are: for peers too, so that kernels are compared."""
    memory = torch.empty(shape, dtype=torch.bfloat16)
    machine.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    return memory


def _pack(dense: Tensor, arena: Arena, slots: Tensor) -> None:
    """Write one sequence into the pages of every row of slots, 64 pages at a time."""
    k, v = dense
    rows = Arena.allocate(PageLayout(arena.k.dtype, PAGE_SIZE), 64, arena.num_kv_heads, arena.head_dim)
    pool = cpu.WorkerPool(machine.default_threads())
    for first in range(0, slots.shape[1], rows.num_slots):
        targets = slots[:, first : first + rows.num_slots]
        from_slots = list(range(targets.shape[1]))
        table = torch.tensor(from_slots, dtype=torch.int32).expand(1, arena.num_kv_heads, -1)
        tokens = slice(first * PAGE_SIZE, (first + len(from_slots)) * PAGE_SIZE)
        cpu.append(rows, table, 0, k[:, :, tokens], v[:, :, tokens], pool)
        for to_slots in targets.tolist():
            cpu.move_pages(rows, arena, from_slots, to_slots, pool)


def _appoint(problem: Problem) -> Judge:
    heads = [0, -1]
    k, v = problem.dense[0, :, 0, heads]
    q = problem.q_rows[0, heads]
    plain = torch.softmax((q @ k.mT) * problem.scale, -1) @ v
    right = torch.softmax((q.double() @ k.double().mT) * problem.scale, -1) @ v.double()
    rounding = torch.finfo(torch.bfloat16).eps * float(right.abs().max())
    return Judge(right, 2 * float((plain.double() - right).abs().max()) + rounding)


def _ours(problem: Problem, paged: list[PagedKV], pool: cpu.WorkerPool) -> Call:
    turns = cycle(paged)

    def call() -> Tensor:
        return kernels.attend(problem.q, next(turns), rule=ScoreRule(problem.scale), pool=pool).out

    return call


def _probe(num_threads: int, arena: Tensor, num_bytes: int) -> Callable[[], float]:
    pool, piece = cpu.WorkerPool(num_threads), arena.flatten()[: num_bytes // arena.itemsize]
    return lambda: probes.read_gbps(pool, piece)


def _admit(problem: Problem, judge: Judge, peers: Mapping[str, Callable[[Problem], Call]]) -> Entrants:
    entrants = Entrants({}, {}, {})
    for name, enter in peers.items():
        try:
            call = enter(problem)
        except PeerUnavailableError as reason:
            entrants.missing[name] = str(reason)
            continue
        error = judge.error(call())
        if error <= judge.tolerance:
            entrants.calls[name], entrants.errors[name] = call, error
        else:
            entrants.missing[name] = f"wrong result: off by {error:.1e}, tolerance {judge.tolerance:.1e}"
    return entrants
