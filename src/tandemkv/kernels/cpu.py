"""The native CPU backend: doors that check tensors by hand and pass addresses to C++.

nanobind would copy a non-contiguous output and throw the result away, and a DLPack argument costs 5 us; so shapes,
dtypes and strides are checked here, before any pointer is used.
"""

from collections.abc import Sequence
from functools import cache
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandemkv.errors import InputError, UnavailableError, UnsupportedError
from tandemkv.kernels.checks import (
    check_lengths,
    check_mass,
    check_query,
    check_rule,
    check_table,
    check_tokens,
    types_of,
)
from tandemkv.types import AnyArena, Arena, Arenas, PagedKV, Partial, ScoreRule

try:
    from tandemkv import _native
except ImportError as error:  # doctor prints this reason
    raise UnavailableError(
        f"the native module is not there ({error}): install a wheel, or build with a C++ compiler"
    ) from error

T = TypeVar("T")

native = _native
Bell = _native.Bell
Driver = _native.Driver
Job = _native.Job
WorkerPool = _native.WorkerPool
_DTYPES = {
    torch.float32: _native.DType.float32,
    torch.bfloat16: _native.DType.bfloat16,
    torch.float16: _native.DType.float16,
}
# What does not change between calls is checked and handed to C++ once, and kept beside its addresses and sizes: the key
# owns the tensors, but `resize_`, `set_` or `share_memory_` would move what they hold.
_arenas: WeakKeyDictionary[AnyArena, tuple[tuple[int, ...], _native.Arenas]] = WeakKeyDictionary()
_runs: WeakKeyDictionary[PagedKV, tuple[tuple[object, ...], _native.Run]] = WeakKeyDictionary()


@cache
def available_isas() -> dict[str, str]:
    """Instruction sets this module was compiled for, fastest first -> '' or what this machine lacks."""
    return dict(_native.isas())


def resolve_isa(name: str | None = None) -> str:
    """The named instruction set, or the fastest one; an error that lists them where this machine lacks it."""
    isas = available_isas()
    if name is None:
        return next(isa for isa, missing in isas.items() if not missing)
    if isas.get(name, "unknown") != "":
        reasons = ", ".join(
            f"{isa} ({'lacks ' + missing if missing else 'available'})" for isa, missing in isas.items()
        )
        raise UnavailableError(f"instruction set {name!r} is not available: {reasons}")
    return name


@cache
def single_thread() -> WorkerPool:
    """A pool of the calling thread alone."""
    return WorkerPool(1)


class Call(NamedTuple, Generic[T]):
    """A call of the kernel that was checked and not made yet; whoever makes it holds it, and with it what is read."""

    native: _native.Call
    runs: Sequence[PagedKV]
    value: T  # when it was made
    held: tuple[object, ...]

    def make(self) -> T:
        """Here and now."""
        return self.result(self.native.make())

    def result(self, status: _native.Status) -> T:
        """Of a call that somebody else has made, which ended so."""
        _raise_for(status, self.runs)
        return self.value


