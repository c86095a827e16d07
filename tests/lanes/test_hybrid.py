"""HybridGen's step: stale logits of far tokens and true ones of near tokens in one softmax; no key crosses the link."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.attention import extend_and_attend, look_ahead, worker_pool
from tandemkv.cache import KVCache, LayerKV
from tandemkv.errors import InputError, LaneError
from tandemkv.lanes import Crew, HybridCrew, Rig, hybrid
from tandemkv.lanes.hybrid import join, near_logits, pick
from tandemkv.schedule import Scheduler, Speed
from tandemkv.schedule.budget import Budget, BudgetRule
from tandemkv.select import Sparse, Verified
from tandemkv.selection import far_question
from tandemkv.types import BLOCK_TOKENS, ScoreRule
from tests.dense import causal_visible
from tests.schedule.machines import plain_machine
from tests.test_selectors import GROUP_SIZE, NUM_KV_HEADS, RULE, Text, chosen_of, feed, spec_of
from tests.tolerances import logit_bound, weigh_bound

READ, FLOOR, LARGE = 600, 240, 4096


@pytest.fixture(params=["rig", "no rig"])
def crew(request: pytest.FixtureRequest) -> HybridCrew | None:
    return crew_on(request.getfixturevalue("rig")) if request.param == "rig" else None


def crew_on(rig: Rig, most_tokens: int = FLOOR, period: int = 1000) -> HybridCrew:
    """Its budget stays at the floor, whatever a step takes here, unless a test asks for less than a thousand steps."""
    budget = Budget(BudgetRule(FLOOR, most_tokens, step_tokens=32, period=period))
    return HybridCrew(rig, Scheduler(plain_machine(), ("logits",)), budget)


def filled(text: Text, crew: HybridCrew | None, budget_tokens: int = FLOOR) -> KVCache:
    """One layer that has read a prompt."""
    cache = KVCache(spec_of(16), worker_pool())
    cache.sparse, cache.crew = Sparse("logits", budget_tokens), crew
    cache.reserve(text.num_seqs, text.num_tokens)
    cache.layer(0).set_kv_start(torch.tensor(text.kv_start))
    feed(cache, text, READ)
    return cache


def step(cache: KVCache, text: Text, stale: Tensor | None, q_len: int = 1) -> Tensor:
    """The next tokens, whose queries were foreseen like this."""
    cache.layer(0).foreseen = stale
    out = feed(cache, text, q_len)
    cache.layer(0).forget_foreseen()
    return out


def stale_queries(text: Text, begin: int, q_len: int) -> Tensor:
    """Quite other ones than will come."""
    return torch.roll(text.q, 1, 1)[:, :, begin : begin + q_len].contiguous()


def grouped(x: Tensor) -> Tensor:
    return x.double().repeat_interleave(GROUP_SIZE, 1)


def mixed_scores(layer: LayerKV, text: Text, stale: Tensor, q: Tensor, rule: ScoreRule = RULE) -> Tensor:
    """float64 `[num_seqs, num_q_heads, q_len, num_tokens]`: far ones of the stale query, near ones of the true one."""
    k, num_far = grouped(text.k[:, :, : layer.seq_len]), layer.first_near_token
    scores = torch.cat([stale.double() @ k[:, :, :num_far].mT, q.double() @ k[:, :, num_far:].mT], -1) * rule.scale
    scores = scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)
    visible = causal_visible(layer.seq_len, q.shape[2], layer.kv_start)
    return scores.masked_fill(~visible.unsqueeze(1), -torch.inf)


def assert_joined(
    out: Tensor, layer: LayerKV, text: Text, stale: Tensor, rule: ScoreRule = RULE, sink: Tensor | None = None
) -> None:
    """One softmax over near tokens and the blocks of the last choice, in float64, and within its bound."""
    end, q_len = layer.seq_len, out.shape[1]
    q, k, v = text.q[:, :, end - q_len : end], text.k[:, :, :end], text.v[:, :, :end]
    scores = mixed_scores(layer, text, stale, q, rule)
    for seq, heads in enumerate(chosen_of(layer)):
        for head, blocks in enumerate(heads):
            left_out = torch.ones(layer.num_far_blocks, dtype=torch.bool)
            left_out[list(blocks)] = False
            tokens = left_out.repeat_interleave(BLOCK_TOKENS).nonzero().flatten()
            rows = slice(head * GROUP_SIZE, (head + 1) * GROUP_SIZE)
            scores[seq, rows, :, tokens] = -torch.inf
    sinks = torch.full((4,), -torch.inf) if sink is None else sink
    logits = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    expected = torch.softmax(logits, -1).nan_to_num(0.0)[..., :-1] @ grouped(v)
    error = torch.maximum(logit_bound(q, k, rule), logit_bound(stale, k, rule)).amax(-1)
    largest = logits.abs().masked_fill(logits == -torch.inf, 0.0).amax(-1)
    bound = weigh_bound(scores, v, num_merges=3, largest=largest, error=error)
    assert bool(((out.transpose(1, 2) - expected).abs() <= bound.out).all())


@pytest.mark.parametrize("q_len", [1, 3, 16])
def test_with_everything_and_the_true_query_it_is_dense(crew: HybridCrew | None, q_len: int) -> None:
    text = Text()
    cache = filled(text, crew, LARGE)
    for _ in range(3):
        out = step(cache, text, None, q_len)
        q = text.q[:, :, cache.seq_len - q_len : cache.seq_len]
        assert_joined(out, cache.layer(0), text, q)
        real = [cache.layer(0).num_far_blocks - start // BLOCK_TOKENS for start in text.kv_start]
        assert [[len(blocks) for blocks in heads] for heads in chosen_of(cache.layer(0))] == [
            [num] * NUM_KV_HEADS for num in real
        ]


@pytest.mark.parametrize("budget_tokens", [FLOOR, LARGE])
@pytest.mark.parametrize("q_len", [1, 3])
def test_far_logits_are_those_of_the_stale_query(crew: HybridCrew | None, q_len: int, budget_tokens: int) -> None:
    text = Text()
    cache = filled(text, crew, budget_tokens)
    stale = stale_queries(text, READ, q_len)
    out = step(cache, text, stale, q_len)
    assert_joined(out, cache.layer(0), text, stale)
    with pytest.raises(AssertionError):
        assert_joined(out, cache.layer(0), text, text.q[:, :, READ : READ + q_len])


def test_a_query_of_another_shape_was_not_foreseen_for_this_step(crew: HybridCrew | None) -> None:
    text = Text()
    cache = filled(text, crew)
    out = step(cache, text, stale_queries(text, READ, 2), 1)
    assert_joined(out, cache.layer(0), text, text.q[:, :, READ : READ + 1])


def test_the_blocks_of_most_mass_are_picked(crew: HybridCrew | None) -> None:
    """By the stale query's softmax over far tokens, in float64; the first block is always one of them."""
    text = Text()
    cache = filled(text, crew)
    stale = stale_queries(text, READ, 1)
    step(cache, text, stale)
    layer = cache.layer(0)
    far = mixed_scores(layer, text, stale, stale)[..., : layer.far_tokens]
    mass = torch.softmax(far, -1).unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1)
    mass = mass.unflatten(1, (NUM_KV_HEADS, -1)).amax((2, 3))
    num_wanted = (FLOOR - layer.num_near_tokens) // BLOCK_TOKENS
    for seq, heads in enumerate(chosen_of(layer)):
        first = text.kv_start[seq] // BLOCK_TOKENS
        mass[seq, :, first] = torch.inf
        for head, blocks in enumerate(heads):
            assert blocks == set(mass[seq, head].topk(num_wanted).indices.tolist())


