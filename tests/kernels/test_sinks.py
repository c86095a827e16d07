"""A sink's logit: one more term of every denominator, applied once, by the last merge."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.kernels import append_and_attend, attend, cpu, merge, reference, torch_ops
from tandemkv.types import PagedKV, PageLayout, Partial, ScoreRule
from tests.paged import poisoned_arena
from tests.tolerances import U, assert_within, excess, merge_bound

MERGES: dict[str, Callable[[list[Partial], Tensor], Partial]] = {
    "one thread": lambda parts, sink: merge(parts, sink_logit=sink),
    "three threads": lambda parts, sink: merge(parts, cpu.WorkerPool(3), sink_logit=sink),
    "torch": torch_ops.merge,
}

logits = st.one_of(st.just(-math.inf), st.floats(-5, 5, width=32), st.sampled_from([1e4, -1e4, 0.0]))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Partial], Tensor]:
    """Parts of a few sequences, heads and queries, some rows empty in all of them, and a logit per head."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_seqs, num_heads, q_len, dim = (draw(st.integers(1, 3)) for _ in range(4))
    rows = num_seqs * num_heads * q_len
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        lse = torch.tensor(draw(st.lists(logits, min_size=rows, max_size=rows))).reshape(num_seqs, num_heads, q_len)
        out = 10 * torch.randn(num_seqs, num_heads, q_len, dim, generator=generator)
        parts.append(Partial(torch.where(lse.unsqueeze(-1) == -math.inf, 0.0, out), lse))
    return parts, torch.tensor(draw(st.lists(logits, min_size=num_heads, max_size=num_heads)))


@pytest.mark.parametrize("name", MERGES)
@settings(max_examples=80, deadline=None)
@given(call=calls())
def test_equals_the_reference(name: str, call: tuple[list[Partial], Tensor]) -> None:
    parts, sink = call
    assert_within(MERGES[name](parts, sink), reference.merge(parts, sink), merge_bound(parts, sink))


def some_parts(num_parts: int) -> list[Partial]:
    generator = torch.Generator().manual_seed(num_parts)
    return [
        Partial(torch.randn(2, 3, 4, 8, generator=generator), torch.randn(2, 3, 4, generator=generator))
        for _ in range(num_parts)
    ]


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_it_is_a_token_without_a_value(num_parts: int, name: str) -> None:
    """As GPT-OSS writes it: softmax over the scores and one more, whose probability is dropped."""
    parts, sink = some_parts(num_parts), torch.tensor([0.5, -1.0, 3.0])
    plain = reference.merge(parts)
    got = MERGES[name](parts, sink)
    scores = torch.stack([plain.lse, sink.double()[:, None].expand_as(plain.lse)], -1)
    kept = torch.softmax(scores, -1)[..., :1]
    torch.testing.assert_close(got.out.double(), plain.out * kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.lse.double(), torch.logsumexp(scores, -1), rtol=1e-6, atol=1e-6)


def test_twice_never_or_for_another_head_is_seen() -> None:
    parts, sink = some_parts(2), torch.tensor([0.5, -1.0, 3.0])
    truth, bound = reference.merge(parts, sink), merge_bound(parts, sink)
    once = merge(parts, sink_logit=sink)
    assert excess(once, truth, bound) <= 1
    assert excess(merge([once], sink_logit=sink), truth, bound) > 10
    assert excess(merge(parts), truth, bound) > 10
    assert excess(merge(parts, sink_logit=sink.roll(1)), truth, bound) > 10


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_no_sink_is_the_identity(num_parts: int, name: str) -> None:
    parts = some_parts(num_parts)
    got = MERGES[name](parts, torch.full((3,), -math.inf))
    plain = torch_ops.merge(parts) if name == "torch" else merge(parts)
    assert torch.equal(got.out, plain.out)
    assert torch.equal(got.lse, plain.lse)


@pytest.mark.parametrize("name", MERGES)
def test_rows_that_see_nothing_give_all_to_the_sink(name: str) -> None:
    empty = torch_ops.empty_partial(torch.zeros(2, 3, 1, 8), 8)
    sink = torch.tensor([0.5, -math.inf, 1e4])
    out, lse = MERGES[name]([empty, empty], sink)
    assert (out == 0).all()
    assert torch.equal(lse, sink[:, None].expand(2, 3, 1))


