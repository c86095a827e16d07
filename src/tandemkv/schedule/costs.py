"""What each lane costs: seconds on every resource it uses, from a machine's speeds. One function for each lane.

Resources: `device` and `host` are processors, `memory` is the host's memory, `up` and `down` are the link to the
device and the link to the host. Lanes that share a resource add up on it; a step takes as long as its longest resource,
with what must come before the first use of it and after the last.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tandemkv.schedule.speeds import Machine
from tandemkv.schedule.work import Plan, Work

RESOURCES = ("device", "host", "memory", "up", "down")
NUM_SLOTS = 2
"""Staging slots of a lane: one is filled while the device reads the other."""


Seconds = Mapping[str, float]
"""By resource; what only passes something on, from one thread to another, stands under HANDOFF."""

HANDOFF = "handoff"


class Cost(NamedTuple):
    """Seconds that a lane needs of each resource; those that pass before it can begin there, and from its end there to
    the step's, each with the resources on which they pass.

    near_bytes: that what comes up takes in the device's memory. launch_s: of the device, until others are at work.
    """

    busy: Seconds
    before: Mapping[str, Seconds]
    after: Mapping[str, Seconds]
    near_bytes: float = 0.0
    launch_s: float = 0.0


def attend(work: Work, machine: Machine, plan: Plan, num_tokens: float) -> Cost:
    """The host attends where the tokens lie; q goes down, out and lse come up, whatever their number. It is the device
    that hands the call over."""
    num_bytes = work.num_seqs * num_tokens * work.kv_bytes
    down, up = machine.down.seconds(work.query_bytes), machine.up.seconds(work.part_bytes)
    return Cost(
        {
            "host": machine.host_attend.seconds(num_bytes),
            "memory": _memory(machine, num_bytes),
            "down": down,
        },
        {"host": {"down": down, HANDOFF: 2 * machine.handoff_s}},
        {"host": {"up": up, HANDOFF: 2 * machine.handoff_s}},
        launch_s=2 * machine.handoff_s,
    )


def stream(work: Work, machine: Machine, plan: Plan, num_tokens: float) -> Cost:
    """K and V come up in stages, and the device attends to each while the next is on its way."""
    num_stages = max(1.0, num_tokens / plan.stage_tokens)
    num_bytes = work.num_seqs * num_tokens * work.kv_bytes
    up = _transfers(machine, num_bytes, num_stages)
    device = num_stages * machine.device_attend.start_us * 1e-6 + num_bytes / (machine.device_attend.gbps * 1e9)
    return Cost(
        {"up": up, "device": device, "memory": _memory(machine, num_bytes)},
        {"device": {"up": up / num_stages, HANDOFF: machine.handoff_s}},
        {"up": {"device": device / num_stages, HANDOFF: machine.handoff_s}},
        NUM_SLOTS * num_bytes / num_stages,
    )


def recompute(work: Work, machine: Machine, plan: Plan, num_tokens: float) -> Cost:
    """K and V of the first tokens are rebuilt from their layer inputs, which lie near (KVPR's row schedule) or come up
    before anything else (its column schedule)."""
    piece = min(num_tokens, plan.piece_tokens)
    num_pieces = num_tokens / piece
    build = num_pieces * machine.products.seconds(work.num_seqs * piece, work.rebuild_flops)
    read = num_pieces * machine.device_attend.start_us * 1e-6 + _read_s(work, machine, num_tokens)
    if work.inputs_are_near:
        return Cost({"device": build + read}, {}, {})
    num_bytes = work.num_seqs * num_tokens * work.input_bytes
    up = _transfers(machine, num_bytes, num_pieces)
    return Cost(
        {"device": build + read, "up": up, "memory": _memory(machine, num_bytes)},
        {"device": {"up": up / num_pieces, HANDOFF: machine.handoff_s}},
        {"up": {"device": (build + read) / num_pieces, HANDOFF: machine.handoff_s}},
        num_bytes,
    )


def logits(work: Work, machine: Machine, plan: Plan, num_tokens: float) -> Cost:
    """The host computes logits over the keys; they and V come up, and the device weighs V with them (HybridGen)."""
    num_stages = max(1.0, num_tokens / plan.stage_tokens)
    k_bytes, v_bytes = (work.num_seqs * num_tokens * each for each in (work.k_bytes, work.v_bytes))
    score_bytes = work.num_seqs * num_tokens * work.num_q_heads * 4
    down = machine.down.seconds(work.query_bytes)
    host = num_stages * machine.host_logits.start_us * 1e-6 + k_bytes / (machine.host_logits.gbps * 1e9)
    up = _transfers(machine, v_bytes + score_bytes, num_stages)
    device = num_stages * machine.device_weigh.start_us * 1e-6 + v_bytes / (machine.device_weigh.gbps * 1e9)
    handoff = machine.handoff_s
    first_host, first_up, last_device = host / num_stages, up / num_stages, device / num_stages
    return Cost(
        {"host": host, "up": up, "device": device, "memory": _memory(machine, k_bytes + v_bytes), "down": down},
        {
            "host": {"down": down, HANDOFF: 2 * handoff},
            "up": {"down": down, "host": first_host, HANDOFF: 3 * handoff},
            "device": {"down": down, "host": first_host, "up": first_up, HANDOFF: 4 * handoff},
        },
        {
            "host": {"up": first_up, "device": last_device, HANDOFF: 2 * handoff},
            "up": {"device": last_device, HANDOFF: handoff},
        },
        NUM_SLOTS * v_bytes / num_stages,
    )


LaneCost = Callable[[Work, Machine, Plan, float], Cost]
COSTS: dict[str, LaneCost] = {"recompute": recompute, "attend": attend, "logits": logits, "stream": stream}
"""By lane, in the order in which a link carries for them: layer inputs first, so that rebuilding can begin."""


class Prediction(NamedTuple):
    """Seconds of a step, and of each resource with what must come before and after it. busy: of a lane, of a resource.
    near_bytes: that what comes up takes. ways: of a lane, from its beginning to the device's last work for it."""

    seconds: float
    resources: Mapping[str, float]
    busy: Mapping[str, Mapping[str, float]]
    near_bytes: float
    ways: Mapping[str, float]

    @property
    def binds(self) -> str:
        """The resource that decides how long the step takes."""
        return max(self.resources, key=lambda name: self.resources[name])


def predict(work: Work, machine: Machine, plan: Plan) -> Prediction:
    """What a step takes with this plan."""
    tokens = {name: plan.tokens[name] for name in COSTS if plan.tokens.get(name, 0) > 0}
    costs = [_Measured(name, COSTS[name](work, machine, plan, num), machine) for name, num in tokens.items()]
    near_bytes = work.num_seqs * work.near_tokens * work.near_bytes
    near = machine.device_attend.seconds(near_bytes) if work.near_tokens else 0.0
    busy: dict[str, Seconds] = {each.name: each.busy for each in costs}
    busy["near"] = {"device": near * machine.factor("near", "device")}
    resources, ways = {}, _ways(costs)
    for resource in RESOURCES:
        seconds = sum(each.get(resource, 0.0) for each in busy.values())
        if resource == "device":
            begin = sum(each.launch_s for each in costs)
            resources["device"] = max(seconds, begin + max(ways.values(), default=0.0)) + _after(resource, costs)
        elif seconds:
            before = min(each.before(resource) for each in costs if resource in each.cost.busy)
            resources[resource] = before + seconds + _after(resource, costs)
    if "up" in resources:
        resources["up"] += _standstill(plan, busy)
    seconds = max(resources.values()) * machine.mixture(frozenset(tokens))
    return Prediction(seconds, resources, busy, sum(each.cost.near_bytes for each in costs), ways)


class _Measured:
    """What a lane costs, with every second as long as it was measured to be."""

    def __init__(self, name: str, cost: Cost, machine: Machine) -> None:
        self.name, self.cost, self._machine = name, cost, machine
        self.launch_s = cost.launch_s * machine.factor(name, "device") if cost.launch_s else 0.0
        busy = {resource: seconds * machine.factor(name, resource) for resource, seconds in cost.busy.items()}
        self.device_s = busy.get("device")
        self.busy = {**busy, "device": (self.device_s or 0.0) + self.launch_s} if self.launch_s else busy

    def before(self, resource: str) -> float:
        """Seconds that pass before it can begin there."""
        return self._sum(self.cost.before.get(resource))

    def after(self, resource: str) -> float:
        """Seconds that pass from its end there."""
        return self._sum(self.cost.after.get(resource))

    def _sum(self, waits: Seconds | None) -> float:
        return sum(each * self._machine.factor(self.name, on) for on, each in waits.items()) if waits else 0.0


def _standstill(plan: Plan, busy: Mapping[str, Mapping[str, float]]) -> float:
    """Of the link, whose slots are full before the device has rebuilt a piece: it reads none meanwhile."""
    if "recompute" not in busy or "stream" not in busy:
        return 0.0
    num_pieces = max(1.0, plan.tokens["recompute"] / plan.piece_tokens)
    num_stages = max(1.0, plan.tokens["stream"] / plan.stage_tokens)
    slots_s = num_pieces * NUM_SLOTS * busy["stream"]["up"] / num_stages
    return max(0.0, busy["recompute"]["device"] - slots_s)


def _ways(costs: Sequence[_Measured]) -> dict[str, float]:
    """Until the device has something to do for a lane, and what it has to do. What goes up for one lane waits for those
    before it."""
    ways, queued = {}, 0.0
    for each in costs:
        if each.device_s is not None:
            ways[each.name] = each.before("device") + queued + each.device_s
        queued += each.busy.get("up", 0.0)
    return ways


def _after(resource: str, costs: Sequence[_Measured]) -> float:
    """From the last use of a resource to the end: of the last lane that uses it."""
    last = [each for each in costs if resource in each.cost.busy][-1:]
    return last[0].after(resource) if last else 0.0


def _memory(machine: Machine, num_bytes: float) -> float:
    return num_bytes / (machine.memory_gbps * 1e9)


def _transfers(machine: Machine, num_bytes: float, num: float) -> float:
    return num * machine.up.start_us * 1e-6 + num_bytes / (machine.up.gbps * 1e9)


def _read_s(work: Work, machine: Machine, num_tokens: float) -> float:
    """The device attends to rebuilt tokens as to near ones."""
    return work.num_seqs * num_tokens * work.near_bytes / (machine.device_attend.gbps * 1e9)
