"""torch's own attention kernels that return lse, for prefill-sized queries and for any device torch knows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandemkv.errors import UnsupportedError
from tandemkv.kernels.checks import (
    NAN_IN_Q,
    OUTSIDE_TABLE,
    SLOT_OUT_OF_RANGE,
    check_lengths,
    check_mass,
    check_query,
    check_rule,
    check_table,
    check_tokens,
)
from tandemkv.types import BLOCK_TOKENS, Arena, PagedKV, Partial, ScoreRule


def attend_dense(q: Tensor, k: Tensor, v: Tensor, *, rule: ScoreRule, first_query: int | None = None) -> Partial:
    """See `tandemkv.kernels.attend_dense`. out was rounded to q's dtype before it is widened."""
    num_seqs, num_q_heads, q_len, _ = q.shape
    kv_len, group_size = k.shape[2], num_q_heads // k.shape[1]
    if kv_len == 0 or q_len == 0:
        return empty_partial(q, v.shape[3])
    sees = None
    if first_query is not None and not _all_seen(q_len, kv_len, first_query, rule):
        sees = _sees(q_len, kv_len, first_query, rule, q.device)
    if rule.softcap is None and first_query == 0 and q_len == kv_len and (rule.window is None or rule.window >= kv_len):
        # torch's causal mask is per query token, so query heads cannot become rows; a chunk's K and V are small.
        out, lse = _flash(
            q, k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1), rule, is_causal=True
        )
    else:
        rows = q.reshape(num_seqs, k.shape[1], group_size * q_len, q.shape[3])
        out, lse = _flash(rows, k, v, rule, sees=None if sees is None else sees.repeat(group_size, 1))
    out = out.reshape(num_seqs, num_q_heads, q_len, v.shape[3]).float()
    lse = lse.reshape(num_seqs, num_q_heads, q_len).float()
    if sees is not None:  # where a query sees nothing, torch's kernels say lse 0 or NaN
        blind = ~sees.any(-1)
        out, lse = out.masked_fill(blind[:, None], 0.0), lse.masked_fill(blind, -math.inf)
    return Partial(out, lse)


def _all_seen(q_len: int, kv_len: int, first_query: int, rule: ScoreRule) -> bool:
    """Whether every query sees every token."""
    return first_query >= kv_len - 1 and (rule.window is None or rule.window >= first_query + q_len)


def _sees(q_len: int, kv_len: int, first_query: int, rule: ScoreRule, device: torch.device) -> Tensor:
    """bool `[q_len, kv_len]`: which query sees which token."""
    query = torch.arange(first_query, first_query + q_len, device=device)[:, None]
    token = torch.arange(kv_len, device=device)
    sees = token <= query
    return sees if rule.window is None else sees & (token > query - rule.window)


def empty_partial(q: Tensor, v_head_dim: int) -> Partial:
    """The identity of `merge` for these queries."""
    return Partial(
        torch.zeros((*q.shape[:3], v_head_dim), dtype=torch.float32, device=q.device),
        torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device),
    )


def attend(
    q: Tensor,
    *runs: PagedKV,
    rule: ScoreRule,
    flags: Tensor,
    causal: bool = False,
    mass: Tensor | None = None,
) -> Partial:
    """See `tandemkv.kernels.devices.attend`: pages are gathered, then plain products in float32. Correct, not tuned,
    for devices on which our own kernels do not work."""
    check_query(q, runs, causal, q.device.type)
    check_rule(rule, causal, len(runs))
    flags |= q.isnan().any().to(torch.int32) * NAN_IN_Q
    dense = [_dense(q, kv, rule, causal and kv is runs[-1], flags) for kv in runs]
    k, v, sees = (torch.cat(xs, dim) for xs, dim in zip(zip(*dense, strict=True), (2, 2, 3), strict=True))
    v = v.masked_fill(~sees.any(2).unsqueeze(-1), 0.0)  # a zero weight does not silence a NaN in V
    sees = sees.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out, lse = _plain(q, k, v, rule, sees)
    if mass is not None:
        check_mass(mass, q, runs)
        scores = _scores(q, k, rule, sees)
        mass.copy_((scores - lse.unsqueeze(-1)).exp().nan_to_num(0.0).unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1))
    return Partial(out, lse)


