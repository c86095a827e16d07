"""Decode attention over quantised KV on this machine's CPU: ours in int8 and int4 beside ours in bf16, and llama.cpp's.

how to read it:
  read      the limit: GB/s of plain loads over 512 MiB, on as many threads
  share     of the limit: the format's own bytes at that speed, over the time it took
  times     as fast as ours in bf16 over as many tokens
  logits    how far q.k / sqrt(head_dim) of the stored keys lies from that of the exact ones in float64: the root of the
            mean square, beside the deviation of the logits themselves, which is 2
  out       how far the output lies from exact attention in float64, as a share of its own norm: what the format costs
  kernel    the same, but from attention over what is stored: what the kernel adds to that
  q8_0, q4_0
            llama.cpp's flash attention over quantised KV, where llama-cpp-python is installed

One query token, 32 query heads on 8 KV heads of 128; keys differ in width from channel to channel. Everything is
checked against float64 before it is timed. All take turns in one run, over copies in rotation (1 GiB of each format),
so that nothing comes from a cache. Numbers are medians. Then what quantising costs: a step behind 32K tokens that
demotes a page in every layer, beside steps that demote none, both of a layer's attention alone and (in a full run) of
a Llama with layers of that shape: two, as wide as Llama-3-8B's, of random weights.

A full run takes some 6 minutes and 9 GiB, and appends to benchmarks/results/quantised.csv.

examples:
  python -m benchmarks.quantised --quick           32K tokens, 2 threads: under 45 seconds
  python -m benchmarks.quantised --quick --json    the same for a script: the last line is one JSON object
  python -m benchmarks.quantised                   32K and 128K tokens, 1 and 2 threads
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tandemkv.integrations.transformers as tandem
from benchmarks.common import (
    RESULTS,
    WrongResultError,
    append_rows,
    argument_parser,
    in_ms,
    medians_in_turn,
    print_json,
    this_run,
)
from tandemkv import kernels
from tandemkv.attention import extend_and_attend, use_threads
from tandemkv.cache import CacheSpec, KVCache, parse_far_dtype
from tandemkv.kernels import cpu, probes
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
LENGTHS = 32768, 131072
ROTATE_BYTES = 1 << 30
PROBE_BYTES = 512 << 20
LAYOUTS = {
    "bf16": PageLayout(torch.bfloat16, PAGE_SIZE, "panels"),
    "int8": PageLayout(torch.bfloat16, PAGE_SIZE, "int8"),
    "int4": PageLayout(torch.bfloat16, PAGE_SIZE, "int4"),
    "int8/96": PageLayout(torch.bfloat16, PAGE_SIZE, "int8", 96),
    "int4/96": PageLayout(torch.bfloat16, PAGE_SIZE, "int4", 96),
}
DEMOTED = "model", "int8", "int4"
NEAR_TOKENS, DECODED, MAX_ROUNDS = 2048, 8, 200
RULE = ScoreRule(HEAD_DIM**-0.5)
PEER_TOLERANCES = {"q8_0": 0.05, "q4_0": 0.4}  # of the norm of out; ours are off by 0.013 and 0.18
KERNEL_TOLERANCE = 2e-3  # of the norm of out; a wrong code or scale is far above


Errors = tuple[float | None, float | None, float | None]
"""Of logits, out and the kernel."""


@dataclass(frozen=True)
class Row:
    """One format at one length with one number of threads. Of peers only out_error is known."""

    kv_len: int
    num_threads: int
    contestant: str
    kv_bytes: int
    ms: float
    read_gbps: float
    times_bf16: float
    logit_error: float | None = None
    out_error: float | None = None
    kernel_error: float | None = None

    @property
    def share_of_read(self) -> float:
        """How much of the speed of memory it reaches with the bytes of its own format."""
        return self.kv_bytes / (self.ms * 1e6) / self.read_gbps


@dataclass(frozen=True)
class DemotionRow:
    """A step behind 32K tokens, and one that also demotes a page in every layer, which is one in PAGE_SIZE. Medians.

    of: attention of some layers, or a model. longer_by: of a round, the second over the median of the first, less one;
    the median of all rounds, and their lower and upper quartile.
    """

    of: str
    far_dtype: str
    step_ms: float
    demoting_step_ms: float
    longer_by: float
    longer_by_least: float
    longer_by_most: float


@dataclass(frozen=True, eq=False)
class Tokens:
    """q, and K and V `[num_kv_heads, kv_len, head_dim]`, bf16."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def random(kv_len: int) -> "Tokens":
        generator = torch.Generator().manual_seed(0)
        width = 0.2 + 2 * torch.rand((NUM_KV_HEADS, 1, HEAD_DIM), generator=generator) ** 2
        k = torch.randn((NUM_KV_HEADS, kv_len, HEAD_DIM), generator=generator) * width
        v = torch.randn((NUM_KV_HEADS, kv_len, HEAD_DIM), generator=generator)
        q = torch.randn((1, NUM_Q_HEADS, 1, HEAD_DIM), generator=generator)
        deviation = float((width**2).mean().sqrt())
        return Tokens((2 / deviation * q).bfloat16(), k.bfloat16(), v.bfloat16())

    def attend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[num_kv_heads, group, kv_len]` and out of every head in float64, the first two KV heads alone."""
        q = self.q.view(NUM_KV_HEADS, -1, HEAD_DIM)[:2].double()
        logits = (q @ k[:2].double().mT) * RULE.scale
        return logits, logits.softmax(-1) @ v[:2].double()


class Pages:
    """A sequence in the pages of a layout, many times over."""

    def __init__(self, sequence: Tokens, layout: PageLayout) -> None:
        self.kv_len = sequence.k.shape[1]
        num_pages = self.kv_len // PAGE_SIZE
        self.num_bytes = num_pages * layout.page_bytes(NUM_KV_HEADS, HEAD_DIM, HEAD_DIM)
        num_copies = max(2, math.ceil(ROTATE_BYTES / self.num_bytes))
        self.arena = Arena.allocate(layout, num_copies * num_pages, NUM_KV_HEADS, HEAD_DIM)
        self._fill(sequence, num_pages)
        for x in (self.arena.k, self.arena.v):
            for copy in range(1, num_copies):
                x[copy * num_pages : (copy + 1) * num_pages] = x[:num_pages]
        slots = torch.arange(num_copies * num_pages, dtype=torch.int32).view(num_copies, 1, 1, num_pages)
        self.runs = [self._run(table.expand(1, NUM_KV_HEADS, num_pages)) for table in slots]

    def _fill(self, sequence: Tokens, num_pages: int) -> None:
        rows = Arena.allocate(PageLayout(torch.bfloat16, PAGE_SIZE), num_pages, NUM_KV_HEADS, HEAD_DIM)
        slots = list(range(num_pages))
        table = torch.tensor(slots, dtype=torch.int32).expand(1, NUM_KV_HEADS, num_pages)
        cpu.append(rows, table, 0, sequence.k[None], sequence.v[None])
        cpu.move_pages(rows, self.arena, slots, slots, cpu.WorkerPool(2))

    def _run(self, table: Tensor) -> PagedKV:
        return PagedKV(self.arena, table, torch.tensor([0]), torch.tensor([self.kv_len]))

    def stored(self) -> tuple[Tensor, Tensor]:
        """K and V as float64."""
        exact = _as_float32(self.arena)
        k, v = (torch.empty((1, NUM_KV_HEADS, self.kv_len, HEAD_DIM), dtype=exact.layout.dtype) for _ in range(2))
        cpu.gather(exact, self.runs[0].page_table, 0, k, v, cpu.WorkerPool(2))
        return k[0].double(), v[0].double()

    def calls(self, q: Tensor, pool: cpu.WorkerPool) -> Callable[[], Tensor]:
        """Attention over the next copy."""
        turns = cycle(self.runs)
        return lambda: kernels.attend(q, next(turns), rule=RULE, pool=pool).out


def _as_float32(arena: Arena) -> Arena:
    """The same codes of int8, given back without rounding. int4 is rounded to bf16, in which its exact channels are."""
    if arena.layout.packing != "int8":
        return arena
    layout = PageLayout(torch.float32, PAGE_SIZE, arena.layout.packing, arena.layout.num_channels)
    return Arena(arena.k, arena.v, layout, HEAD_DIM, HEAD_DIM)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, save; the exit status."""
    parser = argument_parser("benchmarks.quantised", __doc__ or "")
    options = parser.parse_args(arguments)
    lengths, threads = ((LENGTHS[0],), (2,)) if options.quick else (LENGTHS, (1, 2))
    run = this_run("benchmarks.quantised", arguments)
    try:
        rows = [row for kv_len in lengths for row in measure(kv_len, threads, 3.0 if options.quick else 12.0)]
    except WrongResultError as error:
        print(f"our result is wrong, so nothing is timed: {error}", file=sys.stderr)
        return 1
    num_layers = 1 if options.quick else 8
    demotions = demote_in_turn([LayerSteps(name, num_layers) for name in DEMOTED], 3.0 if options.quick else 40.0)
    if not options.quick:
        model = wide_model()
        demotions += demote_in_turn([ModelSteps(model, name) for name in DEMOTED], 100.0)
    print(run)
    show(rows, demotions)
    if options.save or not options.quick:
        append_rows(RESULTS / "quantised.csv", [_csv(row) for row in rows], run)
        append_rows(RESULTS / "quantised-demotion.csv", [_demotion_csv(row) for row in demotions], run)
    if options.json:
        told = {"rows": [asdict(row) for row in rows], "demotions": [asdict(row) for row in demotions]}
        print_json(asdict(run) | told)
    return 0


def measure(kv_len: int, threads: Sequence[int], budget_s: float) -> list[Row]:
    """All formats and peers at one length."""
    sequence = Tokens.random(kv_len)
    exact = sequence.attend(sequence.k, sequence.v)
    pages = {name: Pages(sequence, layout) for name, layout in LAYOUTS.items()}
    peers = _peers(sequence, exact[1])
    errors: dict[str, Errors] = {name: _errors(name, sequence, each, exact) for name, each in pages.items()}
    errors |= {name: (None, each.out_error, None) for name, each in peers.items()}
    num_bytes = {name: each.num_bytes for name, each in pages.items()}
    num_bytes |= {name: each.num_bytes for name, each in peers.items()}
    rows = []
    for num_threads in threads:
        pool, buffer = cpu.WorkerPool(num_threads), probes.probe_buffer(PROBE_BYTES)
        calls = {name: in_ms(each.calls(sequence.q, pool)) for name, each in pages.items()}
        calls |= {name: in_ms(each.start(num_threads)) for name, each in peers.items()}
        probe = {"read": lambda pool=pool, buffer=buffer: probes.read_gbps(pool, buffer)}
        medians = medians_in_turn(calls | probe, budget_s, min_rounds=5)
        print(f"{kv_len} tokens, {num_threads} threads: {medians['int8']:.2f} ms in int8", file=sys.stderr)
        for name in calls:
            times = medians["bf16"] / medians[name]
            found = kv_len, num_threads, name, num_bytes[name], medians[name], medians["read"], times
            rows.append(Row(*found, *errors[name]))
    return rows


def _errors(name: str, sequence: Tokens, pages: Pages, exact: tuple[Tensor, Tensor]) -> Errors:
    """WrongResultError where the kernel's is not small."""
    exact_logits, exact_out = exact
    logits, out = sequence.attend(*pages.stored())
    got = kernels.attend(sequence.q, pages.runs[0], rule=RULE).out[0, :, 0].double()
    got = got.view(NUM_KV_HEADS, -1, HEAD_DIM)[:2]
    kernel = float((got - out).norm() / out.norm())
    # Rows of int4 are rounded to bf16, 2^-9, before they are compared.
    if not kernel <= KERNEL_TOLERANCE + (2.0**-9 if LAYOUTS[name].packing == "int4" else 0):
        raise WrongResultError(f"{name} at {pages.kv_len}: off by {kernel:.1e} of what is stored")
    logit = float((logits - exact_logits).square().mean().sqrt())
    return logit, float((got - exact_out).norm() / exact_out.norm()), kernel


class Peer(NamedTuple):
    """start: a call for so many threads."""

    start: Callable[[int], Callable[[], Tensor]]
    num_bytes: int
    out_error: float


def _peers(sequence: Tokens, exact_out: Tensor) -> dict[str, Peer]:
    """llama.cpp's, by name."""
    try:
        from benchmarks import ggml
    except (ImportError, OSError) as error:
        print(f"llama.cpp takes no part ({error}): pip install '.[peers]'", file=sys.stderr)
        return {}
    found: dict[str, Peer] = {}
    q, dense = sequence.q.float(), torch.stack([sequence.k, sequence.v])[:, None].float()
    for kind in ggml.QUANTISED:
        codes = ggml.quantise(dense, kind)
        num_copies = max(2, math.ceil(ROTATE_BYTES / codes.nbytes))
        copies = codes.expand(num_copies, *codes.shape).contiguous()

        def make(num_threads: int, copies: Tensor = copies, kind: str = kind) -> Callable[[], Tensor]:
            return ggml.FlashAttention(q, copies, RULE.scale, num_threads, kind)

        out = make(2)()[0].flatten().view(NUM_KV_HEADS, -1, HEAD_DIM)[:2].double()
        off = float((out - exact_out).norm() / exact_out.norm())
        if not off < PEER_TOLERANCES[kind]:
            print(f"llama.cpp's {kind} takes no part: off by {off:.1e}", file=sys.stderr)
            continue
        found[f"ggml {kind}"] = Peer(make, codes.nbytes, off)
    return found


class LayerSteps:
    """Attention of some layers behind 32K tokens: of 8, more than a processor's caches hold."""

    def __init__(self, far_dtype: str, num_layers: int) -> None:
        self.of, self.far_dtype = f"attention x {num_layers}", far_dtype
        spec = CacheSpec(
            num_layers=num_layers,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            near_tokens=NEAR_TOKENS,
            far_bytes=num_layers << 28,
            far_formats=parse_far_dtype(far_dtype),
        )
        self.cache, self._sequence = KVCache(spec), Tokens.random(LENGTHS[0])

    def step(self) -> None:
        """One token."""
        self.cache.begin_step(1, 1)
        sequence = self._sequence
        for layer in map(self.cache.layer, range(self.cache.spec.num_layers)):
            extend_and_attend(sequence.q, sequence.k[None, :, :1], sequence.v[None, :, :1], layer, RULE)
        self.cache.end_step()


def wide_model(hidden_size: int = NUM_Q_HEADS * HEAD_DIM, intermediate_size: int = 14336) -> LlamaForCausalLM:
    """Two layers of Llama-3-8B's shape, 872 MB of random weights; next to no vocabulary."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=NUM_Q_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2 * LENGTHS[0],
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    return tandem.attach(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval())


class ModelSteps:
    """A whole model behind 32K tokens."""

    def __init__(self, model: LlamaForCausalLM, far_dtype: str) -> None:
        self.of, self.far_dtype, self._model = "model", far_dtype, model
        self._tiered = tandem.TieredCache(model.config, NEAR_TOKENS, 1 << 30, far_dtype=far_dtype)
        self._token = torch.zeros((1, 1), dtype=torch.int64)

    @property
    def cache(self) -> KVCache:
        """Under the model's."""
        return self._tiered.kv

    def step(self) -> None:
        """One token."""
        self._model(self._token, past_key_values=self._tiered)


@torch.inference_mode()
def demote_in_turn(contestants: Sequence[LayerSteps | ModelSteps], budget_s: float) -> list[DemotionRow]:
    """Of every PAGE_SIZE tokens of each in turn the last few are decoded and timed; one of them demotes."""
    use_threads(None)
    sequence = Tokens.random(LENGTHS[0])
    for each in contestants:
        _add(each.cache, sequence, LENGTHS[0])
        _add(each.cache, sequence, DECODED // 2)  # so that it is one in the middle
    rounds: list[list[tuple[float, float]]] = [[] for _ in contestants]
    start = time.perf_counter()
    while len(rounds[-1]) < 5 or (time.perf_counter() - start < budget_s and len(rounds[-1]) < MAX_ROUNDS):
        for each, found in zip(contestants, rounds, strict=True):
            _add(each.cache, sequence, PAGE_SIZE - DECODED)
            found.append(_round(each))
    for each in contestants:
        each.cache.close()
    return [_demotion_row(each, found) for each, found in zip(contestants, rounds, strict=True)]


def _round(steps: LayerSteps | ModelSteps) -> tuple[float, float]:
    """Milliseconds of the steps that demote nothing, their median, and of the one that does."""
    plain: list[float] = []
    demoting: list[float] = []
    for _ in range(DECODED):
        moved, begin = steps.cache.use()[1].moved_bytes, time.perf_counter()
        steps.step()
        took = (time.perf_counter() - begin) * 1e3
        (demoting if steps.cache.use()[1].moved_bytes > moved else plain).append(took)
    (demoted,) = demoting
    return statistics.median(plain), demoted


def _demotion_row(steps: LayerSteps | ModelSteps, rounds: list[tuple[float, float]]) -> DemotionRow:
    plain, demoting = zip(*rounds, strict=True)
    shares = [after / before - 1 for before, after in rounds]
    least, middle, most = statistics.quantiles(shares, n=4)
    return DemotionRow(
        steps.of, steps.far_dtype, statistics.median(plain), statistics.median(demoting), middle, least, most
    )


def _add(cache: KVCache, sequence: Tokens, num_tokens: int) -> None:
    """Tokens, as a prompt would, but for its attention."""
    cache.begin_step(1, num_tokens)
    for index in range(cache.spec.num_layers):
        layer = cache.layer(index)
        for begin in range(0, num_tokens, layer.chunk_tokens):
            layer.evict()
            tokens = slice(begin, min(begin + layer.chunk_tokens, num_tokens))
            layer.append(sequence.k[None, :, tokens], sequence.v[None, :, tokens])
    cache.end_step()


def show(rows: Sequence[Row], demotions: Sequence[DemotionRow]) -> None:
    """Two tables."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    title = f"Decode attention, {NUM_Q_HEADS}:{NUM_KV_HEADS}x{HEAD_DIM}, one query; medians"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in (
        "tokens",
        "threads",
        "KV",
        "MiB",
        "ms",
        "GB/s",
        "read GB/s",
        "share",
        "times bf16",
        "logits",
        "out",
        "kernel",
    ):
        table.add_column(name, justify="left" if name == "KV" else "right")
    for row in rows:
        table.add_row(
            f"{row.kv_len}",
            str(row.num_threads),
            row.contestant,
            f"{row.kv_bytes / 2**20:.0f}",
            f"{row.ms:.2f}",
            f"{row.kv_bytes / row.ms / 1e6:.1f}",
            f"{row.read_gbps:.1f}",
            f"{row.share_of_read:.2f}",
            f"{row.times_bf16:.2f}",
            *("-" if error is None else f"{error:.1e}" for error in (row.logit_error, row.out_error, row.kernel_error)),
        )
    console.print(table)
    table = Table(title="A step behind 32K tokens, ms", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("of", "far tokens", "step", "step that demotes", "longer by", "quartiles"):
        table.add_column(name, justify="left" if name in ("of", "far tokens") else "right")
    for each in demotions:
        quartiles = f"{each.longer_by_least:.1%} to {each.longer_by_most:.1%}"
        times = f"{each.step_ms:.2f}", f"{each.demoting_step_ms:.2f}", f"{each.longer_by:.1%}"
        table.add_row(each.of, each.far_dtype, *times, quartiles)
    console.print(table)


def _csv(row: Row) -> dict[str, object]:
    return {
        "kv_len": row.kv_len,
        "num_threads": row.num_threads,
        "contestant": row.contestant,
        "kv_bytes": row.kv_bytes,
        "ms": f"{row.ms:.4f}",
        "read_gbps": f"{row.read_gbps:.2f}",
        "share_of_read": f"{row.share_of_read:.3f}",
        "times_bf16": f"{row.times_bf16:.3f}",
        **{
            name: "" if error is None else f"{error:.2e}"
            for name, error in (
                ("logit_error", row.logit_error),
                ("out_error", row.out_error),
                ("kernel_error", row.kernel_error),
            )
        },
    }


def _demotion_csv(row: DemotionRow) -> dict[str, object]:
    return {
        "of": row.of,
        "far_dtype": row.far_dtype,
        "step_ms": f"{row.step_ms:.4f}",
        "demoting_step_ms": f"{row.demoting_step_ms:.4f}",
        "longer_by": f"{row.longer_by:.4f}",
        "longer_by_least": f"{row.longer_by_least:.4f}",
        "longer_by_most": f"{row.longer_by_most:.4f}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
