"""Each system of one way beside the limit of that way, so that none is a weak one to be compared with."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import common
from benchmarks.lanes.ground import HEAD_DIM, LATENCY_US, NEAR_TOKENS, PAGE, RULE, Ground, Layers, median_s, rig_with
from tandemkv import kernels
from tandemkv.attention import prefill_chunk, worker_pool
from tandemkv.cache import CacheSpec, KVCache
from tandemkv.kernels.blocks import ChosenBlocks, FarPages, choose_blocks
from tandemkv.lanes import Ahead, Crew, HybridCrew, Rig
from tandemkv.lanes.hybrid import FarQuestion
from tandemkv.schedule import Profile, Scheduler, Speed
from tandemkv.schedule.budget import Budget, BudgetRule
from tandemkv.systems import SYSTEMS
from tandemkv.types import BLOCK_TOKENS, PagedKV

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import Call

CONTEXT, HEADS = 32_768, (32, 8)
PICKED = 1 / 4
"""Of the far blocks, in sparse systems."""
LAYERS = 8
"""Behind each other, of a system that asks for one ahead."""
CHUNK_TOKENS = 64
"""Of a prompt: few, so that the link may be the slower one."""


@dataclass(frozen=True)
class SystemRow:
    """A system's step of one layer, or its chunk of a prompt. limit_ms: what its bytes take at the speed of the
    resource that `limit` names, measured in the same rounds; share: that over what was measured."""

    system: str
    what: str
    limit: str
    gbps: float
    limit_ms: float
    ms: float
    share: float


class Alone(NamedTuple):
    """What a processor does of K and V while the other one sleeps: the limit of a system that leaves it idle."""

    rig: Rig
    layers: Layers

    def host_attends(self, run: PagedKV | None = None) -> float:
        """GB/s of K and V, of a layer's far tokens or of this run."""
        run = self.layers.next()[1] if run is None else run
        call = kernels.prepare_attend(self.layers.q, run, rule=RULE, pool=self.rig.host.pool)
        return run.num_bytes / self._host_s(call) / 1e9

    def host_scores(self) -> float:
        """GB/s of K."""
        _, far = self.layers.next()
        call = kernels.prepare_logits(self.layers.q, far, rule=RULE, pool=self.rig.host.pool)
        return (far.num_bytes - far.v_bytes) / self._host_s(call) / 1e9

    def device_attends(self) -> float:
        """GB/s of K and V."""
        _, far = self.layers.next()
        return far.num_bytes / common.in_ms(self.rig.prepare_attend(self.layers.q, far, RULE).make)() / 1e6

    def _host_s(self, call: "Call[Any]") -> float:
        self.rig.host.call("raw", call).wait(60)
        (span,) = self.rig.trace.take()
        return span.end - span.begin


class Picking:
    """Systems that attend to some far blocks: HGCA's step, and HybridGen's of layers behind each other."""

    def __init__(self, ground: Ground) -> None:
        self._layers = layers = ground.layers
        self._pages = [FarPages(run.arena, run.page_table[:, 0].contiguous(), run.kv_start) for run in layers.far]
        num_blocks = self._pages[0].num_blocks
        self.num_blocks = int(PICKED * num_blocks)
        self._rooms = [ChosenBlocks.allocate(layers.arena, 1, self.num_blocks) for _ in layers.far]
        for pages, room in zip(self._pages, self._rooms, strict=True):
            scores = torch.rand((1, layers.arena.num_kv_heads, num_blocks))
            choose_blocks(scores, self.num_blocks, pages, 0, room, worker_pool())
        budget = Budget(BudgetRule(self.num_blocks * BLOCK_TOKENS, self.num_blocks * BLOCK_TOKENS))
        self._hgca = ground.crew(SYSTEMS["hgca"].lanes).crew
        self._hybridgen = HybridCrew(ground.rig, Scheduler(ground.speeds, SYSTEMS["hybridgen"].lanes), budget)
        self._turn = 0

    def picked(self) -> PagedKV:
        """What takes part, of the next layer."""
        self._turn = (self._turn + 1) % len(self._rooms)
        return self._rooms[self._turn].run

    def hgca(self) -> None:
        """What was chosen is attended on the host, near tokens on the device."""
        run = self.picked()
        self._hgca.attend(self._layers.q, self._layers.near[self._turn], (run,), RULE)

    def hybridgen(self) -> float:
        """Milliseconds of a layer, of LAYERS behind each other, each asked for before the one in front is attended."""
        ahead = self._asked(self._turn)
        times = []
        for _ in range(1 + LAYERS):
            began, layer, its = time.perf_counter(), self._turn, ahead
            self._turn = (layer + 1) % len(self._rooms)
            ahead = self._asked(self._turn)
            self._hybridgen.attend_jointly(layer, self._layers.q, self._layers.near[layer], RULE, its)
            times.append(time.perf_counter() - began)
        ahead.ticket.wait(60)
        self._hybridgen.rig.trace.take()
        return 1e3 * sum(times[1:]) / LAYERS  # the first had nobody ahead of it

    def _asked(self, layer: int) -> Ahead:
        foreseen = self._layers.q.clone()  # another tensor than the query: the layer was asked for ahead
        asked = FarQuestion(foreseen, self._pages[layer], RULE, self._rooms[layer], self.num_blocks, 0)
        return self._hybridgen.ask(layer, asked)


