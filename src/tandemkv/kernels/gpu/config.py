"""How a decode call is cut into programs. Looked up, never tuned while somebody waits."""

from dataclasses import dataclass, replace

from tandemkv.errors import InputError

WAVES = 2
"""Programs for each multiprocessor, at least: while some wait for memory, others are at work."""

LEAST_TILES = 4
"""Of a part: fewer would spend their time on beginning and merging."""

MAX_SPLITS = 64

BESIDE_TILES_BYTES = 16 << 10
"""Of shared memory, for queries, weights and what changes its layout: 8 to 24 KiB in the variants that are compiled."""


@dataclass(frozen=True)
class Config:
    """block_n: tokens of a tile. block_m: rows of queries, at least the 16 of a tensor core. num_splits: parts of a
    sequence. distance: tiles that are asked for in L2 ahead, 0 for none. guarded: none either where what all programs
    ask for would not fit L2 (`l2.fits_l2`). num_warps, num_stages: Triton's."""

    block_n: int = 64
    block_m: int = 16
    num_splits: int = 1
    distance: int = 0
    num_warps: int = 4
    num_stages: int = 3
    guarded: bool = True

    def __post_init__(self) -> None:
        for name, least in (("block_n", 16), ("block_m", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise InputError(f"{name} must be a power of 2, at least {least}, got {value!r}")
        for name, least in (("num_splits", 1), ("distance", 0), ("num_stages", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")


def config_for(num_seqs: int, num_kv_heads: int, num_rows: int, kv_tokens: int, num_processors: int) -> Config:
    """For so many sequences of kv_tokens, num_rows queries of each KV head, and a GPU's multiprocessors.

    A tile of 64 tokens is a page, so that its slot is looked up once. Rows beyond 16 share K and V in one program up to
    64: more would not fit the registers beside out. A call has programs enough for `WAVES`, as far as parts keep
    `LEAST_TILES`. None of these numbers was measured on a GPU yet.
    """
    block_n = 64
    block_m = block_m_for(num_rows)
    num_programs = max(1, num_seqs * num_kv_heads * -(-num_rows // block_m))
    most = max(1, kv_tokens // (LEAST_TILES * block_n))
    return Config(block_n, block_m, max(1, min(MAX_SPLITS, most, -(-WAVES * num_processors // num_programs))))


def fitted(config: Config, token_bytes: float, shared_bytes: int, num_programs: int = 1) -> Config:
    """With tiles of tokens of so many bytes, K and V, that fit the shared memory of a multiprocessor which has so many
    programs: fewer are on their way while one is computed, and shorter ones where not even one fits."""
    block_n = config.block_n
    while block_n > 16 and block_n * token_bytes > shared_bytes - BESIDE_TILES_BYTES:
        block_n //= 2
    num_ahead = int((shared_bytes // num_programs - BESIDE_TILES_BYTES) // (block_n * token_bytes))
    return replace(config, block_n=block_n, num_stages=min(config.num_stages, 1 + max(1, num_ahead)))


def block_m_for(num_rows: int) -> int:
    """Rows of queries that share K and V in one program."""
    return min(64, max(16, 1 << (num_rows - 1).bit_length()))


def block_n_for(entry_tokens: int) -> int:
    """The longest tile, up to 64 tokens, that always lies in one page: where codes share scales, a tile has one set."""
    return min(64, entry_tokens & -entry_tokens)
