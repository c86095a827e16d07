"""Between two layers of a step on a device: near pages of the next one come to its L2 while this one's MLP computes."""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv.errors import UnavailableError
from tandemkv.kernels import devices
from tandemkv.types import PagedKV, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.gpu import Pull


def pull_into_l2(q: Tensor, near: PagedKV, rule: ScoreRule, share: float) -> int:
    """Ask for pages that `attend` of such a q will read, up to this share of the device's L2, by a small kernel on a
    stream of its own, behind what the current stream has been given so far. Nobody waits for it, and no result changes.
    Returns the bytes asked for, at most; 0 where the device's backend cannot ask."""
    pull = devices.prepare_pull(q, near, rule, share)
    if pull is None:
        return 0
    try:
        _enqueue(pull, q.device)
    except UnavailableError as error:
        devices.do_without("pull", q.device, str(error))
        return 0
    return pull.num_bytes


def _enqueue(pull: "Pull", device: torch.device) -> None:
    if device.type != "cuda":
        pull.launch()
        return
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        pull.launch()
    for x in pull.reads:  # whoever frees it meanwhile does not give it to others before the kernel is over
        x.record_stream(side)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
