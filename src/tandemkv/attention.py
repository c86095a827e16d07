"""One decode step and one prefill chunk: the only place where queries meet pages."""

import os
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.cache import LayerKV
from tandemkv.errors import InputError, UnsupportedError
from tandemkv.kernels import append_and_attend, attend, attend_dense, block_mass, devices, merge
from tandemkv.kernels.checks import NAN_IN_Q
from tandemkv.lanes import LANES, Ahead, Crew, HybridCrew, Inputs, Staging, Task, TorchRig, drive, pull_into_l2
from tandemkv.lanes.hybrid import join, near_logits, pick
from tandemkv.select import MAX_SELECT_QUERIES
from tandemkv.selection import (
    far_question,
    is_verified,
    joins_logits,
    learn,
    observe_chunk,
    observer_of,
    taking_part,
    verified_rest,
    weigh_channels,
)
from tandemkv.types import BLOCK_TOKENS, PagedKV, Partial, ScoreRule
from tandemkv.verification import Step

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool

# Up to here the paged kernel reads K and V once for all queries; beyond it torch's matrix products win.
MAX_DECODE_QUERIES = 8

# History is read in pieces of this many tokens when a prefill chunk attends to it: large enough that a merge is
# small beside the product, small enough that the copy of the piece stays in L2.
PREFILL_PIECE_TOKENS = 2048


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink_logit: Tensor | None = None
) -> Tensor:
    """Add the newest tokens to a layer, and attend from them over what it holds, themselves included.

    That is every token, or in sparse mode what the layer's selector picks within its budget.

    q: `[num_seqs, num_q_heads, q_len, head_dim]` on the near device, k and v accordingly; a token sees what is not
    newer than itself. sink_logit: float32 `[num_q_heads]`, an extra logit without a value (GPT-OSS).
    Returns `[num_seqs, q_len, num_q_heads, v_head_dim]` in q's dtype, contiguous.
    """
    if joins_logits(layer):
        return _decode_jointly(q, k, v, layer, rule, sink_logit)
    if layer.crew is not None:
        return _decode_in_lanes(q, k, v, layer, rule, sink_logit)
    if q.device.type != "cpu":
        return _decode_on_device(q, k, v, layer, rule, sink_logit)
    pool = worker_pool()
    with layer.extended(q.shape[2]) as held:  # one processor reaches near and far: one call
        runs = (*taking_part(q, layer, held, pool), held.near)
        mass = None if observer_of(layer) is None else block_mass(q, *runs)
        if is_verified(layer):
            layer.write(k, v)
            out = _attend_and_verify(Step(q, rule, pool, sink_logit), layer, runs, mass)
        else:
            out = append_and_attend(q, k, v, *runs, rule=rule, sink_logit=sink_logit, pool=pool, mass=mass)
        if mass is not None:
            learn(layer, mass, runs, is_decoded=True)
        return out


def _attend_and_verify(step: Step, layer: LayerKV, runs: tuple[PagedKV, ...], mass: Tensor | None) -> Tensor:
    """Attention over these runs, and over a sample of what they leave out; as `decode_step` returns it."""
    exact = attend(step.q, *runs, rule=step.rule, causal=True, mass=mass, pool=step.pool)
    parts = [exact, *verified_rest(step, layer, runs, exact)]
    whole = merge(parts, step.pool, sink_logit=step.sink_logit)
    return whole.out.transpose(1, 2).to(step.q.dtype).contiguous()


def prefill_chunk(q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule) -> Partial:
    """Attention of a chunk over the layer's history and over itself; the chunk is not appended yet.

    k, v: `[num_seqs, num_kv_heads, q_len, head_dim]`, q accordingly. Memory beside the result is bounded by
    PREFILL_PIECE_TOKENS. Raises InputError for NaN in q.
    """

    def attend(seqs: slice, kv_start: int) -> Partial:
        return _prefill_rows(q[seqs], (k[seqs], v[seqs]), layer, seqs, kv_start, rule)

    return _by_padding(layer.kv_start, attend)


