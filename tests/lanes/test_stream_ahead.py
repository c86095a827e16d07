"""Pages of the next layer cross the link while this one's MLP runs: no more than there are slots, and each once."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv.attention import stream_ahead, worker_pool
from tandemkv.cache import KVCache
from tandemkv.lanes import Crew, Rig
from tandemkv.schedule import Plan, Scheduler, Speed
from tandemkv.schedule.costs import NUM_SLOTS
from tandemkv.select import SELECTORS, Sparse, Summaries
from tandemkv.select.lookahead import Lookahead
from tests.integrations.agreement import attached, tiered
from tests.integrations.test_foresight import deeper, step
from tests.lanes.test_crew import SHAPES, Truth, assert_right, inputs_of, parts_of, true
from tests.models import left_padded
from tests.schedule.machines import plain_machine
from tests.test_selectors import Text, chosen_of, feed, spec_of

SHAPE = SHAPES[0]
STAGE = 128


@pytest.fixture
def sent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of what went up."""
    found: list[int] = []
    up = rig.up.send

    def send(name: str, num_bytes: int, *more: Any) -> Any:
        found.append(num_bytes)
        return up(name, num_bytes, *more)

    monkeypatch.setattr(rig.up, "send", send)
    return found


def crew_on(rig: Rig, lanes: tuple[str, ...] = ("stream",)) -> Crew:
    frozen = Plan(dict.fromkeys(lanes, 64), stage_tokens=STAGE)
    return Crew(rig, Scheduler(plain_machine(), lanes, frozen))


@pytest.fixture
def truth() -> Truth:
    return true(SHAPE, torch.bfloat16, "panels")


@pytest.mark.parametrize("lanes", [("stream",), ("attend", "stream"), ("attend",)], ids="+".join)
def test_what_was_sent_ahead_is_not_sent_again(rig: Rig, truth: Truth, sent: list[int], lanes: tuple[str, ...]) -> None:
    far, near = parts_of(truth.case, 64)
    crew = crew_on(rig, lanes)
    assert_right(crew.attend(truth.case.q, near, (far,), SHAPE.rule), truth)
    whole = sorted(sent)
    sent.clear()
    crew.send_ahead((far,))
    num_ahead = NUM_SLOTS if "stream" in lanes else 0
    assert len(sent) == num_ahead
    assert_right(crew.attend(truth.case.q, near, (far,), SHAPE.rule), truth)
    assert sorted(sent) == whole
    sent.clear()
    assert_right(crew.attend(truth.case.q, near, (far,), SHAPE.rule), truth)
    assert sorted(sent) == whole  # it was taken up once


def test_nothing_is_sent_ahead_of_layer_inputs(rig: Rig, truth: Truth, sent: list[int]) -> None:
    """They come before anything else, so that rebuilding can begin."""
    far, near = parts_of(truth.case, 64)
    crew = crew_on(rig, ("recompute", "stream"))
    inputs = inputs_of(truth.case, 448, are_near=False)
    assert_right(crew.attend(truth.case.q, near, (far,), SHAPE.rule, inputs), truth)
    sent.clear()
    crew.send_ahead((far,))
    assert sent == []


