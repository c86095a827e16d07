"""Each selector does what defines it, through a cache and `extend_and_attend`: held against a plain float64 ledger."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tandemkv.attention import extend_and_attend, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import InputError
from tandemkv.select import MAX_SELECT_QUERIES, SELECTORS, Observer, Seen, Selector, Sparse, Summaries
from tandemkv.select.bounds import Bounds
from tandemkv.select.columns import Columns
from tandemkv.select.heavy_hitters import HeavyHitters
from tandemkv.select.keyformer import Keyformer
from tandemkv.select.recall import Recall
from tandemkv.select.salience import Salience
from tandemkv.select.window import Window
from tandemkv.selection import MASS_QUERIES
from tandemkv.types import BLOCK_TOKENS, ScoreRule
from tests.dense import causal_visible
from tests.sparse import assert_attends_to

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, SCALE = 2, 2, 16, 1.0
RULE = ScoreRule(SCALE)
OBSERVERS = [name for name, selector in SELECTORS.items() if isinstance(selector, Observer)]
FORGETFUL = [name for name in OBSERVERS if SELECTORS[name].forgets]  # type: ignore[attr-defined]


def spec_of(page_size: int, num_layers: int = 1) -> CacheSpec:
    return CacheSpec(
        num_layers=num_layers,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=torch.float32,
        near_tokens=2 * page_size + 7,
        far_bytes=1 << 24,
        page_size=page_size,
        chunk_tokens=128 if page_size == 64 else 48,
    )


@dataclass
class Text:
    """q, k and v of every token; scores of a query are spread by about 4, so that some blocks weigh most."""

    num_seqs: int = 2
    num_tokens: int = 700
    kv_start: tuple[int, ...] = (0, 37)
    seed: int = 0
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        dims = self.num_seqs, NUM_KV_HEADS, self.num_tokens, HEAD_DIM
        self.q = torch.randn(dims[0], NUM_KV_HEADS * GROUP_SIZE, *dims[2:], generator=generator)
        self.k, self.v = (torch.randn(dims, generator=generator) for _ in range(2))


def cache_of(text: Text, sparse: Sparse | None, spec: CacheSpec) -> KVCache:
    cache = KVCache(spec, worker_pool())
    cache.sparse = sparse
    cache.reserve(text.num_seqs, text.num_tokens)
    for index in range(spec.num_layers):
        cache.layer(index).set_kv_start(torch.tensor(text.kv_start))
    return cache


def feed(cache: KVCache, text: Text, num_tokens: int) -> Tensor:
    """The next tokens, as a model's forward pass does; what the last layer gave."""
    begin = cache.seq_len
    now = slice(begin, begin + num_tokens)
    cache.begin_step(text.num_seqs, num_tokens)
    for index in range(cache.spec.num_layers):
        q, k, v = (x[:, :, now] for x in (text.q, text.k, text.v))
        out = extend_and_attend(q, k, v, cache.layer(index), RULE)
    cache.end_step()
    return out


def chosen_of(layer: LayerKV) -> list[list[set[int]]]:
    """Blocks of the last choice, `[seq][head]`."""
    assert layer.chosen is not None
    chosen = layer.chosen[1]
    return [
        [set(chosen.blocks[seq, head, :count].tolist()) for head, count in enumerate(counts)]
        for seq, counts in enumerate(chosen.counts.tolist())
    ]


def budget(spec: CacheSpec, num_blocks: int) -> int:
    """Tokens for so many blocks where near tokens are most."""
    return spec.near_tokens + MAX_SELECT_QUERIES + num_blocks * BLOCK_TOKENS