def extend_and_attend(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink_logit: Tensor | None = None
) -> Tensor:
    """Add new tokens to a layer and attend from them, evicting the oldest: a decode step, or a prompt chunk by chunk.

    Shapes as in `decode_step`, for any q_len; rows of padding come out as 0. Memory grows with a chunk, not with q_len,
    except for the result.
    """
    num_seqs, num_q_heads, q_len, _ = q.shape
    if q_len <= _max_step(layer):
        weigh_channels(q, layer)
        layer.evict()
        worker_pool().rouse()  # they wake while this thread adds the new tokens
        return decode_step(q, k, v, layer, rule, sink_logit)
    out = torch.empty((num_seqs, q_len, num_q_heads, v.shape[3]), dtype=q.dtype, device=q.device)
    for begin in range(0, q_len, layer.chunk_tokens):
        chunk = slice(begin, begin + layer.chunk_tokens)
        q_chunk, k_chunk, v_chunk = q[:, :, chunk], k[:, :, chunk], v[:, :, chunk]
        weigh_channels(q_chunk, layer)
        layer.evict()
        part = prefill_chunk(q_chunk, k_chunk, v_chunk, layer, rule)
        layer.append(k_chunk, v_chunk)
        observe_chunk(q_chunk, layer, rule, worker_pool(), is_last=begin + layer.chunk_tokens >= q_len)
        part = part if sink_logit is None else merge([part], sink_logit=sink_logit)
        out[:, chunk] = part.out.transpose(1, 2)
    return out


def use_threads(threads: int | None) -> None:
    """Let torch, and our pool from its first use on, have so many threads; None is what this machine grants.

    InputError for more than there are processors, or less than one.
    """
    if threads is not None and not 1 <= threads <= machine.usable_cpus():
        raise InputError(f"--threads must be 1 to {machine.usable_cpus()}, the processors here, got {threads}")
    torch.set_num_threads(threads or min(torch.get_num_threads(), machine.default_threads()))


@cache
def worker_pool() -> "WorkerPool":
    """The process's native threads: as many as torch uses, but no more than the cgroup grants.

    With TANDEMKV_PIN_WORKERS=1 each but the caller's stays on a processor of its own; InputError for other values.
    """
    from tandemkv.kernels.cpu import WorkerPool

    return WorkerPool(min(torch.get_num_threads(), machine.default_threads()), machine.pinned_cpus())


def _max_step(layer: LayerKV) -> int:
    """Queries that one step serves: where a selector picks, as many as one choice may serve."""
    return MAX_DECODE_QUERIES if layer.sparse is None else MAX_SELECT_QUERIES


def _decode_in_lanes(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink_logit: Tensor | None
) -> Tensor:
    """`decode_step` on a rig: its scheduler splits the far tokens, every processor attends to what it has."""
    crew = layer.crew
    assert crew is not None
    with layer.extended(q.shape[2]) as held:
        layer.write(k, v)
        runs = (*taking_part(q, layer, held, crew.rig.host.pool), held.near)
        mass = None if observer_of(layer) is None else block_mass(q, *runs)
        exact = crew.attend(q, held.near, runs[:-1], rule, _inputs_of(layer), mass)
        step = Step(q, rule, crew.rig.host.pool, sink_logit)
        rest = _verified_by_host(step, layer, runs, exact, crew) if is_verified(layer) else []
        whole = merge([exact, *rest], sink_logit=sink_logit)
        if mass is not None:
            if sink_logit is not None and not is_verified(layer):
                mass *= (exact.lse - whole.lse).exp_().nan_to_num_(0.0).unsqueeze(-1)
            learn(layer, mass, runs, is_decoded=True)
    return whole.out.transpose(1, 2).to(q.dtype).contiguous()


def _decode_jointly(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink_logit: Tensor | None
) -> Tensor:
    """`decode_step` as HybridGen takes it, on a rig or on the one processor that there is: logits of far tokens are
    those of the query that was foreseen, and join those of near tokens before one softmax."""
    crew = layer.crew
    with layer.extended(q.shape[2]) as held:
        layer.write(k, v)
        if isinstance(crew, HybridCrew):
            part = crew.attend_jointly(layer.index, q, held.near, rule, _taken_up(q, layer, rule, crew))
        else:
            pool = worker_pool()
            picked = pick(far_question(_foreseen(q, layer), layer, rule), pool)
            part = join(picked, held.near, near_logits(q, held.near, rule, pool), pool)
        if sink_logit is not None:
            part = merge([part], sink_logit=sink_logit)
    return part.out.transpose(1, 2).to(q.dtype).contiguous()


def look_ahead(layer: LayerKV) -> None:
    """Begin what the host can do for a layer's next step, whose query was foreseen."""
    crew, q = layer.crew, layer.foreseen
    if q is not None and isinstance(crew, HybridCrew) and joins_logits(layer) and layer.index in crew.rules:
        layer.ahead = crew.ask(layer.index, far_question(q, layer, crew.rules[layer.index], q.shape[2]))


def stream_ahead(layer: LayerKV, q_len: int) -> None:
    """Between two layers: let the first of what this one will stream cross the link already.

    In exact mode that is of all its far tokens, in sparse mode of those that its foreseen query picks; where none was
    foreseen, nothing is known yet. q_len: of the step under way; prompts stage their own.
    """
    crew, sparse = layer.crew, layer.sparse
    is_step = q_len <= (MAX_DECODE_QUERIES if sparse is None else MAX_SELECT_QUERIES)
    if crew is None or not layer.far_tokens or not is_step or "stream" not in crew.scheduler.lanes:
        return
    with layer.hold() as held:
        far = held.far
        if sparse is not None:
            if not sparse.foresees or layer.foreseen is None:
                return
            far = taking_part(layer.foreseen, layer, held, crew.rig.host.pool, num_new=q_len)
    crew.send_ahead(far)