@pytest.mark.parametrize("name", MERGES)
def test_neither_a_huge_sink_nor_huge_scores_overflow(name: str) -> None:
    part = Partial(torch.full((1, 3, 1, 2), 2.0), torch.tensor([1e4, 1e4, -1e4]).reshape(1, 3, 1))
    out, lse = MERGES[name]([part], torch.tensor([-1e4, 1e4, 1e4]))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([2.0, 1.0, 0.0]), rtol=4 * U * 1e4, atol=0)
    torch.testing.assert_close(lse.flatten(), torch.tensor([1e4, 1e4 + math.log(2), 1e4]), rtol=2 * U, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_runs", [1, 2])
def test_append_and_attend_applies_it_once(num_runs: int, dtype: torch.dtype) -> None:
    """To the bit what attend and merge give; over one item and over several, one run or two."""
    q, k, v = (torch.randn(2, heads, 300, 24).to(dtype) for heads in (6, 2, 2))
    sink = torch.tensor([0.5, -1.0, -math.inf, 5.0, 0.0, 1.0])
    table = torch.arange(2 * 19, dtype=torch.int32).reshape(2, 1, 19).expand(2, 2, 19)
    rule, pool = ScoreRule(0.3), cpu.WorkerPool(2)
    arena = poisoned_arena(PageLayout(dtype, 16, "panels"), 2 * 19, 2, 24)
    cpu.append(arena, table, 0, k[:, :, :298], v[:, :, :298])
    zeros = torch.zeros(2, dtype=torch.int64)
    newest = PagedKV(arena, table, torch.full((2,), 100) if num_runs == 2 else zeros, torch.full((2,), 300))
    runs = [PagedKV(arena, table, zeros, torch.full((2,), 100))] * (num_runs - 1) + [newest]
    q = q[:, :, 298:]
    got = append_and_attend(q, k[:, :, 298:], v[:, :, 298:], *runs, rule=rule, pool=pool, sink_logit=sink)
    part = attend(q, *runs, rule=rule, causal=True, pool=pool)
    want = reference.merge([part], sink).out.transpose(1, 2)
    eps = {torch.float32: 8 * U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=1e-6)
    strided = torch.stack([sink, sink], 1)[:, 0]
    again = append_and_attend(q, k[:, :, 298:], v[:, :, 298:], *runs, rule=rule, pool=pool, sink_logit=strided)
    assert torch.equal(got, again)


REFUSED = {
    "too few": (torch.zeros(2), r"sink_logit must be torch.float32 \[3\] on cpu, got torch.float32 \[2\] on cpu"),
    "two dims": (torch.zeros(1, 3), r"got torch.float32 \[1, 3\] on cpu"),
    "bf16": (torch.zeros(3).bfloat16(), r"got torch.bfloat16 \[3\] on cpu"),
    "elsewhere": (torch.zeros(3, device="meta"), r"got torch.float32 \[3\] on meta"),
    "NaN": (torch.tensor([0.0, math.nan, 1.0]), r"must be finite or -inf, got \[0.0, nan, 1.0\]"),
    "infinite": (torch.tensor([0.0, 1.0, math.inf]), r"must be finite or -inf, got \[0.0, 1.0, inf\]"),
    "a list": ([0.0, 0.0, 0.0], "sink_logit must be a tensor, got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    sink, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        merge(some_parts(1), sink_logit=sink)  # type: ignore[arg-type]
    arena = poisoned_arena(PageLayout(torch.float32, 16), 1, 3, 8)
    kv = PagedKV(arena, torch.zeros((1, 3, 1), dtype=torch.int32), torch.tensor([0]), torch.tensor([1]))
    x = torch.zeros(1, 3, 1, 8)
    with pytest.raises(InputError, match=message):
        append_and_attend(x, x, x, kv, rule=ScoreRule(1.0), pool=cpu.single_thread(), sink_logit=sink)  # type: ignore[arg-type]
    assert arena.k.isnan().all()


def test_no_gradient_is_needed() -> None:
    """A model's sinks are parameters."""
    sink = torch.nn.Parameter(torch.zeros(3))
    assert merge(some_parts(1), sink_logit=sink).lse.shape == (2, 3, 4)
