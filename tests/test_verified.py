"""A verified tail: an estimate without bias, an error within its promise, and a report that says what was read."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import coverage
from tandemkv import assets, selection, verification
from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import InputError
from tandemkv.kernels import attend, merge
from tandemkv.kernels.blocks import ChosenBlocks
from tandemkv.kernels.sample import collapse
from tandemkv.select import SELECTORS, Sparse, Summaries, Tally, Verified
from tandemkv.types import BLOCK_TOKENS, Partial, ScoreRule
from tandemkv.verification import NUM_GROUPS, PILOT_BLOCKS, Draw, Step, Tail, sample_size, scaled, scatter_of
from tests.dense import causal_visible, dense_attention, random_kv
from tests.sparse import assert_attends_to
from tests.tolerances import TORCH_FLOAT32, assert_within, attend_bound

HEAD_DIM, SCALE, NEAR_TOKENS = 16, 0.3, 32
RULE = ScoreRule(SCALE)
SMALL = Verified(1e-9, 0.05)
NUM_SEEDS = 250


class Uneven:
    """The first KV head keeps what the budget allows, the others three blocks; which ones says a table."""

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        shape = (q.shape[0], summaries.num_kv_heads, summaries.num_blocks)
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        scores[:, 1:] = scores[:, 1:].masked_fill(torch.arange(summaries.num_blocks) % 13 > 0, -torch.inf)
        return scores


class Setting(NamedTuple):
    """A cache whose layers hold all but the last tokens, the same in each; q asks of every q_len new ones."""

    cache: KVCache
    q: Tensor
    k: Tensor
    v: Tensor
    q_len: int
    kv_start: tuple[int, ...]

    @property
    def layer(self) -> LayerKV:
        return self.cache.layer(0)

    @property
    def new(self) -> tuple[Tensor, Tensor, Tensor]:
        tokens = slice(self.layer.seq_len, self.layer.seq_len + self.q_len)
        return self.q, self.k[:, :, tokens], self.v[:, :, tokens]

    @property
    def asks(self) -> Step:
        return Step(self.q, RULE, worker_pool())

    def truth(self) -> Partial:
        """Of the last step, in float64."""
        visible = causal_visible(self.k.shape[2], self.q_len, torch.tensor(self.kv_start))
        return dense_attention(self.q, self.k, self.v, visible, SCALE)

    def step(self) -> Tensor:
        """A step as a model's; every layer alike."""
        new = self.new
        self.cache.begin_step(len(self.kv_start), self.q_len)
        for index in range(self.cache.spec.num_layers):
            out = extend_and_attend(*new, self.cache.layer(index), RULE)
        self.cache.end_step()
        return out


def setting(
    sparse: Sparse | None,
    num_far_blocks: int = 70,
    *,
    heads: tuple[int, int] = (4, 2),
    kv_start: tuple[int, ...] = (0,),
    q_len: int = 1,
    num_layers: int = 1,
    value_noise: float = 1.0,
    padding: float = 0.0,
    num_steps: int = 1,
) -> Setting:
    """heads: of queries and of keys. value_noise: of values about their mean. padding: what is added to its values."""
    past = num_far_blocks * BLOCK_TOKENS + NEAR_TOKENS
    num_tokens = past + num_steps * q_len
    spec = CacheSpec(
        num_layers=num_layers,
        num_kv_heads=heads[1],
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        near_tokens=NEAR_TOKENS,
        far_bytes=1 << 25,
        page_size=16,
        chunk_tokens=64,
    )
    k, v = random_kv(len(kv_start), heads[1], num_tokens, HEAD_DIM, torch.float32)
    q, _ = random_kv(len(kv_start), heads[0], q_len, HEAD_DIM, torch.float32, seed=1)
    v = v * value_noise + random_kv(1, heads[1], 1, HEAD_DIM, torch.float32, seed=2)[0]
    for seq, start in enumerate(kv_start):
        v[seq, :, :start] += padding
    cache = KVCache(spec, worker_pool())
    cache.reserve(len(kv_start), num_tokens)
    cache.begin_step(len(kv_start), past)
    for index in range(num_layers):
        cache.layer(index).set_kv_start(torch.tensor(kv_start))
        for begin in range(0, past, spec.chunk_tokens):
            chunk = slice(begin, min(begin + spec.chunk_tokens, past))
            cache.layer(index).evict()
            cache.layer(index).append(k[:, :, chunk], v[:, :, chunk])
        cache.layer(index).evict()
    cache.end_step()
    cache.sparse = sparse
    return Setting(cache, q, k, v, q_len, kv_start)


def budget(num_blocks: int) -> int:
    return NEAR_TOKENS + BLOCK_TOKENS + num_blocks * BLOCK_TOKENS


