"""Time per token of a whole model: tandemkv beside every stock configuration, and the limit of memory."""

import math
import pkgutil
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

from tandemkv import machine

machine.set_passive_spin()  # before torch: its threads would spin on the cores that the others are timed on

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AttentionInterface, Cache, DynamicCache, LlamaForCausalLM  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402

import tandemkv.integrations.transformers as tandem  # noqa: E402
from benchmarks import common, plot  # noqa: E402
from tandemkv.demo import speed as demo  # noqa: E402

MODULE = "benchmarks.decode"
ATTENTION = "tandemkv.integrations.transformers.cache.extend_and_attend"
NATIVE = "tandemkv._native.append_and_attend"
CONTEXTS = (1024, 8192, 32_768, 131_072)
STOCK = {
    "sdpa, DynamicCache": ("sdpa", "dynamic"),  # as generate runs it
    "eager, DynamicCache": ("eager", "dynamic"),
    "sdpa, StaticCache": ("sdpa", "static"),
    "eager, StaticCache": ("eager", "static"),
}
AS_GENERATE = "sdpa, DynamicCache"
HELP = """Time per token of the demo's model (155 M parameters, 8 layers, 16:4 heads x 64, bf16) after a context.

Contestants take turns with a probe of read bandwidth, token by token; medians. Caches are filled with the same random
K and V at every length. `limit_ms` is all weights and all K and V read once at the probe's speed;
`attention_share_of_limit` is the time for reading K and V alone over the time our attention took inside the step.
A step of ours has three shares: `weights_ms`, the step of the same model whose attention returns zeros; `native_ms`,
what our kernel computes; `overhead_ms`, the rest, whatever it is: pages, Python, allocations, threads that wake. They
are measured apart, these two models alone in turn, 12 times as many steps, `step_ms` each of ours. All are medians, the
overhead of differences within a turn; were turns independent, `overhead_low_ms` to `overhead_high_ms` would hold its
true median in 95 of 100 runs.
`max_logit_error` is the largest difference of our logits from stock's float32 logits over the same K and V;
`stock_logit_error` is the same for stock in bf16.

Example: python -m benchmarks.decode --context 32768 --json
"""


@dataclass(frozen=True)
class Row:
    """One context. Times are medians in milliseconds per token."""

    context: int
    stock_ms: float
    fastest_stock_ms: float
    fastest_stock: str
    ours_ms: float
    limit_ms: float
    ratio: float
    ratio_to_fastest_stock: float
    attention_ms: float
    attention_share_of_limit: float
    read_gbps: float
    max_logit_error: float
    stock_logit_error: float
    all_stock_ms: dict[str, float]
    step_ms: float
    weights_ms: float
    native_ms: float
    overhead_ms: float
    overhead_low_ms: float
    overhead_high_ms: float
    overhead_share: float


class Clock:
    """Milliseconds that one function took in each step."""

    def __init__(self, target: str) -> None:
        """`target` is the function's place, as `mock.patch` takes it."""
        self.step_ms: list[float] = []
        self._target = target

    @contextmanager
    def running(self, model: LlamaForCausalLM) -> Iterator[None]:
        """Time every call, and add up those of one forward pass of the model."""
        call = pkgutil.resolve_name(self._target)

        def timed(*args: Any, **kwargs: Any) -> Any:
            milliseconds, result = demo.timed(lambda: call(*args, **kwargs))
            self.step_ms[-1] += milliseconds
            return result

        hook = model.register_forward_pre_hook(lambda *_: self.step_ms.append(0.0))
        with mock.patch(self._target, timed):
            yield
        hook.remove()