def test_it_is_one_softmax(crew: HybridCrew | None) -> None:
    """Where every V is 1, what comes out is the sum of the weights, however unlike the two queries are."""
    text = Text()
    text.v.fill_(1.0)
    cache = filled(text, crew)
    out = step(cache, text, 3 * stale_queries(text, READ, 1))
    assert torch.allclose(out, torch.ones_like(out), atol=1e-5)


def test_rules_of_scores_and_sinks(crew: HybridCrew | None) -> None:
    text, sink, rule = Text(), torch.tensor([14.0, 3.0, -2.0, 9.0]), ScoreRule(0.7, softcap=9.0)
    cache = filled(text, crew)
    stale = stale_queries(text, READ, 1)
    q, k, v = (x[:, :, READ : READ + 1] for x in (text.q, text.k, text.v))
    for each, logit in ((cache.fork(), None), (cache, sink)):
        layer = each.layer(0)
        layer.foreseen = stale
        out = extend_and_attend(q, k, v, layer, rule, logit)
        assert_joined(out, layer, text, stale, rule, logit)


# -- what crosses ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What goes up from here on."""
    found: list[tuple[str, int]] = []
    up = rig.up.send

    def send(name: str, num_bytes: int, *more: Any) -> Any:
        found.append((name, num_bytes))
        return up(name, num_bytes, *more)

    monkeypatch.setattr(rig.up, "send", send)
    return found


