"""The logits lane (HybridGen, 2604.18529): the host computes logits over the keys it holds; they and V come up, keys
never do, and the device makes weights of them."""

from torch import Tensor

from tandemkv import kernels
from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.lanes.rig import Rig
from tandemkv.lanes.shares import Weighed, joined, mass_of
from tandemkv.lanes.tickets import Ticket
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.types import PagedKV


def logits(task: Task, share: PagedKV) -> DeviceWork:
    """See `Lane`. The softmax is over this lane's tokens; the merge makes it one over all."""
    rig, rule, stages = task.rig, task.rule, share.cut(task.stage_tokens)
    assert isinstance(rig, Rig), "values of a CUDA device are not staged yet"

    def ask(stage: PagedKV) -> Ticket[Tensor]:
        num_scores = task.q[..., 0].numel() * stage.page_table.shape[2] * stage.entry_tokens
        return rig.call_host(
            "logits",
            task.q,
            lambda q: kernels.prepare_logits(q, stage, rule=rule, pool=rig.host.pool),
            stage.v_bytes + 4 * num_scores,
        )

    # One stage more than slots: while V of two is on its way or read, the host is at the keys of the next.
    tickets, parts = [ask(stage) for stage in stages[: NUM_SLOTS + 1]], []
    try:
        for i, stage in enumerate(stages):
            yield tickets[i]
            scores = tickets[i].result()
            part = kernels.weigh(scores, stage, pool=rig.device_pool)
            parts.append(Weighed(part, None if task.mass is None else mass_of(scores, part.lse)))
            if i + NUM_SLOTS + 1 < len(stages):
                tickets.append(ask(stages[i + NUM_SLOTS + 1]))
    finally:
        for ticket in tickets:
            ticket.cancel()
    return joined(parts, task.mass)
