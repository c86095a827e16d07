"""The native CPU backend: doors that check tensors by hand and pass addresses to C++.

nanobind would copy a non-contiguous output and throw the result away, and a DLPack argument costs 5 us; so shapes,
dtypes and strides are checked here, before any pointer is used.
"""

from collections.abc import Sequence
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.errors import InputError, UnavailableError, UnsupportedError
from tandemkv.types import MAX_GROUP_SIZE, MAX_HEAD_DIM, Arena, PagedKV, Partial, ScoreRule

try:
    from tandemkv import _native
except ImportError as error:  # doctor prints this reason
    raise UnavailableError(
        f"the native module is not there ({error}): install a wheel, or build with a C++ compiler"
    ) from error

WorkerPool = _native.WorkerPool
_DTYPES = {torch.float32: _native.DType.float32, torch.bfloat16: _native.DType.bfloat16}
# What does not change between calls is checked and handed to C++ once, and kept beside its addresses and sizes: the key
# owns the tensors, but `resize_`, `set_` or `share_memory_` would move what they hold.
Addresses = tuple[int, ...]
_arenas: WeakKeyDictionary[Arena, tuple[Addresses, _native.Arena]] = WeakKeyDictionary()
_runs: WeakKeyDictionary[PagedKV, tuple[Addresses, _native.Run]] = WeakKeyDictionary()


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


def attend(
    q: Tensor,
    runs: Sequence[PagedKV],
    *,
    rule: ScoreRule,
    causal: bool,
    pool: WorkerPool | None = None,
    isa: str | None = None,
) -> Partial:
    """See `tandemkv.kernels.attend`."""
    _check_query(q, runs, rule)
    q = _dense(q)
    out = torch.empty(q.shape, dtype=torch.float32, device="cpu")  # whatever the default device is
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
    status = _native.attend(
        pool or single_thread(),
        resolve_isa(isa),
        [_native_run(kv) for kv in runs],
        _rows(q),
        rule.scale,
        causal,
        _rows(out),
        lse.data_ptr(),
    )
    _raise_for(status, runs)
    return Partial(out, lse)


def append_and_attend(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[PagedKV], *, rule: ScoreRule, pool: WorkerPool
) -> Tensor:
    """See `tandemkv.kernels.append_and_attend`."""
    _check_query(q, runs, rule)
    runs[-1].arena.check_tokens(q.shape[0], k, v)
    if k.shape[2] != q.shape[2]:
        raise InputError(f"q, k and v must be of the same tokens, got {q.shape[2]} of q and {k.shape[2]} of k")
    q, k, v = _dense(q), _dense(k), _dense(v)
    num_seqs, num_q_heads, q_len, head_dim = q.shape
    out = torch.empty((num_seqs, q_len, num_q_heads, head_dim), dtype=q.dtype, device="cpu")
    status = _native.append_and_attend(
        pool,
        resolve_isa(),
        [_native_run(kv) for kv in runs],
        _rows(q),
        _rows(k),
        _rows(v),
        rule.scale,
        _rows(out.transpose(1, 2)),
    )
    _raise_for(status, runs)
    return out


def merge(parts: list[Partial], pool: WorkerPool | None = None) -> Partial:
    """See `tandemkv.kernels.merge`."""
    parts = [Partial(part.out.contiguous(), part.lse.contiguous()) for part in parts]
    out, lse = torch.empty_like(parts[0].out), torch.empty_like(parts[0].lse)
    _native.merge(
        pool or single_thread(),
        [part.out.data_ptr() for part in parts],
        [part.lse.data_ptr() for part in parts],
        lse.numel(),
        out.shape[-1],
        out.data_ptr(),
        lse.data_ptr(),
    )
    return Partial(out, lse)


def append(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: WorkerPool | None = None) -> None:
    """See `tandemkv.kernels.append`."""
    _check_rows(arena, page_table, begin, k, v)
    k, v = _dense(k), _dense(v)
    table, strides = page_table.data_ptr(), (page_table.stride(0), page_table.stride(1))
    workers = pool or single_thread()
    _raise_for(_native.append(workers, resolve_isa(), _native_arena(arena), table, strides, begin, _rows(k), _rows(v)))


def gather(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: WorkerPool | None = None) -> None:
    """See `tandemkv.kernels.gather`; head_dim of k and v must be contiguous."""
    _check_rows(arena, page_table, begin, k, v)
    if k.stride(3) != 1 or v.stride(3) != 1 or k.is_neg() or v.is_neg():
        raise InputError("gather writes into tensors whose head_dim is contiguous")
    table, strides = page_table.data_ptr(), (page_table.stride(0), page_table.stride(1))
    workers = pool or single_thread()
    _raise_for(_native.gather(workers, resolve_isa(), _native_arena(arena), table, strides, begin, _rows(k), _rows(v)))


