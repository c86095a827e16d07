"""The attend lane (HGCA, 2507.03153): the host attends where the pages lie; q goes down, out and lse come up."""

from tandemkv import kernels
from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.types import PagedKV


def attend(task: Task, share: PagedKV) -> DeviceWork:
    """See `Lane`. What crosses the links does not depend on how many tokens there are."""
    rig, (num_seqs, num_q_heads, q_len, _) = task.rig, task.q.shape
    up_bytes = num_seqs * num_q_heads * q_len * (share.arena.v_head_dim + 1) * 4
    part = rig.call_host(
        "attend",
        task.q,
        lambda q: kernels.prepare_attend(q, share, rule=task.rule, mass=task.mass, pool=rig.host.pool),
        up_bytes,
    )
    yield part
    return part.result()
