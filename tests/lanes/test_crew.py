"""Every lane, alone and in every mixture, against the float64 reference; and what happens when one stalls or dies."""

import threading
import time
import warnings
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tandemkv import kernels
from tandemkv.errors import InputError, LaneError, LaneWarning
from tandemkv.kernels import reference
from tandemkv.lanes import LANES, Crew, Inputs, Rig, drive
from tandemkv.lanes.base import DeviceWork, Task
from tandemkv.lanes.crew import Step, work_of
from tandemkv.lanes.tickets import Ticket
from tandemkv.schedule import Plan, Scheduler, Speed
from tandemkv.types import Arena, Packing, PagedKV, PageLayout, Partial, ScoreRule
from tests.paged import Case, Shape, build
from tests.schedule.machines import plain_machine
from tests.tolerances import Bound, assert_within, attend_bound, kernel_rounding

SHAPES = [
    Shape(64, 2, 4, 64, kv_len=(1024,), kv_start=(0,)),
    Shape(16, 1, 1, 48, kv_len=(320, 320), kv_start=(0, 37), v_head_dim=32),
    Shape(32, 4, 2, 128, kv_len=(640, 640), kv_start=(100, 639), q_len=3, softcap=20.0),
]
PACKINGS: list[Packing] = ["panels", "rows"]
MIXTURES = [names for size in range(1, len(LANES) + 1) for names in combinations(LANES, size)]


def crew_of(rig: Rig, lanes: tuple[str, ...], far_tokens: int, page_size: int, stage_tokens: int = 64) -> Crew:
    """Far tokens shared out about evenly, whatever the speeds."""
    pages = far_tokens // page_size
    cuts = [round(i * pages / len(lanes)) for i in range(len(lanes) + 1)]
    tokens = {name: (end - begin) * page_size for name, begin, end in zip(lanes, cuts, cuts[1:], strict=False)}
    frozen = Plan({name: num for name, num in tokens.items() if num}, stage_tokens)
    return Crew(rig, Scheduler(plain_machine(), lanes, frozen))


class Truth(NamedTuple):
    """A case, what float64 says of it, and how far float32 may be off."""

    case: Case
    part: Partial
    bound: Bound


@cache
def true(shape: Shape, dtype: torch.dtype, packing: Packing) -> Truth:
    case = build(shape, dtype, packing)
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(dtype), num_merges=12)
    return Truth(case, reference.attend(case.q, case.kv, rule=shape.rule, causal=True), bound)


def inputs_of(case: Case, far_tokens: int, are_near: bool) -> Inputs:
    """As if K and V of a case were made anew."""
    dtype = case.kv.arena.layout.dtype

    def kv(begin: int, end: int, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[1] == end - begin
        return case.k[:, :, begin:end].to(dtype), case.v[:, :, begin:end].to(dtype)

    x = torch.zeros(case.q.shape[0], far_tokens, 64)
    return Inputs(far_tokens, are_near, 64, lambda begin, end: x[:, begin:end], kv)


def parts_of(case: Case, page_size: int, num_near_pages: int = 2) -> tuple[PagedKV, PagedKV]:
    """Far and near pages of a case."""
    num_pages = int(case.kv.kv_len.max()) // page_size
    return case.kv.part(0, num_pages - num_near_pages), case.kv.part(num_pages - num_near_pages, num_pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=["group 4", "padding", "three queries"])
@pytest.mark.parametrize("lanes", MIXTURES, ids="+".join)
def test_every_mixture_is_attention_over_everything(
    rig: Rig, lanes: tuple[str, ...], shape: Shape, packing: Packing, dtype: torch.dtype
) -> None:
    shape = replace(shape, causal=True)
    case, part, bound = true(shape, dtype, packing)
    far, near = parts_of(case, shape.page_size)
    far_tokens = far.page_table.shape[2] * shape.page_size
    crew = crew_of(rig, lanes, far_tokens, shape.page_size)
    got = crew.attend(case.q, near, (far,), shape.rule, inputs_of(case, far_tokens, packing == "panels"))
    assert_within(got, part, bound)
    assert crew.scheduler.lanes == lanes  # none has failed
    assert rig.trace.take() == []  # the scheduler was told


SHAPE = replace(SHAPES[0], causal=True)


@pytest.fixture
def case() -> Case:
    return build(SHAPE, torch.bfloat16, "panels")


@pytest.fixture
def truth() -> Truth:
    return true(SHAPE, torch.bfloat16, "panels")


def assert_right(got: Partial, truth: Truth) -> None:
    assert_within(got, truth.part, truth.bound)


@pytest.mark.parametrize("lanes", [names for names in MIXTURES if "recompute" not in names], ids="+".join)
def test_blocks_of_heads_that_differ_in_length(rig: Rig, lanes: tuple[str, ...]) -> None:
    """What a selector picks: a run of blocks, of which each head has its own."""
    q = torch.randn(2, 4, 1, 64)
    arena = Arena.allocate(PageLayout(torch.float32, 64, "panels"), 9, 2, 64)
    arena.k.normal_()
    arena.v.normal_()
    table = torch.stack([torch.randperm(8 * 8)[:24] for _ in range(4)]).view(2, 2, 24).to(torch.int32)
    far = PagedKV(arena, table, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[384, 64], [0, 200]]), True)
    near_table = torch.full((2, 2, 1), 8, dtype=torch.int32)
    near = PagedKV(arena, near_table, torch.zeros(2, dtype=torch.int64), torch.full((2,), 64))
    rule = ScoreRule(0.125)
    got = crew_of(rig, lanes, 384, 16).attend(q, near, (far,), rule)
    expected = kernels.attend(q, far, near, rule=rule, causal=True)
    assert torch.allclose(got.out, expected.out, atol=1e-5)
    assert torch.allclose(got.lse, expected.lse, atol=1e-5)