# -- The ledger --------------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """What an observer must know of every block, and so attend to, in float64 and one query at a time.

    observe: (numbers, mass of one query, tokens seen) -> numbers. is_kept: of far numbers [num_blocks] of real blocks,
    which may take part. first_mean: a prompt's queries count as their mean.
    """

    text: Text
    spec: CacheSpec
    sparse: Sparse
    observe: Callable[[Tensor, Tensor, Tensor], Tensor]
    is_kept: Callable[[Tensor], Tensor]
    watches_far: bool
    forgets: bool
    first_mean: bool = False
    seq_len: int = 0
    first_near: int = 0
    has_seen: bool = False
    made_from: tuple[int, ...] = ()
    num_looks: int = 0

    def __post_init__(self) -> None:
        self.numbers = torch.zeros(self.text.num_seqs, NUM_KV_HEADS, 0, dtype=torch.float64)
        self.chosen: list[list[set[int]]] = []

    def feed(self, num_tokens: int) -> Tensor | None:
        """The next tokens. bool `[num_seqs, num_kv_heads, num_tokens]`, what the step attends to; None of prompts."""
        if num_tokens <= MAX_SELECT_QUERIES:
            return self._step(num_tokens)
        for begin in range(0, num_tokens, self.spec.chunk_tokens):
            num_new = min(self.spec.chunk_tokens, num_tokens - begin)
            self._grow(num_new)
            everything = torch.ones(self.text.num_seqs, NUM_KV_HEADS, self.seq_len, dtype=torch.bool)
            is_last = begin + num_new == num_tokens
            if not is_last:
                everything[..., : self.first_near] = False
            self._learn(everything, min(num_new, MASS_QUERIES), is_all=is_last)
        return None

    def _grow(self, num_new: int) -> None:
        excess, page_size = self.seq_len - self.first_near - self.spec.near_tokens, self.spec.page_size
        self.first_near += -(-max(0, excess) // page_size) * page_size
        self.seq_len += num_new
        num_blocks = -(-self.seq_len // BLOCK_TOKENS)
        self.numbers = torch.nn.functional.pad(self.numbers, (0, num_blocks - self.numbers.shape[2]))

    def _step(self, num_new: int) -> Tensor:
        self._grow(num_new)
        num_far = self.first_near // BLOCK_TOKENS
        wanted = (self.sparse.budget_tokens - (self.seq_len - self.first_near)) // BLOCK_TOKENS
        kept = torch.ones(self.text.num_seqs, NUM_KV_HEADS, self.seq_len, dtype=torch.bool)
        looks = not self.has_seen or (num_new > 1 and not self.forgets)
        is_all = looks or num_far == 0 or (wanted >= num_far and not self.forgets)
        if not is_all:
            self._choose(num_far, wanted)
            kept[..., : self.first_near] = False
            for seq, heads in enumerate(self.chosen):
                for head, blocks in enumerate(heads):
                    for block in blocks:
                        kept[seq, head, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS] = True
        self._learn(kept, num_new, is_all=is_all and num_far > 0)
        return kept

    def _choose(self, num_far: int, wanted: int) -> None:
        """A choice stands until pages or the room for it have changed, or everything was looked at."""
        made_from = (self.first_near, -(-self.seq_len // self.spec.page_size), wanted, self.num_looks)
        if made_from == self.made_from:
            return
        self.made_from, self.chosen = made_from, []
        for seq, start in enumerate(self.text.kv_start):
            self.chosen.append([])
            first = start // BLOCK_TOKENS
            for head in range(NUM_KV_HEADS):
                numbers = self.numbers[seq, head, :num_far]
                is_kept = torch.zeros(num_far, dtype=torch.bool)
                is_kept[first:] = self.is_kept(numbers[first:])
                sinks = [block for block in range(first, num_far) if block * BLOCK_TOKENS < start + 4]
                rest = [block for block in range(first, num_far) if is_kept[block] and block not in sinks]
                rest.sort(key=lambda block, numbers=numbers: -float(numbers[block]))  # type: ignore[misc]
                blocks = {*sinks, *rest[: max(0, wanted - len(sinks))]}
                self.chosen[seq].append(blocks)
                if self.forgets:
                    gone = [block for block in range(num_far) if block not in blocks]
                    numbers[gone] = -math.inf

    def _learn(self, kept: Tensor, num_queries: int, *, is_all: bool) -> None:
        mass = self._mass(kept, num_queries)
        watched = kept[..., ::BLOCK_TOKENS].clone()
        if not self.watches_far and not is_all:
            watched[..., : self.first_near // BLOCK_TOKENS] = False
        if self.first_mean and num_queries > MAX_SELECT_QUERIES:
            new = mass.mean(2)
        else:
            new = self.numbers
            listed = self.seq_len - self.first_near + int(kept[..., : self.first_near].sum(-1).max())
            attended = (self.seq_len - torch.tensor(self.text.kv_start)).clamp(1, listed)[:, None, None]
            for i in range(num_queries):
                new = self.observe(new, mass[:, :, i], attended)
        gone = self.numbers == -math.inf
        self.numbers = torch.where(watched & ~gone, new, self.numbers)
        self.has_seen = True
        self.num_looks += is_all

    def _mass(self, kept: Tensor, num_queries: int) -> Tensor:
        """`[num_seqs, num_kv_heads, num_queries, num_blocks]`, the largest share of a group's query heads."""
        q = self.text.q[:, :, self.seq_len - num_queries : self.seq_len].double()
        k = self.text.k[:, :, : self.seq_len].double().repeat_interleave(GROUP_SIZE, 1)
        causal = causal_visible(self.seq_len, num_queries, torch.tensor(self.text.kv_start))
        visible = causal[:, None] & kept.repeat_interleave(GROUP_SIZE, 1)[:, :, None]
        weights = torch.softmax((SCALE * q @ k.mT).masked_fill(~visible, -math.inf), -1).nan_to_num(0.0)
        weights = torch.nn.functional.pad(weights, (0, -self.seq_len % BLOCK_TOKENS))
        shares: Tensor = weights.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1).unflatten(1, (-1, GROUP_SIZE)).amax(2)
        return shares


