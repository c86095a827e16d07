"""Attention over a subset of tokens, and the merge of such partial results: tensors and numbers only.

Backends are the files beside this one and never import each other: `cpu` (native, pages in host memory), `gpu` (Triton,
pages in a device's), `torch_ops` (torch's own kernels, on any device) and `reference` (float64, the specification; only
tests import it). `devices` chooses between the middle two.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tandemkv.errors import InputError
from tandemkv.types import AnyArena, Arena, PagedKV, Partial, ScoreRule

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import Call, WorkerPool


def attend(
    q: Tensor,
    *runs: PagedKV,
    rule: ScoreRule,
    causal: bool = False,
    mass: Tensor | None = None,
    pool: "WorkerPool | None" = None,
    isa: str | None = None,
) -> Partial:
    """Exact attention of q over the tokens `[kv_start, kv_len)` of each sequence's page table, in all runs together.

    q: float32, bfloat16 or float16 `[num_seqs, num_q_heads, q_len, head_dim]` in host memory, or with the pages on a
        device, which is waited for. Query heads are a multiple of the KV heads, grouped: query head h reads KV head
        h // group_size. Dims are at most 256.
    runs: disjoint tokens, such as older ones in one pair of arenas and newer ones in another: one call is cheaper than
        one each and a `merge`.
    rule: a window needs `causal` and one run; tokens that no query sees are not read.
    causal: the queries are the last tokens of the last run: query i of q_len sees its tokens below
        `kv_len - q_len + 1 + i`, and all tokens of the other runs; without it all see all.
    mass: what `block_mass` made for these, to be filled.
    pool: threads to use; without one, the caller's.
    isa: force an instruction set by name (`tandemkv doctor` lists them); without one, the fastest. Both for the CPU.

    A query that sees nothing (an empty run, padding) gets out 0 and lse -inf. out is
    `[num_seqs, num_q_heads, q_len, v_head_dim]`. Accumulates in float32.
    Raises InputError for shapes, dtypes or devices that do not fit and for NaN in q, UnsupportedError for a q that
    requires a gradient.
    """
    if isinstance(q, Tensor) and q.device.type == "cuda":
        return _attend_on_device(q, *runs, rule=rule, causal=causal, mass=mass)
    return prepare_attend(q, *runs, rule=rule, causal=causal, mass=mass, pool=pool, isa=isa).make()


def _attend_on_device(q: Tensor, *runs: PagedKV, rule: ScoreRule, causal: bool, mass: Tensor | None) -> Partial:
    """Waits for the device, to tell of NaN; `devices.attend` does not."""
    from tandemkv.kernels import devices
    from tandemkv.kernels.checks import raise_for

    flags = torch.zeros(1, dtype=torch.int32, device=q.device)
    part = devices.attend(q, *runs, rule=rule, causal=causal, mass=mass, flags=flags)
    raise_for(flags)
    return part


def prepare_attend(
    q: Tensor,
    *runs: PagedKV,
    rule: ScoreRule,
    causal: bool = False,
    mass: Tensor | None = None,
    pool: "WorkerPool | None" = None,
    isa: str | None = None,
) -> "Call[Partial]":
    """`attend`, checked and not made: any thread may make the call, without Python. Raises as it does, of NaN later."""
    from tandemkv.kernels import cpu

    return cpu.prepare_attend(q, runs, rule=rule, causal=causal, mass=mass, pool=pool, isa=isa)


def block_mass(q: Tensor, *runs: PagedKV) -> Tensor:
    """Room for the attention mass of a call: zeros, float32 `[num_seqs, num_q_heads, q_len, num_blocks]`.

    `attend` and `append_and_attend` fill it: the share that each block of 16 tokens, of the tables of all runs one
    behind the other, has of a query's attention. A sink's logit counts in the whole, so that shares add up to less.
    """
    num_blocks = sum(kv.num_blocks for kv in runs)
    return torch.zeros((*q.shape[:3], num_blocks), dtype=torch.float32, device=q.device)


def logits(
    q: Tensor, kv: PagedKV, *, rule: ScoreRule, pool: "WorkerPool | None" = None, isa: str | None = None
) -> Tensor:
    """The first half of `attend`: scores of q with every token of the run, as the softmax takes them; V is not read.

    q: as in `attend`. rule: without a window; no mask but the run's own.
    pool, isa: as in `attend`.
    Returns float32 `[num_seqs, num_q_heads, q_len, tokens of the table]`: natural, after scale and soft cap, with the
    run's log_counts; -inf for tokens outside `[kv_start, kv_len)`, which are not read. The same bits as inside
    `attend`, for any number of threads.
    Raises as `attend` does, and InputError for a rule with a window.
    """
    return prepare_logits(q, kv, rule=rule, pool=pool, isa=isa).make()


def prepare_logits(
    q: Tensor, kv: PagedKV, *, rule: ScoreRule, pool: "WorkerPool | None" = None, isa: str | None = None
) -> "Call[Tensor]":
    """`logits`, checked and not made: see `prepare_attend`."""
    from tandemkv.kernels import cpu

    return cpu.prepare_logits(q, kv, rule=rule, pool=pool, isa=isa)


def weigh(logits: Tensor, kv: PagedKV, *, pool: "WorkerPool | None" = None, isa: str | None = None) -> Partial:
    """The second half of `attend`: the softmax over what `logits` gave, and its weights times V; K is not read.

    logits: float32 `[num_seqs, num_q_heads, q_len, tokens of the table]`, contiguous, in host memory. -inf leaves a
        token out, whose V is read all the same and must be finite. What stands for tokens outside
        `[kv_start, kv_len)` does not matter, and neither do the run's log_counts, which logits count already.
    A row of nothing but -inf gets out 0 and lse -inf. `weigh(logits(q, kv, rule=rule), kv)` is `attend(q, kv,
    rule=rule)` to the bit, on the same instruction set.
    Raises InputError for shapes, dtypes or devices that do not fit, UnsupportedError for logits that require a
    gradient.
    """
    from tandemkv.kernels import cpu

    return cpu.weigh(logits, kv, pool=pool, isa=isa)


def append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *runs: PagedKV,
    rule: ScoreRule,
    pool: "WorkerPool",
    sink_logit: Tensor | None = None,
    mass: Tensor | None = None,
) -> Tensor:
    """`append` k and v as the last q_len tokens of the last run, then `attend` from them, causally, over all runs.

    One call, because after a short context calls cost more than reading.
    q, rule as in `attend`; k, v as in `append`, q_len tokens; kv_len of the last run, equal for all sequences, counts
    them already. sink_logit as in `merge`, mass as in `attend`. Returns `[num_seqs, q_len, num_q_heads, v_head_dim]` in
    q's dtype, contiguous, rounded once. Raises as `attend`, `append` and `merge` do; where attention fails, tokens are
    written.
    """
    from tandemkv.kernels import cpu

    if sink_logit is not None:
        _check_sink_logit(sink_logit, q)
    return cpu.append_and_attend(q, k, v, runs, rule=rule, pool=pool, sink_logit=sink_logit, mass=mass)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, *, rule: ScoreRule, first_query: int | None = None) -> Partial:
    """Exact attention of prefill-sized queries over dense k and v, by torch's kernels, on any device.

    q: `[num_seqs, num_q_heads, q_len, head_dim]`; k, v: `[num_seqs, num_kv_heads, kv_len, head_dim or v_head_dim]`,
        every token real.
    first_query: query i is token `first_query + i` of k's run, which may lie behind its end, and sees what is not newer
        than itself; without it all queries see all tokens.
    out was rounded to q's dtype by torch's kernel before it became float32, except under a soft cap.
    """
    from tandemkv.kernels import torch_ops

    _check_dense(q, k, v, rule, first_query)
    return torch_ops.attend_dense(q, k, v, rule=rule, first_query=first_query)


def merge(parts: Sequence[Partial], pool: "WorkerPool | None" = None, *, sink_logit: Tensor | None = None) -> Partial:
    """Attention over the union of disjoint subsets, from the attention over each: an exact log-sum-exp merge.

    Associative, commutative (up to rounding), safe for huge logits; the empty subset is its identity, and a row that
    is empty in all parts stays empty. Parts are merged in the order given: the same parts give the same bits.
    sink_logit: float32 `[num_q_heads]` on the parts' device, for the last merge alone: one more logit in every
        denominator, which has no value (GPT-OSS, 2508.10925): out is multiplied by sigmoid(lse - sink_logit), lse
        becomes logaddexp(lse, sink_logit). -inf is none.
    Raises InputError where there is no part, or shapes, dtypes or devices do not fit, or sink_logit is NaN or inf.
    """
    _check_parts(parts)
    first = parts[0]
    if sink_logit is not None:
        _check_sink_logit(sink_logit, first.out)
    if len(parts) == 1 and sink_logit is None:
        return first
    if first.out.device.type == "cpu":
        from tandemkv.kernels import cpu

        return cpu.merge(parts, pool, sink_logit)
    from tandemkv.kernels import devices

    return devices.merge(parts, sink_logit)


def append(
    arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: "WorkerPool | None" = None
) -> None:
    """Write k and v as tokens `begin...` of the page table's run; on a GPU into an arena of rows.

    k: `[num_seqs, num_kv_heads, num_tokens, head_dim]` in the arena's dtype, on its device; v with v_head_dim.
    InputError for an arena of codes: those are filled a page at a time, by `move_pages`.
    """
    if arena.k.device.type == "cpu":
        from tandemkv.kernels import cpu

        return cpu.append(arena, page_table, begin, k, v, pool)
    from tandemkv.kernels import devices

    return devices.append(arena, page_table, begin, k, v)


def gather(
    arena: AnyArena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: "WorkerPool | None" = None
) -> None:
    """Read tokens `begin...` of the page table's run into k and v, shaped as in `append`; codes as what they stand for,
    rounded to the arena's dtype."""
    if arena.k.device.type == "cpu":
        from tandemkv.kernels import cpu

        return cpu.gather(arena, page_table, begin, k, v, pool)
    from tandemkv.kernels import torch_ops

    assert isinstance(arena, Arena), "pages of several packings lie in host memory"
    return torch_ops.gather(arena, page_table, begin, k, v)


