"""The native CPU backend: doors that check tensors by hand and pass addresses to C++.

nanobind would copy a non-contiguous output and throw the result away, and a DLPack argument costs 5 us; so shapes,
dtypes and strides are checked here, before any pointer is used.
"""

from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tandemkv.errors import InputError, UnavailableError, UnsupportedError
from tandemkv.types import MAX_GROUP_SIZE, MAX_HEAD_DIM, Arena, PagedKV, Partial

try:
    from tandemkv import _native
except ImportError as error:  # doctor prints this reason
    raise UnavailableError(
        f"the native module is not there ({error}): install a wheel, or build with a C++ compiler"
    ) from error

WorkerPool = _native.WorkerPool
_DTYPES = {torch.float32: _native.DType.float32, torch.bfloat16: _native.DType.bfloat16}
_arenas: WeakKeyDictionary[Arena, _native.Arena] = WeakKeyDictionary()


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
    q: Tensor, kv: PagedKV, *, scale: float, causal: bool, pool: WorkerPool | None = None, isa: str | None = None
) -> Partial:
    """See `tandemkv.kernels.attend`."""
    _check_query(q, kv)
    q = q if q.stride(3) == 1 else q.contiguous()
    num_seqs, num_q_heads, q_len, head_dim = q.shape
    out = torch.empty((num_seqs, num_q_heads, q_len, head_dim), dtype=torch.float32)
    lse = torch.empty((num_seqs, num_q_heads, q_len), dtype=torch.float32)
    status = _native.attend(
        pool or single_thread(),
        resolve_isa(isa),
        q.data_ptr(),
        _DTYPES[q.dtype],
        (q.stride(0), q.stride(1), q.stride(2)),
        num_seqs,
        num_q_heads,
        q_len,
        _native_arena(kv.arena),
        kv.page_table.data_ptr(),
        (kv.page_table.stride(0), kv.page_table.stride(1)),
        kv.kv_start.data_ptr(),
        kv.kv_len.data_ptr(),
        scale,
        causal,
        out.data_ptr(),
        lse.data_ptr(),
    )
    _raise_for(status)
    return Partial(out, lse)


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
    if arena.layout.packing != "rows":
        raise InputError("tokens are appended to an arena of rows; panels are filled by move_pages")
    num_tokens = _check_rows(arena, page_table, begin, k, v)
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    status = _native.append(
        pool or single_thread(),
        _native_arena(arena),
        page_table.data_ptr(),
        (page_table.stride(0), page_table.stride(1)),
        k.shape[0],
        begin,
        begin + num_tokens,
        k.data_ptr(),
        v.data_ptr(),
        _byte_strides(k),
        _byte_strides(v),
    )
    _raise_for(status)


def gather(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: WorkerPool | None = None) -> None:
    """Read tokens `begin...` of the table, from rows or panels, into k and v (as in `append`, tokens contiguous)."""
    num_tokens = _check_rows(arena, page_table, begin, k, v)
    if any(x.stride(3) != 1 or (num_tokens > 1 and x.stride(2) != arena.head_dim) for x in (k, v)):
        raise InputError("gather writes into tensors whose tokens and head_dim are contiguous")
    status = _native.gather(
        pool or single_thread(),
        resolve_isa(),
        _native_arena(arena),
        page_table.data_ptr(),
        (page_table.stride(0), page_table.stride(1)),
        k.shape[0],
        begin,
        begin + num_tokens,
        k.data_ptr(),
        v.data_ptr(),
        _byte_strides(k),
        _byte_strides(v),
    )
    _raise_for(status)


def move_pages(
    source: Arena, target: Arena, source_slots: list[int], target_slots: list[int], pool: WorkerPool | None = None
) -> None:
    """See `tandemkv.kernels.move_pages`; both arenas in host memory."""
    if source.layout.packing != "rows" or len(source_slots) != len(target_slots):
        raise InputError("move_pages takes pages of rows and as many target slots as source slots")
    same = (source.layout.dtype, source.layout.page_size, source.num_kv_heads, source.head_dim)
    if same != (target.layout.dtype, target.layout.page_size, target.num_kv_heads, target.head_dim):
        raise InputError(f"arenas differ in more than packing: {source.layout} and {target.layout}")
    status = _native.move_pages(
        pool or single_thread(), resolve_isa(), _native_arena(source), _native_arena(target), source_slots, target_slots
    )
    _raise_for(status)


