"""What every lane is: a function that starts work on far pages and returns something to wait for."""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from tandemkv.types import PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


class PendingPartial(Protocol):
    """A Partial that is being computed."""

    def result(self) -> Partial:
        """Wait for it; out and lse are on q's device. Raises what the computation raised."""

    def wait(self) -> None:
        """Until the lane reads no page any more, however its work ended."""


class Lane(Protocol):
    """Starts attention of q over far tokens; q may be on any device."""

    def __call__(self, q: Tensor, far: PagedKV, *, rule: ScoreRule, workers: "WorkerPool") -> PendingPartial:
        """Returns at once where the device and the host are different processors."""