def test_logits_and_values_of_the_picked_come_up_and_nothing_else(rig: Rig, sent: list[tuple[str, int]]) -> None:
    text = Text()
    cache = filled(text, crew_on(rig))
    sent.clear()
    step(cache, text, stale_queries(text, READ, 3), 3)
    chosen, arena = chosen_of(cache.layer(0)), cache.layer(0).far.arena.parts[0]
    num_blocks = sum(len(blocks) for heads in chosen for blocks in heads)
    v_bytes = num_blocks * BLOCK_TOKENS * 16 * arena.v.element_size()
    padding = [sum(start % BLOCK_TOKENS for _ in heads) for start, heads in zip(text.kv_start, chosen, strict=True)]
    num_logits = (num_blocks * BLOCK_TOKENS - sum(padding)) * GROUP_SIZE * 3
    assert sent == [("logits 0", v_bytes + 4 * num_logits)]


def test_the_device_reads_no_far_key(rig: Rig) -> None:
    """They are NaN when it begins."""
    text = Text()
    cache = filled(text, None)
    layer, q = cache.layer(0), text.q[:, :, READ : READ + 1]
    with layer.extended(1) as held:
        layer.write(text.k[:, :, READ : READ + 1], text.v[:, :, READ : READ + 1])
        picked = pick(far_question(q, layer, RULE), rig.host.pool)
        layer.far.arena.k.fill_(torch.nan)
        part = join(picked, held.near, near_logits(q, held.near, RULE, None), None)
        assert_joined(part.out.transpose(1, 2), layer, text, q)


# -- a layer ahead -----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers that the host was asked about."""
    found: list[int] = []
    ask = HybridCrew.ask

    def logged(crew: HybridCrew, layer: int, question: Any) -> Any:
        found.append(layer)
        return ask(crew, layer, question)

    monkeypatch.setattr(HybridCrew, "ask", logged)
    return found