@contextmanager
def attended(case: Setting) -> Iterator[tuple[ChosenBlocks, Partial]]:
    """Inside of a step: what was chosen, and attention over that and over near tokens."""
    layer, (q, k, v) = case.layer, case.new
    with layer.extended(case.q_len) as held:
        runs = (*selection.taking_part(q, layer, held, worker_pool()), held.near)
        layer.write(k, v)
        assert layer.chosen is not None
        yield layer.chosen[1], attend(q, *runs, rule=RULE, causal=True, pool=worker_pool())


# -- No bias -----------------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "a head each": {"heads": (2, 2)},
    "padding and several queries": {"kv_start": (0, 37, 300), "q_len": 3},
}


def assert_unbiased(estimates: list[Partial], truth: Partial) -> None:
    """exp(lse), and out x exp(lse) along the reference, summed over the rows of a sequence, are on average those of the
    reference, within 3 standard errors; each of the hundreds of numbers alone within 5.5."""
    share = torch.stack([(part.lse.double() - truth.lse).exp() for part in estimates])
    outs = share[..., None] * torch.stack([part.out.double() for part in estimates])
    found = torch.cat([share[..., None], outs], -1)  # [seed, seq, head, query, 1 + dim]
    expected = torch.cat([torch.ones_like(truth.lse)[..., None], truth.out], -1)

    def deviations(got: Tensor, want: Tensor) -> Tensor:
        error = got.std(0) / math.sqrt(len(got))
        assert bool((error > 0).all())
        return (got.mean(0) - want).abs() / error

    def of_sequences(x: Tensor) -> Tensor:
        return torch.stack([x[..., 0].sum((-2, -1)), (x[..., 1:] * truth.out).sum((-3, -2, -1))])

    assert deviations(of_sequences(found).transpose(0, 1), of_sequences(expected)).max() <= 3
    assert deviations(found, expected).max() <= 5.5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("selector", ["window", Uneven()], ids=["window", "uneven"])
