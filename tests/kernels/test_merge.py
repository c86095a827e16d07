"""`merge` as an algebra: associative, commutative, with an identity; any split of a run merges into the whole."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandemkv.errors import InputError
from tandemkv.kernels import attend, cpu, merge, reference, torch_ops
from tandemkv.types import Packing, PageLayout, Partial, ScoreRule
from tests.paged import paginate
from tests.tolerances import U, assert_within, attend_bound, kernel_rounding, merge_bound

DTYPES = [torch.float32, torch.bfloat16]
PROPERTY = settings(max_examples=80, deadline=None)
MERGES: dict[str, Callable[[list[Partial]], Partial]] = {
    "one thread": merge,
    "three threads": lambda parts: merge(parts, cpu.WorkerPool(3)),
    "torch": torch_ops.merge,
}

lses = st.one_of(
    st.just(-math.inf),
    st.floats(-1e4, 1e4, width=32),
    st.floats(-5, 5, width=32),
    st.sampled_from([1e4, -1e4, 0.0]),
)


@st.composite
def partials(draw: st.DrawFn, min_parts: int = 1, max_parts: int = 6) -> list[Partial]:
    """Parts of one shape, each row empty, ordinary or huge on its own; empty rows are the identity."""
    num_parts = draw(st.integers(min_parts, max_parts))
    rows, dim = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for _ in range(num_parts):
        lse = torch.tensor(draw(st.lists(lses, min_size=rows, max_size=rows)), dtype=torch.float32).reshape(1, rows, 1)
        out = 10 * torch.randn(1, rows, 1, dim, generator=generator)
        parts.append(Partial(torch.where(lse.unsqueeze(-1) == -math.inf, 0.0, out), lse))
    return parts


def in_random_grouping(draw: Callable[[st.SearchStrategy[int]], int], parts: list[Partial]) -> Partial:
    """Merges two random parts, or three, until one is left: a random tree over a random order."""
    parts = list(parts)
    while len(parts) > 1:
        arity = min(draw(st.integers(2, 3)), len(parts))
        parts.append(merge([parts.pop(draw(st.integers(0, len(parts) - 1))) for _ in range(arity)]))
    return parts[0]


@pytest.mark.parametrize("name", MERGES)
@PROPERTY
@given(parts=partials())
def test_equals_the_reference(name: str, parts: list[Partial]) -> None:
    assert_within(MERGES[name](parts), reference.merge(parts), merge_bound(parts))


@PROPERTY
@given(partials(min_parts=2), st.data())
def test_is_associative_and_commutative(parts: list[Partial], data: st.DataObject) -> None:
    assert_within(in_random_grouping(data.draw, parts), reference.merge(parts), merge_bound(parts))


@pytest.mark.parametrize("name", MERGES)
@PROPERTY
@given(parts=partials(max_parts=1), position=st.integers(0, 2))
def test_the_empty_subset_is_the_identity(name: str, parts: list[Partial], position: int) -> None:
    (part,) = parts
    empty = torch_ops.empty_partial(part.out, part.out.shape[3])
    padded = [empty] * position + [part] + [empty] * (2 - position)
    got = MERGES[name](padded)
    assert torch.equal(got.out, part.out)
    assert torch.equal(got.lse, part.lse)


@pytest.mark.parametrize("name", MERGES)
def test_nothing_but_empty_parts_is_empty(name: str) -> None:
    empty = torch_ops.empty_partial(torch.zeros(2, 3, 1, 8), 8)
    out, lse = MERGES[name]([empty] * 3)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("height", [1e4, -1e4])
def test_huge_lse_neither_overflows_nor_vanishes(height: float, name: str) -> None:
    out = torch.tensor([2.0, 6.0]).reshape(2, 1, 1, 1, 1)
    lse = torch.full((2, 1, 1, 1), height)
    got = MERGES[name]([Partial(out[i], lse[i]) for i in range(2)])
    torch.testing.assert_close(got.out.item(), 4.0, rtol=2 * U * 1e4, atol=0)
    torch.testing.assert_close(got.lse.item(), height + math.log(2), rtol=2 * U, atol=0)


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("base", [0.0, -1e4, 5e3])
def test_a_difference_of_1e4_leaves_the_larger_part(base: float, name: str) -> None:
    small, large = (
        Partial(torch.full((1, 1, 1, 2), x), torch.full((1, 1, 1), y)) for x, y in ((3.0, base), (7.0, base + 1e4))
    )
    for parts in ([small, large], [large, small]):
        got = MERGES[name](parts)
        assert torch.equal(got.out, large.out)
        assert torch.equal(got.lse, large.lse)


def test_one_part_is_returned_as_it_is() -> None:
    part = Partial(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1))
    assert merge([part]) is part


def test_strided_parts_give_the_same_bits() -> None:
    """As `attention` hands them over: transposed to the model's layout, expanded, sliced."""
    parts = [Partial(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5)) for _ in range(2)]
    strided = [
        Partial(part.out.transpose(1, 2).contiguous().transpose(1, 2), part.lse.mT.contiguous().mT) for part in parts
    ]
    assert not strided[0].out.is_contiguous()
    assert not strided[0].lse.is_contiguous()
    for got, want in zip(merge(strided), merge(parts), strict=True):
        assert torch.equal(got, want)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    parts = [Partial(torch.randn(3, 32, 7, 16), 5 * torch.randn(3, 32, 7)) for _ in range(5)]
    want = merge(parts)
    for num_threads in (1, 2, 3):
        got = merge(parts, cpu.WorkerPool(num_threads))
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)


