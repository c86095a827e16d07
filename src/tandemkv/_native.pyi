from collections.abc import Callable, Sequence
from enum import Enum

class DType(Enum):
    float32 = 0
    bfloat16 = 1
    float16 = 2

class Packing(Enum):
    rows = 0
    panels = 1
    int8 = 2
    int4 = 3

class Status(Enum):
    ok = 0
    nan_in_query = 1
    slot_out_of_range = 2
    outside_table = 3
    out_of_memory = 4

class WorkerPool:
    def __init__(self, num_threads: int, cpus: Sequence[int] = ...) -> None: ...
    def rouse(self) -> None: ...
    @property
    def num_threads(self) -> int: ...

class Bell:
    def __init__(self) -> None: ...
    @property
    def num_rung(self) -> int: ...
    def ring(self) -> None: ...
    def wait(self, num_rung: int, until: float) -> None: ...

class Job:
    @property
    def begin(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def status(self) -> Status: ...
    def cancel(self) -> None: ...

class Driver:
    def __init__(self, bell: Bell, cpu: int) -> None: ...
    def make(self, call: Call, not_before: float) -> Job: ...
    def do(self, callable: Callable[[], None], not_before: float) -> Job: ...
    def close(self, seconds: float) -> bool: ...

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
        v_head_dim: int,
        num_channels: int,
    ) -> None: ...
    @property
    def slice_bytes(self) -> tuple[int, int]: ...

class Arenas:
    def __init__(self, parts: Sequence[Arena]) -> None: ...

class Rows:
    def __init__(self, data: int, dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...]) -> None: ...

class Run:
    def __init__(
        self,
        arenas: Arenas,
        slots: int,
        strides: tuple[int, int],
        num_seqs: int,
        num_pages: int,
        kv_start: int,
        kv_len: int,
        of_blocks: bool,
        log_counts: int,
    ) -> None: ...

class ScoreRule:
    def __init__(self, scale: float, softcap: float | None, window: int | None) -> None: ...

class Output:
    def __init__(self, out: Rows, lse: int, mass: int, mass_blocks: int) -> None: ...

class Call:
    def make(self) -> Status: ...

class PreparedAttend:
    def __init__(self, isa: str, runs: Sequence[Run], q: Rows, rule: ScoreRule, causal: bool) -> None: ...

class PreparedCall:
    def __init__(self, isa: str, runs: Sequence[Run], q: Rows, k: Rows, v: Rows, rule: ScoreRule) -> None: ...

def isas() -> list[tuple[str, str]]: ...
def attend(pool: WorkerPool, call: PreparedAttend, q: int, out: int, lse: int, mass: int, mass_blocks: int) -> Call: ...
def logits(pool: WorkerPool, isa: str, run: Run, q: Rows, rule: ScoreRule, logits_to: int) -> Call: ...
def weigh(pool: WorkerPool, isa: str, run: Run, logits: Rows, to: Output) -> Status: ...
def append_and_attend(
    pool: WorkerPool,
    call: PreparedCall,
    q: int,
    k: int,
    v: int,
    out: int,
    sink_logit: int,
    mass: int,
    mass_blocks: int,
) -> Status: ...
def merge(
    pool: WorkerPool,
    outs: Sequence[int],
    lses: Sequence[int],
    shape: tuple[int, ...],
    sink_logit: int,
    out: int,
    lse: int,
) -> None: ...
def append(
    pool: WorkerPool, isa: str, arenas: Arenas, table: int, table_strides: tuple[int, int], begin: int, k: Rows, v: Rows
) -> Status: ...
def gather(
    pool: WorkerPool, isa: str, arenas: Arenas, table: int, table_strides: tuple[int, int], begin: int, k: Rows, v: Rows
) -> Status: ...
def move_pages(
    pool: WorkerPool,
    isa: str,
    source: Arenas,
    target: Arenas,
    source_slots: Sequence[int],
    target_slots: Sequence[int],
    channel_weights: int,
) -> tuple[Status, list[int], list[int]]: ...

class Codes(Enum):
    bounds = 0
    columns = 1

class BlockCodes:
    def __init__(
        self, kind: Codes, codes: int, steps: int, num_kv_heads: int, num_slots: int, page_blocks: int
    ) -> None: ...

def make_bounds(
    pool: WorkerPool, isa: str, arenas: Arenas, slots: Sequence[int], num_lines: int, codes: int, steps: int
) -> Status: ...
def score_blocks(
    pool: WorkerPool,
    isa: str,
    codes: BlockCodes,
    rows: int,
    dtype: DType,
    shape: tuple[int, ...],
    directions: int,
    num_columns: int,
    slots: int,
    slot_stride: int,
    num_pages: int,
    scores: int,
) -> Status: ...
def choose_blocks(
    pool: WorkerPool,
    isa: str,
    scores: int,
    strides: tuple[int, int],
    shape: tuple[int, int, int],
    padding: int,
    num_wanted: int,
    num_sink_tokens: int,
    slots: int,
    slot_stride: int,
    page_blocks: int,
    blocks: int,
    entries: int,
    capacity: int,
    kv_start: int,
    kv_len: int,
) -> None: ...
def shuffle_left(
    pool: WorkerPool,
    shape: tuple[int, int, int],
    page_blocks: int,
    kv_start: int,
    chosen: int,
    capacity: int,
    chosen_tokens: int,
    slots: int,
    slot_stride: int,
    seed: int,
    to: int,
) -> None: ...

class Groups:
    def __init__(self, out: int, lse: int, shape: tuple[int, int, int, int]) -> None: ...

def collapse(pool: WorkerPool, groups: Groups, out: int, lse: int) -> None: ...
def scatter(pool: WorkerPool, groups: Groups, out: int, lse: int, variance: int, products: int) -> None: ...
def read_gbps(pool: WorkerPool, isa: str, buffer: int, num_bytes: int) -> float: ...
def dot_gops(pool: WorkerPool, isa: str) -> float: ...
def load_latency_ns(next: int, num_steps: int) -> float: ...
def multiply_adds(isa: str, group_size: int) -> int: ...