@pytest.mark.parametrize("of_blocks", [False, True], ids=["pages", "blocks"])
def test_a_run_that_is_written_anew_is_read_anew(rig: Rig, of_blocks: bool) -> None:
    """A choice of blocks, and the length of a run, change in place between steps."""
    arena = Arena.allocate(PageLayout(torch.float32, 16, "panels"), 40, 1, 16)
    arena.k.normal_()
    arena.v.normal_()
    lengths = torch.tensor([[320]] if of_blocks else [320])
    far = PagedKV(
        arena, torch.arange(20, dtype=torch.int32).view(1, 1, 20), torch.zeros_like(lengths), lengths, of_blocks
    )
    near = PagedKV(arena, torch.full((1, 1, 1), 39, dtype=torch.int32), torch.tensor([0]), torch.tensor([16]))
    q, rule, crew = torch.randn(1, 2, 1, 16), ScoreRule(0.25), crew_of(rig, ("attend", "logits", "stream"), 320, 16)
    for length, first in ((320, 0), (100, 10), (250, 3)):
        lengths.fill_(length)
        far.page_table.copy_(torch.arange(first, first + 20))
        got = crew.attend(q, near, (far,), rule)
        assert torch.allclose(got.out, kernels.attend(q, far, near, rule=rule, causal=True).out, atol=1e-5)


def test_a_run_that_stands_for_others_goes_to_one_lane(rig: Rig, case: Case, truth: Truth) -> None:
    """A second run is not split: its tokens come with counts."""
    far, near = parts_of(case, 64)
    first, second = far.part(0, 8), far.part(8, far.page_table.shape[2])
    crew = crew_of(rig, tuple(LANES), 512, 64)
    assert_right(crew.attend(case.q, near, (first, second), SHAPE.rule, inputs_of(case, 512, True)), truth)


def test_whoever_listens_is_told_of_every_step(rig: Rig, case: Case) -> None:
    far, near = parts_of(case, 64)
    crew, steps = crew_of(rig, ("attend", "logits", "stream"), 896, 64), list[Step]()
    crew.on_step = steps.append
    for _ in range(3):
        crew.attend(case.q, near, (far,), SHAPE.rule)
    crew.on_step = None
    crew.attend(case.q, near, (far,), SHAPE.rule)
    assert len(steps) == 3
    for step in steps:
        assert step.solution.plan == crew.plan
        assert {(span.row, span.name) for span in step.spans} == {
            ("device", "near"),
            *((row, "attend") for row in ("device", "down", "host", "up")),
            *((row, "logits") for row in ("device", "down", "host", "up")),
            *((row, "stream") for row in ("device", "up")),
        }
        assert all(step.begin <= span.begin <= span.end <= step.end for span in step.spans)