def pull_ahead(layer: LayerKV, q: Tensor) -> None:
    """Between two layers of a step: let near pages of this one come to the device's L2 while the MLP of the one before
    computes. q: the query of the one before. UnsupportedError on a CPU, which fetches ahead itself."""
    if q.device.type == "cpu":
        raise UnsupportedError("l2_share is for CUDA devices, the near tier is on a CPU: set it to 0")
    if layer.num_near_tokens and q.shape[2] <= MAX_DECODE_QUERIES:
        with layer.hold() as held:
            pull_into_l2(q, held.near, ScoreRule(1.0, window=layer.window), layer.l2_share)


def _taken_up(q: Tensor, layer: LayerKV, rule: ScoreRule, crew: HybridCrew) -> Ahead:
    """What the host is at already, if it is about the pages that there are now: the layer may have evicted since."""
    ahead, layer.ahead, stale = layer.ahead, None, _foreseen(q, layer)
    if ahead is not None and ahead.asked.q is stale and ahead.asked.is_about(layer.far, rule):
        return ahead
    if ahead is not None:
        ahead.ticket.cancel()
    return crew.ask(layer.index, far_question(stale, layer, rule))


def _foreseen(q: Tensor, layer: LayerKV) -> Tensor:
    """The query as it was foreseen; the true one, where none of that shape was."""
    return q if layer.foreseen is None or layer.foreseen.shape != q.shape else layer.foreseen


def _verified_by_host(
    step: Step, layer: LayerKV, runs: tuple[PagedKV, ...], exact: Partial, crew: Crew
) -> list[Partial]:
    """`verified_rest` on a rig, where the pages lie: q and the exact part go down, what was sampled comes up."""
    part_bytes = exact.out.nbytes + exact.lse.nbytes
    crew.rig.down.send("verify", part_bytes, lambda: None)
    rest = crew.rig.ask_host("verify", step.q, lambda q: verified_rest(step, layer, runs, exact), 2 * part_bytes)
    return rest.wait()


def _inputs_of(layer: LayerKV) -> Inputs | None:
    """What entered the layer with its far tokens, as far as it is kept."""
    kept, num_tokens = layer.inputs, min(layer.num_inputs, layer.far_tokens)
    if kept is None or not num_tokens or kept.spec.hidden_size is None:
        return None
    are_near = kept.asked.where == "near"
    return Inputs(num_tokens, are_near, kept.spec.hidden_size, partial(kept.x, layer.index), layer.rebuild)


def _decode_on_device(
    q: Tensor, k: Tensor, v: Tensor, layer: LayerKV, rule: ScoreRule, sink_logit: Tensor | None = None
) -> Tensor:
    """`decode_step` where near tokens lie on a device, and far ones where the host attends to them meanwhile. NaN in q
    is told when the step is over (`DeviceFlags`): nobody waits for the device but for far tokens."""
    rig, flags = _torch_rig(os.getpid()), layer.flags.bits(q.device)
    with layer.extended(q.shape[2]) as held:
        layer.write(k, v)
        far = taking_part(q, layer, held, worker_pool())
        works = {f"attend {i}": LANES["attend"](Task(q, rule, rig), run) for i, run in enumerate(far)}
        outcome = drive(lambda: _attend_near(q, held.near, rule, flags), works, rig)  # while the host works
        for error in outcome.failed.values():
            raise error
        parts = [Partial(*(x.to(q.device) for x in outcome.parts[name])) for name in works]
        part = merge([*parts, outcome.parts["near"]], sink_logit=sink_logit)
    return part.out.transpose(1, 2).to(q.dtype).contiguous()


@cache
def _torch_rig(pid: int) -> TorchRig:
    """Of this process: threads do not survive a fork."""
    return TorchRig(worker_pool())


def _attend_near(q: Tensor, near: PagedKV, rule: ScoreRule, flags: Tensor) -> Partial:
    return devices.attend(q, near, rule=rule, causal=True, flags=flags)


