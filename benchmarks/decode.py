"""Time per token of a whole model: tandemkv beside every stock configuration, and the limit of memory."""

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
from transformers import Cache, DynamicCache, LlamaForCausalLM  # noqa: E402

import tandemkv.integrations.transformers as tandem  # noqa: E402
from benchmarks import common, plot  # noqa: E402
from tandemkv import demo  # noqa: E402
from tandemkv.attention import extend_and_attend  # noqa: E402

MODULE = "benchmarks.decode"
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


class AttentionClock:
    """Milliseconds that our attention took in each step."""

    def __init__(self) -> None:
        self.step_ms: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time every call that the integration makes into attention."""

        def timed(*args: Any, **kwargs: Any) -> Tensor:
            milliseconds, out = demo.timed(lambda: extend_and_attend(*args, **kwargs))
            self.step_ms[-1] += milliseconds
            return out

        with mock.patch("tandemkv.integrations.transformers.cache.extend_and_attend", timed):
            yield


def measure(context: int, num_steps: int) -> Row:
    """All contestants at one context."""
    stock = demo.demo_model()
    models = {attention: demo.twin(stock) for attention in ("sdpa", "eager")}
    for attention, model in models.items():
        model.set_attn_implementation(attention)
    ours, clock = tandem.attach(demo.twin(stock)), AttentionClock()
    runs: dict[str, tuple[LlamaForCausalLM, Cache]] = {
        name: (models[attention], demo.stock_cache(stock, kind, context, num_steps + 1))
        for name, (attention, kind) in STOCK.items()
    }
    for _, cache in runs.values():
        demo.fill_stock(cache, stock.config, context)
    tiered = demo.tiered_cache(ours, context)
    demo.fill_tiered(tiered, ours.config, context)
    runs["ours"] = (ours, tiered)
    hook = ours.register_forward_pre_hook(lambda *_: clock.step_ms.append(0.0))
    with clock.running():
        times, logits = demo.decode_in_turn(runs, num_steps)
    hook.remove()
    medians = {name: statistics.median(values) for name, values in times.items()}
    truth = float32_logits(stock, context)
    return summarise(context, medians, statistics.median(clock.step_ms[1:]), stock, (logits, truth))


def float32_logits(stock: LlamaForCausalLM, context: int) -> Tensor:
    """Logits of the first token by stock in float32, over the same (bf16) K and V."""
    wide = demo.demo_model().float()
    wide.load_state_dict(stock.state_dict())
    cache = DynamicCache(config=wide.config)
    for index, (k, v) in enumerate(demo.random_kv(stock.config, context)):
        cache.update(k.float(), v.float(), index)
    return demo.next_logits(wide, cache, torch.tensor([[7]]))


def summarise(
    context: int,
    medians: dict[str, float],
    attention_ms: float,
    model: LlamaForCausalLM,
    logits: tuple[dict[str, Tensor], Tensor],
) -> Row:
    """The row that the contract names."""
    found, truth = logits
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
        attention_ms=attention_ms,
        attention_share_of_limit=kv_bytes / bytes_per_ms / attention_ms,
        read_gbps=medians["read_gbps"],
        max_logit_error=error,
        stock_logit_error=stock_error,
        all_stock_ms=all_stock_ms,
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