def move_pages(
    source: AnyArena,
    target: AnyArena,
    source_slots: list[int],
    target_slots: list[int],
    pool: "WorkerPool | None" = None,
    channel_weights: Tensor | None = None,
) -> dict[int, int]:
    """Copy whole pages into the slots of an arena in host memory, packed or quantised where it holds panels or codes.

    Both may be one arena. channel_weights: float32 `[num_pages, num_kv_heads, head_dim]`, by which channels of K are
    kept where some are not: `layout.num_channels` of the highest `weight * sum of k^2` (ThinK's score, squared, where
    weights are the sums of q^2 over an observation window); None weighs all alike.
    Returns the pages that cannot become codes, as places in the lists, with their first token whose K or V is not
    finite (or, of K, too far from the others of its channel for float32); they are not written.
    Raises InputError where a target slot is named twice or is a source of the same arena.
    """
    from tandemkv.kernels import cpu

    if isinstance(source, Arena) and source.k.device.type != "cpu":
        index = torch.tensor(source_slots, device=source.k.device)
        source = Arena(source.k[index].cpu(), source.v[index].cpu(), source.layout, source.head_dim, source.v_head_dim)
        source_slots = list(range(len(source_slots)))
    return cpu.move_pages(source, target, source_slots, target_slots, pool, channel_weights)


