"""Reads memory and does nothing else: what reading K and V once takes at least."""
# mypy: ignore-errors
# What Triton compiles is no Python: it has no types of Python's.

import triton
import triton.language as tl


@triton.jit
def read_all(x, sums, num_blocks, block: tl.constexpr):
    """x: int32 `[num_blocks * block]`; sums: int32, one for each program, so that nothing read is left out."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    at = x + program.to(tl.int64) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.int32)
    for _ in range(program, num_blocks, num_programs):
        total = total ^ tl.load(at)
        at += num_programs.to(tl.int64) * block
    tl.store(sums + program, tl.max(total, 0))
