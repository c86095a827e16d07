"""What a sparse step saves, and what a verified one reads: one layer of 32:8 heads x 128 from Python."""

import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import common
from tandemkv import machine

machine.set_passive_spin()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tandemkv.attention import extend_and_attend, worker_pool  # noqa: E402
from tandemkv.cache import CacheSpec, KVCache  # noqa: E402
from tandemkv.kernels import attend, block_mass  # noqa: E402
from tandemkv.select import SELECTORS, Estimator, Sparse, Summariser, Verified  # noqa: E402
from tandemkv.select.clusters import Clustered, Clusters  # noqa: E402
from tandemkv.select.tandem import Tandem  # noqa: E402
from tandemkv.types import Arena, PageLayout, ScoreRule  # noqa: E402

MODULE = "benchmarks.sparse"
CONTEXT, SHARES = 131_072, (0.05, 0.02)
NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, NEAR_TOKENS, SPARE_TOKENS = 8, 4, 128, 1024, 2048
RULE = ScoreRule(HEAD_DIM**-0.5)
PROMISE = Verified(0.05, 0.05)
FLUSHED = torch.ones(1 << 26, dtype=torch.int64)  # 512 MiB, more than any cache
LOGIT_DEVIATION = 2.0
MAX_ERROR = 0.01  # of out, rounded to bf16 once
HELP = """One decode step of one layer, 32:8 heads x 128 in bf16, appended, selected, attended and merged, from Python.

Every selector at a share of the context as its budget, beside the exact step, all in turn, after 512 MiB of other
memory were read; medians. `limit` is what the bytes of the budget and of what the selector reads to choose would allow.
Then verified(0.05, 0.05) behind two selectors, on keys whose logits have a deviation of 2: flat keys, as wide in every
direction, and graded ones, whose widths fall as those of trained models do (43 of 128 channels have nine tenths of the
variance). Values have a mean as large as their deviation. `wrong` is the share of query heads whose error, against the
exact step, is above epsilon.

Example: python -m benchmarks.sparse --context 32768 --json
"""


@dataclass(frozen=True)
class Row:
    """One selector and budget. limit: of the speed-up, from bytes."""

    context: int
    selector: str
    budget_tokens: int
    ms: float
    exact_ms: float
    speedup: float
    limit: float


@dataclass(frozen=True)
class VerifiedRow:
    """One selector in front of a verified tail, shares of many steps. read: of the bytes of K and V, codes included."""

    context: int
    keys: str
    selector: str
    budget_tokens: int
    ms: float
    exact_ms: float
    read: float
    fallbacks: float
    wrong: float
    largest_error: float


class Tokens(NamedTuple):
    """K and V `[1, num_kv_heads, num_tokens, head_dim]` and as many queries as may be asked, bf16."""

    q: Tensor
    k: Tensor
    v: Tensor