def _check_parts(parts: Sequence[Partial]) -> None:
    if not isinstance(parts, (list, tuple)) or isinstance(parts, Partial):
        raise InputError(f"merge takes a list of Partials, got {type(parts).__name__}")
    if not parts:
        raise InputError("merge needs at least one part; the empty subset is out = 0, lse = -inf")
    first = parts[0]
    for part in parts:
        if not isinstance(part, Partial):
            raise InputError(f"merge takes a list of Partials, got {type(part).__name__} in it")
        if part.out.shape != first.out.shape or part.lse.shape != first.out.shape[:-1]:
            got = f"{list(part.out.shape)} and {list(part.lse.shape)}"
            raise InputError(f"parts must be alike: expected out {list(first.out.shape)} and its lse, got {got}")
        if part.out.dtype != torch.float32 or part.lse.dtype != torch.float32:
            raise InputError(f"a Partial is float32, got out {part.out.dtype} and lse {part.lse.dtype}")
        devices = {first.out.device, part.out.device, part.lse.device}
        if len(devices) > 1:
            raise InputError(f"parts must lie on one device, got {sorted(map(str, devices))}")


def _check_sink_logit(sink_logit: Tensor, x: Tensor) -> None:
    """InputError unless it fits queries or out `[num_seqs, num_q_heads, q_len, ...]`."""
    if not isinstance(sink_logit, Tensor) or not isinstance(x, Tensor):
        raise InputError(f"sink_logit must be a tensor, got {type(sink_logit).__name__}")
    expected = x.shape[1:2]
    if sink_logit.dtype != torch.float32 or sink_logit.shape != expected or sink_logit.device != x.device:
        got = f"{sink_logit.dtype} {list(sink_logit.shape)} on {sink_logit.device}"
        raise InputError(f"sink_logit must be torch.float32 {list(expected)} on {x.device}, got {got}")
    if x.device.type == "cpu" and not bool((sink_logit < torch.inf).all()):  # a device would have to be waited for
        raise InputError(f"sink_logit must be finite or -inf, got {sink_logit.tolist()}")


def _check_dense(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, first_query: int | None) -> None:
    """torch's kernels would divide by zero, read beyond v, or mask from the wrong corner."""
    shapes = f"got q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[::3] != k.shape[::3]:
        raise InputError(f"expected q, k and v of as many sequences, q and k of one head_dim, k and v alike, {shapes}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1] or q.shape[1] < k.shape[1]:
        raise InputError(f"query heads must be a multiple of the KV heads, {shapes}")
    if rule.window is not None and first_query is None:
        raise InputError("a window needs to know where the queries are: pass first_query")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise InputError(
            f"q, k and v must have one dtype and device, got {q.dtype} on {q.device}, {k.dtype} on {k.device} and "
            f"{v.dtype} on {v.device}"
        )
