"""What observers are told on a rig: the share of each block of all tokens, whichever lane attended to it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import KVCache
from tandemkv.errors import LaneWarning
from tandemkv.kernels import block_mass
from tandemkv.lanes import LANES, Crew, Rig
from tandemkv.schedule import Scheduler
from tandemkv.select import SELECTORS, Sparse, Verified
from tandemkv.types import BLOCK_TOKENS, PagedKV
from tests.lanes.test_crew import MIXTURES, SHAPES, Truth, crew_of, dying, inputs_of, parts_of, true
from tests.paged import Shape
from tests.schedule.machines import plain_machine
from tests.test_selectors import RULE, Text, chosen_of, feed, spec_of
from tests.test_systems import assert_sees
from tests.tolerances import kernel_rounding


def true_mass(truth: Truth, shape: Shape) -> tuple[Tensor, Tensor]:
    """Shares of blocks `[num_seqs, num_q_heads, q_len, num_blocks]` in float64, and how far float32 may be off."""
    q, k = truth.case.q.double(), truth.case.k.double().repeat_interleave(shape.group_size, 1)
    scores = shape.scale * q @ k.mT
    scores = scores if shape.softcap is None else shape.softcap * torch.tanh(scores / shape.softcap)
    scores = scores.masked_fill(~truth.case.visible.unsqueeze(1), -torch.inf)
    mass = torch.softmax(scores, -1).nan_to_num(0.0).unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1)
    relative = torch.expm1(2 * truth.bound.lse).unsqueeze(-1) + kernel_rounding(truth.case.kv.arena.layout.dtype).weight
    return mass, mass * relative + 1e-30


def assert_shares(mass: Tensor, truth: Truth, shape: Shape) -> None:
    expected, allowed = true_mass(truth, shape)
    assert mass.shape == expected.shape
    assert bool(((mass - expected).abs() <= allowed).all())


@pytest.mark.parametrize("shape", SHAPES, ids=["group 4", "padding", "three queries"])
@pytest.mark.parametrize("lanes", MIXTURES, ids="+".join)
def test_every_mixture_weighs_blocks_alike(rig: Rig, lanes: tuple[str, ...], shape: Shape) -> None:
    shape = replace(shape, causal=True)
    truth = true(shape, torch.bfloat16, "panels")
    far, near = parts_of(truth.case, shape.page_size)
    far_tokens = far.page_table.shape[2] * shape.page_size
    crew, mass = crew_of(rig, lanes, far_tokens, shape.page_size), block_mass(truth.case.q, far, near)
    crew.attend(truth.case.q, near, (far,), shape.rule, inputs_of(truth.case, far_tokens, False), mass)
    assert_shares(mass, truth, shape)


@pytest.mark.parametrize("lane", LANES)
def test_a_lane_that_failed_leaves_no_share_behind(rig: Rig, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SHAPES[0], causal=True)
    truth = true(shape, torch.bfloat16, "panels")
    far, near = parts_of(truth.case, 64)
    crew, mass = crew_of(rig, tuple(LANES), 896, 64), block_mass(truth.case.q, far, near)

    def spoiling(task: Any, share: PagedKV) -> Any:
        task.mass.fill_(7.0)
        return dying(task, share)

    monkeypatch.setitem(LANES, lane, spoiling)
    with pytest.warns(LaneWarning, match="division by zero"):
        crew.attend(truth.case.q, near, (far,), shape.rule, inputs_of(truth.case, 896, True), mass)
    assert_shares(mass, truth, shape)


# -- selectors on a rig ------------------------------------------------------------------------------------------------


def filled(text: Text, sparse: Sparse, crew: Crew | None, num_tokens: int) -> KVCache:
    cache = KVCache(spec_of(16), worker_pool())
    cache.sparse, cache.crew = sparse, crew
    cache.reserve(text.num_seqs, text.num_tokens)
    cache.layer(0).set_kv_start(torch.tensor(text.kv_start))
    feed(cache, text, num_tokens)
    return cache


def attend_crew(rig: Rig) -> Crew:
    return Crew(rig, Scheduler(plain_machine(), ("attend", "stream")))


def pairs(rig: Rig, text: Text, sparse: Sparse, num_tokens: int) -> Iterator[tuple[KVCache, KVCache, Tensor, Tensor]]:
    """The same steps on a rig and without one, of one token and of several."""
    there, here = (filled(text, sparse, crew, num_tokens) for crew in (attend_crew(rig), None))
    for q_len in (1, 1, 3, 1, 1, 16, 1, 1):
        yield there, here, feed(there, text, q_len), feed(here, text, q_len)


@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "logits"])  # it gives no partial results
def test_a_selector_learns_and_chooses_as_without_a_rig(rig: Rig, selector: str) -> None:
    """Observers are told the same numbers, and who estimates adds the same estimate."""
    for there, here, out, expected in pairs(rig, Text(), Sparse(selector, 240), 600):
        mine, its = (cache.layer(0).known() for cache in (there, here))
        assert mine._replace(far=its.far, near=its.near, digest=None) == its._replace(digest=None)
        assert torch.allclose(mine.far, its.far, atol=1e-5)
        assert torch.allclose(mine.near, its.near, atol=1e-5)
        assert torch.allclose(out, expected, atol=1e-4)
        if there.layer(0).chosen is not None:
            assert chosen_of(there.layer(0)) == chosen_of(here.layer(0))


def test_a_promise_is_kept_by_the_host(rig: Rig) -> None:
    """What is sampled lies in far memory: the same is drawn, and told, as without a rig."""
    text, sparse = Text(num_tokens=6050), Sparse("columns", 240, verified=Verified(0.2, 0.1))
    text.q *= 0.25
    text.v += 1
    rig.trace.take()
    for there, here, out, expected in pairs(rig, text, sparse, 6000):
        assert torch.allclose(out, expected, atol=1e-5)
        mine, its = there.tallies[0].to_dict(), here.tallies[0].to_dict()
        assert mine == pytest.approx(its, rel=1e-3)
    assert 0 < its["share_read"] < 1
    assert {"host", "down", "up"} <= {span.row for span in rig.trace.take() if span.name == "verify"}


def test_a_sink_takes_part_of_every_share(rig: Rig) -> None:
    text, sink = Text(), torch.full((4,), 14.0)
    there, here = (filled(text, Sparse("salience", 240), crew, 600) for crew in (attend_crew(rig), None))
    for cache in (there, here):
        q, k, v = (x[:, :, 600:601] for x in (text.q, text.k, text.v))
        extend_and_attend(q, k, v, cache.layer(0), RULE, sink)
    mine, its = (cache.layer(0).known() for cache in (there, here))
    assert torch.allclose(mine.near, its.near, atol=1e-6)
    without = filled(text, Sparse("salience", 240), None, 600)
    extend_and_attend(q, k, v, without.layer(0), RULE)
    assert not torch.allclose(without.layer(0).known().near, its.near, atol=1e-3)


def test_hgca_moves_no_page(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What defines it on a rig: queries go down and results come up, whatever the budget, and near tokens are dense."""
    text = Text()
    crew = Crew(rig, Scheduler(plain_machine(), ("attend",)))
    cache = filled(text, Sparse("salience", 240), crew, 600)
    sent: list[tuple[str, int]] = []
    carry_up = rig.up.carry

    def carry(name: str, num_bytes: int, *more: Any) -> Any:
        sent.append((name, num_bytes))
        return carry_up(name, num_bytes, *more)

    monkeypatch.setattr(rig.up, "carry", carry)
    out = feed(cache, text, 1)
    num_seqs, _, num_heads, width = out.shape
    assert sent == [("attend", num_seqs * num_heads * (width + 1) * 4)]
    chosen = chosen_of(cache.layer(0))
    assert max(len(blocks) for heads in chosen for blocks in heads) < cache.layer(0).num_far_blocks
    assert_sees(cache, text, out, chosen)