def random_tokens(context: int, keys: str, seed: int = 0) -> Tokens:
    """Logits have a deviation of LOGIT_DEVIATION, whatever the keys."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    num_tokens = context + SPARE_TOKENS
    widths = torch.ones(HEAD_DIM)
    if keys == "graded":
        widths = (1 + torch.arange(HEAD_DIM) / 8.0) ** -1.0
    widths = widths / widths.pow(4).mean().pow(0.25)  # of q and k alike: the variance of a logit is mean(widths^4)
    k = normal(1, NUM_KV_HEADS, num_tokens, HEAD_DIM).mul_(widths).bfloat16()
    v = normal(1, NUM_KV_HEADS, num_tokens, HEAD_DIM) + normal(1, NUM_KV_HEADS, 1, HEAD_DIM)
    q = normal(1, NUM_KV_HEADS * GROUP_SIZE, SPARE_TOKENS, HEAD_DIM) * widths * LOGIT_DEVIATION
    return Tokens(q.bfloat16(), k, v.bfloat16())


class Layer:
    """A cache of one layer that holds a context, and its forks."""

    def __init__(self, tokens: Tokens, context: int) -> None:
        pages = 2 * context // 64 + SPARE_TOKENS  # all forks together may grow as much
        spec = CacheSpec(
            num_layers=1,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            near_tokens=NEAR_TOKENS,
            far_bytes=pages * 2 * NUM_KV_HEADS * 64 * HEAD_DIM * 2,
        )
        self.tokens, self._cache = tokens, KVCache(spec, worker_pool())
        self._cache.begin_step(1, context)
        for begin in range(0, context, spec.chunk_tokens):
            chunk = slice(begin, min(begin + spec.chunk_tokens, context))
            self._cache.layer(0).evict()
            self._cache.layer(0).append(tokens.k[:, :, chunk], tokens.v[:, :, chunk])
        self._cache.end_step()

    def fork(self, sparse: Sparse | None) -> KVCache:
        """The same context, attended to in another way."""
        fork = self._cache.fork()
        fork.sparse = sparse
        return fork

    def timed_step(self, cache: KVCache, *, is_cold: bool) -> tuple[Tensor, float]:
        """The next token's attention, and its milliseconds.

        is_cold: blocks lie in memory, not in the processor's cache, because a model has other layers.
        """
        at, (q, k, v) = cache.seq_len, self.tokens
        query, new = at % SPARE_TOKENS, slice(at % k.shape[2], at % k.shape[2] + 1)
        q, k, v = q[:, :, query : query + 1], k[:, :, new], v[:, :, new]
        cache.begin_step(1, 1)  # of all layers
        if is_cold:
            FLUSHED.sum()
        start = time.perf_counter()
        out = extend_and_attend(q, k, v, cache.layer(0), RULE)
        ms = (time.perf_counter() - start) * 1e3
        cache.end_step()
        return out, ms

    def step(self, cache: KVCache) -> Tensor:
        """The next token."""
        return self.timed_step(cache, is_cold=False)[0]


def limit_of(selector: str, budget_tokens: int, context: int) -> float:
    """Bytes of the exact step over bytes of this one: its budget, and what it reads of all blocks to choose."""
    policy, token_bytes = SELECTORS[selector], 4 * HEAD_DIM
    read_bytes = 0.0
    if isinstance(policy, Summariser):
        page = Arena.allocate(PageLayout(torch.bfloat16, packing="panels"), 1, 1, HEAD_DIM)
        read_bytes += policy.allocate(page).num_bytes / page.layout.page_size
    if isinstance(policy, Clusters | Tandem):  # a mean key and a mean value in bf16, which stand for the rest
        read_bytes += 4 * HEAD_DIM / (16 * policy.cluster_blocks)
    if isinstance(policy, Clusters):  # and the mean keys in float32, which choose
        read_bytes += 4 * HEAD_DIM / (16 * policy.cluster_blocks)
    return context * token_bytes / (budget_tokens * token_bytes + context * read_bytes)


def check(layer: Layer, selector: str, context: int) -> None:
    """A sparse step attends to the blocks that were chosen, to near tokens and to what stands for the others: the first
    group of heads in float64."""
    cache = layer.fork(Sparse(selector, max(2 * NEAR_TOKENS, context // 10)))
    layer.step(cache)  # an observer looks at everything first
    got, held = layer.step(cache)[0, 0, :GROUP_SIZE].double(), cache.layer(0)
    assert held.chosen is not None
    chosen = held.chosen[1]
    blocks = chosen.blocks[0, 0, : int(chosen.counts[0, 0])].long()
    far = (blocks[:, None] * 16 + torch.arange(16)).flatten()
    seen = torch.cat([far, torch.arange(held.first_near_token, held.seq_len)])
    q, k, v = (x[0].double() for x in layer.tokens)
    keys, values, counts = k[0, seen], v[0, seen], torch.zeros(len(seen)).double()
    if isinstance(SELECTORS[selector], Estimator):
        others, chosen_of = held.knowledge.digest, torch.zeros(held.num_far_blocks).double()
        assert isinstance(others, Clustered)
        chosen_of[blocks] = 16.0
        left = torch.zeros(others.keys.shape[2]).double().scatter_add_(0, others.labels[0, 0], 16.0 - chosen_of)
        keys, values = (torch.cat([x, y[0, 0].double()]) for x, y in ((keys, others.keys), (values, others.values)))
        counts = torch.cat([counts, left.log()])
    logits = q[:GROUP_SIZE, (held.seq_len - 1) % SPARE_TOKENS] @ keys.mT * RULE.scale + counts
    truth = logits.softmax(-1) @ values
    error = float((got - truth).norm() / truth.norm())
    if not error < MAX_ERROR:
        raise common.WrongResultError(f"{selector}: {error:.3g} from float64, expected at most {MAX_ERROR}")


def measure(layer: Layer, context: int, selectors: list[str], budget_s: float) -> list[Row]:
    """Every selector and share in turn, the exact step among them."""
    for selector in selectors:
        check(layer, selector, context)
    budgets = {(name, share): max(2 * NEAR_TOKENS, int(share * context)) for name in selectors for share in SHARES}
    caches = {"exact": layer.fork(None)}
    caches |= {f"{name} {share}": layer.fork(Sparse(name, budgets[name, share])) for name, share in budgets}
    for cache in caches.values():
        for _ in range(3):
            layer.step(cache)

    def cold_ms(cache: KVCache) -> float:
        return layer.timed_step(cache, is_cold=True)[1]

    ms = common.medians_in_turn({name: partial(cold_ms, cache) for name, cache in caches.items()}, budget_s)
    return [
        Row(
            context,
            name,
            budgets[name, share],
            ms[f"{name} {share}"],
            ms["exact"],
            ms["exact"] / ms[f"{name} {share}"],
            limit_of(name, budgets[name, share], context),
        )
        for name, share in budgets
    ]


def measure_verified(context: int, keys: str, selector: str, num_steps: int) -> VerifiedRow:
    """Steps of a verified cache beside those of an exact one."""
    layer = Layer(random_tokens(context, keys), context)
    budget_tokens = max(2 * NEAR_TOKENS, int(SHARES[0] * context))
    caches = {"verified": layer.fork(Sparse(selector, budget_tokens, verified=PROMISE)), "exact": layer.fork(None)}
    errors: list[Tensor] = []
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(num_steps):
        out = {}
        for name, cache in caches.items():
            out[name], ms = layer.timed_step(cache, is_cold=True)
            times[name].append(ms)
        exact = out["exact"].float()
        errors.append((out["verified"] - exact).norm(dim=-1) / exact.norm(dim=-1))
    error = torch.cat(errors).flatten()
    tally = caches["verified"].tallies[0].to_dict()
    codes = 1 / limit_of(selector, 0, context)
    median = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    wrong = float((error > PROMISE.epsilon).float().mean())
    read, fallbacks = tally["share_read"] + codes, tally["share_fallbacks"]
    return VerifiedRow(
        context,
        keys,
        selector,
        budget_tokens,
        median["verified"],
        median["exact"],
        read,
        fallbacks,
        wrong,
        float(error.max()),
    )


def mass_ratio(layer: Layer, budget_s: float) -> float:
    """Time of attention over near tokens that says what each block weighs, over the time without."""
    cache = layer.fork(None)
    q = layer.tokens.q[:, :, :1].contiguous()
    with cache.layer(0).hold() as held:
        near = held.near
        calls = {
            "plain": lambda: attend(q, near, rule=RULE, causal=True, pool=worker_pool()),
            "mass": lambda: attend(q, near, rule=RULE, causal=True, mass=block_mass(q, near), pool=worker_pool()),
        }
        ms = common.medians_in_turn({name: common.in_ms(call) for name, call in calls.items()}, budget_s)
    return ms["mass"] / ms["plain"]


def print_rows(rows: list[Row], verified: list[VerifiedRow], mass: float, console: Console) -> None:
    """The tables for people."""
    table = Table(title="one step of one layer")
    for heading in ("selector", "budget", "ms", "exact ms", "speed-up", "limit"):
        table.add_column(heading, justify="left" if heading == "selector" else "right")
    for row in rows:
        numbers = f"{row.ms:.2f}", f"{row.exact_ms:.2f}", f"{row.speedup:.1f}", f"{row.limit:.1f}"
        table.add_row(row.selector, f"{row.budget_tokens:,}", *numbers)
    console.print(table)
    table = Table(title=f"verified({PROMISE.epsilon}, {PROMISE.delta})")
    for heading in ("keys", "selector", "ms", "exact ms", "bytes read", "fallbacks", "wrong", "largest error"):
        table.add_column(heading, justify="left" if heading in ("keys", "selector") else "right")
    for one in verified:
        shares = (f"{share:.1%}" for share in (one.read, one.fallbacks, one.wrong, one.largest_error))
        table.add_row(one.keys, one.selector, f"{one.ms:.1f}", f"{one.exact_ms:.1f}", *shares)
    console.print(table)
    console.print(f"mass of near blocks: {mass:.2f} times the time of attention without")


def main() -> None:
    """Run, print, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument("--context", type=common.positive, help=f"tokens (default: {CONTEXT})")
    parser.add_argument("--steps", type=common.positive, default=40, help="verified steps of each kind (default: 40)")
    parser.add_argument("--no-verified", action="store_true", help="selectors alone")
    arguments = parser.parse_args()
    context = arguments.context or (16_384 if arguments.quick else CONTEXT)
    console = Console(stderr=arguments.json)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    layer = Layer(random_tokens(context, "flat"), context)
    rows = measure(layer, context, list(SELECTORS), 3.0 if arguments.quick else 40.0)
    mass = mass_ratio(layer, 0.5 if arguments.quick else 4.0)
    del layer
    kinds = (
        [] if arguments.no_verified else [(keys, name) for keys in ("flat", "graded") for name in ("bounds", "columns")]
    )
    steps = 2 if arguments.quick else arguments.steps
    verified = [measure_verified(context, keys, name, steps) for keys, name in kinds]
    print_rows(rows, verified, mass, console)
    if not arguments.quick or arguments.save:
        common.append_rows(common.RESULTS / "sparse.csv", [asdict(row) for row in rows], run)
        if verified:
            common.append_rows(common.RESULTS / "verified.csv", [asdict(row) for row in verified], run)
    if arguments.json:
        result = {**asdict(rows[-1]), "rows": [asdict(row) for row in rows], "mass_ratio": mass}
        common.print_json({**result, "verified": [asdict(row) for row in verified], **asdict(run)})
    if not all(math.isfinite(row.ms) for row in rows):
        raise common.WrongResultError("a time is no number")


if __name__ == "__main__":
    main()
