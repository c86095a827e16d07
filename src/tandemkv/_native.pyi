from collections.abc import Sequence
from enum import Enum

class DType(Enum):
    float32 = 0
    bfloat16 = 1

class Packing(Enum):
    rows = 0
    panels = 1

class Status(Enum):
    ok = 0
    nan_in_query = 1
    slot_out_of_range = 2

class WorkerPool:
    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

class Arena:
    def __init__(
        self,
        k: int,
        v: int,
        dtype: DType,
        packing: Packing,
        num_slots: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
    ) -> None: ...

def isas() -> list[tuple[str, str]]: ...
def attend(
    pool: WorkerPool,
    isa: str,
    q: int,
    q_dtype: DType,
    q_strides: tuple[int, int, int],
    num_seqs: int,
    num_q_heads: int,
    q_len: int,
    arena: Arena,
    table: int,
    table_strides: tuple[int, int],
    kv_start: int,
    kv_len: int,
    scale: float,
    causal: bool,
    out: int,
    lse: int,
) -> Status: ...
def merge(
    pool: WorkerPool, outs: Sequence[int], lses: Sequence[int], num_rows: int, dim: int, out: int, lse: int
) -> None: ...
def append(
    pool: WorkerPool,
    arena: Arena,
    table: int,
    table_strides: tuple[int, int],
    num_seqs: int,
    begin: int,
    end: int,
    k: int,
    v: int,
    k_strides: tuple[int, int, int],
    v_strides: tuple[int, int, int],
) -> Status: ...
def gather(
    pool: WorkerPool,
    isa: str,
    arena: Arena,
    table: int,
    table_strides: tuple[int, int],
    num_seqs: int,
    begin: int,
    end: int,
    k: int,
    v: int,
    k_strides: tuple[int, int, int],
    v_strides: tuple[int, int, int],
) -> Status: ...
def move_pages(
    pool: WorkerPool,
    isa: str,
    source: Arena,
    target: Arena,
    source_slots: Sequence[int],
    target_slots: Sequence[int],
) -> Status: ...
def read_gbps(pool: WorkerPool, isa: str, buffer: int, num_bytes: int) -> float: ...