def move_pages(
    source: Arena, target: Arena, source_slots: list[int], target_slots: list[int], pool: WorkerPool | None = None
) -> None:
    """See `tandemkv.kernels.move_pages`; both arenas in host memory."""
    if len(source_slots) != len(target_slots):
        raise InputError(f"{len(source_slots)} source slots and {len(target_slots)} target slots: expected as many")
    if source.layout.packing not in ("rows", target.layout.packing):
        raise InputError(f"move_pages packs rows into panels, not {source.layout.packing} into {target.layout.packing}")
    same = (source.layout.dtype, source.layout.page_size, source.num_kv_heads, source.head_dim)
    if same != (target.layout.dtype, target.layout.page_size, target.num_kv_heads, target.head_dim):
        raise InputError(f"arenas differ in more than packing: {source.layout} and {target.layout}")
    status = _native.move_pages(
        pool or single_thread(), resolve_isa(), _native_arena(source), _native_arena(target), source_slots, target_slots
    )
    _raise_for(status)


def probe_buffer(num_bytes: int) -> Tensor:
    """Memory for `read_gbps`, as pools have it: in huge pages where allowed."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    machine.advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer.fill_(1)  # or every page would be the kernel's one page of zeros


def read_gbps(pool: WorkerPool, buffer: Tensor) -> float:
    """Gigabytes (1e9) per second of plain loads over a tensor, best of three prefetch distances, one pass each."""
    offset = -buffer.data_ptr() % 64
    return _native.read_gbps(pool, resolve_isa(), buffer.data_ptr() + offset, buffer.nbytes - offset)


def dot_gops(pool: WorkerPool, isa: str | None = None) -> float:
    """1e9 multiply-adds per second of the instruction that bf16 products use, from registers alone, on all threads.

    vdpbf16ps in avx512_bf16, bfdot in neon_bf16, else float32 multiply-adds. Best of a few passes of a millisecond.
    """
    return _native.dot_gops(pool, resolve_isa(isa))


def multiply_adds(group_size: int, isa: str | None = None) -> int:
    """Multiply-adds that attending to an element of K and one of V costs, in bf16 with one bf16 query per head.

    For each query head of the group one for q.k, and one for p.v, or two where p is a high and a low bf16 part.
    0 where AMX tiles do them, which `dot_gops` does not measure.
    """
    return _native.multiply_adds(resolve_isa(isa), group_size)


def _native_arena(arena: Arena) -> _native.Arena:
    addresses = arena.k.data_ptr(), arena.v.data_ptr()
    known = _arenas.get(arena)
    if known is not None and known[0] == addresses:
        return known[1]
    if arena.k.device.type != "cpu":
        raise InputError(f"the CPU kernel reads arenas in host memory, got {arena.k.device}")
    if not 2 <= arena.head_dim <= MAX_HEAD_DIM or arena.head_dim % 2:
        raise UnsupportedError(f"head_dim must be even and at most {MAX_HEAD_DIM}, got {arena.head_dim}")
    native = _native.Arena(
        *addresses,
        _DTYPES[arena.layout.dtype],
        _native.Packing[arena.layout.packing],
        arena.num_slots,
        arena.num_kv_heads,
        arena.layout.page_size,
        arena.head_dim,
    )
    _arenas[arena] = addresses, native
    return native


def _native_run(kv: PagedKV) -> _native.Run:
    arena, table = kv.arena, kv.page_table
    tensors = arena.k, arena.v, table, kv.kv_start, kv.kv_len
    addresses = *(tensor.data_ptr() for tensor in tensors), *table.shape, *kv.kv_start.shape, *kv.kv_len.shape
    known = _runs.get(kv)
    if known is not None and known[0] == addresses:
        return known[1]
    num_seqs = table.shape[0] if table.dim() else 0
    _check_table(arena, table, num_seqs)
    for name, tensor in (("kv_start", kv.kv_start), ("kv_len", kv.kv_len)):
        good = tensor.dtype == torch.int64 and tensor.shape == (num_seqs,) and tensor.device.type == "cpu"
        if not good or not tensor.is_contiguous():
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise InputError(f"{name} must be contiguous int64 [{num_seqs}] on the CPU, got {got}")
    strides = table.stride(0), table.stride(1)
    run = _native.Run(_native_arena(arena), addresses[2], strides, num_seqs, table.shape[2], *addresses[3:5])
    _runs[kv] = addresses, run
    return run


def _check_query(q: Tensor, runs: Sequence[PagedKV], rule: ScoreRule) -> None:
    if not runs:
        raise InputError("attend needs at least one run of tokens; an empty one gives the identity of merge")
    if not isinstance(q, Tensor) or not all(isinstance(kv, PagedKV) for kv in runs):
        raise InputError(f"expected a tensor q and runs of PagedKV, got {_types_of(q, *runs)}")
    if rule.softcap is not None or rule.window is not None:
        raise UnsupportedError("the CPU kernel has neither soft caps nor windows yet")
    if q.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError("no gradient flows through paged attention: use torch.no_grad()")
    arena = runs[0].arena
    if q.device.type != "cpu":
        raise InputError(f"the CPU kernel attends queries in host memory, got {q.device}")
    if q.dtype not in _DTYPES:
        raise UnsupportedError(
            f"queries must be float32 or bfloat16, got {q.dtype}: load the model with dtype=torch.bfloat16"
        )
    if q.dim() != 4 or q.shape[3] != arena.head_dim:
        raise InputError(f"expected q [num_seqs, num_q_heads, q_len, {arena.head_dim}], got {list(q.shape)}")
    if q.shape[2] < 1:
        raise InputError(f"q_len must be at least 1, got {list(q.shape)}")
    group_size, rest = divmod(q.shape[1], arena.num_kv_heads)
    if rest or not 1 <= group_size <= MAX_GROUP_SIZE:
        raise UnsupportedError(
            f"query heads must be 1 to {MAX_GROUP_SIZE} times the {arena.num_kv_heads} KV heads, got {q.shape[1]}"
        )
    for kv in runs:
        if kv.page_table.shape[:1] != q.shape[:1]:
            got = list(kv.page_table.shape)
            raise InputError(f"page_table must be [{q.shape[0]}, {arena.num_kv_heads}, num_pages] as q is, got {got}")
        if (kv.arena.head_dim, kv.arena.num_kv_heads) != (arena.head_dim, arena.num_kv_heads):
            raise InputError(
                f"runs must have one head_dim and as many KV heads, got {arena.k.shape[1:]} and {kv.arena.k.shape[1:]}"
            )


def _types_of(*values: object) -> str:
    return ", ".join(type(value).__name__ for value in values)


def _check_table(arena: Arena, page_table: Tensor, num_seqs: int) -> None:
    good = page_table.dtype == torch.int32 and page_table.dim() == 3 and page_table.device.type == "cpu"
    if not good or page_table.shape[:2] != (num_seqs, arena.num_kv_heads):
        got = f"{page_table.dtype} {list(page_table.shape)} on {page_table.device}"
        raise InputError(
            f"page_table must be int32 [{num_seqs}, {arena.num_kv_heads}, num_pages] on the CPU, got {got}"
        )
    if page_table.stride(2) != 1 and page_table.shape[2] > 1:
        raise InputError("page_table must be contiguous along its pages")


def _check_rows(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor) -> None:
    num_seqs = page_table.shape[0] if page_table.dim() == 3 else k.shape[0]
    arena.check_tokens(num_seqs, k, v)
    _check_table(arena, page_table, num_seqs)
    end = begin + k.shape[2]
    if begin < 0 or end > page_table.shape[2] * arena.layout.page_size:
        raise InputError(f"tokens [{begin}, {end}) lie outside a table of {page_table.shape[2]} pages")


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
    if status == _native.Status.slot_out_of_range:
        raise AssertionError("a page table entry in use points outside its arena")
    if status == _native.Status.outside_table:
        for kv in runs:
            num_pages = kv.page_table.shape[2]
            capacity = num_pages * kv.arena.layout.page_size
            if min(int(kv.kv_start.min()), int(kv.kv_len.min())) < 0 or int(kv.kv_len.max()) > capacity:
                got = f"got {kv.kv_start.tolist()} and {kv.kv_len.tolist()}"
                raise InputError(
                    f"[kv_start, kv_len) must lie in [0, {capacity}] for a table of {num_pages} pages, {got}"
                )
        raise InputError(
            "kv_len of the last run must be the same for all sequences, count the tokens that are appended and stay as "
            f"it is during the call, got {runs[-1].kv_len.tolist()}"
        )
    raise AssertionError(f"the kernel answered {status}")
