"""What is attended: shapes of models, and a pool of random numbers in which K and V of every case lie."""

import gc
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.ground import LARGE
from tandemkv.kernels import gpu
from tandemkv.kernels.gpu import Config
from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule

PAGE = 64
WRONG = 0.01
"""Of out against float64, relative: 16-bit K and V of the kernels here are off by 0.002 to 0.004."""
WRONG_LSE = 0.01

RowsOf = Callable[[int, int, int], tuple[Tensor, Tensor]]
"""K and V `[context, head_dim]` of a head, by the number of a place, a sequence and a KV head."""


class Form(NamedTuple):
    """A way to attend. call: what is timed. out_of: of what that gives, out `[batch, num_q_heads, head_dim]` and the
    natural log-sum-exp `[batch, num_q_heads]`, or None where it is computed and not checked. rows: what it attended."""

    call: Callable[[int], Any]
    out_of: Callable[[Any], tuple[Tensor, Tensor | None]]
    rows: RowsOf


class Model(NamedTuple):
    """A layer's heads."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128


MODELS = (
    Model("Llama-2-7B", 32, 32),
    Model("Llama-3-8B", 32, 8),
    Model("Qwen2.5-7B", 28, 4),
    Model("Qwen2.5-14B", 40, 8),
)


class Case(NamedTuple):
    """One decode step of one layer: a query token for each sequence of a batch."""

    model: Model
    context: int
    batch: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        context = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        return f"{self.model.name} {context} x {self.batch}"

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.model.num_q_heads // self.model.num_kv_heads

    @property
    def num_pages(self) -> int:
        """Of a sequence."""
        return -(-self.context // PAGE)

    @property
    def kv_bytes(self) -> int:
        """K and V, once."""
        return 2 * self.batch * self.model.num_kv_heads * self.context * self.model.head_dim * self.dtype.itemsize

    @property
    def numbers(self) -> int:
        """That K takes in the pool, and V: whole pages."""
        return self.batch * self.model.num_kv_heads * self.num_pages * PAGE * self.model.head_dim

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.model.head_dim**-0.5)

    def to_row(self) -> dict[str, object]:
        """The first columns of a row."""
        heads = {"num_q_heads": self.model.num_q_heads, "num_kv_heads": self.model.num_kv_heads}
        shape = {"head_dim": self.model.head_dim, "context": self.context, "batch": self.batch}
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.model.name, **heads, **shape, "dtype": dtype, "kv_bytes": self.kv_bytes}


def places_for(num_bytes: int, l2_bytes: int) -> int:
    """Of what a call reads: so many that one is read again only when twice `LARGE` times L2 were read since."""
    return max(2, math.ceil(2 * LARGE * l2_bytes / num_bytes))


class Pool:
    """Random numbers for K and for V. A case lies at several places of it, as pages or dense: what it holds makes no
    difference to how long reading takes, and to what is right only as far as a judge reads the same."""

    def __init__(self, device: torch.device, dtype: torch.dtype, num_bytes: int) -> None:
        numbers = num_bytes // 2 // dtype.itemsize
        self.device, self.dtype = device, dtype
        self.k, self.v = (torch.empty(numbers, dtype=dtype, device=device).normal_() for _ in range(2))

    def fits(self, case: Case) -> bool:
        """Whether it lies in here even once."""
        return case.numbers <= self.k.numel()

    def places(self, case: Case, l2_bytes: int) -> list[int]:
        """Where it begins: at `places_for` its bytes, or fewer where there is no room for more."""
        num_places = min(places_for(case.kv_bytes, l2_bytes), self.k.numel() // case.numbers)
        return [case.numbers * i for i in range(max(1, num_places))]

    def dense(self, case: Case, place: int, tokens_first: bool = False) -> tuple[Tensor, Tensor]:
        """K and V `[batch, num_kv_heads, context, head_dim]`, contiguous; tokens_first: `[batch, context, ...]`."""
        model, size = case.model, case.kv_bytes // 2 // case.dtype.itemsize
        order = (case.context, model.num_kv_heads) if tokens_first else (model.num_kv_heads, case.context)
        k, v = (x[place : place + size].view(case.batch, *order, model.head_dim) for x in (self.k, self.v))
        return k, v

    def paged(self, case: Case, place: int) -> PagedKV:
        """Pages in an order of no sense, as a long-lived pool has them; tables lie on the device."""
        model, num_slots = case.model, case.batch * case.num_pages
        k, v = (
            x[place : place + case.numbers].view(num_slots, model.num_kv_heads, PAGE, model.head_dim)
            for x in (self.k, self.v)
        )
        arena = Arena(k, v, PageLayout(self.dtype, PAGE), model.head_dim, model.head_dim)
        return shuffled(arena, case)


def shuffled(arena: Arena, case: Case, first_slot: int = 0) -> PagedKV:
    """A case's pages from such a slot on, in an order of no sense; tables on the arena's device."""
    device, num_slots = arena.k.device, case.batch * case.num_pages
    slots = first_slot + torch.randperm(num_slots, device=device).int().view(case.batch, 1, case.num_pages)
    starts = torch.zeros(case.batch, dtype=torch.int64, device=device)
    table = slots.expand(-1, case.model.num_kv_heads, -1).contiguous()
    return PagedKV(arena, table, starts, torch.full_like(starts, case.context))


class Pools:
    """The one pool that is held at a time."""

    def __init__(self, device: torch.device, num_bytes: Callable[[], int]) -> None:
        self._device, self._num_bytes = device, num_bytes
        self._pool: Pool | None = None

    def of(self, dtype: torch.dtype, share: float) -> Pool:
        """Of such a share of the memory that is free without it."""
        self._pool = Pool(self._device, dtype, int(share * self.free_bytes()))
        return self._pool

    def free_bytes(self) -> int:
        """Of memory, once no pool is held."""
        self.release()
        return self._num_bytes()

    def release(self) -> None:
        """Its memory is free again."""
        self._pool = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class Question:
    """A case's query over K and V that lie at so many places, and what is right. Scores deviate by 2, so that some 2 %
    of the tokens carry the weight: a flat softmax would hide errors."""

    def __init__(self, case: Case, device: torch.device, num_places: int) -> None:
        self.case, self.device, self.num_places = case, device, num_places
        shape = (case.batch, case.model.num_q_heads, 1, case.model.head_dim)
        self.q = (2 * torch.randn(shape, device=device)).to(case.dtype)

    @property
    def q_rows(self) -> Tensor:
        """With the heads of a group as rows: `[batch, num_kv_heads, group_size, head_dim]`."""
        return self.q.view(self.case.batch, self.case.model.num_kv_heads, self.case.group_size, -1)

    def over(self, runs: Sequence[PagedKV], rows: RowsOf, config: Config | None = None) -> Form:
        """The decode kernel over a run for each place, its merge included."""
        rule, flags = ScoreRule(self.case.scale), torch.zeros(1, dtype=torch.int32, device=self.device)

        def call(turn: int) -> Partial:
            return gpu.attend(self.q, runs[turn % len(runs)], rule=rule, flags=flags, config=config)

        return Form(call, lambda part: (part.out[:, :, 0], part.lse[:, :, 0]), rows)

    def check(self, form: Form) -> tuple[float, str]:
        """Its error at the first place and at the last, and what is wrong with it, or ''."""
        worst, wrong = 0.0, ""
        for place in sorted({0, self.num_places - 1}):
            out, lse = form.out_of(form.call(place))
            error, why = self._judge(out, lse, partial(form.rows, place))
            worst, wrong = max(worst, error), wrong or why
        return worst, wrong

    def _judge(
        self, out: Tensor, lse: Tensor | None, rows: Callable[[int, int], tuple[Tensor, Tensor]]
    ) -> tuple[float, str]:
        """Of a few sequences and heads against float64; NaN is wrong."""
        case, worst, worst_lse = self.case, 0.0, 0.0
        batch, heads = case.batch, case.model.num_kv_heads
        for seq, head in {(0, 0), (batch // 2, heads // 2), (batch - 1, heads - 1)}:
            k, v = (x.double() for x in rows(seq, head))
            scores = case.scale * (self.q_rows[seq, head].double() @ k.mT)
            truth = torch.softmax(scores, -1) @ v
            group = slice(head * case.group_size, (head + 1) * case.group_size)
            worst = max(worst, _or_inf((out[seq, group].double() - truth).norm() / truth.norm()))
            if lse is not None:
                off = lse[seq, group].double() - torch.logsumexp(scores, -1)
                worst_lse = max(worst_lse, _or_inf(off.abs().max()))
        if worst >= WRONG:
            return worst, f"wrong: out is off by {worst:.2g}, {WRONG} allowed"
        return worst, f"wrong: lse is off by {worst_lse:.2g}, {WRONG_LSE} allowed" if worst_lse >= WRONG_LSE else ""


class Problem(Question):
    """A case in a pool."""

    def __init__(self, case: Case, pool: Pool, l2_bytes: int) -> None:
        self.pool, self.places = pool, pool.places(case, l2_bytes)
        super().__init__(case, pool.device, len(self.places))

    @cached_property
    def dense(self) -> list[tuple[Tensor, Tensor]]:
        """K and V at every place."""
        return [self.pool.dense(self.case, place) for place in self.places]

    @cached_property
    def tokens_first(self) -> list[tuple[Tensor, Tensor]]:
        """The same memory as `[batch, context, num_kv_heads, head_dim]`."""
        return [self.pool.dense(self.case, place, tokens_first=True) for place in self.places]

    @cached_property
    def runs(self) -> list[PagedKV]:
        """The same memory as pages."""
        return [self.pool.paged(self.case, place) for place in self.places]

    def of_dense(self, place: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
        """`RowsOf` dense."""
        k, v = self.dense[place]
        return k[seq, head], v[seq, head]

    def of_tokens_first(self, place: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
        """`RowsOf` tokens_first."""
        k, v = self.tokens_first[place]
        return k[seq, :, head], v[seq, :, head]

    def of_runs(self, place: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
        """`RowsOf` runs."""
        run = self.runs[place]
        assert isinstance(run.arena, Arena)
        slots = run.page_table[seq, head].long()
        k, v = (x[slots, head].flatten(0, 1)[: self.case.context] for x in (run.arena.k, run.arena.v))
        return k, v

    def ours(self, config: Config | None = None) -> Form:
        """The decode kernel over pages."""
        return self.over(self.runs, self.of_runs, config)


def _or_inf(error: Tensor) -> float:
    return math.inf if bool(error.isnan()) else float(error)
