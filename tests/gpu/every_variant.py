"""`make check-gpu`: every variant of the decode kernel compiles for every architecture. A bar, and errors last."""

from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.progress import track

from tandemkv import machine
from tandemkv.kernels.gpu.variants import SHARED_BYTES, Variant, asks_of, compiled, every


def error_of(variant: Variant) -> str:
    """Of compiling it; '' for none."""
    try:
        kernel = compiled(variant)
        bulk, lines = asks_of(kernel.asm["ptx"])
        right, wrong = (bulk, lines) if variant.capability >= 90 else (lines, bulk)
        if kernel.metadata.shared > SHARED_BYTES[variant.capability]:
            return f"{variant.name}: {kernel.metadata.shared:,} bytes of shared memory"
    except Exception as error:  # noqa: BLE001  told with the others
        return f"{variant.name}: {error!r}"
    is_right = not wrong and (right > 0) == (variant.distance > 0)
    return "" if is_right else f"{variant.name}: asks in bulk {bulk} times, line by line {lines} times"


def main() -> None:
    """Exit code 1 where one does not compile."""
    variants = every()
    console = Console()
    with ProcessPoolExecutor(machine.default_threads()) as pool:
        found = track(
            pool.map(error_of, variants, chunksize=8), f"{len(variants):,} variants", len(variants), console=console
        )
        errors = [error for error in found if error]
    for error in errors:
        console.print(error, highlight=False)
    console.print(f"{len(variants) - len(errors):,} of {len(variants):,} compile")
    raise SystemExit(bool(errors))


if __name__ == "__main__":
    main()