class Limit(NamedTuple):
    """Bytes that have to pass a resource. gbps: of a round, by the names of its contestants."""

    resource: str
    num_bytes: float
    gbps: Callable[[Mapping[str, float]], float]

    def ms(self, each: Mapping[str, float]) -> float:
        """What that takes at least."""
        return self.num_bytes / self.gbps(each) / 1e6


def measure(profile: Profile, context: int, budget_s: float) -> Iterator[SystemRow]:
    """A row for each."""
    layers = Layers(*HEADS, context)
    with rig_with(Speed(LATENCY_US, 1e6)) as rig:
        alone = Alone(rig, layers)
        for _ in range(2 * len(layers.far)):  # pages are touched, threads are awake
            alone.host_attends()
        host_gbps = median(alone.host_attends() for _ in range(10))
    link = Speed(LATENCY_US, host_gbps / 4)
    with rig_with(link) as rig:
        yield from _decoding(Ground(rig, profile.machine("bfloat16", 0, (link, link)), layers), budget_s)
    yield _reading(profile, context, budget_s / 4)


def _decoding(ground: Ground, budget_s: float) -> Iterator[SystemRow]:
    picking, alone = Picking(ground), Alone(ground.rig, ground.layers)
    crews = {name: ground.crew(SYSTEMS[name].lanes) for name in ("flexgen", "moe-lightning")}
    steps = {name: common.in_ms(each.step) for name, each in crews.items()}
    steps |= {"hgca": common.in_ms(picking.hgca), "hybridgen": picking.hybridgen}
    raw = {
        "attends": alone.host_attends,
        "picks": lambda: alone.host_attends(picking.picked()),
        "scores": alone.host_scores,
        "device": alone.device_attends,
    }
    found = common.rounds_in_turn(steps | raw, budget_s)
    rounds = [{name: median(scores) for name, scores in each.items()} for each in found]
    link, far, picked = ground.rig.up.speed.gbps, ground.layers.far[0], picking.picked()
    logits_bytes = 4 * HEADS[0] * picking.num_blocks * BLOCK_TOKENS
    limits = {
        "flexgen": [
            Limit("link", far.num_bytes, lambda _: link),
            Limit("device, attend", far.num_bytes, lambda each: each["device"]),
        ],
        "moe-lightning": [Limit("host, attend", far.num_bytes, lambda each: each["attends"])],
        "hgca": [Limit("host, blocks", picked.num_bytes, lambda each: each["picks"])],
        "hybridgen": [
            Limit("host, logits", far.num_bytes - far.v_bytes, lambda each: each["scores"]),
            Limit("link", picked.v_bytes + logits_bytes, lambda _: link),
        ],
    }
    for name, its in limits.items():
        yield _row(name, "decode", its, rounds)


def _row(system: str, what: str, limits: Sequence[Limit], rounds: Sequence[Mapping[str, float]]) -> SystemRow:
    """Beside the longest of its limits."""

    def of(ratio: Callable[[Mapping[str, float]], float]) -> float:
        return median(map(ratio, rounds))

    binding = max(limits, key=lambda limit: of(limit.ms))
    share = of(lambda each: binding.ms(each) / each[system])
    return SystemRow(
        system, what, binding.resource, of(binding.gbps), of(binding.ms), of(lambda each: each[system]), share
    )


def _reading(profile: Profile, context: int, budget_s: float) -> SystemRow:
    """HeadInfer's chunk of a prompt behind the context, over a link that takes twice as long as attending does."""
    num_q_heads, num_kv_heads = HEADS
    fast = Speed(LATENCY_US, 1e6)
    spec = CacheSpec(1, num_kv_heads, HEAD_DIM, torch.bfloat16, NEAR_TOKENS, 1 << 31, PAGE)
    cache = KVCache(spec, worker_pool())
    cache.reserve(1, context + CHUNK_TOKENS)
    for _ in range(0, context, spec.chunk_tokens):
        k, v = torch.randn((2, 1, num_kv_heads, spec.chunk_tokens, HEAD_DIM)).bfloat16()
        cache.begin_step(1, spec.chunk_tokens)
        cache.layer(0).evict()
        cache.layer(0).append(k, v)
        cache.end_step()
    q, (k, v) = (
        torch.randn((n, 1, h, CHUNK_TOKENS, HEAD_DIM)).bfloat16() for n, h in ((1, num_q_heads), (2, num_kv_heads))
    )
    layer = cache.layer(0)

    def step() -> None:
        prefill_chunk(q[0], k, v, layer, RULE)

    def on(speed: Speed) -> float:
        with rig_with(speed) as rig:
            cache.crew = Crew(
                rig, Scheduler(profile.machine("bfloat16", 0, (speed, speed)), ("stream",)), stages_heads=True
            )
            return median_s(step, budget_s)

    num_bytes = layer.far_bytes(0, layer.far_tokens)
    link = Speed(LATENCY_US, num_bytes / (2 * on(fast)) / 1e9)
    return _row(
        "headinfer",
        "64 tokens of a prompt",
        [Limit("link", num_bytes, lambda _: link.gbps)],
        [{"headinfer": on(link) * 1e3}],
    )