def steps_ahead(cache: KVCache, text: Text, num_steps: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Steps that the host begins before they come: what they gave, what was foreseen, and whether pages had moved."""
    layer = cache.layer(0)
    for _ in range(num_steps):
        stale = layer.foreseen = stale_queries(text, cache.seq_len, 1)
        look_ahead(layer)
        has_moved = layer.pages_to_evict() > 0
        out = feed(cache, text, 1)
        yield out, stale, has_moved
        layer.forget_foreseen()


def test_what_was_begun_ahead_is_taken_up_or_redone_where_pages_moved(rig: Rig, asked: list[int]) -> None:
    text = Text()
    cache = filled(text, crew_on(rig))
    step(cache, text, None)  # from which on its rule is known
    num_moved = 0
    for out, stale, has_moved in steps_ahead(cache, text, 40):
        assert_joined(out, cache.layer(0), text, stale)
        assert len(asked) == 1 + 1 + has_moved
        num_moved += has_moved
        asked[1:] = []
    assert num_moved > 1


def test_an_answer_to_another_query_is_not_taken(rig: Rig, asked: list[int]) -> None:
    text = Text()
    cache = filled(text, crew_on(rig))
    step(cache, text, None)
    layer, stale = cache.layer(0), stale_queries(text, READ + 1, 1)
    layer.foreseen = -stale
    look_ahead(layer)
    out = step(cache, text, stale)
    assert_joined(out, layer, text, stale)
    assert len(asked) == 3
    assert layer.ahead is None


def test_nothing_is_begun_without_a_rig_or_a_rule(rig: Rig, asked: list[int]) -> None:
    text = Text()
    for crew in (None, crew_on(rig)):
        cache = filled(text, crew)
        cache.layer(0).foreseen = stale_queries(text, READ, 1)
        look_ahead(cache.layer(0))
        assert cache.layer(0).ahead is None
    assert not asked


# -- the budget --------------------------------------------------------------------------------------------------------


def num_picked(layer: LayerKV) -> int:
    return max(len(blocks) for heads in chosen_of(layer) for blocks in heads)


def floor_of(layer: LayerKV) -> int:
    return (FLOOR - layer.num_near_tokens) // BLOCK_TOKENS


def test_spare_time_raises_the_budget_and_lack_of_it_lowers_it_to_its_floor(rig: Rig) -> None:
    """Algorithm 1: first the device has much to do meanwhile, then transfers take long; at last K is picked before."""
    text = Text()
    crew = crew_on(rig, most_tokens=FLOOR + 128, period=2)
    cache = filled(text, crew)
    layer = cache.layer(0)
    step(cache, text, None)
    assert num_picked(layer) == floor_of(layer)

    def run(num_steps: int, device_s: float) -> None:
        for _ in range(num_steps):
            layer.foreseen = stale = stale_queries(text, cache.seq_len, 1)
            look_ahead(layer)
            time.sleep(device_s)
            out = feed(cache, text, 1)
            layer.forget_foreseen()
            assert_joined(out, layer, text, stale)
            assert num_picked(layer) >= floor_of(layer)

    run(12, 0.03)
    assert crew.budget.tokens == FLOOR + 128
    assert num_picked(layer) == floor_of(layer) + 128 // BLOCK_TOKENS
    rig.up.speed = Speed(30_000, 10)
    run(12, 0.0)
    assert (crew.budget.tokens, crew.budget.picks_before) == (FLOOR, True)
    assert num_picked(layer) == floor_of(layer)


def test_a_step_that_was_not_foreseen_tells_nothing_of_time(rig: Rig) -> None:
    """Nothing hides its work: the first layers would keep the budget at its floor."""
    text = Text()
    crew = crew_on(rig, most_tokens=LARGE, period=1)
    cache = filled(text, crew)
    for _ in range(4):
        step(cache, text, None)
    assert not crew.budget.picks_before


def test_pre_qk_reads_the_keys_of_the_picked_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of half of them, the first, and of the others those that were picked last."""
    text = Text()
    crew = crew_on(rig)
    cache = filled(text, crew)
    layer = cache.layer(0)
    step(cache, text, None)
    before, num = chosen_of(layer), num_picked(layer)
    crew.budget.picks_before = True
    seen: list[bool] = []
    logits = kernels.logits

    def logged(q: Tensor, run: Any, **kwargs: Any) -> Tensor:
        seen.append(run.of_blocks)
        return logits(q, run, **kwargs)

    monkeypatch.setattr(kernels, "logits", logged)
    stale = stale_queries(text, cache.seq_len, 1)
    out = step(cache, text, stale)
    assert sorted(seen) == [False, True]  # of near pages, and of blocks that were picked
    assert_joined(out, layer, text, stale)
    newest = set(range(layer.num_far_blocks - num // 2, layer.num_far_blocks))
    for seq, heads in enumerate(chosen_of(layer)):
        first = text.kv_start[seq] // BLOCK_TOKENS
        for head, blocks in enumerate(heads):
            assert {first, *newest} <= blocks
            assert blocks - newest - {first} <= before[seq][head]


# -- bad luck ----------------------------------------------------------------------------------------------------------


def test_a_host_that_fails_is_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text()
    cache = filled(text, crew_on(rig))

    def die(*_: object) -> object:
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patch:
        patch.setattr(hybrid, "pick", die)
        with pytest.raises(LaneError, match="the host gave no logits of layer 0: division by zero"):
            step(cache, text, None)
    cache.settle()
    cache.layer(0).foreseen = None
    out = step(cache, text, None)
    assert_joined(out, cache.layer(0), text, text.q[:, :, READ : READ + 1])
    cache.check()


def test_nan_in_q_is_an_error_of_the_user(crew: HybridCrew | None) -> None:
    text = Text()
    cache = filled(text, crew)
    text.q = text.q.clone()
    text.q[0, 1, READ, 3] = torch.nan
    with pytest.raises(InputError, match="q contains NaN"):
        step(cache, text, None)


def test_a_plain_crew_or_a_promise_attends_by_partial_results(rig: Rig) -> None:
    """The selector alone: the choice is that of the foreseen query, the attention that of the true one."""
    text = Text()
    cache = filled(text, None)
    cache.crew = Crew(rig, Scheduler(plain_machine(), ("attend",)))
    out = step(cache, text, stale_queries(text, READ, 1))
    assert_joined(out, cache.layer(0), text, text.q[:, :, READ : READ + 1])
    cache.sparse = Sparse("logits", FLOOR, verified=Verified(0.2, 0.1))
    step(cache, text, stale_queries(text, READ + 1, 1))
    assert 0 < cache.tallies[0].to_dict()["share_read"] <= 1
