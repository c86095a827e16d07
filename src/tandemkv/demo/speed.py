"""The demo's second half: stock transformers beside tandemkv on a long context, the limit of memory, and agreement.

The benchmarks measure the same model through the same functions.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import tandemkv.integrations.transformers as tandem
from tandemkv import machine
from tandemkv.attention import worker_pool
from tandemkv.errors import CapacityError, InputError
from tandemkv.kernels import cpu, probes
from tandemkv.types import format_bytes

MAX_PREFILL = 32_768
"""Longer contexts are filled with random K and V instead of prefilled: stock would need many minutes."""

NEAR_TOKENS = 1024
NUM_STEPS = 5
PROBE_BYTES = 1 << 30


def demo_config(dtype: torch.dtype = torch.bfloat16, small: bool = False) -> LlamaConfig:
    """A Llama of 155 M parameters, 8 layers, 16:4 heads x 64; or a small copy of it."""
    width, num_layers, heads, kv_heads = (256, 2, 4, 1) if small else (1024, 8, 16, 4)
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        vocab_size=1024 if small else 32_768,
        max_position_embeddings=1 << 22,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def demo_model(dtype: torch.dtype = torch.bfloat16, small: bool = False) -> LlamaForCausalLM:
    """The model of `demo_config`, its random weights the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(demo_config(dtype, small)).to(dtype).eval()


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model over the same weights, so that one can be attached and the other stay stock."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes that every token reads: all weights once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def kv_bytes(config: LlamaConfig, context: int) -> int:
    """Bytes of K and V that a token attends to."""
    per_token: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * config.dtype.itemsize
    return per_token * context


