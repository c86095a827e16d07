"""What asks for pages to be in L2 before anybody reads them (asynchronous KV prefetch, 2504.06319): PTX, chosen by
architecture, and the paper's rule for how much there is room for."""

BULK_CAPABILITY = 90
"""From sm_90 on one instruction of one thread asks for up to a whole piece: `cp.async.bulk.prefetch.L2` (PTX ISA 8.0).
Before, each thread asks for a line: `prefetch.global.L2` (PTX ISA 2.0)."""

_LINE_BYTES = 128


def prefetch_ptx(capability: int, num_bytes: int, num_threads: int) -> str:
    """Inline assembly for `$1`, the address of so many bytes in a row; `$0` becomes 0. Nobody waits, and an address
    that is none of ours faults as a load would.

    capability: 80 for sm_80. num_threads: of the program, all of which run it.
    """
    whole = num_bytes // 16 * 16  # the bulk engine counts in units of 16
    if not whole:
        return ""
    if capability >= BULK_CAPABILITY:
        ask = f"setp.eq.u32 p, t, 0; @p cp.async.bulk.prefetch.L2.global [$1], {whole};"
        return f"{{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; {ask} mov.u32 $0, 0; }}"
    step = num_threads * _LINE_BYTES
    asks = " ".join(
        f"setp.lt.u64 p, a, {whole - begin}; add.u64 b, a, $1; @p prefetch.global.L2 [b+{begin}];"
        for begin in range(0, whole, step)
    )
    return (
        f"{{ .reg .pred p; .reg .u32 t; .reg .u64 a; .reg .u64 b; mov.u32 t, %tid.x; mul.wide.u32 a, t, {_LINE_BYTES}; "
        f"{asks} mov.u32 $0, 0; }}"
    )


def fits_l2(tile_bytes: int, distance: int, num_programs: int, l2_bytes: int) -> bool:
    """Whether what all programs ask for ahead fits L2 at once: the paper's M_total = M_block * warps * H * B <= L2,
    with a program's tiles of K and V in the place of a warp's block. Conservative: not all programs run at once."""
    return tile_bytes * distance * num_programs <= l2_bytes