def ledger_of(selector: Selector, text: Text, spec: CacheSpec, sparse: Sparse) -> Ledger:
    """As the papers have it, in units of blocks."""
    if isinstance(selector, Salience):
        beta, rate = selector.beta, selector.rate

        def average(x: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
            return x + rate * (mass - x)

        return Ledger(text, spec, sparse, average, lambda x: x > beta * x.mean(), False, False, first_mean=True)
    if isinstance(selector, HeavyHitters):
        return Ledger(text, spec, sparse, lambda x, mass, _: x + mass, lambda x: x > -math.inf, True, True)
    assert isinstance(selector, Recall)
    num_queries = selector.num_queries

    def recall(x: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
        return torch.where(mass > BLOCK_TOKENS / seen, float(num_queries), (x - 1).clamp(min=0))

    return Ledger(text, spec, sparse, recall, lambda x: x > 0, True, True)


# A prompt of several chunks, a question, decoding, a few tokens at once, decoding.
STORY = (310, *[1] * 37, 5, *[1] * 20, 16, *[1] * 9)


# Whose threshold, beside the budget, keeps more of one head than of another.
UNEVEN = (Salience(), Salience(beta=1.5), Recall(num_queries=4))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(
    "selector",
    [
        Salience(),
        Salience(beta=0.3, rate=0.5),
        Salience(beta=1.5),
        HeavyHitters(),
        Recall(),
        Recall(num_queries=4),
    ],
    ids=repr,
)
def test_a_step_attends_to_what_the_ledger_says(selector: Selector, page_size: int) -> None:
    """Every step of a story, in two sequences of which one is padded; and what is known at its end."""
    text, spec = Text(), spec_of(page_size)
    sparse = Sparse(selector, budget(spec, 10 if page_size == 16 else 4))
    cache, ledger = cache_of(text, sparse, spec), ledger_of(selector, text, spec, sparse)
    layer, is_uneven = cache.layer(0), False
    for num_tokens in STORY:
        out, kept = feed(cache, text, num_tokens), ledger.feed(num_tokens)
        assert layer.first_near_token == ledger.first_near
        if kept is not None:
            end, now = cache.seq_len, slice(cache.seq_len - num_tokens, cache.seq_len)
            q, k, v = text.q[:, :, now], text.k[:, :, :end], text.v[:, :, :end]
            assert_attends_to(kept, out, q, k, v, torch.tensor(text.kv_start), SCALE)
        if num_tokens == 1 and ledger.chosen:
            assert chosen_of(layer) == ledger.chosen
            is_uneven |= any(len({len(blocks) for blocks in heads}) > 1 for heads in ledger.chosen)
            assert int(kept.sum(-1).max()) <= sparse.budget_tokens  # type: ignore[union-attr]
    known = torch.cat([layer.known().far, layer.known().near], 2)
    torch.testing.assert_close(known.double(), ledger.numbers, rtol=1e-4, atol=1e-6)
    if selector in UNEVEN:
        assert is_uneven
    assert ledger.chosen


# -- What defines a selector -------------------------------------------------------------------------------------------


def test_salience_lets_a_block_come_back() -> None:
    """Several tokens at once weigh everything anew."""
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse(Salience(), budget(spec, 3)), spec)
    feed(cache, text, 300)
    was_in: list[Any] = []
    for num_tokens in (1, 9, 1, 12, 1):
        feed(cache, text, num_tokens)
        if num_tokens == 1:
            was_in.append(chosen_of(cache.layer(0)))
    far = range(300 // BLOCK_TOKENS - 3)
    histories = [
        [block in chosen[seq][head] for chosen in was_in] for seq in range(2) for head in range(2) for block in far
    ]
    assert [False, True] in [history[:2] for history in histories]
    assert [True, False, True] in histories


def test_salience_carries_what_was_learnt_near_into_the_far_tier() -> None:
    """And what is far is not observed any more, while one token comes after the other."""
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse(Salience(), budget(spec, 2)), spec)
    feed(cache, text, 300)
    layer = cache.layer(0)
    for _ in range(60):
        before, boundary = layer.known(), layer.num_far_blocks
        feed(cache, text, 1)
        after = layer.known()
        assert torch.equal(after.far[..., :boundary], before.far)
        assert torch.equal(after.far[..., boundary:], before.near[..., : layer.num_far_blocks - boundary])
        assert (after.far.diff(dim=2) != 0).any()


@pytest.mark.parametrize("name", FORGETFUL)
@pytest.mark.parametrize("page_size", [16, 64])
def test_what_fell_out_never_comes_back(name: str, page_size: int) -> None:
    """Not when the budget grows, not after another prompt, and not because several tokens are appended."""
    text, spec = Text(), spec_of(page_size)
    cache = cache_of(text, Sparse(name, budget(spec, 4)), spec)
    feed(cache, text, 300)
    layer, gone = cache.layer(0), [[set[int]() for _ in range(NUM_KV_HEADS)] for _ in range(2)]
    num_gone = 0
    for at, num_tokens in enumerate([1] * 30 + [7] + [1] * 30 + [90] + [1] * 20):
        if at == 40:
            cache.sparse = Sparse(name, budget(spec, 14))
        feed(cache, text, num_tokens)
        if num_tokens > MAX_SELECT_QUERIES:
            continue
        for seq, heads in enumerate(chosen_of(layer)):
            for head, blocks in enumerate(heads):
                assert not blocks & gone[seq][head]
                gone[seq][head] |= set(range(layer.num_far_blocks)) - blocks
                num_gone += len(gone[seq][head])
    assert num_gone > 0
    for seq in range(2):
        for head in range(NUM_KV_HEADS):
            if gone[seq][head]:
                numbers = layer.known().far[seq, head]
                assert (numbers[sorted(gone[seq][head])] == -math.inf).all()


def test_keyformer_repeats_with_a_seed() -> None:
    text, spec = Text(), spec_of(16)
    found = []
    for seed in (0, 0, 1):
        cache = cache_of(text, Sparse(Keyformer(seed=seed), budget(spec, 4)), spec)
        feed(cache, text, 300)
        outs = [feed(cache, text, 1) for _ in range(20)]
        found.append((torch.cat(outs, 1), cache.layer(0).known().near))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])