def test_what_a_step_that_failed_did_is_not_the_next_ones(
    rig: Rig, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, near = parts_of(case, 64)
    crew, steps = crew_of(rig, ("attend", "stream"), 896, 64), list[Step]()
    crew.on_step = steps.append
    with monkeypatch.context() as patch, pytest.warns(LaneWarning, match="'attend' has failed"):
        patch.setitem(LANES, "attend", dying)
        crew.attend(case.q, near, (far,), SHAPE.rule)
    crew.attend(case.q, near, (far,), SHAPE.rule)
    assert "dying" in {span.name for span in steps[0].spans}
    assert {span.name for span in steps[1].spans} == {"near", "stream"}


def test_no_far_token_at_all(rig: Rig, case: Case, truth: Truth) -> None:
    got = Crew(rig, Scheduler(plain_machine())).attend(case.q, case.kv.part(0, 16), (), SHAPE.rule)
    assert_right(got, truth)


def test_nan_in_q_is_an_error_of_the_user(rig: Rig, case: Case) -> None:
    far, near = parts_of(case, 64)
    case.q[0, 3, 0, 5] = float("nan")
    with pytest.raises(InputError, match="q contains NaN"):
        crew_of(rig, ("attend", "stream"), 896, 64).attend(case.q, near, (far,), SHAPE.rule)


def test_the_same_plan_gives_the_same_bits(rig: Rig, case: Case) -> None:
    far, near = parts_of(case, 64)
    inputs = inputs_of(case, 896, are_near=False)
    crews = [crew_of(rig, tuple(LANES), 896, 64) for _ in range(2)]
    first, second = (crew.attend(case.q, near, (far,), SHAPE.rule, inputs) for crew in crews)
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)


def test_what_a_link_stands_still_for_goes_first(rig: Rig) -> None:
    there: Ticket[None] = Ticket(rig.bell)
    there.set(lambda: None)
    order: list[str] = []

    def work(name: str, ticket: Ticket[None]) -> DeviceWork:
        for _ in range(3):
            yield ticket
            order.append(name)
        return Partial(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1))

    drive(None, {"rebuilt": work("rebuilt", rig.done), "streamed": work("streamed", there)}, rig)
    assert order == ["streamed"] * 3 + ["rebuilt"] * 3


def test_a_step_is_not_told_of_one_that_failed_before_it(rig: Rig, case: Case) -> None:
    far, near = parts_of(case, 64)
    steps: list[Step] = []
    crew = crew_of(rig, ("attend", "stream"), 896, 64)
    crew.on_step = steps.append
    good = case.q.clone()
    case.q[0, 3, 0, 5] = float("nan")
    with pytest.raises(InputError, match="q contains NaN"):
        crew.attend(case.q, near, (far,), SHAPE.rule)
    crew.attend(good, near, (far,), SHAPE.rule)
    (step,) = steps
    assert min(span.begin for span in step.spans) >= step.begin


# -- bad luck ----------------------------------------------------------------------------------------------------------


def stalling(task: Task, share: PagedKV) -> DeviceWork:
    yield Ticket(task.rig.bell)  # which nobody is at work on
    raise AssertionError("it was done")


def dying(task: Task, share: PagedKV) -> DeviceWork:
    def die(q: Tensor) -> Partial:
        raise ZeroDivisionError("division by zero")

    part = task.rig.ask_host("dying", task.q, die, 100)
    yield part
    return part.result()


@pytest.mark.parametrize(("bad", "why"), [(stalling, "nothing came within"), (dying, "division by zero")])
@pytest.mark.parametrize("name", list(LANES))
def test_a_lane_that_fails_is_done_without(
    rig: Rig, case: Case, truth: Truth, monkeypatch: pytest.MonkeyPatch, name: str, bad: Any, why: str
) -> None:
    """One warning, the same answer, and later steps do not try it again."""
    far, near = parts_of(case, 64)
    crew, inputs = crew_of(rig, tuple(LANES), 896, 64), inputs_of(case, 896, are_near=True)
    monkeypatch.setattr("tandemkv.lanes.crew._SHORTEST_DEADLINE_S", 0.1)
    with monkeypatch.context() as patch:
        patch.setitem(LANES, name, bad)
        with pytest.warns(LaneWarning, match=f"the lane '{name}' has failed .*{why}") as said:
            got = crew.attend(case.q, near, (far,), SHAPE.rule, inputs)
        assert len(said) == 1
        assert_right(got, truth)
        assert name not in crew.scheduler.lanes
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_right(crew.attend(case.q, near, (far,), SHAPE.rule, inputs), truth)