@pytest.mark.parametrize("num_groups", [1, NUM_GROUPS])
def test_the_tail_is_unbiased_with_b_fixed(name: str, selector: Any, num_groups: int) -> None:
    case = setting(Sparse(selector, budget(6), verified=SMALL), **SHAPES[name])
    with attended(case) as (chosen, exact):
        found = []
        for seed in range(NUM_SEEDS):
            tail = Tail(case.asks, case.layer, chosen, seed)
            drawn = tail.draw(tail.num_left // 4 + torch.arange(2))
            part = scaled(tail.attend_groups(drawn, num_groups), tail.num_left, drawn.counts)
            found.append(merge([exact, collapse(part)]))
    assert_unbiased(found, case.truth())


@pytest.mark.parametrize("name", SHAPES)
def test_pilot_and_sample_together_are_unbiased(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step, its sample of a size that was told; the pilot counts for itself."""
    monkeypatch.setattr(verification, "PILOT_BLOCKS", 10)
    monkeypatch.setattr(verification, "sample_size", lambda exact, parts, drawn, left, promise, pool: left // 6)
    case = setting(Sparse("window", budget(6), verified=SMALL), **SHAPES[name])
    with attended(case) as (chosen, exact):
        found = []
        for seed in range(NUM_SEEDS):
            promise = replace(SMALL, seed=seed)
            case.layer._sparse = Sparse("window", budget(6), verified=promise)  # the choice stands
            rest = verification.attend_rest(case.asks, case.layer, chosen, exact)
            assert not rest.is_exact.any()
            found.append(merge([exact, *rest.parts]))
    assert_unbiased(found, case.truth())


def positions(tail: Tail, seq: int, head: int) -> list[int]:
    """Of the shuffled blocks of a head, from their entries, of which each stands for a block of a page."""
    far = tail._far
    slots, page_blocks = far.slots[seq].tolist(), far.page_blocks
    entries = tail._order[seq, head, : int(tail.num_left[seq, head])].tolist()
    pages = [divmod(entry, far.arena.num_kv_heads * page_blocks) for entry in entries]
    return [slots.index(slot) * page_blocks + block for slot, block in pages]


class Drawn(NamedTuple):
    """What a step drew: its tail, and (blocks of each head, groups) of every draw."""

    tail: Tail
    draws: list[list[list[list[int]]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Drawn]:
    """Every tail of the test and its draws, `[draw][seq][head]` lists of blocks."""
    found: list[Drawn] = []
    make, draw = Tail.__init__, Tail.draw

    def noted_make(self: Tail, *args: Any) -> None:
        make(self, *args)
        found.append(Drawn(self, []))

    def noted_draw(self: Tail, num_wanted: Tensor) -> Draw:
        got = draw(self, num_wanted)
        heads = [
            [
                positions(self, seq, head)[first : first + count]
                for head, (first, count) in enumerate(zip(*both, strict=True))
            ]
            for seq, both in enumerate(zip(got.first.tolist(), got.counts.tolist(), strict=True))
        ]
        assert got.counts.tolist() == num_wanted.tolist()
        found[-1].draws.append(heads)
        return got

    monkeypatch.setattr(Tail, "__init__", noted_make)
    monkeypatch.setattr(Tail, "draw", noted_draw)
    return found


@pytest.mark.parametrize("selector", ["window", Uneven()], ids=["window", "uneven"])
@pytest.mark.parametrize("epsilon", [1e-9, 0.12, 0.9])
def test_no_block_is_read_twice_and_none_of_padding(selector: Any, epsilon: float, drawn: list[Drawn]) -> None:
    """Chosen, pilot, sample and what was drawn more are disjoint; together they are what the report says was read."""
    kv_start = (0, 37, 300)
    case = setting(Sparse(selector, budget(6), verified=Verified(epsilon, 0.05)), 400, kv_start=kv_start)
    case.step()
    assert case.layer.chosen is not None
    chosen, num_read = case.layer.chosen[1], 0
    for seq, start in enumerate(kv_start):
        first, num_far = start // BLOCK_TOKENS, case.layer.num_far_blocks
        for head in range(2):
            own = chosen.blocks[seq, head, : int(chosen.counts[seq, head])].tolist()
            read = own + [block for draw in drawn[0].draws for block in draw[seq][head]]
            assert len(read) == len(set(read)), "a block was read twice"
            assert set(read) <= set(range(first, num_far))
            assert first in own, "the block where padding ends was drawn"
            assert len(drawn[0].draws[0][seq][head]) == PILOT_BLOCKS
            if epsilon < 1e-3:
                assert set(read) == set(range(first, num_far))
            else:
                assert NUM_GROUPS <= len(read) - len(own) - PILOT_BLOCKS < num_far // 2
            num_read += len(read)
    num_tokens = sum(case.layer.seq_len - start for start in kv_start) * 2
    near = case.layer.num_near_tokens * len(kv_start) * 2
    assert case.layer.knowledge.tally.num_read == min(num_tokens, near + num_read * BLOCK_TOKENS)


def test_every_block_is_drawn_as_often_as_any_other(drawn: list[Drawn]) -> None:
    """A chi-square of counts over seeds, for each head, below its quantile of 1e-6 (Wilson and Hilferty)."""
    case = setting(Sparse("window", budget(6), verified=SMALL), kv_start=(0, 37))
    with attended(case) as (chosen, _):
        for seed in range(NUM_SEEDS):
            tail = Tail(case.asks, case.layer, chosen, seed)
            tail.draw(torch.full((2, 2), 12))
    for seq in range(2):
        for head in range(2):
            num_left = int(drawn[0].tail.num_left[seq, head])
            count = torch.bincount(torch.tensor([b for each in drawn for b in each.draws[0][seq][head]]), minlength=70)
            expected = NUM_SEEDS * 12 / num_left
            assert int((count > 0).sum()) == num_left
            # Without replacement counts vary less than a Poisson variable's, by (left - 12) / (left - 1).
            square = float((count[count > 0] - expected).square().sum() / expected) * (num_left - 1) / (num_left - 12)
            spread = 2 / (9 * (num_left - 1))
            assert square < (num_left - 1) * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


# -- Seeds -------------------------------------------------------------------------------------------------------------


def test_runs_repeat_with_a_seed_and_layers_steps_and_sequences_draw_others(drawn: list[Drawn]) -> None:
    def run(seed: int) -> tuple[list[Tensor], list[Any]]:
        drawn.clear()
        sparse = Sparse("window", budget(6), verified=Verified(0.2, 0.05, seed))
        case = setting(sparse, 400, num_layers=2, kv_start=(0, 0), num_steps=2)
        return [case.step() for _ in range(2)], [each.draws[0] for each in drawn]

    outs, draws = run(7)
    again, same = run(7)
    assert all(map(torch.equal, outs, again))
    assert draws == same
    others, other = run(8)
    assert not any(map(torch.equal, outs, others))
    pilots = [tuple(blocks) for each in (*draws, *other) for seq in each for blocks in seq]
    assert len(pilots) == 2 * 2 * 2 * 2 * 2  # runs, steps, layers, sequences, heads
    assert len(set(pilots)) == len(pilots), "two of them drew the same"


def test_other_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    setting(Sparse("window", budget(6), verified=SMALL)).step()
    assert torch.equal(torch.rand(2), expected)


# -- Where everything is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("selector", ["window", "bounds", "columns", "clusters", Uneven()], ids=str)
def test_where_everything_is_read_the_step_is_exact_and_counts_as_fallback(name: str, selector: Any) -> None:
    case = setting(Sparse(selector, budget(6), verified=SMALL), 200, **SHAPES[name])
    out = case.step()
    visible = causal_visible(case.k.shape[2], case.q_len, torch.tensor(case.kv_start))
    truth = case.truth()
    # A pilot of 64 parts, groups of 16 and their union are collapsed at once: an exp, a sum of 64 at most (54 u) and
    # a logarithm, each as three merges of two. Then four parts are merged.
    bound = attend_bound(case.q, case.k, case.v, visible, SCALE, TORCH_FLOAT32, num_merges=3 * 3 + 4)
    got = Partial(out.transpose(1, 2), truth.lse.float())
    assert_within(got, truth, bound._replace(lse=torch.full_like(bound.lse, math.inf)))
    tally, num_seqs = case.layer.knowledge.tally, len(case.kv_start)
    assert (tally.num_steps, tally.num_fallbacks) == (num_seqs * 2, num_seqs * 2)
    assert tally.to_dict() == {
        "estimated_error_mean": 0.0,
        "estimated_error_max": 0.0,
        "share_read": 1.0,
        "share_read_max": 1.0,
        "share_fallbacks": 1.0,
        "share_fallbacks_max": 1.0,
    }


@pytest.mark.parametrize("selector", SELECTORS)  # those that forget have not chosen yet
def test_where_the_budget_covers_everything_nothing_is_estimated(
    selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "attend_rest", lambda *_: pytest.fail("something was left out"))
    case = setting(Sparse(selector, budget(100), verified=Verified(0.05, 0.05)), kv_start=(0, 37))
    out = case.step()
    everything = torch.ones(2, 2, case.k.shape[2], dtype=torch.bool)
    assert_attends_to(everything, out, case.q, case.k, case.v, torch.tensor(case.kv_start), SCALE)
    tally = case.cache.tallies[0]
    assert tally == Tally(
        num_read=tally.num_tokens, num_tokens=2 * (2 * case.layer.seq_len - 37), num_steps=4, max_share_read=1.0
    )


@pytest.mark.parametrize("num_sink_tokens", [1, 4, 16, 40])
def test_the_block_where_padding_ends_is_chosen_and_not_drawn(num_sink_tokens: int, drawn: list[Drawn]) -> None:
    case = setting(
        Sparse("window", NEAR_TOKENS + 16 + -(-num_sink_tokens // 16) * 16, num_sink_tokens, verified=SMALL),
        kv_start=(5, 37, 300),
    )
    case.step()
    for seq, start in enumerate(case.kv_start):
        blocks = {block for draw in drawn[0].draws for head in draw[seq] for block in head}
        assert min(blocks) > start // BLOCK_TOKENS


def test_padding_is_not_attended_with_the_least_budget() -> None:
    """No first tokens are asked for, and the budget is the least that a cache takes. Padding is large: it would be seen
    in a draw."""
    for budget_tokens in range(1, 200):
        sparse = Sparse("window", budget_tokens, 0, SMALL)
        with suppress(InputError):
            sparse.check(NEAR_TOKENS)
            break
    case = setting(sparse, kv_start=(5,), padding=100.0)
    out = case.step()
    torch.testing.assert_close(out.transpose(1, 2).double(), case.truth().out, rtol=0, atol=1e-4)


# -- Its arithmetic ----------------------------------------------------------------------------------------------------

CHI_SQUARE = {  # quantiles from tables, of 0.95 and 0.99
    (1, 0.05): 3.84146,
    (10, 0.05): 18.3070,
    (100, 0.05): 124.342,
    (1, 0.01): 6.63490,
    (10, 0.01): 23.2093,
    (100, 0.01): 135.807,
}
WILSON_HILFERTY = {1: 0.03, 10: 3e-3, 100: 3e-4}  # how far that approximation is off, relatively


def parts_of(residuals: Tensor) -> tuple[Partial, Partial]:
    """Parts whose residuals, about a whole of 0 that weighs 1, are these `[num_parts, dim]`."""
    shape = (1, len(residuals), 1, 1)
    whole = Partial(torch.zeros(1, 1, 1, residuals.shape[1]), torch.zeros(1, 1, 1))
    return Partial(residuals.float().reshape(*shape, -1), torch.zeros(shape)), whole


@pytest.mark.parametrize(("freedom", "delta"), CHI_SQUARE)
def test_the_factor_is_a_quantile_of_chi_square(freedom: int, delta: float) -> None:
    """Residuals that have exactly so many independent directions of the same length, as often to either side."""
    directions = torch.eye(freedom, 128)
    parts, whole = parts_of(torch.cat([directions, -directions]).repeat(800 // freedom, 1))
    found = scatter_of(parts, whole, delta)
    torch.testing.assert_close(float(found.variance), 1.0, rtol=2e-3, atol=0)
    expected = CHI_SQUARE[freedom, delta] / freedom
    # Of so few parts others than a part itself lie in its direction less often: the freedom is that much larger.
    finite = 0.5 * freedom / parts.lse.shape[1] * (expected - 1)
    assert abs(float(found.factor) / expected - 1) <= WILSON_HILFERTY[freedom] + finite + 1e-3


@pytest.mark.parametrize("num_parts", [1, 2, 16, 64])
def test_scatter_against_plain_loops(num_parts: int) -> None:
    """Uneven weights and a direction that has most of the variance; float64 and no matrices."""
    generator = torch.Generator().manual_seed(num_parts)
    outs = torch.randn(1, num_parts, 2, 2, 6, generator=generator) * torch.tensor([3.0, 1, 1, 1, 0.3, 0])
    lse = torch.randn(1, num_parts, 2, 2, generator=generator)
    whole = Partial(torch.randn(1, 2, 2, 6, generator=generator), torch.randn(1, 2, 2, generator=generator) + 2)
    found = scatter_of(Partial(outs, lse), whole, 0.1)
    for head in range(2):
        for query in range(2):
            at = (head, query)
            rows = []
            for part in range(num_parts):
                weight = math.exp(lse[0, part, *at] - whole.lse[0, *at])
                rows.append(
                    [
                        weight * (a - b)
                        for a, b in zip(outs[0, part, *at].tolist(), whole.out[0, *at].tolist(), strict=True)
                    ]
                )
            mean = [sum(row[d] for row in rows) / num_parts for d in range(6)]
            rows = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows]
            variance = sum(x * x for row in rows for x in row) / max(1, num_parts - 1)
            torch.testing.assert_close(float(found.variance[0, *at]), variance, rtol=1e-4, atol=1e-12)
            if num_parts == 1:
                continue
            pairs = [(i, j) for i in range(num_parts) for j in range(num_parts) if i != j]
            square = sum(sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) ** 2 for i, j in pairs) / len(pairs)
            freedom = min(max(variance**2 / square, 1.0), 6.0)
            z = 1.2815515655446004  # the normal quantile of 0.9
            factor = (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
            torch.testing.assert_close(float(found.factor[0, *at]), factor, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("num_drawn", "num_left"), [(64, 400), (64, 4000), (30, 30), (0, 0), (32, 1_000_000)])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
def test_the_size_of_a_sample(num_drawn: int, num_left: int, epsilon: float) -> None:
    """The fewest blocks of which factor x variance of the total, n^2 s^2 (1/b - 1/n), is within (epsilon x ||out||)^2;
    the query that asks for most decides for its KV head."""
    generator = torch.Generator().manual_seed(0)
    num_parts, heads = 16, (4, 2)
    outs = torch.randn(1, num_parts, heads[0], 1, 8, generator=generator)
    parts = Partial(outs, 0.1 * torch.randn(1, num_parts, heads[0], 1, generator=generator))
    exact = Partial(torch.full((1, heads[0], 1, 8), 2.0), torch.tensor([8.0, 8, 9, 10])[None, :, None])
    if not num_drawn:
        parts = Partial(torch.zeros_like(outs), torch.full_like(parts.lse, -math.inf))
    drawn, left = torch.full((1, 2), num_drawn), torch.full((1, 2), num_left)
    got = sample_size(exact, parts, drawn, left, Verified(epsilon, 0.05))
    tail = collapse(parts)
    whole = merge([exact, Partial(tail.out, tail.lse + math.log(max(1.0, num_left / max(1, num_drawn))))])
    scatter = scatter_of(parts, whole, 0.05)
    for kv_head in range(2):
        most = 0
        for head in (2 * kv_head, 2 * kv_head + 1):
            norm = float(whole.out[0, head].double().norm())
            of_block = float(scatter.factor[0, head] * scatter.variance[0, head]) / max(num_drawn / num_parts, 1e-9)

            def error(b: int, of_block: float = of_block) -> float:
                return math.sqrt(num_left**2 * of_block * (1 / b - 1 / num_left))

            fewest = next((b for b in range(1, num_left) if error(b) <= epsilon * norm), num_left)
            most = max(most, fewest)
        expected = min(num_left, max(NUM_GROUPS, most))
        assert abs(int(got[0, kv_head]) - expected) <= 1 + 1e-5 * expected


def test_more_than_half_is_all() -> None:
    case = setting(Sparse("window", budget(6), verified=SMALL), 100)
    with attended(case) as (chosen, _):
        tail = Tail(case.asks, case.layer, chosen, 0)
    assert (tail.num_real == 100).all()
    assert (tail.num_left == 94).all()
    left = torch.tensor([[74, 74]])  # 20 of the pilot and 6 chosen were read
    assert tail.affordable(torch.tensor([[24, 25]]), left).tolist() == [[24, 74]]


def test_the_estimated_error_is_that_of_the_sample() -> None:
    """Over seeds the root mean square of true errors is that of the estimated ones without their factor: all in one
    layer of 400 blocks, b = 40."""
    case = setting(Sparse("window", budget(6), verified=SMALL), 400)
    truth, true, told = case.truth(), [], []
    with attended(case) as (chosen, exact):
        for seed in range(NUM_SEEDS):
            tail = Tail(case.asks, case.layer, chosen, seed)
            drawn = tail.draw(torch.full((1, 2), 40))
            groups = tail.attend_groups(drawn, NUM_GROUPS)
            whole = merge([exact, scaled(collapse(groups), tail.num_left, drawn.counts)])
            error = verification.error_of(groups, exact, tail.num_left, drawn.counts, SMALL)
            factor = scatter_of(scaled(groups, tail.num_left, drawn.counts), whole, SMALL.delta).factor
            true.append(((whole.out.double() - truth.out).norm(dim=-1) / truth.out.norm(dim=-1)).square())
            told.append(error.double().square() / factor)
    ratio = torch.stack(told).mean(0) / torch.stack(true).mean(0)
    assert ((ratio - 1).abs() < 5 * math.sqrt(2 / NUM_SEEDS)).all(), ratio  # at worst one degree of freedom


# -- The promise -------------------------------------------------------------------------------------------------------

PROMISE = Verified(0.05, 0.05)


def most_wrong(num_rows: int, delta: float) -> float:
    """A share that one run in 10,000 exceeds where each row is wrong with probability delta."""
    return delta + 3.72 * math.sqrt(delta * (1 - delta) / num_rows)


@pytest.fixture(scope="module", params=["flat", "two clusters"])
def text(request: pytest.FixtureRequest) -> coverage.RandomContext:
    return coverage.RandomContext(request.param, 16_384)


def errors_of(text: coverage.RandomContext, selector: str, promise: Verified, num_runs: int) -> tuple[Tensor, Tally]:
    """Of several steps, with several seeds."""
    found, tallies = [], []
    context, plain = text.fork(), Sparse(selector, coverage.budget_of(text.context))
    context.sparse = plain
    text.step(context)  # clusters are made once
    for seed in range(num_runs):
        cache = context.fork()
        cache.sparse = replace(plain, verified=replace(promise, seed=seed))
        with coverage.watching() as watched:
            for _ in range(10):
                text.step(cache)
        found.append(watched.error)
        tallies += cache.tallies
        cache.close()
    context.close()
    return torch.cat(found), Tally.of(tallies)


@pytest.mark.parametrize("selector", ["bounds", "clusters"])
def test_errors_keep_their_promise(text: coverage.RandomContext, selector: str) -> None:
    """And not because all is read, or because the promise is easy."""
    error, tally = errors_of(text, selector, PROMISE, 12)
    assert float((error > PROMISE.epsilon).double().mean()) <= most_wrong(len(error), PROMISE.delta)
    found = tally.to_dict()
    assert found["share_read"] < 0.5
    assert found["share_fallbacks"] < 0.05
    assert float(error.median()) > PROMISE.epsilon / 4


def test_a_sample_that_is_too_small_breaks_the_promise(
    text: coverage.RandomContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what was asked for: what the promise costs is needed."""
    size = verification.sample_size
    monkeypatch.setattr(verification, "sample_size", lambda *args: size(*args) // 2)
    error, _ = errors_of(text, "bounds", PROMISE, 5)
    assert float((error > PROMISE.epsilon).double().mean()) > most_wrong(len(error), PROMISE.delta)


@pytest.fixture(scope="module")
def novel() -> coverage.ShippedContext:
    return coverage.ShippedContext(assets.JUDGED_TOKENS)


@pytest.mark.parametrize("selector", ["bounds", "clusters"])
def test_errors_of_the_shipped_model_keep_their_promise(novel: coverage.ShippedContext, selector: str) -> None:
    """Every layer and head of its steps, on the inputs that these had, against the exact output."""
    cache = novel.fork()
    cache.sparse = Sparse(selector, coverage.budget_of(novel.context), verified=PROMISE)
    with coverage.watching() as watched:
        for _ in range(25):
            novel.step(cache)
    assert watched.layers == [0, 1, 2, 3] * 25
    error = watched.error
    assert len(error) == 25 * 4 * 4
    assert float((error > PROMISE.epsilon).double().mean()) <= most_wrong(len(error), PROMISE.delta)
    found = Tally.of(cache.tallies).to_dict()
    assert 0.2 < found["share_read"] < 0.95
    assert 0 < found["share_fallbacks"] < 0.95
    assert float((error > 1e-3).double().mean()) > 0.05, "nothing was estimated"


# -- The report --------------------------------------------------------------------------------------------------------


def test_what_is_told_of_a_step_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, and for all of them."""
    rests: list[verification.Rest] = []

    def noted(*args: Any) -> verification.Rest:
        rests.append(verification.attend_rest(*args))
        return rests[-1]

    monkeypatch.setattr(selection, "attend_rest", noted)
    case = setting(
        Sparse("window", budget(6), verified=Verified(0.12, 0.05)), 400, kv_start=(0, 37), num_layers=2, q_len=2
    )
    case.step()
    tallies = case.cache.tallies
    assert len(tallies) == len(rests) == 2
    num_tokens = (2 * case.layer.seq_len - 37) * 2
    for tally, rest in zip(tallies, rests, strict=True):
        assert rest.error.shape == (2, 4, 2)
        assert 0 < float(rest.error.max()) < 1
        assert tally.num_rows == 2 * 4 * 2
        assert tally.max_error == float(rest.error.max())
        num_read = int(rest.num_read.sum()) * BLOCK_TOKENS + 4 * case.layer.num_near_tokens
        shares = num_read / num_tokens, int(rest.is_exact.sum()) / 4
        assert tally[3:] == (num_read, num_tokens, 4, int(rest.is_exact.sum()), *shares)
        assert tally.to_dict() == {
            "estimated_error_mean": pytest.approx(float(rest.error.mean())),
            "estimated_error_max": tally.max_error,
            "share_read": num_read / num_tokens,
            "share_read_max": num_read / num_tokens,
            "share_fallbacks": int(rest.is_exact.sum()) / 4,
            "share_fallbacks_max": int(rest.is_exact.sum()) / 4,
        }
    assert rests[0].num_read.tolist() != rests[1].num_read.tolist() or tallies[0].max_error != tallies[1].max_error
    both = Tally.of(tallies)
    assert both.max_error == max(tally.max_error for tally in tallies)
    assert both.to_dict()["estimated_error_mean"] == pytest.approx(float(torch.stack([r.error for r in rests]).mean()))
    assert both.num_tokens == 2 * num_tokens


def test_a_tally_adds_steps_and_layers() -> None:
    one = Tally().plus(torch.tensor([[0.1, 0.3]]), 30, 100, 2, 1)
    two = one.plus(torch.tensor([0.2, 0.2]), 70, 100, 2, 0)
    errors = {"estimated_error_mean": 0.2, "estimated_error_max": 0.3}
    maxima = {"share_read_max": 0.3, "share_fallbacks_max": 0.5}
    assert one.to_dict() == pytest.approx({**errors, "share_read": 0.3, "share_fallbacks": 0.5, **maxima})
    assert two.num_rows == 4
    maxima = {"share_read_max": 0.7, "share_fallbacks_max": 0.5}
    assert two.to_dict() == pytest.approx({**errors, "share_read": 0.5, "share_fallbacks": 0.25, **maxima})
    whole = Tally.of([one, two, Tally()])
    assert whole.to_dict() == pytest.approx({**errors, "share_read": 130 / 300, "share_fallbacks": 2 / 6, **maxima})
    assert two.summary == (
        "20.0% on average, 30.0% at most; 50.0% of far and near tokens read (in a step at most 70.0%), "
        "25.0% of heads exactly (50.0%)"
    )
    assert set(Tally().to_dict().values()) == {0.0}
    assert Tally.of([]) == Tally()


def test_tallies_of_a_cache() -> None:
    """None without a promise; a fork has its own, beams go on; another mode and another text start anew."""
    verified = Sparse("window", budget(6), verified=Verified(0.2, 0.05))
    case = setting(verified, 200, num_layers=2)
    assert case.cache.tallies == [Tally(), Tally()]
    case.step()
    assert [tally.num_steps for tally in case.cache.tallies] == [2, 2]
    fork = case._replace(cache=case.cache.fork())
    assert fork.cache.tallies == [Tally(), Tally()]
    fork.cache.crop(fork.cache.seq_len - 1)
    fork.step()
    assert [tally.num_steps for tally in fork.cache.tallies] == [2, 2]
    assert [tally.num_steps for tally in case.cache.tallies] == [2, 2]
    fork.cache.select(torch.tensor([0, 0]))
    assert [tally.num_steps for tally in fork.cache.tallies] == [2, 2]
    for other in (None, Sparse("window", budget(6))):
        case.cache.sparse = other
        assert case.cache.tallies == []
    case.cache.sparse = replace(verified, selector="bounds")
    assert case.cache.tallies == [Tally(), Tally()]
    fork.cache.crop(0)
    assert fork.cache.tallies == [Tally(), Tally()]
    fork.cache.reset()
    assert fork.cache.tallies == []


def test_another_promise_starts_another_tally() -> None:
    case = setting(Sparse("window", budget(6), verified=Verified(0.2, 0.05)), 200)
    case.step()
    case.cache.sparse = Sparse("window", budget(6), verified=Verified(0.05, 0.05))
    assert case.cache.tallies == [Tally()]


def test_a_step_that_is_undone_is_not_told() -> None:
    case = setting(Sparse("window", budget(6), verified=Verified(0.2, 0.05)), 200, num_layers=2)
    q, k, v = case.new
    case.cache.begin_step(1, 1)
    extend_and_attend(q, k, v, case.cache.layer(0), RULE)
    assert case.cache.layer(0).knowledge.tally.num_steps == 2
    with pytest.raises(InputError, match="NaN"):
        extend_and_attend(q * math.nan, k, v, case.cache.layer(1), RULE)
    case.cache.settle()
    assert case.cache.tallies == [Tally(), Tally()]
    case.step()
    assert [tally.num_steps for tally in case.cache.tallies] == [2, 2]


@pytest.mark.parametrize("selector", ["bounds", "columns", "lookahead", "tandem"])
def test_beams_keep_what_codes_are_made_with(selector: str) -> None:
    """The next page that becomes far is coded as those before it, and blocks are chosen as before."""
    case = setting(Sparse(selector, budget(20)), 150, kv_start=(0, 0))
    twin, basis = case.cache.fork(), case.layer.summaries().basis
    twin.close()
    case.cache.select(torch.tensor([1, 1]))
    assert case.layer.summaries().basis is basis
    assert case.layer.summaries().codes is not None
    case.step()


# -- Whatever else is set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("promise", [None, Verified(0.2, 0.05)], ids=["sparse", "verified"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_default_dtype_changes_nothing(selector: str, promise: Verified | None) -> None:
    outs = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = setting(None, 150, num_steps=2)
        try:
            torch.set_default_dtype(dtype)
            case.cache.sparse = Sparse(selector, budget(20), verified=promise)
            case.step()
            outs.append(case.step())
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_rows_of_padding_have_no_error_and_need_no_sample() -> None:
    """The second sequence is padding up to the last of three queries, or all the way."""
    past, sparse = 400 * BLOCK_TOKENS + NEAR_TOKENS, Sparse("window", budget(6), verified=Verified(0.2, 0.05))
    for start in (past + 2, past + 3):
        case = setting(sparse, 400, kv_start=(0, start), q_len=3)
        case.step()
        told = case.layer.knowledge.tally.to_dict()
        assert 0 < told["estimated_error_mean"] < told["estimated_error_max"] < 1
        assert 0 < told["share_read"] < 0.5
        assert told["share_fallbacks"] == 0


# -- Limits ------------------------------------------------------------------------------------------------------------


def test_a_sink_logit_takes_part_in_the_error() -> None:
    """Values that are nearly alike: without a sink any sample is right, with one its weight has to be."""
    errors = []
    case = setting(Sparse("window", budget(6), verified=Verified(0.02, 0.05)), 400, value_noise=0.01)
    sink_logit = case.truth().lse.amax((0, 2)).float()
    truth = merge([Partial(*(x.float() for x in case.truth()))], sink_logit=sink_logit).out.transpose(1, 2)
    for seed in range(40):
        case.cache.sparse = Sparse("window", budget(6), verified=Verified(0.02, 0.05, seed))
        out = extend_and_attend(*case.new, case.layer, RULE, sink_logit)
        case.layer.crop(case.layer.seq_len - 1)
        errors.append((out - truth).norm(dim=-1) / truth.norm(dim=-1))
    error = torch.cat(errors).flatten()
    assert float((error > 0.02).double().mean()) <= most_wrong(len(error), 0.05)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 0.05), "epsilon must lie between 0 and 1, such as 0.05, got 0"),
        ((1, 0.05), "epsilon must lie between 0 and 1, such as 0.05, got 1"),
        ((-0.1, 0.05), "epsilon must lie between 0 and 1"),
        ((math.nan, 0.05), "epsilon must lie between 0 and 1, such as 0.05, got nan"),
        ((math.inf, 0.05), "epsilon must lie between 0 and 1, such as 0.05, got inf"),
        ((True, 0.05), "epsilon must lie between 0 and 1, such as 0.05, got True"),
        (("0.05", 0.05), "epsilon must lie between 0 and 1, such as 0.05, got '0.05'"),
        ((0.05, 0.0), "delta must lie between 0 and 1, such as 0.05, got 0.0"),
        ((0.05, 1.0), "delta must lie between 0 and 1, such as 0.05, got 1.0"),
        ((0.05, False), "delta must lie between 0 and 1, such as 0.05, got False"),
        ((0.05, None), "delta must lie between 0 and 1, such as 0.05, got None"),
        ((0.05, 0.05, -1), "seed must be a whole number of at least 0, got -1"),
        ((0.05, 0.05, True), "seed must be a whole number of at least 0, got True"),
        ((0.05, 0.05, 1.5), "seed must be a whole number of at least 0, got 1.5"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Verified(*arguments)


def test_a_promise_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"verified must be a Verified\(epsilon, delta\) or None, got \(0.05, 0.05\)"):
        Sparse("window", 256, verified=(0.05, 0.05))  # type: ignore[arg-type]