class NothingKept(Cache):
    """A cache that says how long it is and keeps nothing."""

    def __init__(self, context: int) -> None:
        super().__init__(layers=[])
        self._context = context

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new ones alone."""
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always the same."""
        return self._context

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Nobody looks at the mask."""
        return query_length, 0


def without_attention(stock: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model over the same weights; its attention returns zeros."""

    def zeros(module: Any, q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return q.new_zeros((q.shape[0], q.shape[2], q.shape[1], q.shape[3])), None

    AttentionInterface.register("zeros", zeros)
    AttentionMaskInterface.register("zeros", lambda **_: None)
    model = demo.twin(stock)
    model.set_attn_implementation("zeros")
    return model


def measure(context: int, num_steps: int) -> Row:
    """All contestants at one context."""
    stock = demo.demo_model()
    models = {attention: demo.twin(stock) for attention in ("sdpa", "eager")}
    for attention, model in models.items():
        model.set_attn_implementation(attention)
    ours = tandem.attach(demo.twin(stock))
    runs: dict[str, tuple[LlamaForCausalLM, Cache]] = {
        name: (models[attention], demo.stock_cache(stock, kind, context, num_steps + 1))
        for name, (attention, kind) in STOCK.items()
    }
    for _, cache in runs.values():
        demo.fill_stock(cache, stock.config, context)
    num_share_steps = 12 * num_steps
    tiered = demo.tiered_cache(ours, context + num_steps + num_share_steps)
    demo.fill_tiered(tiered, ours.config, context)
    clock = Clock(ATTENTION)
    with clock.running(ours):
        times, logits = demo.decode_in_turn({**runs, "ours": (ours, tiered)}, num_steps)
    times["attention"] = clock.step_ms[1:]
    truth = float32_logits(stock, context)
    runs.clear()  # gigabytes, and none of them is needed any more
    shares = {"weights": (without_attention(stock), NothingKept(context)), "ours": (ours, tiered)}
    clock = Clock(NATIVE)
    with clock.running(ours):
        share_times, _ = demo.decode_in_turn(shares, num_share_steps)
    share_times["native"] = clock.step_ms[1:]
    return summarise(context, times, share_times, stock, (logits, truth))


def float32_logits(stock: LlamaForCausalLM, context: int) -> Tensor:
    """Logits of the first token by stock in float32, over the same (bf16) K and V."""
    wide = demo.demo_model().float()
    wide.load_state_dict(stock.state_dict())
    cache = DynamicCache(config=wide.config)
    for index, (k, v) in enumerate(demo.random_kv(stock.config, context)):
        cache.update(k.float(), v.float(), index)
    return demo.next_logits(wide, cache, torch.tensor([[7]]))


def shares_of(times: dict[str, list[float]]) -> dict[str, float]:
    """The shares of a step, as a row names them; the interval is that of order statistics (binomial, as a normal)."""
    steps, weights, native = times["ours"], times["weights"], times["native"]
    rest = sorted(a - b - c for a, b, c in zip(steps, weights, native, strict=True))
    overhead_ms, step_ms = statistics.median(rest), statistics.median(steps)
    middle, reach = len(rest) / 2, 0.98 * math.sqrt(len(rest))
    return {
        "step_ms": step_ms,
        "weights_ms": statistics.median(weights),
        "native_ms": statistics.median(native),
        "overhead_ms": overhead_ms,
        "overhead_low_ms": rest[max(0, math.floor(middle - reach))],
        "overhead_high_ms": rest[min(len(rest) - 1, math.ceil(middle + reach))],
        "overhead_share": overhead_ms / step_ms,
    }


def summarise(
    context: int,
    times: dict[str, list[float]],
    share_times: dict[str, list[float]],
    model: LlamaForCausalLM,
    logits: tuple[dict[str, Tensor], Tensor],
) -> Row:
    """The row that the contract names."""
    found, truth = logits
    medians = {name: statistics.median(values) for name, values in times.items()}
    all_stock_ms = {name: medians[name] for name in STOCK}
    fastest = min(all_stock_ms, key=all_stock_ms.__getitem__)
    bytes_per_ms = medians["read_gbps"] * 1e6
    kv_bytes = demo.kv_bytes(model.config, context)
    error, stock_error = ((found[name] - truth).abs().max().item() for name in ("ours", AS_GENERATE))
    if not error <= 4 * stock_error:
        raise common.WrongResultError(
            f"tandemkv's logits are off by {error:.3g} after {context} tokens, stock's by {stock_error:.3g}"
        )
    return Row(
        context=context,
        stock_ms=medians[AS_GENERATE],
        fastest_stock_ms=all_stock_ms[fastest],
        fastest_stock=fastest,
        ours_ms=medians["ours"],
        limit_ms=(demo.weight_bytes(model) + kv_bytes) / bytes_per_ms,
        ratio=medians[AS_GENERATE] / medians["ours"],
        ratio_to_fastest_stock=all_stock_ms[fastest] / medians["ours"],
        attention_ms=medians["attention"],
        attention_share_of_limit=kv_bytes / bytes_per_ms / medians["attention"],
        read_gbps=medians["read_gbps"],
        max_logit_error=error,
        stock_logit_error=stock_error,
        all_stock_ms=all_stock_ms,
        **shares_of(share_times),
    )


def print_rows(rows: list[Row], console: Console) -> None:
    """The table for people: a column for each context."""
    table = Table(title="ms per token (medians)")
    table.add_column("context")
    for row in rows:
        table.add_column(f"{row.context:,}", justify="right")

    def add(name: str, cell: Callable[[Row], str]) -> None:
        table.add_row(name, *(cell(row) for row in rows))

    for name in STOCK:
        table.add_row(f"stock: {name}", *(f"{row.all_stock_ms[name]:.1f}" for row in rows))
    add("tandemkv", lambda row: f"{row.ours_ms:.1f}")
    add("  alone, for its shares", lambda row: f"{row.step_ms:.1f}")
    add("  torch's weights: attention returns zeros", lambda row: f"{row.weights_ms:.1f}")
    add("  our attention: native kernel", lambda row: f"{row.native_ms:.1f}")
    add("  overhead: the rest", lambda row: f"{row.overhead_ms:.2f} ({row.overhead_share:.1%})")
    add("    95 % interval", lambda row: f"{row.overhead_low_ms:.2f} to {row.overhead_high_ms:.2f}")
    add("limit: weights and KV read once", lambda row: f"{row.limit_ms:.1f}")
    add("x as fast as stock in generate", lambda row: f"{row.ratio:.2f}")
    add("x as fast as the fastest stock", lambda row: f"{row.ratio_to_fastest_stock:.2f}")
    add("attention, share of its limit", lambda row: f"{row.attention_share_of_limit:.0%}")
    add("read GB/s", lambda row: f"{row.read_gbps:.1f}")
    add("logit error (stock bf16)", lambda row: f"{row.max_logit_error:.3f} ({row.stock_logit_error:.3f})")
    console.print(table)


def draw(rows: list[Row], run: common.Run) -> str:
    """The picture that README shows."""
    series = {f"stock: {name}": [row.all_stock_ms[name] for row in rows] for name in STOCK}
    series |= {"tandemkv": [row.ours_ms for row in rows], "limit": [row.limit_ms for row in rows]}
    title = "A whole token of a 155 M Llama, bf16, on the CPU"
    path = common.RESULTS / "decode.png"
    return plot.draw_over_context({"ms per token": series}, [row.context for row in rows], title, run, path)


def main() -> None:
    """Run, print, save."""
    parser = common.argument_parser(MODULE, HELP)
    parser.add_argument(
        "--context",
        type=common.positive,
        action="append",
        help="tokens; may be repeated (default: all four)",
    )
    parser.add_argument("--steps", type=common.positive, default=9, help="tokens that are timed (default: 9)")
    arguments = parser.parse_args()
    contexts = arguments.context or ((8192,) if arguments.quick else CONTEXTS)
    num_steps = min(arguments.steps, 3) if arguments.quick else arguments.steps
    console = Console(stderr=arguments.json)
    run = common.this_run(MODULE, sys.argv[1:])
    console.print(str(run), highlight=False)
    rows = [measure(context, num_steps) for context in contexts]
    print_rows(rows, console)
    if not arguments.quick or arguments.save:
        flat = [
            {**asdict(row), "all_stock_ms": " ".join(f"{ms:.1f}" for ms in row.all_stock_ms.values())} for row in rows
        ]
        common.append_rows(common.RESULTS / "decode.csv", flat, run)
    if set(CONTEXTS) <= set(contexts):
        console.print(draw(rows, run), highlight=False)
    if arguments.json:
        common.print_json({**asdict(rows[-1]), "rows": [asdict(row) for row in rows], **asdict(run)})


if __name__ == "__main__":
    main()
