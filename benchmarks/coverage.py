"""Whether the promise of a verified tail holds: its error beside the exact output, by keys and selector in front."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NamedTuple
from unittest import mock

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import common
from tandemkv import machine

machine.set_passive_spin()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from tandemkv import assets, attention  # noqa: E402
from tandemkv.attention import extend_and_attend, worker_pool  # noqa: E402
from tandemkv.cache import CacheSpec, KVCache, LayerKV  # noqa: E402
from tandemkv.kernels import attend  # noqa: E402
from tandemkv.select import Sparse, Tally, Verified  # noqa: E402
from tandemkv.types import BLOCK_TOKENS, ScoreRule  # noqa: E402

MODULE = "benchmarks.coverage"
CONTEXT, QUICK_CONTEXT, NUM_STEPS = 32_768, 16_384, 100
NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, NEAR_TOKENS, SPARE_TOKENS = 2, 2, 64, 512, 512
RULE = ScoreRule(HEAD_DIM**-0.5)
PROMISE = Verified(0.05, 0.05)
KEYS = ("flat", "two clusters", "one needle", "heavy tails")
SHIPPED = "shipped model"
IN_FRONT = ("window", "bounds", "columns", "clusters", "salience")
MAX_ERROR = 1e-4  # of exact attention in float32, against float64
HELP = """Shares of (step, layer, query head) whose error is above epsilon, for verified(0.05, 0.05).

Every decode step is attended twice, verified and exactly, on the same queries, keys and values. Keys of the first four
kinds are random, 4:2 heads x 64 in float32: logits normal with a deviation of 1 (flat); two tight groups in random
order, of which a tenth of the tokens has nearly all the mass; flat ones and one block, somewhere far back, with half of
the mass; logits of Student's t, half of it, of 4 degrees (heavy tails). Values have a mean as large as their deviation.
Those of the shipped model come from a novel, in all of its layers. A sample cannot see a needle that the selector
missed.