def test_inputs_are_left_alone() -> None:
    parts = [Partial(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1)) for _ in range(2)]
    copies = [Partial(part.out.clone(), part.lse.clone()) for part in parts]
    merge(parts)
    for part, copy in zip(parts, copies, strict=True):
        assert torch.equal(part.out, copy.out)
        assert torch.equal(part.lse, copy.lse)


# ---- Splits ----


@PROPERTY
@given(
    st.lists(st.integers(0, 4), max_size=90),
    st.sampled_from(DTYPES),
    st.sampled_from(["rows", "panels"]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.data(),
)
def test_any_split_merges_into_the_whole(
    owner: list[int], dtype: torch.dtype, packing: Packing, scale: float, data: st.DataObject
) -> None:
    """Token t belongs to subset owner[t] of five, of which any may be empty; the subsets are merged in any grouping."""
    generator = torch.Generator().manual_seed(len(owner))
    k, v = (torch.randn(1, 2, len(owner), 16, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(1, 6, 1, 16, generator=generator)
    layout = PageLayout(dtype, 16, packing)
    tokens = [[t for t, subset in enumerate(owner) if subset == i] for i in range(5)]
    runs = [paginate(k[:, :, own], v[:, :, own], layout) for own in tokens]
    parts = [attend(q, run, rule=ScoreRule(scale)) for run in runs]
    truth = reference.attend(q, paginate(k, v, layout), rule=ScoreRule(scale), causal=False)
    visible = torch.ones(1, 1, len(owner), dtype=torch.bool)
    bound = attend_bound(q, k, v, visible, scale, kernel_rounding(dtype), num_merges=len(parts))
    assert_within(in_random_grouping(data.draw, parts), truth, bound)
    assert_within(attend(q, *runs, rule=ScoreRule(scale)), truth, bound)


# ---- The door ----


def part_of(*shape: int) -> Partial:
    return Partial(torch.zeros(shape), torch.zeros(shape[:-1]))


GOOD = part_of(1, 2, 1, 8)
REFUSED = {
    "no part": ([], "at least one part; the empty subset is out = 0, lse = -inf"),
    "another head_dim": ([GOOD, part_of(1, 2, 1, 4)], r"expected out \[1, 2, 1, 8\] and its lse, got \[1, 2, 1, 4\]"),
    "another head count": ([GOOD, part_of(1, 3, 1, 8)], r"got \[1, 3, 1, 8\] and \[1, 3, 1\]"),
    "an lse that does not fit": ([GOOD, Partial(GOOD.out, torch.zeros(1, 2))], r"got \[1, 2, 1, 8\] and \[1, 2\]"),
    "its own lse": ([Partial(GOOD.out, torch.zeros(1, 2))], r"got \[1, 2, 1, 8\] and \[1, 2\]"),
    "out of bf16": (
        [GOOD, Partial(GOOD.out.bfloat16(), GOOD.lse)],
        "float32, got out torch.bfloat16 and lse torch.float32",
    ),
    "lse of float64": (
        [GOOD, Partial(GOOD.out, GOOD.lse.double())],
        "float32, got out torch.float32 and lse torch.float64",
    ),
    "two devices": ([GOOD, Partial(GOOD.out.to("meta"), GOOD.lse.to("meta"))], r"on one device, got \['cpu', 'meta'\]"),
    "lse elsewhere": ([Partial(GOOD.out, GOOD.lse.to("meta"))], r"on one device, got \['cpu', 'meta'\]"),
}


def test_what_is_no_partial_is_refused() -> None:
    for wrong in (None, 1.0, (GOOD.out, GOOD.lse)):
        with pytest.raises(InputError, match="merge takes a list of Partials, got"):
            merge([GOOD, wrong])  # type: ignore[list-item]


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    parts, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        merge(parts)


def test_parts_on_another_device_are_merged_there() -> None:
    parts = [Partial(GOOD.out.to("meta"), GOOD.lse.to("meta"))] * 2
    assert merge(parts).out.device.type == "meta"
