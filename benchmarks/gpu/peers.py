"""The others: attention of one query over dense K and V on a GPU, with the log-sum-exp, each in its best form.

A peer says in which forms it can attend; the fastest that is right takes part. Peers get dense K and V, contiguous per
head (or per token, for those that want it so); flashinfer gets pages, which are its own layout. torch's kernels take
the heads of a group as rows of one query (K and V are read once for all of them) or as heads (they share K and V).
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.budget import Allowance
from benchmarks.gpu.cases import PAGE, Form, Problem
from benchmarks.gpu.ground import Ground
from benchmarks.peers import PeerUnavailableError
from tandemkv.types import Arena

Forms = Mapping[str, Form]
Peer = Callable[[Problem], Forms]


def flash(problem: Problem) -> Forms:
    """torch's FlashAttention 2, which splits K and V among programs for few queries."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return _torch_forms(problem, lambda q, k, v: attend(q, k, v, scale=problem.case.scale))


def cudnn(problem: Problem) -> Forms:
    """cuDNN's attention, as torch calls it."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return _torch_forms(problem, lambda q, k, v: attend(q, k, v, None, True, scale=problem.case.scale))


def flex(problem: Problem) -> Forms:
    """torch's compiled attention. Heads of a group as rows: its kernel for decoding takes groups of powers of two."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def with_lse(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, scale=problem.case.scale, return_aux=AuxRequest(lse=True))

    torch.compiler.reset()  # torch gives up compiling a function after 8 shapes
    return {"rows": _torch_forms(problem, torch.compile(with_lse, dynamic=False))["rows"]}


def flash_attn(problem: Problem) -> Forms:
    """The flash-attn package's kernel for decoding, tokens before heads as its cache has them."""
    package = _imported("flash_attn")
    q, scale = problem.q.transpose(1, 2), problem.case.scale

    def call(turn: int) -> Any:
        k, v = problem.tokens_first[turn % len(problem.places)]
        return package.flash_attn_with_kvcache(q, k, v, softmax_scale=scale, return_softmax_lse=True)

    return {"tokens first": Form(call, lambda found: (found[0][:, 0], None), problem.of_tokens_first)}


def flashinfer(problem: Problem) -> Forms:
    """Its batch decode over pages of 64 tokens, with and without tensor cores; planned before, which is not timed."""
    package = _imported("flashinfer")
    return {name: _flashinfer(problem, package, name == "tensor cores") for name in ("tensor cores", "cuda cores")}


PEERS: Mapping[str, Peer] = {
    "flash": flash,
    "cudnn": cudnn,
    "flex": flex,
    "flash_attn": flash_attn,
    "flashinfer": flashinfer,
}
PACKAGES = ("flash_attn", "flashinfer")
"""Whose absence is told with the import that failed."""
_WORKSPACE_BYTES = 32 << 20

SLOW = ("flex",)
"""Compiled for each shape, for seconds."""


def presence() -> dict[str, str]:
    """Of each package its version, or word by word how its import failed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = str(getattr(_imported(name), "__version__", "no version"))
        except PeerUnavailableError as reason:
            found[name] = str(reason)
    return found


@dataclass
class Entrants:
    """Peers of a case: those that take part with the form they do so in, and why the others do not."""

    forms: dict[str, Form] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def admit(problem: Problem, ground: Ground, peers: Mapping[str, Peer], slow: Allowance) -> Entrants:
    """Every peer tried, whatever it raises: a peer is no reason to measure nothing. slow: for those in `SLOW`."""
    found = Entrants()
    for name, enter in peers.items():
        if name in SLOW and not slow.allows:
            found.missing[name] = "not measured: compiling it for every shape takes longer than there is time"
            continue
        try:
            with slow if name in SLOW else nullcontext():
                right, wrong = _tried(problem, enter(problem))
            best = _fastest(right, ground)
        except Exception as error:  # noqa: BLE001  told with the row
            found.missing[name] = told(error)
            continue
        if best:
            found.forms[name], found.names[name] = right[best], best
        else:
            found.missing[name] = "; ".join(f"{form}: {why}" for form, why in wrong.items())
    return found


def told(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, PeerUnavailableError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _tried(problem: Problem, forms: Forms) -> tuple[dict[str, Form], dict[str, str]]:
    """Those that are right, and what is wrong with the others."""
    wrong = {name: why for name, form in forms.items() if (why := why_wrong(problem, form))}
    return {name: form for name, form in forms.items() if name not in wrong}, wrong


def why_wrong(problem: Problem, form: Form) -> str:
    """What float64 says against a form's result, or what it raised; '' for nothing."""
    try:
        return problem.check(form)[1]
    except Exception as error:  # noqa: BLE001  told with the row
        return told(error)


def _torch_forms(problem: Problem, attend: Callable[[Tensor, Tensor, Tensor], Any]) -> dict[str, Form]:
    """out of shape `[batch, heads, queries, head_dim]` comes first in what attend gives."""
    case = problem.case

    def form(q: Tensor) -> Form:
        def call(turn: int) -> Any:
            return attend(q, *problem.dense[turn % len(problem.places)])

        shape = case.batch, case.model.num_q_heads, case.model.head_dim
        return Form(call, lambda found: (found[0].reshape(shape), None), problem.of_dense)

    forms = {"rows": form(problem.q_rows)}
    return forms | ({"heads": form(problem.q)} if case.group_size > 1 else {})


def _flashinfer(problem: Problem, package: Any, tensor_cores: bool) -> Form:
    case, device = problem.case, problem.pool.device
    model, q = case.model, problem.q[:, :, 0]
    ends = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.num_pages
    last = torch.full((case.batch,), (case.context - 1) % PAGE + 1, dtype=torch.int32, device=device)
    shape = (model.num_q_heads, model.num_kv_heads, model.head_dim, PAGE)
    wrappers = []
    for run in problem.runs:
        room = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=tensor_cores)
        slots = run.page_table[:, 0].flatten().contiguous()
        wrapper.plan(ends, slots, last, *shape, q_data_type=case.dtype, kv_data_type=case.dtype, sm_scale=case.scale)
        wrappers.append(wrapper)

    def call(turn: int) -> Any:
        arena = problem.runs[turn % len(wrappers)].arena
        assert isinstance(arena, Arena)
        return wrappers[turn % len(wrappers)].run(q, (arena.k, arena.v), return_lse=True)

    return Form(call, lambda found: (found[0], None), problem.of_runs)


def _imported(name: str) -> Any:
    """Raises PeerUnavailableError with the words of the import that failed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PeerUnavailableError(f"import {name}: {type(error).__name__}: {error}") from error


def _fastest(forms: Mapping[str, Form], ground: Ground) -> str:
    if len(forms) < 2:
        return next(iter(forms), "")
    times = ground.in_turn({name: form.call for name, form in forms.items()}, 0.0, least=3)
    return min(times, key=lambda name: times[name].us)