def read_gbps(pool: WorkerPool, buffer: Tensor) -> float:
    """Gigabytes (1e9) per second of plain loads over a tensor, best of three prefetch distances, one pass each."""
    offset = -buffer.data_ptr() % 64
    return _native.read_gbps(pool, resolve_isa(), buffer.data_ptr() + offset, buffer.nbytes - offset)


def _native_arena(arena: Arena) -> _native.Arena:
    native = _arenas.get(arena)
    if native is None:
        if arena.k.device.type != "cpu":
            raise InputError(f"the CPU kernel reads arenas in host memory, got {arena.k.device}")
        if not 2 <= arena.head_dim <= MAX_HEAD_DIM or arena.head_dim % 2:
            raise UnsupportedError(f"head_dim must be even and at most {MAX_HEAD_DIM}, got {arena.head_dim}")
        native = _native.Arena(
            arena.k.data_ptr(),
            arena.v.data_ptr(),
            _DTYPES[arena.layout.dtype],
            _native.Packing[arena.layout.packing],
            arena.num_slots,
            arena.num_kv_heads,
            arena.layout.page_size,
            arena.head_dim,
        )
        _arenas[arena] = native
    return native


def _check_query(q: Tensor, kv: PagedKV) -> None:
    arena = kv.arena
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
    _check_table(arena, kv.page_table, q.shape[0])
    for name, tensor in (("kv_start", kv.kv_start), ("kv_len", kv.kv_len)):
        good = tensor.dtype == torch.int64 and tensor.shape == (q.shape[0],) and tensor.device.type == "cpu"
        if not good or not tensor.is_contiguous():
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise InputError(f"{name} must be contiguous int64 [{q.shape[0]}] on the CPU, got {got}")
    capacity = kv.page_table.shape[2] * arena.layout.page_size
    if q.shape[0] and (int(kv.kv_len.max()) > capacity or int(kv.kv_start.min()) < 0):
        raise InputError(
            f"[kv_start, kv_len) must lie in [0, {capacity}) for a table of {kv.page_table.shape[2]} pages"
        )


def _check_table(arena: Arena, page_table: Tensor, num_seqs: int) -> None:
    good = page_table.dtype == torch.int32 and page_table.dim() == 3 and page_table.device.type == "cpu"
    if not good or page_table.shape[:2] != (num_seqs, arena.num_kv_heads):
        got = f"{page_table.dtype} {list(page_table.shape)} on {page_table.device}"
        raise InputError(
            f"page_table must be int32 [{num_seqs}, {arena.num_kv_heads}, num_pages] on the CPU, got {got}"
        )
    if page_table.stride(2) != 1 and page_table.shape[2] > 1:
        raise InputError("page_table must be contiguous along its pages")


def _check_rows(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor) -> int:
    if k.dim() != 4:
        raise InputError(f"expected k [num_seqs, num_kv_heads, num_tokens, head_dim], got {list(k.shape)}")
    expected = (k.shape[0], arena.num_kv_heads, k.shape[2], arena.head_dim)
    for name, x in (("k", k), ("v", v)):
        if x.shape != expected or x.dtype != arena.layout.dtype or x.device.type != "cpu":
            got = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise InputError(f"{name} must be {arena.layout.dtype} {list(expected)} on the CPU, got {got}")
    _check_table(arena, page_table, k.shape[0])
    end = begin + k.shape[2]
    if begin < 0 or end > page_table.shape[2] * arena.layout.page_size:
        raise InputError(f"tokens [{begin}, {end}) lie outside a table of {page_table.shape[2]} pages")
    return k.shape[2]


def _byte_strides(x: Tensor) -> tuple[int, int, int]:
    size = x.element_size()
    return x.stride(0) * size, x.stride(1) * size, x.stride(2) * size


def _raise_for(status: _native.Status) -> None:
    if status == _native.Status.nan_in_query:
        raise InputError("q contains NaN: a layer before this attention produced it")
    if status == _native.Status.slot_out_of_range:
        raise AssertionError("a page table entry in use points outside its arena")