def prepare_attend(
    q: Tensor,
    runs: Sequence[PagedKV],
    *,
    rule: ScoreRule,
    causal: bool,
    mass: Tensor | None = None,
    pool: WorkerPool | None = None,
    isa: str | None = None,
) -> Call[Partial]:
    """See `tandemkv.kernels.attend`."""
    if not isinstance(causal, bool):
        raise InputError(f"causal must be True or False, got {causal!r}")
    pool, known = _pool(pool), _checked(q, runs, rule, causal, isa)
    q = _dense(q) if known.copies else q
    out = q.new_empty((*q.shape[:3], runs[0].arena.v_head_dim), dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    addresses = q.data_ptr(), out.data_ptr(), lse.data_ptr()
    call = _native.attend(pool, known.native, *addresses, *_mass(mass, q, runs))
    return Call(call, runs, Partial(out, lse), (pool, q, mass))


class _Checked(NamedTuple):
    """What was checked of a call; the next step of decoding differs from it in addresses alone. Checking everything in
    every step was half of a call's Python. copies: the query does not lie as C++ reads it."""

    layout: tuple[object, ...]
    native: _native.PreparedAttend
    copies: bool


_attends: WeakKeyDictionary[PagedKV, _Checked] = WeakKeyDictionary()


def _checked(q: Tensor, runs: Sequence[PagedKV], rule: ScoreRule, causal: bool, isa: str | None) -> _Checked:
    """The last call over these runs, where all that is checked is the same; else everything is checked."""
    layout: tuple[object, ...] = ()
    if runs and type(q) is Tensor and all(type(kv) is PagedKV for kv in runs):
        layout = *_layout(q), rule, causal, isa, torch.is_grad_enabled(), *[_run_layout(kv) for kv in runs]
        known = _attends.get(runs[0])
        if known is not None and known.layout == layout:
            return known
    check_query(q, runs, causal, "cpu")
    native_rule, dense_q = _native_rule(rule, causal, len(runs)), _dense(q)
    native_runs = [_native_run(kv) for kv in runs]
    native = _native.PreparedAttend(resolve_isa(isa), native_runs, _rows(dense_q), native_rule, causal)
    checked = _attends[runs[0]] = _Checked(layout, native, dense_q is not q)
    return checked


def prepare_logits(
    q: Tensor, kv: PagedKV, *, rule: ScoreRule, pool: WorkerPool | None = None, isa: str | None = None
) -> Call[Tensor]:
    """See `tandemkv.kernels.logits`."""
    check_query(q, [kv], False, "cpu")
    if isinstance(rule, ScoreRule) and rule.window is not None:
        raise InputError(f"logits are scores of all tokens of the run: expected a rule without a window, got {rule}")
    native_rule = _native_rule(rule, False, 1)
    q, run = _dense(q), _native_run(kv)
    found = torch.empty((*q.shape[:3], _table_tokens(kv)), dtype=torch.float32, device="cpu")
    pool = _pool(pool)
    call = _native.logits(pool, resolve_isa(isa), run, _rows(q), native_rule, found.data_ptr())
    return Call(call, [kv], found, (pool, q))


def weigh(logits: Tensor, kv: PagedKV, *, pool: WorkerPool | None = None, isa: str | None = None) -> Partial:
    """See `tandemkv.kernels.weigh`."""
    _check_logits(logits, kv)
    logits = logits.resolve_neg()
    run = _native_run(kv)
    out = torch.empty((*logits.shape[:3], kv.arena.v_head_dim), dtype=torch.float32, device="cpu")
    lse = torch.empty(logits.shape[:3], dtype=torch.float32, device="cpu")
    to = _native.Output(_rows(out), lse.data_ptr(), 0, 0)
    _raise_for(_native.weigh(_pool(pool), resolve_isa(isa), run, _rows(logits), to), [kv])
    return Partial(out, lse)


def _table_tokens(kv: PagedKV) -> int:
    return kv.page_table.shape[2] * kv.entry_tokens


def _check_logits(logits: Tensor, kv: PagedKV) -> None:
    if not isinstance(logits, Tensor) or not isinstance(kv, PagedKV):
        raise InputError(f"expected a tensor logits and a PagedKV, got {types_of(logits, kv)}")
    if logits.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("no gradient flows through paged attention: use torch.no_grad()")
    num_seqs, num_kv_heads = kv.page_table.shape[0] if kv.page_table.dim() else 0, kv.arena.num_kv_heads
    check_table(kv.arena, kv.page_table, num_seqs)
    ends = num_seqs, _table_tokens(kv)
    good = logits.dtype == torch.float32 and logits.dim() == 4 and logits.shape[::3] == ends
    if not good or logits.device.type != "cpu" or not logits.is_contiguous():
        got = f"{logits.dtype} {list(logits.shape)} on {logits.device}"
        expected = f"[{ends[0]}, num_q_heads, q_len, {ends[1]}]"
        raise InputError(f"logits must be contiguous float32 {expected} on the CPU, got {got}")
    num_q_heads, q_len = logits.shape[1:3]
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads or q_len < 1:
        raise InputError(
            f"query heads must be a multiple of the {num_kv_heads} KV heads, and q_len at least 1, got {num_q_heads} "
            f"and {q_len}"
        )


def append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Sequence[PagedKV],
    *,
    rule: ScoreRule,
    pool: WorkerPool,
    sink_logit: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """See `tandemkv.kernels.append_and_attend`; sink_logit is checked there."""
    call = _prepared(q, k, v, runs, rule)
    if call.copies:
        q, k, v = _dense(q), _dense(k), _dense(v)
    sink_logit = None if sink_logit is None else sink_logit.contiguous()
    num_seqs, num_q_heads, q_len, _ = q.shape
    out = torch.empty((num_seqs, q_len, num_q_heads, runs[-1].arena.v_head_dim), dtype=q.dtype, device="cpu")
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), _address(sink_logit)
    _raise_for(_native.append_and_attend(_pool(pool), call.native, *addresses, *_mass(mass, q, runs)), runs)
    return out