@pytest.mark.parametrize("num_decoded", [0, 64, 256, 10_000])
def test_keyformer_adds_gumbel_noise_to_logarithms(num_decoded: int) -> None:
    """softmax((log mass + noise) / temperature), the temperature rising from 1 to 2 over 256 tokens."""
    mass = torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(1, 1, 1, -1)
    sums, num_seeds = torch.zeros(4, dtype=torch.float64), 4000
    temperature = 1 + min(1.0, num_decoded / 256)
    firsts = torch.zeros(4, dtype=torch.float64)
    for seed in range(num_seeds):
        got = (
            Keyformer(seed=seed).observe(torch.zeros(1, 1, 4), Seen(mass, torch.tensor([64]), 7, num_decoded)).flatten()
        )
        assert abs(float(got.sum()) - 1) < 1e-5
        sums += got.log().double()
        firsts[got.argmax()] += 1
    # Gumbel's: the largest of log p + noise is at i with probability p_i. Five standard deviations.
    p = mass.flatten().double()
    assert ((firsts / num_seeds - p).abs() <= 5 * (p * (1 - p) / num_seeds).sqrt()).all()
    # Differences of log softmax are those of logits over the temperature; Gumbel's variance is pi^2 / 6.
    ratio = (sums[0] - sums[1]) / num_seeds
    assert abs(ratio - math.log(2) / temperature) <= 5 * math.pi / math.sqrt(3 * num_seeds) / temperature