def test_pages_are_there_when_they_are_asked_for(rig: Rig, truth: Truth) -> None:
    """Over a slow link a step that was begun ahead waits for what is left alone."""
    far, near = parts_of(truth.case, 64)
    far = far.part(0, 2 * STAGE // 64)
    rig.up.speed = Speed(100_000, 1000)
    crew, seconds = crew_on(rig), []
    crew.attend(truth.case.q, near, (far,), SHAPE.rule)
    for is_ahead in (False, True):
        if is_ahead:
            crew.send_ahead((far,))
            time.sleep(0.15)
        begin = time.perf_counter()
        crew.attend(truth.case.q, near, (far,), SHAPE.rule)
        seconds.append(time.perf_counter() - begin)
    assert seconds[0] >= 0.1
    assert seconds[1] < 0.08


def test_other_pages_are_sent_again_and_the_first_ones_dropped(rig: Rig, truth: Truth, sent: list[int]) -> None:
    far, near = parts_of(truth.case, 64)
    crew = crew_on(rig)
    crew.attend(truth.case.q, near, (far,), SHAPE.rule)
    num = far.page_table.shape[2]
    crew.send_ahead((far.part(1, num),))  # a page fewer than the plan is for
    sent.clear()
    table = far.page_table.flip(2)
    crew.send_ahead((type(far)(far.arena, table, far.kv_start, far.kv_len),))
    ahead = [ticket for _, ticket in crew._sent]
    assert len(ahead) == len(sent) == NUM_SLOTS
    sent.clear()
    assert_right(crew.attend(truth.case.q, near, (far,), SHAPE.rule), truth)
    assert sum(sent) == far.num_bytes
    assert all(ticket.is_cancelled for ticket in ahead)


# -- with a selector that foresees -------------------------------------------------------------------------------------


def filled(text: Text, crew: Crew | None, selector: str | None) -> KVCache:
    cache = KVCache(spec_of(16), worker_pool())
    cache.sparse, cache.crew = None if selector is None else Sparse(selector, 245), crew
    cache.reserve(text.num_seqs, text.num_tokens)
    cache.layer(0).set_kv_start(torch.tensor(text.kv_start))
    feed(cache, text, 600)
    return cache


@pytest.mark.parametrize("selector", [None, *(name for name in SELECTORS if name != "logits")])
def test_the_foreseen_choice_is_sent_ahead_and_made_once(
    rig: Rig, sent: list[int], selector: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which others cannot: what they pick follows from a query that has not come, or from what is not yet learnt."""
    scored = []
    text = Text()
    foresees = selector == "lookahead"
    there, here = (filled(text, crew, selector) for crew in (crew_on(rig), None))
    layer, num_ahead = there.layer(0), 0
    score = Lookahead.score

    def logged(selector: Lookahead, q: Tensor, summaries: Summaries) -> Tensor:
        scored.append(summaries.foreseen)
        return score(selector, q, summaries)

    monkeypatch.setattr(Lookahead, "score", logged)
    for i in range(18):
        stale = torch.roll(text.q, 1, 1)[:, :, there.seq_len : there.seq_len + 1].contiguous()
        for each in (there, here):
            each.layer(0).foreseen = stale if foresees else None
        sent.clear()
        scored.clear()
        has_moved, map_before = layer.pages_to_evict() > 0, layer._map.slots
        stream_ahead(layer, 1)
        num_ahead += len(sent)
        assert len(sent) in ({0, NUM_SLOTS} if i and (foresees or selector is None) else {0})
        out, expected = (feed(each, text, 1) for each in (there, here))
        assert torch.allclose(out, expected, atol=1e-4)
        if foresees:
            assert chosen_of(layer) == chosen_of(here.layer(0))
            has_moved |= layer._map.slots is not map_before
            assert len(scored) == 1 + 1 + has_moved  # here, ahead, and again where there are other pages
        if selector is None and i and not has_moved:
            assert sum(sent) == layer.far_bytes(0, layer.far_tokens)
    assert (num_ahead > 0) == (foresees or selector is None)


# -- in a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many stages each layer found on their way."""
    found: list[int] = []
    taken_up = Crew._taken_up

    def logged(crew: Crew, *args: Any) -> Any:
        tickets = taken_up(crew, *args)
        found.append(len(tickets))
        return tickets

    monkeypatch.setattr(Crew, "_taken_up", logged)
    yield found


@pytest.mark.parametrize("sparse", [None, Sparse("lookahead", 160)], ids=["exact", "lookahead"])
def test_every_layer_but_the_first_finds_its_pages_on_their_way(
    rig: Rig, ahead: list[int], sparse: Sparse | None
) -> None:
    model = attached(deeper("llama"))
    ids, mask = left_padded([340, 320])
    outs: list[list[Tensor]] = []
    for crew in (crew_on(rig), None):
        cache = tiered(model)
        cache.kv.sparse, cache.kv.crew = sparse, crew
        with torch.no_grad():
            model(ids[:, :-40], attention_mask=mask[:, :-40], past_key_values=cache)
        ahead.clear()
        outs.append([step(model, cache, ids, mask, 1) for _ in range(8)])
        if crew is not None:
            passes = [ahead[i : i + 4] for i in range(0, len(ahead), 4)]
            assert all(each[0] == 0 for each in passes)
            could = [2, 3] if sparse is not None else [1, 2, 3]  # layer 1 is not foreseen
            assert sum(each == [NUM_SLOTS * (layer in could) for layer in range(4)] for each in passes) >= 6
    assert all(torch.allclose(out, expected, atol=1e-4) for out, expected in zip(*outs, strict=True))