class _Call(NamedTuple):
    """A call that was checked. The next step of decoding differs from it in four addresses: checking every step took a
    third of the Python of a layer. copies: some operand does not lie as C++ reads it."""

    layout: tuple[object, ...]
    native: _native.PreparedCall
    copies: bool


_calls: WeakKeyDictionary[PagedKV, _Call] = WeakKeyDictionary()


def _prepared(q: Tensor, k: Tensor, v: Tensor, runs: Sequence[PagedKV], rule: ScoreRule) -> _Call:
    """The last call that appended to this run, where all that is checked is the same; else everything is checked."""
    layout: tuple[object, ...] = ()
    if runs and type(q) is type(k) is type(v) is Tensor and all(type(kv) is PagedKV for kv in runs):
        tensors = *_layout(q), *_layout(k), *_layout(v)
        layout = *tensors, rule, torch.is_grad_enabled(), *[_run_layout(kv) for kv in runs]
        known = _calls.get(runs[-1])
        if known is not None and known.layout == layout:
            return known
    check_query(q, runs, True, "cpu")
    native_rule = _native_rule(rule, True, len(runs))
    runs[-1].arena.check_tokens(q.shape[0], k, v)
    _refuse_codes(runs[-1].arena)
    if k.shape[2] != q.shape[2]:
        raise InputError(f"q, k and v must be of the same tokens, got {q.shape[2]} of q and {k.shape[2]} of k")
    dense_q, dense_k, dense_v = (_dense(x) for x in (q, k, v))
    rows = _rows(dense_q), _rows(dense_k), _rows(dense_v)
    native = _native.PreparedCall(resolve_isa(), [_native_run(kv) for kv in runs], *rows, native_rule)
    call = _Call(layout, native, dense_q is not q or dense_k is not k or dense_v is not v)
    _calls[runs[-1]] = call
    return call


def _layout(x: Tensor) -> tuple[object, ...]:
    return x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.requires_grad


def merge(parts: Sequence[Partial], pool: WorkerPool | None = None, sink_logit: Tensor | None = None) -> Partial:
    """See `tandemkv.kernels.merge`; parts and sink_logit are checked there."""
    parts = [Partial(part.out.contiguous(), part.lse.contiguous()) for part in parts]
    sink_logit = None if sink_logit is None else sink_logit.contiguous()
    out, lse = torch.empty_like(parts[0].out), torch.empty_like(parts[0].lse)
    _native.merge(
        _pool(pool),
        [part.out.data_ptr() for part in parts],
        [part.lse.data_ptr() for part in parts],
        out.shape,
        _address(sink_logit),
        out.data_ptr(),
        lse.data_ptr(),
    )
    return Partial(out, lse)


def append(
    arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: WorkerPool | None = None
) -> None:
    """See `tandemkv.kernels.append`."""
    check_tokens(arena, page_table, begin, k, v)
    _refuse_codes(arena)
    k, v = _dense(k), _dense(v)
    _raise_for(_native.append(_pool(pool), resolve_isa(), *_native_tokens(arena, page_table, begin, k, v)))


def gather(
    arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: WorkerPool | None = None
) -> None:
    """See `tandemkv.kernels.gather`; head_dim of k and v must be contiguous."""
    check_tokens(arena, page_table, begin, k, v)
    if k.stride(3) != 1 or v.stride(3) != 1 or k.is_neg() or v.is_neg():
        raise InputError("gather writes into tensors whose head_dim is contiguous")
    _raise_for(_native.gather(_pool(pool), resolve_isa(), *_native_tokens(arena, page_table, begin, k, v)))