def test_keyformer_counts_no_query_of_padding() -> None:
    nothing = Seen(torch.zeros(1, 1, 3, 4), torch.tensor([64]), 0, 0)
    known = torch.tensor([[[1.0, 2, 3, -math.inf]]])
    assert torch.equal(Keyformer().observe(known, nothing), known)


def test_recall_is_more_than_an_even_share_of_one_of_the_last_queries() -> None:
    """CORM: 1/t of the attention per token, t tokens being seen."""
    selector, num_tokens = Recall(num_queries=3), torch.tensor([160])  # ten blocks: 0.1 is an even share
    known = torch.zeros(1, 1, 4)
    shares = [[0.5, 0.101, 0.099, 0.0], [0.5, 0.0, 0.2, 0.0], [0.5, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]]
    numbers = []
    for share in shares:
        seen = Seen(torch.tensor(share).reshape(1, 1, 1, 4), num_tokens, 0, 0)
        known = selector.observe(known, seen)
        numbers.append(known.flatten().tolist())
    assert numbers == [[3, 3, 0, 0], [3, 2, 3, 0], [3, 1, 2, 0], [3, 0, 1, 0]]
    at_once = Seen(torch.tensor(shares)[None, None], num_tokens, 0, 0)
    assert selector.observe(torch.zeros(1, 1, 4), at_once).flatten().tolist() == numbers[-1]


def test_recall_does_not_recall_what_is_gone() -> None:
    """A prompt attends to everything; what fell out before stays gone."""
    gone = torch.full((1, 1, 2), -math.inf)
    got = Recall().observe(gone, Seen(torch.tensor([[[[0.9, 0.0]]]]), torch.tensor([160]), 0, 0))
    assert torch.equal(got, gone)


