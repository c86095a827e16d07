"""A context that does not fit this machine's memory in bf16, decoded in int4 or int8: refused first, then held.

The demo's model (a Llama of 155 M fixed random weights, 8 layers, 16:4 heads of 64) behind 4,194,304 tokens: in bf16 K
and V take 34 GB, and `reserve` refuses them with the arithmetic; in int4 they take 10. The far pages are filled with
random K and V, not prefilled: 65,536 tokens over and over, as they would arrive from a prompt, demoted and quantised
page by page. One head's attention is compared with float64 over what is stored, then tokens are decoded.

A full run takes some 6 minutes and 11 GiB, and appends to benchmarks/results/capacity.csv.

examples:
  python -m benchmarks.capacity --quick                  262,144 tokens: under 45 seconds
  python -m benchmarks.capacity                          4 million tokens in int4
  python -m benchmarks.capacity --far-dtype int8 --tokens 2000000
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import LlamaForCausalLM

import tandemkv.integrations.transformers as tandem
from benchmarks.common import RESULTS, WrongResultError, append_rows, argument_parser, positive, print_json, this_run
from tandemkv import machine
from tandemkv.attention import use_threads, worker_pool
from tandemkv.cache import CacheSpec, LayerKV, parse_far_dtype
from tandemkv.demo.speed import demo_config, kv_bytes, next_logits
from tandemkv.errors import CapacityError, InputError, UnsupportedError
from tandemkv.kernels import attend, probes
from tandemkv.types import ScoreRule

QUICK_TOKENS, FULL_TOKENS = 1 << 18, 1 << 22
PIECE_TOKENS = 1 << 16
NEAR_TOKENS, NUM_STEPS = 4096, 5
ERROR_TOLERANCE = 1e-2  # of the norm; K and V are rounded to bf16 before they are compared


@dataclass(frozen=True)
class Held:
    """What came of a context. refusal: what `reserve` said of it in bf16, or nothing where it fits."""

    tokens: int
    far_dtype: str
    bf16_bytes: int
    far_bytes: int
    refusal: str
    fill_s: float
    step_ms: float
    read_gbps: float
    error: float

    @property
    def share_of_read(self) -> float:
        """Far bytes at the speed of memory, over the time of a token."""
        return self.far_bytes / (self.step_ms * 1e6) / self.read_gbps


def main(arguments: Sequence[str]) -> int:
    """Hold, decode, print, save; the exit status."""
    parser = argument_parser("benchmarks.capacity", __doc__ or "")
    parser.add_argument("--tokens", type=positive, default=None, help="of the context, 4194304 where left out")
    parser.add_argument("--far-dtype", default="int4", help="as TieredCache takes it")
    options = parser.parse_args(arguments)
    try:
        check_format(options.far_dtype)
    except (InputError, UnsupportedError) as error:
        parser.error(f"--far-dtype: {error}")
    use_threads(None)
    run = this_run("benchmarks.capacity", arguments)
    tokens = options.tokens or (QUICK_TOKENS if options.quick else FULL_TOKENS)
    try:
        found = hold(tokens, options.far_dtype, Console(stderr=True))
    except WrongResultError as error:
        print(f"our result is wrong, so nothing is timed: {error}", file=sys.stderr)
        return 1
    print(run)
    sizes = f"{found.bf16_bytes / 1e9:.1f} GB in bf16, {found.far_bytes / 1e9:.1f} GB far in {found.far_dtype}"
    print(f"{found.tokens:,} tokens: {sizes}\nin bf16: {found.refusal or 'fits'}")
    print(
        f"filled in {found.fill_s:.0f} s; a token takes {found.step_ms:.0f} ms, {found.share_of_read:.2f} of the speed "
        f"of memory ({found.read_gbps:.1f} GB/s); one head is off by {found.error:.1e} of float64"
    )
    if options.save or not options.quick:
        row = {name: value for name, value in asdict(found).items() if name != "refusal"}
        append_rows(RESULTS / "capacity.csv", [row | {"refused_in_bf16": bool(found.refusal)}], run)
    if options.json:
        print_json(asdict(run) | asdict(found))
    return 0


def check_format(far_dtype: str) -> None:
    """InputError or UnsupportedError where the demo's model cannot keep far tokens so."""
    config, formats = demo_config(), parse_far_dtype(far_dtype)
    heads = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    CacheSpec(*heads, torch.bfloat16, NEAR_TOKENS, 0, far_formats=formats)