def move_pages(
    source: AnyArena,
    target: AnyArena,
    source_slots: list[int],
    target_slots: list[int],
    pool: WorkerPool | None = None,
    channel_weights: Tensor | None = None,
) -> dict[int, int]:
    """See `tandemkv.kernels.move_pages`; both arenas in host memory."""
    _check_arenas(source, target)
    for slots in (source_slots, target_slots):
        if not isinstance(slots, list) or not all(isinstance(slot, int) for slot in slots):
            raise InputError(f"slots must be a list of whole numbers, got {slots!r}")
    if len(source_slots) != len(target_slots):
        raise InputError(f"{len(source_slots)} source slots and {len(target_slots)} target slots: expected as many")
    packings = [{part.layout.packing for part in arena.parts} for arena in (source, target)]
    if packings != [{"rows"}, {"rows"}] and "rows" in packings[1]:
        raise InputError(f"move_pages packs, and does not unpack: got {sorted(packings[0])} into {sorted(packings[1])}")
    shapes = [
        (arena.layout.dtype, arena.layout.page_size, arena.num_kv_heads, arena.head_dim, arena.v_head_dim)
        for arena in (source, target)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(f"arenas differ in more than packing: {shapes[0]} and {shapes[1]}")
    _check_disjoint(source, target, source_slots, target_slots)
    weights = _channel_weights(channel_weights, (len(source_slots), source.num_kv_heads, source.head_dim))
    arenas = native_arena(source), native_arena(target)
    status, pages, tokens = _native.move_pages(
        _pool(pool), resolve_isa(), *arenas, source_slots, target_slots, _address(weights)
    )
    _raise_for(status)
    return dict(zip(pages, tokens, strict=True))


def _channel_weights(weights: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != shape or weights.dtype != torch.float32:
        got = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else types_of(weights)
        raise InputError(f"channel_weights must be float32 {list(shape)}, got {got}")
    return weights.cpu().contiguous()


def native_arena(arena: AnyArena) -> _native.Arenas:
    """The view that C++ takes, of an arena that the caller holds; made once."""
    addresses = _addresses(arena)
    known = _arenas.get(arena)
    if known is not None and known[0] == addresses:
        return known[1]
    native = _native.Arenas([_native_part(part) for part in arena.parts])
    _arenas[arena] = addresses, native
    return native


def _native_part(arena: Arena) -> _native.Arena:
    if arena.k.device.type != "cpu":
        raise InputError(f"the CPU kernel reads arenas in host memory, got {arena.k.device}")
    layout = arena.layout
    layout.check_dims(arena.head_dim, arena.v_head_dim)
    return _native.Arena(
        arena.k.data_ptr(),
        arena.v.data_ptr(),
        _DTYPES[layout.dtype],
        _native.Packing[layout.packing],
        arena.num_slots,
        arena.num_kv_heads,
        layout.page_size,
        arena.head_dim,
        arena.v_head_dim,
        layout.num_channels or 0,
    )


def _addresses(arena: AnyArena) -> tuple[int, ...]:
    if type(arena) is Arena:
        return arena.k.data_ptr(), arena.v.data_ptr()
    return tuple(x.data_ptr() for part in arena.parts for x in (part.k, part.v))


def _run_layout(kv: PagedKV) -> tuple[object, ...]:
    """Spelled out, because a loop over the tensors takes twice as long."""
    arena, table, kv_start, kv_len = kv.arena, kv.page_table, kv.kv_start, kv.kv_len
    addresses = *_addresses(arena), table.data_ptr(), kv_start.data_ptr(), kv_len.data_ptr()
    sizes = arena.k.shape, arena.head_dim, arena.v_head_dim, table.shape, kv_start.shape, kv_len.shape
    dtypes = arena.layout, table.dtype, kv_start.dtype, kv_len.dtype
    counts = None if kv.log_counts is None else (kv.log_counts.data_ptr(), *_layout(kv.log_counts))
    return addresses, sizes, table.stride(), dtypes, kv.of_blocks, counts


def _native_run(kv: PagedKV) -> _native.Run:
    layout = _run_layout(kv)
    known = _runs.get(kv)
    if known is not None and known[0] == layout:
        return known[1]
    arena, table = kv.arena, kv.page_table
    num_seqs = table.shape[0] if table.dim() else 0
    check_table(arena, table, num_seqs)
    check_lengths(kv, num_seqs)
    strides, at = (table.stride(0), table.stride(1)), (kv.kv_start.data_ptr(), kv.kv_len.data_ptr())
    table_of = table.data_ptr(), strides, num_seqs, table.shape[2]
    run = _native.Run(native_arena(arena), *table_of, *at, kv.of_blocks, _log_counts(kv))
    _runs[kv] = layout, run
    return run


def _log_counts(kv: PagedKV) -> int:
    """Address, or 0 for none."""
    counts, table = kv.log_counts, kv.page_table
    if counts is None:
        return 0
    expected = (*table.shape[:2], table.shape[2] * kv.entry_tokens)
    good = counts.dtype == torch.float32 and counts.shape == expected
    if not good or not counts.is_contiguous() or counts.device.type != "cpu":
        got = f"{counts.dtype} {list(counts.shape)}"
        raise InputError(f"log_counts must be contiguous float32 {list(expected)} on the CPU, got {got}")
    return counts.data_ptr()


def _native_rule(rule: ScoreRule, causal: bool, num_runs: int) -> _native.ScoreRule:
    check_rule(rule, causal, num_runs)
    # No table has 2^62 tokens, and C++ counts in 64 bits.
    return _native.ScoreRule(rule.scale, rule.softcap, None if rule.window is None else min(rule.window, 2**62))


def _check_arenas(*arenas: AnyArena) -> None:
    if not all(isinstance(arena, Arena | Arenas) for arena in arenas):
        raise InputError(f"pages lie in an Arena, got {types_of(*arenas)}")


def _refuse_codes(arena: AnyArena) -> None:
    if any(part.layout.is_quantised for part in arena.parts):
        raise InputError("quantised pages are filled whole: append to rows or panels, and move_pages")


def _check_disjoint(source: AnyArena, target: AnyArena, source_slots: list[int], target_slots: list[int]) -> None:
    """Pages are copied by several threads, in no order."""
    targets = set(target_slots)
    if len(targets) < len(target_slots):
        raise InputError(f"a page can be written once by a move, got target slots {target_slots}")
    if _addresses(source) == _addresses(target) and not targets.isdisjoint(source_slots):
        both = sorted(targets & set(source_slots))
        raise InputError(
            f"inside one arena a slot is either read or written by a move, got {both} as source and target"
        )


_NativeTokens = tuple[_native.Arenas, int, tuple[int, int], int, _native.Rows, _native.Rows]


def _native_tokens(arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor) -> _NativeTokens:
    """Rows of tokens, and where they lie in pages; the caller holds the tensors until the call returns."""
    strides = page_table.stride(0), page_table.stride(1)
    return native_arena(arena), page_table.data_ptr(), strides, begin, _rows(k), _rows(v)


def _mass(mass: Tensor | None, q: Tensor, runs: Sequence[PagedKV]) -> tuple[int, int]:
    """Address and blocks of what is to be filled; none is (0, 0)."""
    if mass is None:
        return 0, 0
    check_mass(mass, q, runs)
    return mass.data_ptr(), mass.shape[3]


def _pool(pool: WorkerPool | None) -> WorkerPool:
    if pool is None:
        return single_thread()
    if not isinstance(pool, WorkerPool):
        raise InputError(f"pool must be a WorkerPool, such as WorkerPool(2), or None, got {pool!r}")
    return pool


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor) -> _native.Rows:
    """The view that C++ takes, of a tensor that the caller holds until the call returns."""
    return _native.Rows(x.data_ptr(), _DTYPES[x.dtype], x.shape, x.stride())


def _dense(x: Tensor) -> Tensor:
    """head_dim contiguous, and the numbers as they lie in memory (a negative view holds the others)."""
    x = x.resolve_neg() if x.is_neg() else x
    return x if x.stride(3) == 1 else x.contiguous()


def _raise_for(status: _native.Status, runs: Sequence[PagedKV] = ()) -> None:
    if status == _native.Status.ok:
        return
    if status == _native.Status.nan_in_query:
        raise InputError("q contains NaN: a layer before this attention produced it")
    if status == _native.Status.out_of_memory:
        raise MemoryError("no memory for what the kernel keeps while it attends")
    if status == _native.Status.slot_out_of_range:
        raise AssertionError("a page table entry in use points outside its arena")
    if status == _native.Status.outside_table:
        for kv in runs:
            num_pages = kv.page_table.shape[2]
            capacity, kind = num_pages * kv.entry_tokens, "blocks" if kv.of_blocks else "pages"
            if min(int(kv.kv_start.min()), int(kv.kv_len.min())) < 0 or int(kv.kv_len.max()) > capacity:
                got = f"got {kv.kv_start.tolist()} and {kv.kv_len.tolist()}"
                raise InputError(
                    f"[kv_start, kv_len) must lie in [0, {capacity}] for a table of {num_pages} {kind}, {got}"
                )
        raise InputError(
            "kv_len of the last run must be the same for all sequences, count the tokens that are appended and stay as "
            f"it is during the call, got {runs[-1].kv_len.tolist()}"
        )
    raise AssertionError(f"the kernel answered {status}")