def _dense(q: Tensor, kv: PagedKV, rule: ScoreRule, causal: bool, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v `[num_seqs, heads, tokens of the table, dim]` and who sees them `[num_seqs, heads, q_len, tokens]`."""
    arena, q_len, device = kv.arena, q.shape[2], q.device
    if not isinstance(arena, Arena) or arena.layout.is_quantised or kv.of_blocks or kv.stands_in:
        raise UnsupportedError("torch attends whole pages of rows or panels, each token for itself")
    check_table(arena, kv.page_table, q.shape[0], on_cpu=False)
    check_lengths(kv, q.shape[0], on_cpu=False)
    slots, starts, lens = (x.to(device, non_blocking=True).long() for x in (kv.page_table, kv.kv_start, kv.kv_len))
    starts, lens = (x[:, None, None, None] for x in (starts, lens))
    tokens = torch.arange(slots.shape[2] * kv.entry_tokens, device=device)
    is_outside = (torch.minimum(starts, lens) < 0) | (lens > tokens.shape[0])
    flags |= is_outside.any().to(torch.int32) * OUTSIDE_TABLE
    sees = ((tokens >= starts) & (tokens < lens)).expand(-1, arena.num_kv_heads, q_len, -1)
    if causal:
        query = lens - q_len + torch.arange(q_len, device=device)[:, None]  # which token it is
        sees = sees & (tokens <= query)
        sees = sees if rule.window is None else sees & (tokens > query - rule.window)
    if not arena.num_slots:  # nothing can be looked up
        flags |= sees.any().to(torch.int32) * SLOT_OUT_OF_RANGE
        k, v = (
            torch.zeros(*sees.shape[:2], tokens.shape[0], dim, device=device)
            for dim in (arena.head_dim, arena.v_head_dim)
        )
        return k, v, torch.zeros_like(sees)
    is_used = sees.any(2).unflatten(2, (-1, kv.entry_tokens)).any(3)
    is_wild = is_used & ((slots < 0) | (slots >= arena.num_slots))
    flags |= is_wild.any().to(torch.int32) * SLOT_OUT_OF_RANGE
    places = torch.where(is_used & ~is_wild, slots, 0), torch.arange(arena.num_kv_heads, device=device)[:, None]
    sees = sees & ~is_wild.repeat_interleave(kv.entry_tokens, 2).unsqueeze(2)
    return _rows_of_k(arena.k[places], arena), _rows_of_v(arena.v[places], arena), sees


def _rows_of_k(pages: Tensor, arena: Arena) -> Tensor:
    """Pages `[num_seqs, heads, pages, page_size, stored dim]` of rows or panels as `[num_seqs, heads, tokens, dim]`."""
    if arena.layout.packing == "panels":  # [block of 16 tokens][dim / pair][16][pair]
        pair = arena.layout.pair
        blocks = pages.flatten(3).unflatten(3, (-1, pages.shape[4] // pair, BLOCK_TOKENS, pair))
        pages = blocks.transpose(4, 5).reshape(pages.shape)
    return pages.flatten(2, 3)[..., : arena.head_dim]


def _rows_of_v(pages: Tensor, arena: Arena) -> Tensor:
    """The same of V."""
    if arena.layout.packing == "panels":  # [token / pair][dim][pair]
        pairs = pages.flatten(3).unflatten(3, (-1, pages.shape[4], arena.layout.pair))
        pages = pairs.transpose(4, 5).reshape(pages.shape)
    return pages.flatten(2, 3)[..., : arena.v_head_dim]


def merge(parts: Sequence[Partial], sink_logit: Tensor | None = None) -> Partial:
    """See `tandemkv.kernels.merge`."""
    lses = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(lses, 0)
    if sink_logit is not None:
        lse = torch.logaddexp(lse, sink_logit[:, None])
    weights = torch.exp(lses - torch.where(lse == -math.inf, 0.0, lse))
    out = torch.zeros_like(parts[0].out)
    for weight, part in zip(weights, parts, strict=True):
        out += weight.unsqueeze(-1) * part.out
    return Partial(out, lse)


def append(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: object = None) -> None:
    """See `tandemkv.kernels.append`; an arena of rows on any device. `pool` has no use here."""
    check_tokens(arena, page_table, begin, k, v, on_cpu=False)
    if arena.layout.packing != "rows":
        raise UnsupportedError(f"torch appends tokens to pages of rows, got {arena.layout.packing}")
    slots, offsets = _places(arena, page_table, begin, k.shape[2])
    arena.k[slots, :, offsets] = k.transpose(1, 2)
    arena.v[slots, :, offsets] = v.transpose(1, 2)


def gather(arena: Arena, page_table: Tensor, begin: int, k: Tensor, v: Tensor, pool: object = None) -> None:
    """See `tandemkv.kernels.gather`; an arena of rows on any device. `pool` has no use here."""
    slots, offsets = _places(arena, page_table, begin, k.shape[2])
    k.copy_(arena.k[slots, :, offsets].transpose(1, 2))
    v.copy_(arena.v[slots, :, offsets].transpose(1, 2))


def _places(arena: Arena, page_table: Tensor, begin: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Slot `[num_seqs, num_tokens]` and place in the page `[num_tokens]` of each token; heads share their pages."""
    tokens = torch.arange(begin, begin + num_tokens)
    slots = page_table[:, 0].long()[:, tokens // arena.layout.page_size]
    return slots.to(arena.k.device), (tokens % arena.layout.page_size).to(arena.k.device)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, sees: Tensor | None = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, lse) of torch's kernel that returns both, or of plain products where it has none for this call."""
    ops = torch.ops.aten
    on_cuda = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0
    if rule.softcap is not None or (q.device.type != "cpu" and (not on_cuda or sees is not None)):
        return _plain(q, k, v, rule, sees if not is_causal else _sees(q.shape[2], k.shape[2], 0, rule, q.device))
    width = v.shape[3]
    if width != k.shape[3]:  # torch's kernels want one width: zeros change neither scores nor the dims that are kept
        widest = max(width, k.shape[3])
        q, k, v = (torch.nn.functional.pad(x, (0, widest - x.shape[3])) for x in (q, k, v))
    if q.device.type == "cpu":
        mask = None if sees is None else torch.zeros_like(sees, dtype=q.dtype).masked_fill_(~sees, -math.inf)
        result = ops._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=None if mask is None else mask[None, None], scale=rule.scale
        )
    else:
        result = ops._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=rule.scale)
    return result[0][..., :width], result[1]


def _plain(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, sees: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two products and a softmax, for what torch has no kernel that returns lse: soft caps, float32 on CUDA."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    scores = _scores(q, k, rule, sees)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = scores.sub_(lse.masked_fill(lse == -math.inf, 0.0)).exp_()
    return torch.matmul(weights, v.float()), lse.squeeze(-1)


def _scores(q: Tensor, k: Tensor, rule: ScoreRule, sees: Tensor | None) -> Tensor:
    """float32; -inf where a query does not see a token."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * rule.scale
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    return scores if sees is None else scores.masked_fill_(~sees, -math.inf)