@pytest.mark.parametrize("selector", [Bounds(), Columns()], ids=["bounds", "columns"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_the_block_of_the_best_key_is_chosen(selector: Selector, page_size: int) -> None:
    """Every head has its own in another far block, for every query its own; there is room for one beside the first."""
    text, spec = Text(), spec_of(page_size)
    num_steps, past = 12, 400
    generator = torch.Generator().manual_seed(1)
    planted = torch.randint(4, 15, (2, NUM_KV_HEADS, num_steps), generator=generator)
    for seq in range(2):
        for head in range(NUM_KV_HEADS):
            for step in range(num_steps):
                q = text.q[seq, head * GROUP_SIZE : (head + 1) * GROUP_SIZE, past + step]
                q[1] = 0.1 * q[1]  # the other query of the group asks for little
                token = int(planted[seq, head, step]) * BLOCK_TOKENS + step
                text.k[seq, head, token] = 3 * q[0] / q[0].norm() * math.sqrt(HEAD_DIM)
    # Longer than any other, and unlike the others: its own query likes it best.
    cache = cache_of(text, Sparse(selector, budget(spec, 2)), spec)
    feed(cache, text, past)
    layer = cache.layer(0)
    for step in range(num_steps):
        feed(cache, text, 1)
        for seq, heads in enumerate(chosen_of(layer)):
            for head, blocks in enumerate(heads):
                assert int(planted[seq, head, step]) in blocks
                assert len(blocks) < layer.num_far_blocks // 2


def test_window_keeps_the_newest() -> None:
    text, spec = Text(), spec_of(64)
    cache = cache_of(text, Sparse("window", budget(spec, 5)), spec)
    feed(cache, text, 400)
    for _ in range(30):
        feed(cache, text, 1)
        layer = cache.layer(0)
        num_wanted = (budget(spec, 5) - layer.num_near_tokens) // BLOCK_TOKENS
        for seq, heads in enumerate(chosen_of(layer)):
            first = text.kv_start[seq] // BLOCK_TOKENS
            sinks = {first, (text.kv_start[seq] + 3) // BLOCK_TOKENS}
            newest = range(layer.num_far_blocks - num_wanted + len(sinks), layer.num_far_blocks)
            assert heads == [sinks | set(newest)] * NUM_KV_HEADS


# -- What all have in common -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_budgets_hold_for_every_head(name: str, page_size: int) -> None:
    """Near and chosen tokens together, while they grow; first tokens are in; padding, and what is near, are not."""
    text, spec = Text(), spec_of(page_size)
    sparse = Sparse(name, budget(spec, 3) + 5, num_sink_tokens=4)
    cache = cache_of(text, sparse, spec)
    feed(cache, text, 310)
    layer, most = cache.layer(0), 0
    for num_tokens in [1] * 40 + [16] + [1] * 20:
        feed(cache, text, num_tokens)
        if layer.chosen is None or layer.chosen[0] is None or num_tokens > 1:
            continue
        for seq, heads in enumerate(chosen_of(layer)):
            start = text.kv_start[seq]
            for blocks in heads:
                most = max(most, layer.num_near_tokens + len(blocks) * BLOCK_TOKENS)
                assert layer.num_near_tokens + len(blocks) * BLOCK_TOKENS <= sparse.budget_tokens
                assert {start // BLOCK_TOKENS, (start + 3) // BLOCK_TOKENS} <= blocks
                assert all(start < (block + 1) * BLOCK_TOKENS <= layer.first_near_token for block in blocks)
    assert most > sparse.budget_tokens - 2 * BLOCK_TOKENS  # and the budget is used


@pytest.mark.parametrize("name", SELECTORS)
def test_a_fork_knows_what_its_origin_knows(name: str) -> None:
    """Both go on alike, to the bit; and what the fork learns its origin does not."""
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse(name, budget(spec, 4)), spec)
    feed(cache, text, 300)
    for _ in range(20):
        feed(cache, text, 1)
    fork = cache.fork()
    ours = [feed(fork, text, 1) for _ in range(40)]
    theirs = [feed(cache, text, 1) for _ in range(40)]
    assert torch.equal(torch.cat(ours, 1), torch.cat(theirs, 1))
    mine, its = fork.layer(0).known(), cache.layer(0).known()
    assert torch.equal(mine.far, its.far)
    assert torch.equal(mine.near, its.near)
    assert (mine.num_queries, mine.num_decoded) == (its.num_queries, its.num_decoded)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "keyformer"])  # its noise is of places
def test_selected_sequences_take_their_knowledge_along(name: str) -> None:
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse(name, budget(spec, 4)), spec)
    feed(cache, text, 300)
    for _ in range(20):
        feed(cache, text, 1)
    stay, rows = cache.fork(), torch.tensor([1, 0, 1])
    cache.select(rows)
    swapped = replace(text, num_seqs=3, kv_start=(37, 0, 37))
    swapped.q, swapped.k, swapped.v = text.q[rows], text.k[rows], text.v[rows]
    for _ in range(40):
        got, want = feed(cache, swapped, 1), feed(stay, text, 1)
        torch.testing.assert_close(got, want[rows], rtol=1e-5, atol=1e-6)
        if cache.layer(0).chosen is not None:
            assert chosen_of(cache.layer(0)) == [chosen_of(stay.layer(0))[row] for row in rows.tolist()]


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_crop_forgets_what_was_cropped(name: str, page_size: int) -> None:
    """What comes again has other content, and starts anew; what was not cropped keeps what is known of it."""
    text, spec = Text(), spec_of(page_size)
    cache = cache_of(text, Sparse(name, budget(spec, 4)), spec)
    feed(cache, text, 400)
    for _ in range(30):
        feed(cache, text, 1)
    layer = cache.layer(0)
    for seq_len in (416, 304, 256, 208):  # near, and into the far tier, further than the budget reaches
        before = torch.cat([layer.known().far, layer.known().near], 2)
        cache.crop(seq_len)
        num_left = seq_len // BLOCK_TOKENS
        if name in OBSERVERS:
            after = torch.cat([layer.known().far, layer.known().near], 2)
            assert torch.equal(after, before[..., :num_left])
        feed(cache, text, 1)
        if name in OBSERVERS:
            new = torch.cat([layer.known().far, layer.known().near], 2)[..., num_left:]
            most = 1.0 if name != "recall" else SELECTORS["recall"].num_queries  # type: ignore[attr-defined]
            assert new.shape[2] == 1
            assert new.min() >= 0  # no block that is new is gone
            assert new.max() <= most
        for _ in range(34):
            feed(cache, text, 1)
        cache.check()