@torch.inference_mode()
def hold(tokens: int, far_dtype: str, console: Console) -> Held:
    """Fill a cache and decode behind it."""
    config = demo_config()
    config.max_position_embeddings = tokens + 2 * NUM_STEPS
    torch.manual_seed(0)
    model = tandem.attach(LlamaForCausalLM(config).to(torch.bfloat16).eval())
    bf16_bytes = kv_bytes(config, tokens)
    refusal = _refusal(model, tokens)
    cache = _cache(model, tokens, far_dtype)
    cache.reserve(1, tokens + NUM_STEPS)
    start = time.perf_counter()
    for index in track(range(config.num_hidden_layers), "filling and quantising", console=console, transient=True):
        _fill(cache.kv.layer(index), tokens, index)
    fill_s = time.perf_counter() - start
    error = _error(cache.kv.layer(config.num_hidden_layers - 1))
    if not error <= ERROR_TOLERANCE:
        raise WrongResultError(f"one head is off by {error:.1e}, tolerance {ERROR_TOLERANCE:.1e}")
    steps = []
    token = torch.zeros((1, 1), dtype=torch.int64)
    for _ in track(range(NUM_STEPS), "decoding", console=console, transient=True):
        start = time.perf_counter()
        logits = next_logits(model, cache, token)
        steps.append((time.perf_counter() - start) * 1e3)
        if not bool(logits.isfinite().all()):
            raise WrongResultError("logits are not finite")
        token = logits.argmax().view(1, 1)
    read_gbps = probes.read_gbps(worker_pool(), probes.probe_buffer(512 << 20))
    far_bytes = cache.use()[1].used_bytes
    cache.close()
    return Held(tokens, far_dtype, bf16_bytes, far_bytes, refusal, fill_s, statistics.median(steps), read_gbps, error)


def _cache(model: LlamaForCausalLM, tokens: int, far_dtype: str) -> tandem.TieredCache:
    """With room for no more than these tokens."""
    spec = tandem.TieredCache(model.config, NEAR_TOKENS, 0, far_dtype=far_dtype).kv.spec
    far_bytes = spec.far_bytes_of(spec.num_far_pages(1, tokens + 2 * spec.chunk_tokens))
    return tandem.TieredCache(model.config, NEAR_TOKENS, far_bytes, far_dtype=far_dtype)


def _refusal(model: LlamaForCausalLM, tokens: int) -> str:
    """What is said of as many tokens in bf16, with all the memory that there is."""
    try:
        cache = tandem.TieredCache(model.config, NEAR_TOKENS, machine.memory().whole.num_bytes)
        cache.reserve(1, tokens)
    except CapacityError as error:
        return str(error)
    cache.close()
    return ""


def _fill(layer: LayerKV, tokens: int, seed: int) -> None:
    """A piece of random K and V, over and over, in chunks."""
    arena = layer.far.arena
    generator = torch.Generator().manual_seed(seed)
    shape = (1, arena.num_kv_heads, PIECE_TOKENS, arena.head_dim)
    k, v = (torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator) for _ in range(2))
    for begin in range(0, tokens, layer.chunk_tokens):
        layer.evict()
        at = slice(begin % PIECE_TOKENS, min(begin % PIECE_TOKENS + layer.chunk_tokens, PIECE_TOKENS))
        num = min(at.stop - at.start, tokens - begin)
        layer.append(k[:, :, at.start : at.start + num], v[:, :, at.start : at.start + num])


def _error(layer: LayerKV) -> float:
    """Of attention over everything, KV head 0, against float64 over what is stored; as a share of its norm."""
    generator = torch.Generator().manual_seed(3)
    arena = layer.far.arena
    num_q_heads, rule = 4 * arena.num_kv_heads, ScoreRule(2 * arena.head_dim**-0.5)
    q = torch.randn((1, num_q_heads, 1, arena.head_dim), generator=generator).bfloat16()
    with layer.hold() as held:
        got = attend(q, *held.far, held.near, rule=rule, pool=worker_pool()).out[0, :4, 0].double()
    top, weights, out = (
        torch.full((4,), -torch.inf).double(),
        torch.zeros(4).double(),
        torch.zeros(4, arena.head_dim).double(),
    )
    for begin in range(0, layer.seq_len, PIECE_TOKENS):
        k, v = (x[0, 0].double() for x in layer.read(begin, min(begin + PIECE_TOKENS, layer.seq_len)))
        scores = rule.scale * (q[0, :4, 0].double() @ k.T)
        out, weights, top = _added(out, weights, top, scores, v)
    truth = out / weights[:, None]
    return float((got - truth).norm() / truth.norm())


def _added(out: Tensor, weights: Tensor, top: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A sum of weighted values and of weights, relative to the largest score so far, with more tokens."""
    now = torch.maximum(top, scores.amax(1))
    shrink, p = (top - now).exp(), (scores - now[:, None]).exp()
    return out * shrink[:, None] + p @ v, weights * shrink + p.sum(1), now


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
