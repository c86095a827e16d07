"""How far float32 attention may lie from the float64 reference: bounds computed from the data, term by term.

For a row of q with visible tokens t, true weights w_t = exp(s_t - lse) and n tokens, where u = 2^-24 is the unit
roundoff of float32, the relative error r of a weight has these terms:

scores   A = |scale| * max_t sum_d |q_d k_td| bounds every score and every sum inside its dot product. head_dim
         products summed in float32 cost A `sum_error(head_dim)`; rounding `scale` and the product with it, 2 A u;
         q multiplied as bf16 parts, A `Rounding.query`.
cap      where scores are capped, cap tanh(s / cap): tanh passes an error of s on at most as it is, and adds 8 u (the
         kernel's), 3 u (the rounded cap twice, the product) and that of s / cap, 1 u: 12 u of a score, which is at most
         C = min(A, cap). C takes the place of A below.
maxima   H = A + ln n bounds scores, maxima and lse. A score less the maximum, which is itself a rounded score, and the
         lse of a chunk: 4 H u.
exp      `Rounding.exp`.
sums     n probabilities, and n products with V, are summed in float32; each tile of 64 tokens may rescale what was
         summed before it (8 roundings): `sum_error(n + n / 8)`.
codes    attention over codes multiplies whole numbers (csrc/digits.h): weights become multiples of a unit, which is a
         32639th of their largest, and are off by half of it. `CodeError` bounds what that adds to a score, in absolute
         terms, and to out; where a score is a sum of scale * code and zero, `magnitude` bounds both for A.
merges   each weighs, adds and divides (8 u) and rounds two lse (2 H u). A sink's logit is one more part, without a
         value, and counts in H.

lse is off by at most r and its own rounding, out by (e^(2 r) - 1) * sum_t w_t |v_td| (numerator and denominator), by
`Rounding.weight` of the same sum and by `Rounding.out`. Nothing else may differ: one token out of a hundred, 1 % of the
scale or a lost mask lie outside (kernels/test_tolerances.py proves it).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tandemkv.types import Partial, ScoreRule

U = 2.0**-24
TINY = 1e-30  # what denormals flushed to zero, and weights below exp(-87), may lose in absolute terms


class Rounding(NamedTuple):
    """Relative errors of a kernel beyond those of plain float32: of q and of a weight as multiplied, of exp, of out."""

    query: float = 0.0
    weight: float = 0.0
    exp: float = 4 * U
    out: float = 2 * U


FLOAT32 = Rounding()
# Two bf16 parts: x - high is exact in float32 and at most 2^-8 of x, so that half an ulp of its bf16 is 2^-17 of x.
SPLIT_BF16 = Rounding(query=2.0**-17, weight=2.0**-17)
# torch's CPU flash kernel in bf16 has an exp that is off by 1.5e-4 (2^-12.7, measured in 2.13; 6 u in float32), and it
# rounds probabilities (before PV) and out to 8 bits.
TORCH_FLOAT32 = Rounding(exp=8 * U)
TORCH_BF16 = Rounding(weight=2.0**-8, exp=2.0**-12, out=2.0**-8)


def kernel_rounding(kv_dtype: torch.dtype) -> Rounding:
    """What `kernels.attend` may do with KV of this dtype on any instruction set."""
    return SPLIT_BF16 if kv_dtype == torch.bfloat16 else FLOAT32


class CodeError(NamedTuple):
    """Of attention over codes. score `[S, Hq, Q]`: of any score. out `[S, Hq, Q, Dv]`. magnitude `[S, Hq, Q]`: the
    largest sum of |q_d| times the parts of k_td."""

    score: Tensor
    out: Tensor
    magnitude: Tensor


class Bound(NamedTuple):
    """Largest allowed |got - reference|, in the shapes of a Partial."""

    out: Tensor
    lse: Tensor


def sum_error(num_terms: float) -> float:
    """Relative to the sum of magnitudes: the worst case n u, or 6 sqrt(n) u, which independent roundings exceed once in
    3e7 sums (Higham & Mary 2019, 1-exp(-lambda^2/2) with lambda = 6)."""
    return min(num_terms, 6 * math.sqrt(num_terms)) * U


def attend_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    rule: ScoreRule | float,
    rounding: Rounding = FLOAT32,
    num_merges: int = 0,
    codes: CodeError | None = None,
) -> Bound:
    """Bound for attention of q `[S, Hq, Q, D]` over k, v `[S, Hkv, T, D]` where `visible` `[S, Q, T]` says so.

    rule: a number is a scale; a window has to stand in `visible`.
    num_merges: how often partial results of this attention were merged afterwards. codes: where k and v are what codes
        stand for.
    """
    scale, cap = (rule.scale, rule.softcap) if isinstance(rule, ScoreRule) else (rule, None)
    group_size = q.shape[1] // k.shape[1]
    hidden = ~visible.unsqueeze(1)
    k = k.double().repeat_interleave(group_size, 1)
    scores = (scale * (q.double() @ k.mT)).masked_fill(hidden, -math.inf)
    magnitude = (abs(scale) * (q.double().abs() @ k.abs().mT)).masked_fill(hidden, 0.0)
    largest = magnitude.amax(-1) if k.shape[2] else torch.zeros(q.shape[:3], dtype=torch.float64)
    largest = largest if codes is None else torch.maximum(largest, codes.magnitude)
    largest_score = largest
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)  # of hidden ones: -cap, and hidden again
        scores = scores.masked_fill(hidden, -math.inf)
        largest_score = largest.clamp(max=cap)
    error = _score_error(largest, q.shape[3], cap, rounding)
    error = error if codes is None else error + codes.score
    bound = weigh_bound(scores, v, rounding, num_merges, largest_score, error)
    return bound if codes is None else bound._replace(out=bound.out + codes.out)


def logit_bound(
    q: Tensor, k: Tensor, rule: ScoreRule, rounding: Rounding = FLOAT32, codes: CodeError | None = None
) -> Tensor:
    """Largest allowed error of every score of q `[S, Hq, Q, D]` with k `[S, Hkv, T, D]`: `[S, Hq, Q, T]`."""
    magnitude = abs(rule.scale) * (
        q.double().abs() @ k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    )
    if codes is None:
        return _score_error(magnitude, q.shape[3], rule.softcap, rounding) + TINY
    magnitude = torch.maximum(magnitude, codes.magnitude.unsqueeze(-1))
    return _score_error(magnitude, q.shape[3], rule.softcap, rounding) + codes.score.unsqueeze(-1) + TINY


def weigh_bound(
    scores: Tensor,
    v: Tensor,
    rounding: Rounding = FLOAT32,
    num_merges: int = 0,
    largest: Tensor | None = None,
    error: Tensor | float = 0.0,
) -> Bound:
    """Bound for softmax over scores `[S, Hq, Q, T]`, -inf where a token is hidden, times v `[S, Hkv, T, D]`.

    largest: bounds the scores of a row, else they do. error: of a row's scores.
    """
    v = v.double().abs().repeat_interleave(scores.shape[1] // v.shape[1], 1)
    seen = scores != -math.inf
    if largest is None:
        sizes = scores.double().abs().masked_fill(~seen, 0.0)
        largest = sizes.amax(-1) if scores.shape[3] else torch.zeros(scores.shape[:3], dtype=torch.float64)
    lse = torch.logsumexp(scores.double(), -1)
    mass = torch.exp(scores.double() - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1)) @ v
    num_tokens = max(int(seen.sum(-1).max()), 1)
    height = largest + math.log(num_tokens)  # bounds every score, maximum and lse on the way
    relative = (
        error + height * 4 * U + rounding.exp + sum_error(num_tokens * 1.125) + num_merges * (8 * U + height * 2 * U)
    )
    return _bound(relative, mass, height, rounding)


def _score_error(magnitude: Tensor, head_dim: int, cap: float | None, rounding: Rounding) -> Tensor:
    error = magnitude * (sum_error(head_dim) + 2 * U + rounding.query)
    return error if cap is None else error + magnitude.clamp(max=cap) * 12 * U


def merge_bound(parts: list[Partial], sink_logit: Tensor | None = None) -> Bound:
    """Bound for any order of merging float32 parts that are taken as exact, and a sink's logit at last."""
    if sink_logit is not None:
        sink = sink_logit[:, None].expand_as(parts[0].lse)
        parts = [*parts, Partial(torch.zeros_like(parts[0].out), sink)]
    lses = torch.stack([part.lse.double() for part in parts])
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - torch.where(lse == -math.inf, 0.0, lse))
    mass = (weights.unsqueeze(-1) * torch.stack([part.out.double().abs() for part in parts])).sum(0)
    height = torch.where(lses == -math.inf, 0.0, lses.abs()).amax(0) + math.log(len(parts))
    return _bound(len(parts) * (8 * U + height * 2 * U), mass, height, FLOAT32)


def _bound(relative: Tensor, mass: Tensor, height: Tensor, rounding: Rounding) -> Bound:
    out = mass * (torch.expm1(2 * relative).unsqueeze(-1) + rounding.weight + rounding.out)
    return Bound(out + TINY, relative + 2 * U * height + TINY)


def excess(got: Partial, reference: Partial, bound: Bound) -> float:
    """The largest error in units of its bound: above 1 is wrong. Equal infinities agree; a NaN is infinitely wrong."""
    worst = 0.0
    for x, y, allowed in zip(got, reference, bound, strict=True):
        assert x.shape == y.shape == allowed.shape
        error = torch.where(x.double() == y, 0.0, (x.double() - y).abs() / allowed)
        worst = max(worst, float(error.nan_to_num(math.inf, math.inf).max()) if error.numel() else 0.0)
    return worst


def assert_within(got: Partial, reference: Partial, bound: Bound) -> None:
    """Every number of a float32 Partial lies within its bound of the reference."""
    assert got.out.dtype == got.lse.dtype == torch.float32
    assert excess(got, reference, bound) <= 1