def test_regrown_blocks_start_from_nothing() -> None:
    """The sum of a block that came again is that of the queries that have seen it."""
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse(HeavyHitters(), budget(spec, 4)), spec)
    feed(cache, text, 300)
    for _ in range(60):
        feed(cache, text, 1)
    cache.crop(320)
    feed(cache, text, 1)
    assert (cache.layer(0).known().near[..., -1] <= 1 + 1e-5).all()
    assert cache.layer(0).known().near.shape[2] == cache.layer(0).num_near_blocks


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_a_step_that_is_undone_has_taught_nothing(name: str, num_tokens: int) -> None:
    """The first layer has learnt, the second fails; repeated, all is as without."""
    text, spec = Text(), spec_of(16, num_layers=2)
    twins = [cache_of(text, Sparse(name, budget(spec, 4)), spec) for _ in range(2)]
    for cache in twins:
        feed(cache, text, 300)
        for _ in range(20):
            feed(cache, text, 1)
    failing, other = twins
    for _ in range(20):  # over every place in a page
        before = [failing.layer(index).knowledge for index in range(2)]
        spoilt = replace(text)
        spoilt.q, spoilt.k, spoilt.v = text.q.clone(), text.k, text.v
        begin = failing.seq_len
        failing.begin_step(2, num_tokens)
        now = slice(begin, begin + num_tokens)
        extend_and_attend(text.q[:, :, now], text.k[:, :, now], text.v[:, :, now], failing.layer(0), RULE)
        spoilt.q[1, -1, begin + num_tokens - 1, 3] = math.nan
        with pytest.raises(InputError, match="NaN"):
            extend_and_attend(spoilt.q[:, :, now], text.k[:, :, now], text.v[:, :, now], failing.layer(1), RULE)
        failing.settle()
        assert failing.seq_len == begin
        for index in range(2):
            assert failing.layer(index).knowledge is before[index]
        got, want = feed(failing, text, 1), feed(other, text, 1)
        if num_tokens > MAX_SELECT_QUERIES:
            continue  # what the prompt has pushed out of the near tier is not promoted
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        if name in OBSERVERS:
            mine, its = (torch.cat([cache.layer(0).known().far, cache.layer(0).known().near], 2) for cache in twins)
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    failing.check()


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_that_comes_late_looks_at_everything_first(name: str) -> None:
    text, spec = Text(), spec_of(64)
    cache = cache_of(text, None, spec)
    feed(cache, text, 400)
    cache.sparse = Sparse(name, budget(spec, 4))
    layer = cache.layer(0)
    assert layer.knowledge.num_queries == 0
    for is_first in (True, False):
        out, now = feed(cache, text, 1), slice(cache.seq_len - 1, cache.seq_len)
        everything = torch.ones(2, NUM_KV_HEADS, cache.seq_len, dtype=torch.bool)
        tokens = text.q[:, :, now], text.k[:, :, : cache.seq_len], text.v[:, :, : cache.seq_len]
        if is_first:
            assert_attends_to(everything, out, *tokens, torch.tensor(text.kv_start), SCALE)
            assert (layer.known().far[0] > 0).all() or name in {"recall", "keyformer"}
            assert layer.chosen is None
        else:
            with pytest.raises(AssertionError):
                assert_attends_to(everything, out, *tokens, torch.tensor(text.kv_start), SCALE)
            assert layer.chosen is not None


@pytest.mark.parametrize("name", ["window", "bounds"])
def test_what_is_far_already_is_summarised_when_the_mode_is_set(name: str) -> None:
    """To the bit what it would be, had the mode been set before; also after it was another one in between."""
    text, spec = Text(), spec_of(64)
    sparse = Sparse(name, budget(spec, 4))
    early, late = cache_of(text, sparse, spec), cache_of(text, None, spec)
    feed(early, text, 400)
    feed(late, text, 400)
    late.sparse = sparse
    for at in range(40):
        if at == 20:  # pages that become far meanwhile have no codes of ours
            late.sparse = Sparse("columns", budget(spec, 4))
            late.sparse = sparse
        assert torch.equal(feed(early, text, 1), feed(late, text, 1))


