"""HybridGen's step (2604.18529), as the paper has it: logits of far tokens join those of near ones in one softmax.

    device   layer i ...              logits of near keys (true query) | one softmax, V of both
    host     logits of far keys of layer i + 1 (foreseen query), pick
    link     q~ down                  logits and V of what was picked up; keys never

The host begins when the query is foreseen, a layer ahead. What it had time for decides how many far tokens take part,
and whether they are picked behind their logits (Post-QK) or before (Pre-QK): `schedule/budget.py`.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.errors import LaneError
from tandemkv.kernels.blocks import ChosenBlocks, FarPages, choose_blocks
from tandemkv.lanes.base import DeviceWork, drive
from tandemkv.lanes.crew import Crew, deadline_of, work_of
from tandemkv.lanes.rig import Rig
from tandemkv.lanes.tickets import Span, Ticket
from tandemkv.schedule import Plan, Scheduler
from tandemkv.schedule.budget import Budget
from tandemkv.select.logits import mass_of_blocks
from tandemkv.types import BLOCK_TOKENS, PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


class FarQuestion(NamedTuple):
    """What the host is asked about a layer's far tokens.

    q: `[num_seqs, num_q_heads, q_len, head_dim]`, foreseen or true. room: for the choice. num_blocks: to be picked, of
    each KV head, those of the first num_first_tokens tokens among them. last: bool `[num_seqs, num_kv_heads,
    num_blocks]`, the choice before; where it is given, blocks are picked before their logits (Pre-QK), else behind.
    """

    q: Tensor
    far: FarPages
    rule: ScoreRule
    room: ChosenBlocks
    num_blocks: int
    num_first_tokens: int
    last: Tensor | None = None

    def is_about(self, far: FarPages, rule: ScoreRule) -> bool:
        """Whether the same pages are meant, and the same scores."""
        mine = self.far
        return (
            mine.arena is far.arena
            and self.rule == rule
            and torch.equal(mine.slots, far.slots)
            and torch.equal(mine.kv_start, far.kv_start)
        )


class Picked(NamedTuple):
    """What comes up. logits: float32 `[num_seqs, num_q_heads, q_len, tokens of chosen.run's table]`, -inf for tokens
    that are not there; of these V comes up, too."""

    logits: Tensor
    chosen: ChosenBlocks

    @property
    def num_bytes(self) -> int:
        """Logits and V of the tokens that were picked."""
        run, per_head = self.chosen.run, self.logits[0, :, :, 0].numel() // self.chosen.blocks.shape[1]
        return run.v_bytes + 4 * per_head * int((run.kv_len - run.kv_start).sum())


def pick(asked: FarQuestion, pool: "WorkerPool | None") -> Picked:
    """The host's part: logits over all keys and the blocks of most mass, or blocks first and logits over these."""
    far, room = asked.far, asked.room
    if asked.last is not None:
        scores = _scores_before(asked.last, asked.num_blocks)
        choose_blocks(scores, asked.num_blocks, far, asked.num_first_tokens, room, pool)
        return Picked(kernels.logits(asked.q, room.run, rule=asked.rule, pool=pool), room)
    logits = kernels.logits(asked.q, far.run, rule=asked.rule, pool=pool)
    scores = mass_of_blocks(logits, far.arena.num_kv_heads)
    choose_blocks(scores, asked.num_blocks, far, asked.num_first_tokens, room, pool)
    return Picked(_of_blocks(logits, room), room)


def _scores_before(last: Tensor, num_blocks: int) -> Tensor:
    """Without a look at keys: a window of half of them, then what was picked last, then the newest others."""
    newness = torch.arange(last.shape[2], dtype=torch.float32, device="cpu") / last.shape[2]
    in_window = torch.arange(last.shape[2], device="cpu") >= last.shape[2] - num_blocks // 2
    return newness + last.float() + 2 * in_window.float()


def _of_blocks(logits: Tensor, chosen: ChosenBlocks) -> Tensor:
    """Those of the chosen blocks, in their order, `[num_seqs, num_q_heads, q_len, capacity * 16]`."""
    num_heads = chosen.blocks.shape[1]
    by_block = logits.unflatten(-1, (-1, BLOCK_TOKENS)).unflatten(1, (num_heads, -1))
    is_chosen = chosen.is_chosen[:, :, None, None, :, None]
    index = torch.where(chosen.is_chosen, chosen.blocks, 0).long()[:, :, None, None, :, None]
    found = by_block.gather(4, index.expand(*by_block.shape[:4], -1, BLOCK_TOKENS))
    of_tokens: Tensor = found.masked_fill_(~is_chosen, -torch.inf).flatten(4).flatten(1, 2)
    return of_tokens