Example: python -m benchmarks.coverage --context 16384 --keys flat --json
"""


@dataclass(frozen=True)
class Row:
    """One kind of keys and a selector in front. wrong: share of num_rows above epsilon; read and fallbacks: shares."""

    context: int
    keys: str
    selector: str
    budget_tokens: int
    num_rows: int
    wrong: float
    median_error: float
    largest_error: float
    estimated_mean: float
    estimated_largest: float
    read: float
    fallbacks: float


class Tokens(NamedTuple):
    """K and V `[1, num_kv_heads, num_tokens, head_dim]`, and as many queries as may be asked."""

    q: Tensor
    k: Tensor
    v: Tensor


def random_tokens(num_tokens: int, keys: str, seed: int = 0) -> Tokens:
    """Keys of a kind of KEYS, and a query for each of them. Channel 0 of a query is a constant, where keys use it."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    k, q = normal(1, NUM_KV_HEADS, num_tokens, HEAD_DIM), normal(1, NUM_KV_HEADS * GROUP_SIZE, num_tokens, HEAD_DIM)
    v = normal(*k.shape) + normal(1, NUM_KV_HEADS, 1, HEAD_DIM)
    if keys == "heavy tails":
        k *= 0.5 * normal(1, NUM_KV_HEADS, num_tokens, 4).square().mean(-1, keepdim=True) ** -0.5
    elif keys == "two clusters":
        is_heavy = torch.rand(1, NUM_KV_HEADS, num_tokens, generator=random) < 0.1
        k = 0.1 * k + normal(1, NUM_KV_HEADS, 1, HEAD_DIM)
        k[..., 0] = 8.0 * is_heavy
        q[..., 0] = HEAD_DIM**0.5
    elif keys == "one needle":
        k[..., 0], q[..., 0] = 0.0, HEAD_DIM**0.5
        begin = int(torch.randint(2, num_tokens // BLOCK_TOKENS // 2, (1,), generator=random)) * BLOCK_TOKENS
        needle = slice(begin, begin + BLOCK_TOKENS)
        k[:, :, needle, 0] = math.log(num_tokens / BLOCK_TOKENS)  # more than the others' logits, which are alike else
        v[:, :, needle] = normal(1, NUM_KV_HEADS, 1, HEAD_DIM)
    return Tokens(q, k, v)


@dataclass
class Watched:
    """Errors of decode steps against exact attention, each `[num_seqs, q_len, num_q_heads]`, and of which layer."""

    errors: list[Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)

    @property
    def error(self) -> Tensor:
        """All of them, flat."""
        return torch.cat([error.flatten() for error in self.errors])


@contextmanager
def watching() -> Iterator[Watched]:
    """Every decode step inside is attended exactly as well; WrongResultError where that is not what float64 says."""
    watched, plainly = Watched(), attention.decode_step

    def both(
        q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink_logit: Tensor | None = None
    ) -> Tensor:
        out = plainly(q, k, v, layer, rule, sink_logit)
        with layer.hold() as held:
            exact = attend(q, *held.far, held.near, rule=rule, causal=True, pool=worker_pool()).out.transpose(1, 2)
        if layer.index not in watched.layers:
            check(q, layer, rule, exact)
        watched.errors.append((out - exact).norm(dim=-1) / exact.norm(dim=-1))
        watched.layers.append(layer.index)
        return out

    with mock.patch.object(attention, "decode_step", both):
        yield watched


def check(q: Tensor, layer: LayerKV, rule: ScoreRule, exact: Tensor) -> None:
    """Exact attention of the last query's first head is that of float64 over everything the layer holds."""
    k, v = (x[0, 0].double() for x in layer.read(0, layer.seq_len))
    truth = (q[0, 0, -1].double() @ k.mT * rule.scale).softmax(-1) @ v
    error = float((exact[0, -1, 0].double() - truth).norm() / truth.norm())
    if not error < MAX_ERROR:
        raise common.WrongResultError(f"exact attention is {error:.3g} from float64, expected at most {MAX_ERROR}")


class RandomContext:
    """A cache of one layer that holds random keys and values."""

    num_layers = 1

    def __init__(self, keys: str, context: int, seed: int = 0) -> None:
        self.keys, self.context = keys, context
        self._tokens = random_tokens(context + SPARE_TOKENS, keys, seed)
        spec = CacheSpec(
            num_layers=1,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.float32,
            near_tokens=NEAR_TOKENS,
            far_bytes=(context + 16 * SPARE_TOKENS) * 2 * NUM_KV_HEADS * HEAD_DIM * 4,
        )
        self._cache = KVCache(spec, worker_pool())
        self._cache.begin_step(1, context)
        for begin in range(0, context, spec.chunk_tokens):
            new = slice(begin, min(begin + spec.chunk_tokens, context))
            self._cache.layer(0).evict()
            self._cache.layer(0).append(self._tokens.k[:, :, new], self._tokens.v[:, :, new])
        self._cache.end_step()

    def fork(self) -> KVCache:
        """The same context, to be continued on its own."""
        return self._cache.fork()

    def step(self, cache: KVCache) -> None:
        """The next token."""
        new = slice(cache.seq_len, cache.seq_len + 1)
        q, k, v = (x[:, :, new] for x in self._tokens)
        cache.begin_step(1, 1)
        extend_and_attend(q, k, v, cache.layer(0), RULE)
        cache.end_step()


class ShippedContext:
    """The shipped model reads a novel that it was not trained on."""

    keys = SHIPPED

    def __init__(self, context: int) -> None:
        import tandemkv.integrations.transformers as tandem
        from tandemkv.integrations.transformers.folders import load_model, quieten, read_config, read_tokenizer

        quieten()
        self.context = context
        self._model = load_model(assets.MODEL, read_config(assets.MODEL, "float32").dtype)
        ids = read_tokenizer(assets.MODEL)(assets.held_out_text()).input_ids[: context + SPARE_TOKENS]
        self._ids = torch.tensor([ids])
        self._cache = tandem.TieredCache(self._model.config, near_tokens=NEAR_TOKENS, far_bytes="1GiB")
        self.num_layers = self._cache.kv.spec.num_layers
        self._caches: dict[KVCache, tandem.TieredCache] = {}
        self._read(self._cache, context)

    @torch.no_grad()
    def _read(self, cache: object, num_tokens: int) -> None:
        begin = cache.get_seq_length()  # type: ignore[attr-defined]
        new = self._ids[:, begin : begin + num_tokens]
        self._model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def fork(self) -> KVCache:
        """The same context, to be continued on its own."""
        import copy

        twin = copy.deepcopy(self._cache)
        self._caches[twin.kv] = twin
        return twin.kv

    def step(self, cache: KVCache) -> None:
        """The next token of the novel."""
        self._read(self._caches[cache], 1)


def budget_of(context: int) -> int:
    """What selectors may pick: a sixteenth of the context, near tokens twice at least."""
    return max(2 * NEAR_TOKENS, context // 16)


def measure(text: RandomContext | ShippedContext, selector: str, promise: Verified, num_steps: int) -> Row:
    """Steps of one selector in front, after one without a promise: an observer looks at everything first."""
    cache, budget_tokens = text.fork(), budget_of(text.context)
    cache.sparse = Sparse(selector, budget_tokens)
    text.step(cache)
    cache.sparse = Sparse(selector, budget_tokens, verified=promise)
    with watching() as watched:
        for _ in range(num_steps):
            text.step(cache)
    error, tally = watched.error, Tally.of(cache.tallies)
    if len(watched.errors) != num_steps * text.num_layers or not bool(error.isfinite().all()):
        raise common.WrongResultError(f"{text.keys}, {selector}: {len(watched.errors)} steps, errors {error}")
    found = tally.to_dict()
    cache.close()
    return Row(
        text.context,
        text.keys,
        selector,
        budget_tokens,
        error.numel(),
        float((error > promise.epsilon).double().mean()),
        float(error.median()),
        float(error.max()),
        found["estimated_error_mean"],
        found["estimated_error_max"],
        found["share_read"],
        found["share_fallbacks"],
    )


def print_rows(rows: list[Row], console: Console) -> None:
    """The table for people."""
    table = Table(title=f"verified({PROMISE.epsilon}, {PROMISE.delta})", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("keys", "in front"):
        table.add_column(heading, no_wrap=True)
    for heading in ("above", "median", "largest", "estimated", "read", "exact"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = (row.wrong, row.median_error, row.largest_error, row.estimated_mean, row.read, row.fallbacks)
        by_chance = 3 * math.sqrt(PROMISE.delta * (1 - PROMISE.delta) / row.num_rows)
        style = "red" if row.wrong > PROMISE.delta + by_chance else None
        keys = f"{row.keys}, {row.context // 1024}K"
        table.add_row(keys, row.selector, *(f"{share:.1%}" for share in shares), style=style)
    console.print(table)
    console.print("above: of (step, layer, query head) those whose error is above epsilon; red where that is more than")
    console.print("delta and chance explain. estimated: on average. exact: KV heads read whole.")


def main() -> None:
    """Run, print, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument(
        "--context", type=common.positive, help=f"tokens (default: {CONTEXT}, the model's at most 8192)"
    )
    parser.add_argument("--steps", type=common.positive, help=f"of each row (default: {NUM_STEPS})")
    parser.add_argument("--keys", choices=(*KEYS, SHIPPED), action="append", help="only this kind; may be repeated")
    parser.add_argument("--selector", choices=IN_FRONT, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    least = 4 * NEAR_TOKENS
    context = arguments.context or (QUICK_CONTEXT if arguments.quick else CONTEXT)
    if context < least:
        parser.error(f"--context must be at least {least}, got {context}: a budget must leave something out")
    num_steps = arguments.steps or (10 if arguments.quick else NUM_STEPS)
    if num_steps >= SPARE_TOKENS:
        parser.error(f"--steps must be below {SPARE_TOKENS}, got {num_steps}")
    console = Console(stderr=arguments.json)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    rows = []
    for keys in arguments.keys or (*KEYS, SHIPPED):
        text = ShippedContext(min(context, assets.JUDGED_TOKENS)) if keys == SHIPPED else RandomContext(keys, context)
        rows += [measure(text, selector, PROMISE, num_steps) for selector in arguments.selector or IN_FRONT]
    print_rows(rows, console)
    if not arguments.quick or arguments.save:
        common.append_rows(common.RESULTS / "coverage.csv", [asdict(row) for row in rows], run)
    if arguments.json:
        common.print_json({**asdict(rows[-1]), "rows": [asdict(row) for row in rows], **asdict(run)})


if __name__ == "__main__":
    main()
