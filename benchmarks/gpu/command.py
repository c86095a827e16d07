"""The command: refuse, build, test, measure, save, print."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import common
from benchmarks.gpu import bootstrap
from tandemkv.errors import InputError, UnavailableError
from tandemkv.machine import check_can_write

MODULE = "benchmarks.gpu"
PARTS = ("kernels",)
HELP = """The GPU's kernels, measured: our decode kernel beside its peers and the copy bandwidth, and the paper's table
of KV prefetch to L2 (2504.06319). Meant to take less than 9 minutes from a bare checkout with torch, triton, a C++
compiler, cmake, nanobind, typer and rich, and no network: the native module is built first, then the GPU's tests run
(with pytest, hypothesis, transformers), then everything is measured.

speed     four models, contexts of 2K to 128K, batches of 1 to 64: GB/s of K and V, each read once, over the copy
          bandwidth of this run (bytes read and written) where K and V are at least 4 times L2; microseconds below.
          Beside it torch's flash and cuDNN attention and FlexAttention, each with the log-sum-exp and in its best form,
          flash-attn and flashinfer where they are installed. All take turns, over memory that L2 does not hold.
paper     the paper's baseline design and ours, with nothing or 1, 2, 4 pieces asked for ahead, beside what was foreseen
ahead     a layer's MLP, then our kernel, without and with its pages pulled into L2 by a side stream meanwhile
packed    pages of panels, int8 and int4: made rows, and attended beside rows of the same tokens
sweep     configurations of our kernel for a few shapes
counters  L2 hit rate, memory throughput and stalls by Nsight Compute, where it runs

A kernel's result is compared with float64 before it is timed: a wrong one has no time, and the exit code is 1, as it is
where a test fails. Times are medians by CUDA events, of calls that the host has issued while the GPU slept.

Example: python -m benchmarks.gpu --part kernels --out DIR
"""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 2 where this cannot be measured here."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument("--part", choices=PARTS, default="kernels", help="what is measured (default: kernels)")
    parser.add_argument("--section", action="append", metavar="NAME", help="only this one; repeat it (default: all)")
    parser.add_argument("--no-tests", action="store_true", help="leave the GPU's tests out, as --quick does")
    parser.add_argument("--commit", metavar="HASH", help="of these files where they are no git checkout; noted as told")
    parser.add_argument("--out", type=Path, help="folder of the files (default: benchmarks/results/NAME-OF-THE-GPU)")
    options = parser.parse_args(arguments)
    try:
        require_gpu()
        if options.out is not None:
            check_folder(options.out)
        native = bootstrap.ensure_native(MODULE, arguments)
        from benchmarks.gpu import ground, measured  # Triton's kernels, once there is a GPU for them

        return measured.measure_and_report(measured.Options.of(options), arguments, native, ground.cuda_ground)
    except (InputError, UnavailableError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        return 2


def check_folder(out: Path) -> None:
    """InputError where files could not be written there; before anything has taken time."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_can_write("--out", out / "kernels.json")
    except OSError as error:
        raise InputError(f"--out must be a folder that can be written, got {out}: {error.strerror}") from error


def require_gpu() -> None:
    """UnavailableError without a CUDA device or Triton."""
    if not torch.cuda.is_available():
        raise UnavailableError(f"{MODULE} needs a CUDA device, and torch {torch.__version__} sees none")
    if find_spec("triton") is None:
        raise UnavailableError(f"{MODULE} needs Triton: pip install 'tandemkv[gpu]'")