def _prefill_rows(
    q: Tensor, kv: tuple[Tensor, Tensor], layer: LayerKV, seqs: slice, kv_start: int, rule: ScoreRule
) -> Partial:
    """`prefill_chunk` for some sequences with the same padding."""
    history, q_len = layer.seq_len, q.shape[2]
    oldest = 0 if rule.window is None else max(0, history - rule.window + 1)  # that the first query sees
    first = max(oldest, min(kv_start, history))
    staged = _staged(layer, seqs, first)  # on its way while the chunk attends to itself
    num_padded = min(max(kv_start - history, 0), q_len)  # of the chunk's own tokens
    queries = q[:, :, num_padded:].contiguous()  # once, or each piece would copy it to group its heads
    k, v = (x[:, :, num_padded:] for x in kv)
    part = attend_dense(queries, k, v, rule=rule, first_query=0)
    # torch's kernel hides NaN in runs shorter than a block; in others it shows in lse, which is cheaper to read than q.
    # Of NaN torch's CPU kernel makes an lse that is NaN, its CUDA kernels one of +inf.
    spoilt = (queries.isnan() if queries.shape[2] < BLOCK_TOKENS else ~(part.lse < torch.inf)).any()
    if q.device.type != "cpu":  # told when the step is over: nobody waits
        layer.flags.bits(q.device).bitwise_or_(spoilt.to(torch.int32) * NAN_IN_Q)
    elif bool(spoilt):
        raise InputError("q contains NaN, or k does: a layer before this attention produced it")
    place = history + num_padded  # of the first query
    for begin in range(first if staged is None else layer.first_near_token, history, PREFILL_PIECE_TOKENS):
        piece_k, piece_v = layer.read(begin, min(begin + PREFILL_PIECE_TOKENS, history), seqs)
        older = attend_dense(queries, piece_k, piece_v, rule=rule, first_query=place - begin)
        part = merge([older, part], worker_pool())
    if staged is not None:
        part = merge([_attend_staged(queries, layer, seqs, staged, rule, place), part], worker_pool())
    if num_padded == 0:
        return part
    out = torch.nn.functional.pad(part.out, (0, 0, num_padded, 0))
    return Partial(out, torch.nn.functional.pad(part.lse, (num_padded, 0), value=-torch.inf))


class _Piece(NamedTuple):
    """Far tokens `[begin, end)` of one KV head; None: of all of them."""

    begin: int
    end: int
    head: int | None


class _Staged(NamedTuple):
    """What a prompt's chunk needs of far tokens, as it comes up."""

    pieces: list[_Piece]
    staging: Staging


def _staged(layer: LayerKV, seqs: slice, first: int) -> _Staged | None:
    """The far tokens from `first` on, sent for: every page once, or once for each head. None where a chunk reads them
    where they lie, and where there are none."""
    crew, far = layer.crew, layer.far
    if crew is None or layer.window is not None or first >= layer.far_tokens:
        return None
    page_size, num_heads = far.arena.layout.page_size, far.arena.num_kv_heads
    step = max(1, PREFILL_PIECE_TOKENS // page_size) * page_size  # no page is in two pieces
    cuts = [first, *range((first // step + 1) * step, layer.far_tokens, step), layer.far_tokens]
    heads = range(num_heads) if crew.stages_heads else [None]
    pieces = [_Piece(begin, end, head) for head in heads for begin, end in pairwise(cuts)]
    sizes = [layer.far_bytes(begin, end, seqs) // len(heads) for begin, end in pairwise(cuts)] * len(heads)
    return _Staged(pieces, Staging(crew.rig, "prefill", sizes))


def _attend_staged(
    q: Tensor, layer: LayerKV, seqs: slice, staged: _Staged, rule: ScoreRule, first_query: int
) -> Partial:
    """Attention over far tokens, each piece while the next is on its way; those of a head are for its queries alone."""
    assert layer.crew is not None
    pool, group_size = layer.crew.rig.device_pool, q.shape[1] // layer.far.arena.num_kv_heads
    found: dict[int | None, Partial] = {}
    for i in staged.staging.loads():
        begin, end, head = staged.pieces[i]
        heads = slice(None) if head is None else slice(head, head + 1)
        rows = q if head is None else q[:, head * group_size : (head + 1) * group_size]
        k, v = layer.read(begin, end, seqs, heads)
        part = attend_dense(rows, k, v, rule=rule, first_query=first_query - begin)
        found[head] = part if head not in found else merge([found[head], part], pool)
    layer.crew.rig.trace.take()  # of a long prompt they would be millions, and no step's
    return Partial(*(torch.cat(xs, 1) for xs in zip(*found.values(), strict=True)))


def _by_padding(kv_start: Tensor, attend: Callable[[slice, int], Partial]) -> Partial:
    """All sequences at once where they have the same padding; else each alone, over what exists of it."""
    starts: list[int] = kv_start.tolist()
    if len(set(starts)) <= 1:
        return attend(slice(None), starts[0] if starts else 0)
    parts = [attend(slice(seq, seq + 1), start) for seq, start in enumerate(starts)]
    return Partial(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))
