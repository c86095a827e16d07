"""What attends to pages in a device's memory: our Triton kernels where they work, else torch's own operations; which of
the two, and why, is never silent."""

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tandemkv.errors import BackendWarning, UnavailableError
from tandemkv.types import AnyArena, Arena, PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.gpu import Pull

OLDEST_TRITON = 3, 6
OLDEST_CAPABILITY = 80
"""sm_80, the first with asynchronous copies to shared memory, and with tensor cores for bfloat16."""


class Backend(NamedTuple):
    """name: for people. why_not: what keeps our kernels from being used; empty where they are."""

    name: str
    module: ModuleType
    why_not: str


def backend_of(device: torch.device) -> Backend:
    """Who attends on a device, as far as is known without a call; a BackendWarning comes with the first that is not us.

    Of the CPU, whose own kernels are others, for tests: Triton where its interpreter runs, else torch.
    """
    backend = _FAILED.get(device) or _found(device)
    if backend.why_not and device.type == "cuda" and device not in _TOLD:
        _TOLD.add(device)
        warnings.warn(f"near tokens on {device} are attended by torch: {backend.why_not}", BackendWarning, stacklevel=2)
    return backend


def attend(q: Tensor, *runs: PagedKV, rule: ScoreRule, flags: Tensor, **options: Any) -> Partial:
    """`tandemkv.kernels.attend` of q and pages on a device. Nobody waits for it.

    flags: int32 `[1]` there, in which bits are set for what is out of order: `checks.raise_for` tells when the
    step is over. options: `causal` and `mass`.
    """
    part: Partial = _first_that_works("attend", q.device, q, *runs, rule=rule, flags=flags, **options)
    return part


def merge(parts: Sequence[Partial], sink_logit: Tensor | None = None) -> Partial:
    """`tandemkv.kernels.merge` on a device."""
    whole: Partial = _first_that_works("merge", parts[0].out.device, parts, sink_logit)
    return whole


def append(arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor) -> None:
    """`tandemkv.kernels.append` on a device, which nobody waits for."""
    _first_that_works("append", arena.k.device, arena, page_table, begin, k, v)


def prepare_pull(q: Tensor, kv: PagedKV, rule: ScoreRule, share: float) -> "Pull | None":
    """What asks for pages that `attend` of such a q will read, up to this share of the device's L2, once launched. None
    where the backend cannot ask."""
    if not has("pull", q.device):
        return None
    from tandemkv.kernels import gpu

    return gpu.prepare_pull(q, kv, rule, share)


def unpack(source: Arena, target: Arena, source_slots: Tensor, target_slots: Tensor) -> bool:
    """Pages of any packing -> pages of rows, on their device (`gpu.unpack`). False, and nothing is done, where the
    backend cannot."""
    if not has("unpack", source.k.device):
        return False
    from tandemkv.kernels import gpu

    try:
        gpu.unpack(source, target, source_slots, target_slots)
    except UnavailableError as error:
        do_without("unpack", source.k.device, str(error))
        return False
    return True


def has(name: str, device: torch.device) -> bool:
    """Whether the device's backend can `unpack`, or `pull`: torch can do neither."""
    return not backend_of(device).why_not and (name, device) not in _WITHOUT


def do_without(name: str, device: torch.device, why: str) -> None:
    """From now on, since that kernel does not compile; a BackendWarning says so."""
    _WITHOUT.add((name, device))
    warnings.warn(f"{name} is done without on {device}: {why}", BackendWarning, stacklevel=2)


def why_not_triton(device: torch.device) -> str:
    """What keeps our kernels from a device; '' for nothing. Compiles a small one and runs it: a second, once."""
    try:
        import triton
    except ModuleNotFoundError:
        return "triton is not installed: pip install 'tandemkv[gpu]'"
    except Exception as error:  # noqa: BLE001  whatever a broken installation raises
        return f"triton cannot be imported: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is too old: {'.'.join(map(str, OLDEST_TRITON))} or newer is needed"
    from tandemkv.kernels import gpu

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if 10 * major + minor < OLDEST_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, 8.0 is needed"
    elif not gpu.is_interpreted():
        return f"Triton compiles nothing for {device}"
    return gpu.failure(device)


@functools.cache
def _found(device: torch.device) -> Backend:
    why_not = why_not_triton(device)
    if not why_not:
        from tandemkv.kernels import gpu

        return Backend("triton", gpu, "")
    return _torch(why_not)


def _torch(why_not: str) -> Backend:
    from tandemkv.kernels import torch_ops

    return Backend("torch", torch_ops, why_not)


_FAILED: dict[torch.device, Backend] = {}  # devices for which a kernel did not compile
_TOLD: set[torch.device] = set()
_WITHOUT: set[tuple[str, torch.device]] = set()


def _first_that_works(name: str, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """A function of the backend that is used; from the first kernel on that does not compile, of the next one."""
    try:
        return getattr(backend_of(device).module, name)(*args, **kwargs)
    except UnavailableError as error:
        _FAILED[device] = _torch(str(error))
        return getattr(backend_of(device).module, name)(*args, **kwargs)