def test_codes_are_made_of_pages_that_came_while_another_looked() -> None:
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse(Bounds(), budget(spec, 4)), spec)
    feed(cache, text, 300)
    cache.sparse = Sparse("window", budget(spec, 4))
    for _ in range(50):
        feed(cache, text, 1)
    cache.sparse = Sparse(Bounds(), budget(spec, 4))
    fresh = cache_of(text, Sparse(Bounds(), budget(spec, 4)), spec)
    feed(fresh, text, 350)
    for _ in range(20):
        feed(cache, text, 1)
        feed(fresh, text, 1)
        if cache.layer(0).num_far_blocks == fresh.layer(0).num_far_blocks:
            assert chosen_of(cache.layer(0)) == chosen_of(fresh.layer(0))


def test_another_selector_starts_anew_and_the_same_goes_on() -> None:
    text, spec = Text(), spec_of(16)
    cache = cache_of(text, Sparse("heavy_hitters", budget(spec, 4)), spec)
    feed(cache, text, 300)
    feed(cache, text, 1)
    layer = cache.layer(0)
    known = layer.knowledge
    cache.sparse = Sparse("heavy_hitters", budget(spec, 9))
    assert layer.knowledge is known
    cache.sparse = Sparse(Salience(), budget(spec, 9))
    assert layer.knowledge.num_queries == 0
    cache.sparse = Sparse(Salience(beta=0.5), budget(spec, 9))
    feed(cache, text, 1)
    assert layer.knowledge.num_queries == 1


class CountedWindow(Window):
    """How often it was asked."""

    calls: ClassVar[list[int]] = []

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        self.calls.append(summaries.num_blocks)
        return super().score(q, summaries)


class CountedHitters(HeavyHitters):
    """How often it was asked."""

    calls: ClassVar[list[int]] = []

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        self.calls.append(summaries.num_blocks)
        return super().score(q, summaries)


class CountedBounds(Bounds):
    """How often it was asked."""

    calls: ClassVar[list[int]] = []

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        self.calls.append(summaries.num_blocks)
        return super().score(q, summaries)


@pytest.mark.parametrize("kind", [CountedWindow, CountedHitters])
def test_a_choice_that_stands_is_not_made_again(kind: Any) -> None:
    """Only where the boundary, the pages or the room for blocks have changed; and after a crop."""
    text, spec = Text(), spec_of(64)
    cache = cache_of(text, Sparse(kind(), budget(spec, 4)), spec)
    feed(cache, text, 400)
    layer = cache.layer(0)
    kind.calls.clear()
    reasons = set()
    for _ in range(150):
        feed(cache, text, 1)
        room = (budget(spec, 4) - layer.num_near_tokens) // BLOCK_TOKENS
        reasons.add((layer.num_far_pages, -(-layer.seq_len // 64), room))
        assert len(kind.calls) == len(reasons)
    assert len(reasons) < 16
    cache.crop(layer.seq_len - 3)
    feed(cache, text, 1)
    assert len(kind.calls) == len(reasons) + 1


def test_a_choice_that_depends_on_queries_is_made_for_each() -> None:
    text, spec = Text(), spec_of(64)
    cache = cache_of(text, Sparse(CountedBounds(), budget(spec, 4)), spec)
    feed(cache, text, 400)
    CountedBounds.calls.clear()
    for _ in range(30):
        feed(cache, text, 1)
    feed(cache, text, 7)
    assert len(CountedBounds.calls) == 31


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Salience(beta=0), r"beta must be above 0 .*, got 0"),
        (lambda: Salience(rate=1.5), "rate must be above 0 and at most 1, got 1.5"),
        (lambda: Keyformer(first=2.0, last=1.0), "temperatures must be above 0 and rise, got 2.0 to 1.0"),
        (lambda: Keyformer(num_steps=0), "num_steps must be a whole number of tokens, at least 1, got 0"),
        (lambda: Recall(num_queries=0), "num_queries must be a whole number, at least 1, got 0"),
        (lambda: Columns(num_columns=10), "num_columns must be a multiple of 4, at least 4, got 10"),
    ],
)
def test_refusals(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        make()