def random_kv(config: LlamaConfig, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same K and V `[1, num_kv_heads, context, head_dim]` for each layer at every call."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for _ in range(config.num_hidden_layers):
        k = torch.empty(shape, dtype=config.dtype).normal_(generator=generator)
        yield k, torch.empty(shape, dtype=config.dtype).normal_(generator=generator)


def fill_stock(cache: Cache, config: LlamaConfig, context: int) -> None:
    """Put `random_kv` into a stock cache."""
    for index, (k, v) in enumerate(random_kv(config, context)):
        cache.update(k, v, index)


def fill_tiered(cache: tandem.TieredCache, config: LlamaConfig, context: int) -> None:
    """Put `random_kv` into a tiered cache, a chunk at a time, as a prompt would arrive."""
    cache.reserve(1, context)
    chunk_tokens = cache.kv.spec.chunk_tokens
    for index, (k, v) in enumerate(random_kv(config, context)):
        layer = cache.kv.layer(index)
        for begin in range(0, context, chunk_tokens):
            layer.evict()
            layer.append(k[:, :, begin : begin + chunk_tokens], v[:, :, begin : begin + chunk_tokens])


def tiered_cache(model: LlamaForCausalLM, context: int, near_tokens: int = NEAR_TOKENS) -> tandem.TieredCache:
    """A cache for `context` tokens and a few steps, and no more."""
    far_bytes = kv_bytes(model.config, context + 2 * NUM_STEPS) + (1 << 20)
    return tandem.TieredCache(model.config, near_tokens=near_tokens, far_bytes=far_bytes)


def stock_cache(model: LlamaForCausalLM, kind: str, context: int, num_steps: int) -> Cache:
    """An empty "dynamic" cache, or a "static" one with room for the context and the steps."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=context + num_steps)
    return DynamicCache(config=model.config)


@torch.inference_mode()
def next_logits(model: PreTrainedModel, cache: Cache, ids: Tensor, **kwargs: Tensor) -> Tensor:
    """Logits `[vocab_size]` after ids `[1, num_tokens]`."""
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **kwargs).logits
    return logits[0, -1]


@dataclass(frozen=True)
class Agreement:
    """Logits of a small float32 copy against stock in float64.

    The check: our error is within `tolerance`, four times stock's own float32 error. `withheld_error` is our error with
    one far page hidden: it must be beyond the tolerance, or the check would prove nothing.
    """

    context: int
    far_pages: int
    stock_error: float
    error: float
    withheld_error: float

    @property
    def tolerance(self) -> float:
        """What our error may be."""
        return 4 * self.stock_error

    @property
    def holds(self) -> bool:
        """Whether we agree and the check can fail."""
        return self.error <= self.tolerance < self.withheld_error


def check_agreement(context: int = 2048) -> Agreement:
    """Prefill and decode with the small copy, near_tokens 256; then once more with the first far page withheld."""
    stock = demo_model(torch.float32, small=True)
    exact, ours = copy.deepcopy(stock).double(), tandem.attach(twin(stock))
    ids = torch.randint(0, stock.config.vocab_size, (1, context + 1), generator=torch.Generator().manual_seed(2))

    def answer(model: LlamaForCausalLM, cache: Cache, **kwargs: Tensor) -> Tensor:
        next_logits(model, cache, ids[:, :-1])
        return next_logits(model, cache, ids[:, -1:], **kwargs).double()

    cache = tiered_cache(ours, context, near_tokens=256)
    truth = answer(exact, DynamicCache(config=exact.config))
    stock_error = (answer(stock, DynamicCache(config=stock.config)) - truth).abs().max()
    error = (answer(ours, cache) - truth).abs().max()
    far = cache.use()[1].used_bytes // cache.kv.spec.far_page_bytes
    cache.reset()
    hidden = torch.ones((1, context + 1), dtype=torch.long)
    hidden[:, : cache.kv.spec.page_size] = 0  # padding in front: the first far page is skipped
    position = torch.tensor([[context]])
    withheld = answer(ours, cache, attention_mask=hidden, position_ids=position)
    return Agreement(context, far, stock_error.item(), error.item(), (withheld - truth).abs().max().item())


@dataclass(frozen=True)
class Demo:
    """What the demo found. Times are medians of tokens decoded in turn; `ratio` is stock_ms / ours_ms."""

    context: int
    prefilled: bool
    stock_ms: float
    fastest_stock_ms: float
    ours_ms: float
    limit_ms: float
    read_gbps: float
    max_logit_difference: float
    near_bytes: int
    far_bytes: int
    agreement: Agreement

    @property
    def ratio(self) -> float:
        """How many times faster than stock as `generate` runs it."""
        return self.stock_ms / self.ours_ms

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        found: dict[str, object] = asdict(self)
        found["agreement"] = {**asdict(self.agreement), "tolerance": self.agreement.tolerance}
        return {**found, "ratio": self.ratio, "agrees": self.agreement.holds}


def run_demo(context: int, console: Console) -> Demo:
    """Decode a few tokens with stock and with tandemkv, in turn, after `context` tokens."""
    require_room(context)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("building the model", total=5)

        def stage(name: str) -> None:
            progress.update(task, description=name, advance=1)

        stock = demo_model()
        ours = tandem.attach(twin(stock))
        cache = tiered_cache(ours, context)
        cache.reserve(1, context + NUM_STEPS + 1)  # before any work starts
        stage("filling the caches" if context > MAX_PREFILL else "prefilling")
        runs = {
            "stock": (stock, stock_cache(stock, "dynamic", context, NUM_STEPS + 1)),
            "fastest_stock": (stock, stock_cache(stock, "static", context, NUM_STEPS + 1)),
            "ours": (ours, cache),
        }
        for model, each in runs.values():
            start(model, each, context)
        stage("decoding")
        times, logits = decode_in_turn(runs)
        stage("checking agreement")
        agreement = check_agreement()
    read_gbps = statistics.median(times.pop("read_gbps"))
    medians = {name: statistics.median(values) for name, values in times.items()}
    num_bytes = weight_bytes(stock) + kv_bytes(stock.config, context)
    near, far = cache.use()
    return Demo(
        context=context,
        prefilled=context <= MAX_PREFILL,
        stock_ms=medians["stock"],
        fastest_stock_ms=medians["fastest_stock"],
        ours_ms=medians["ours"],
        limit_ms=num_bytes / read_gbps / 1e6,
        read_gbps=read_gbps,
        max_logit_difference=(logits["ours"] - logits["stock"]).abs().max().item(),
        near_bytes=near.used_bytes,
        far_bytes=far.used_bytes,
        agreement=agreement,
    )


def require_room(context: int) -> None:
    """Refuse a context without far pages, and one that does not fit: three caches, one of which is copied when a token
    is added, beside the weights and the probe's buffer."""
    if context < 2 * NEAR_TOKENS:
        raise InputError(f"--context must be at least {2 * NEAR_TOKENS}, so that pages lie far; got {context}")
    config = demo_config()
    needed = 4 * kv_bytes(config, context) + PROBE_BYTES + (1 << 30)
    available = machine.available_bytes()
    if needed > available.num_bytes:
        raise CapacityError(
            f"the demo needs about {format_bytes(needed)} for {context} tokens, stock's caches included; "
            f"{format_bytes(available.num_bytes)} available ({available.limit}): lower --context"
        )


def start(model: LlamaForCausalLM, cache: Cache, context: int) -> None:
    """Bring a cache to `context` tokens: prefill up to MAX_PREFILL, random K and V beyond."""
    if context <= MAX_PREFILL:
        generator = torch.Generator().manual_seed(3)
        next_logits(model, cache, torch.randint(0, model.config.vocab_size, (1, context), generator=generator))
    elif isinstance(cache, tandem.TieredCache):
        fill_tiered(cache, model.config, context)
    else:
        fill_stock(cache, model.config, context)


def decode_in_turn(
    runs: Mapping[str, tuple[PreTrainedModel, Cache]], num_steps: int = NUM_STEPS
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Milliseconds of each token and the first token's float32 logits, all contestants and the read probe in turn.

    One step that is not counted goes first. The times carry the probe as "read_gbps".
    """
    buffer = probes.probe_buffer(PROBE_BYTES)
    times: dict[str, list[float]] = {name: [] for name in [*runs, "read_gbps"]}
    logits: dict[str, Tensor] = {}
    for step in range(num_steps + 1):
        token = torch.tensor([[step + 7]])
        for name, (model, cache) in runs.items():
            milliseconds, result = timed(partial(next_logits, model, cache, token))
            if step:
                times[name].append(milliseconds)
            else:
                logits[name] = result.float()
        times["read_gbps"].append(max(probes.read_gbps(pool, buffer) for pool in (cpu.single_thread(), worker_pool())))
    return times, logits


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Milliseconds that a call takes, and what it returns."""
    begin = time.perf_counter()
    result = call()
    return (time.perf_counter() - begin) * 1e3, result


def print_demo(demo: Demo, console: Console) -> None:
    """The table, the limit and the agreement, for people."""
    how = (
        "prefilled from random tokens"
        if demo.prefilled
        else "caches filled with the same random K and V, not prefilled"
    )
    table = Table(title=f"{demo.context:,} tokens of context ({how})", title_justify="left")
    for heading in ("", "ms per token", "tokens/s", "tandemkv is"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("transformers as generate runs it (DynamicCache, sdpa)", demo.stock_ms),
        ("transformers at its fastest (StaticCache, sdpa)", demo.fastest_stock_ms),
        ("tandemkv", demo.ours_ms),
        (f"limit: weights and KV read once at {demo.read_gbps:.0f} GB/s", demo.limit_ms),
    ]
    for name, milliseconds in rows:
        table.add_row(
            name, f"{milliseconds:.1f}", f"{1e3 / milliseconds:.2f}", f"{milliseconds / demo.ours_ms:.2f}x as fast"
        )
    console.print(table)
    agreement = demo.agreement
    console.print(
        f"KV: {format_bytes(demo.near_bytes)} near, {format_bytes(demo.far_bytes)} far. "
        f"bf16 logits differ from stock by at most {demo.max_logit_difference:.3f}."
    )
    console.print(
        f"Exact? Small float32 copy, {agreement.context} tokens, {agreement.far_pages} far pages. Error of the logits "
        f"against float64: stock {agreement.stock_error:.1e}, tandemkv {agreement.error:.1e}; with one far page "
        f"withheld {agreement.withheld_error:.1e}. {'Agrees.' if agreement.holds else 'DOES NOT AGREE.'}"
    )