def test_what_was_streamed_is_not_rebuilt_as_the_first_tokens(
    rig: Rig, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recompute is left alone: it knows the inputs of the first tokens, and would answer with their K and V."""
    far, near = parts_of(case, 64)
    crew = crew_of(rig, ("recompute", "stream"), 896, 64)
    monkeypatch.setitem(LANES, "stream", dying)
    with (
        pytest.warns(LaneWarning, match="'stream' has failed"),
        pytest.raises(LaneError, match="of recompute no lane can take the tokens of another"),
    ):
        crew.attend(case.q, near, (far,), SHAPE.rule, inputs_of(case, 896, are_near=True))


def test_the_last_lane_that_fails_is_an_error(rig: Rig, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = parts_of(case, 64)
    monkeypatch.setitem(LANES, "attend", dying)
    with (
        pytest.warns(LaneWarning, match="'attend' has failed"),
        pytest.raises(LaneError, match="the last lane, 'attend', has failed"),
    ):
        crew_of(rig, ("attend",), 896, 64).attend(case.q, near, (far,), SHAPE.rule)


def at_half_a_gigabyte(task: Task, share: PagedKV) -> DeviceWork:
    """The attend lane on a host so slow that what else runs on this machine does not matter."""

    def work(q: Tensor) -> Partial:
        time.sleep(share.num_bytes / 0.5e9)
        return kernels.attend(q, share, rule=task.rule)

    part = task.rig.ask_host("attend", task.q, work, 100)
    yield part
    return part.result()


def test_a_link_that_slows_down_tenfold_gets_less(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a run; answers stay right, and the split follows within 20 steps."""
    monkeypatch.setitem(LANES, "attend", at_half_a_gigabyte)
    shape = replace(SHAPES[2], q_len=1, softcap=None, causal=True, kv_len=(4096, 4096), kv_start=(0, 0))
    case = build(shape, torch.bfloat16, "panels")
    far, near = parts_of(case, 32)
    whole = kernels.attend(case.q, case.kv, rule=shape.rule, causal=True)
    rig.up.speed = Speed(10, 1)
    crew = Crew(rig, Scheduler(replace(plain_machine(10, 0.5), up=rig.up.speed), ("attend", "stream")))
    bound = attend_bound(case.q, case.k, case.v, case.visible, shape.rule, kernel_rounding(torch.bfloat16), 80)

    def share_streamed(num_steps: int) -> float:
        for _ in range(num_steps):
            got = crew.attend(case.q, near, (far,), shape.rule)
        assert_within(got, whole, bound)
        plan = crew.scheduler.plan(work_of(case.q, near, (far,))).plan
        return plan.tokens.get("stream", 0) / plan.num_tokens

    before = share_streamed(60)
    rig.up.speed = Speed(100, 0.1)
    after = share_streamed(20)
    assert before > 0.5
    assert after < 0.3


def test_pages_are_free_when_an_error_is_raised(rig: Rig, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device fails while the host reads: the error comes when the host has ended."""
    far, near = parts_of(case, 64)
    has_ended = threading.Event()

    def slow(task: Task, share: PagedKV) -> DeviceWork:
        def work(q: Tensor) -> Partial:
            time.sleep(0.1)
            has_ended.set()
            return kernels.attend(q, share, rule=task.rule)

        part = task.rig.ask_host("slow", task.q, work, 100)
        yield part
        return part.result()

    monkeypatch.setitem(LANES, "attend", slow)
    crew = crew_of(rig, ("attend",), 896, 64)

    def failing(task: Task, near: PagedKV) -> Partial:
        time.sleep(0.05)
        raise RuntimeError("the device failed")

    monkeypatch.setattr(crew, "_attend_near", failing)
    with pytest.raises(RuntimeError, match="the device failed"):
        crew.attend(case.q, near, (far,), SHAPE.rule)
    assert has_ended.is_set()