def near_logits(q: Tensor, near: PagedKV, rule: ScoreRule, pool: "WorkerPool | None") -> Tensor:
    """The device's: of near keys with the true query, `[num_seqs, num_q_heads, q_len, tokens of the table]`; queries
    are the last of these tokens."""
    logits = kernels.logits(q, near, rule=rule, pool=pool)
    if q.shape[2] > 1:
        place = near.kv_len[:, None] - q.shape[2] + torch.arange(q.shape[2], device="cpu")
        is_newer = torch.arange(logits.shape[3], device="cpu") > place[..., None]
        logits.masked_fill_(is_newer.unsqueeze(1), -torch.inf)
    return logits


def join(picked: Picked, near: PagedKV, logits: Tensor, pool: "WorkerPool | None") -> Partial:
    """One softmax over the logits of both, in the order of tokens, and its weights times V of both.

    `kernels.weigh` normalises over its own tokens: what it gives counts by their share of the one softmax.
    """
    both = torch.cat([picked.logits, logits], -1)
    weights = torch.softmax(both, -1).nan_to_num_(0.0)  # a row of padding sees nothing
    far, close = weights.split([picked.logits.shape[3], logits.shape[3]], -1)
    out = kernels.weigh(picked.logits, picked.chosen.run, pool=pool).out * far.sum(-1, keepdim=True)
    out += kernels.weigh(logits, near, pool=pool).out * close.sum(-1, keepdim=True)
    return Partial(out, torch.logsumexp(both, -1))


class Ahead(NamedTuple):
    """What the host is at for a layer. waited_s: that the device had waited for the host, in all, when it was asked."""

    name: str
    asked: FarQuestion
    ticket: Ticket[Picked]
    begun_at: float
    waited_s: float


class HybridCrew(Crew):
    """Steps as HybridGen takes them. How many tokens take part follows from what steps take, for all layers alike."""

    def __init__(self, rig: Rig, scheduler: Scheduler, budget: Budget) -> None:
        """budget: counts as `Sparse.budget_tokens` does, near tokens included; that is its floor."""
        super().__init__(rig, scheduler)
        self.budget = budget
        self.rules: dict[int, ScoreRule] = {}  # of layers, as they were attended last
        self._spans: list[Span] = []  # of layers that the host is ahead of
        self._waited_s = 0.0
        self._last_layer = -1
        self._pass: list[tuple[float, float]] = []  # of each layer: the device's time, and the lane's

    def ask(self, layer: int, asked: FarQuestion) -> Ahead:
        """Send the host to work. Its answer crosses the link as logits and V of what it picked."""
        name = f"logits {layer}"
        pool = self.rig.host.pool
        ticket = self.rig.ask_host(name, asked.q, lambda _: pick(asked, pool), lambda picked: picked.num_bytes)
        return Ahead(name, asked, ticket, time.perf_counter(), self._waited_s)

    def attend_jointly(self, layer: int, q: Tensor, near: PagedKV, rule: ScoreRule, ahead: Ahead) -> Partial:
        """Attention over near tokens and what the host picks, or has picked ahead. LaneError where it does not answer:
        nobody else has these keys."""
        self._begin_layer(layer)
        self.rules[layer] = rule
        work = work_of(q, near, (ahead.asked.far.run,))
        deadline_s = deadline_of(self.scheduler.plan(work))
        outcome = drive(None, {ahead.name: self._device_work(q, near, rule, ahead)}, self.rig, deadline_s)
        for error in outcome.failed.values():
            raise LaneError(f"the host gave no logits of layer {layer}: {error}") from error
        self.plan = Plan({"logits": int(ahead.asked.room.run.kv_len.max())})
        return outcome.parts[ahead.name]

    def _device_work(self, q: Tensor, near: PagedKV, rule: ScoreRule, ahead: Ahead) -> DeviceWork:
        logits = near_logits(q, near, rule, self.rig.device_pool)
        asked_for_at = time.perf_counter()
        yield ahead.ticket
        picked = ahead.ticket.result()
        device_s = asked_for_at - ahead.begun_at - (self._waited_s - ahead.waited_s)
        self._waited_s += time.perf_counter() - asked_for_at
        if ahead.asked.q is not q:  # nothing hides the work of a layer that was not foreseen
            self._pass.append((device_s, self._lane_seconds(ahead)))
        return join(picked, near, logits, self.rig.device_pool)

    def _lane_seconds(self, ahead: Ahead) -> float:
        """Of the host and the link to the device, for this answer."""
        spans = [span for span in (*self._spans, *self.rig.trace.take()) if span.row in ("host", "up")]
        self._spans = [span for span in spans if span.name.startswith("logits ") and span.name != ahead.name]
        its = [span for span in spans if span.name == ahead.name and span.begin >= ahead.begun_at]
        return sum(span.end - span.begin for span in its)

    def _begin_layer(self, layer: int) -> None:
        """With the first layer of a pass the one before is over: it may move the budget."""
        if layer <= self._last_layer and self._pass:
            self.budget.observe(*map(sum, zip(*self._pass, strict=True)))
            self._pass = []
        self._last_layer = layer
