"""The others: what a user of torch or transformers has today for one decode query over a long KV, each at its best.

A peer is a function from a `Problem` to a call that attends over the problem's next copy of K and V. Peers get dense
K and V, contiguous per head (the layout each of them is fastest with), and bf16 as ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from types import SimpleNamespace

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from benchmarks.common import in_ms, medians_in_turn
from tandemkv import machine

Call = Callable[[], Tensor]


class PeerUnavailableError(Exception):
    """A peer that cannot take part here, and why."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One query per head, over copies of one sequence.

    q: bf16 `[1, num_q_heads, 1, head_dim]`. dense: bf16 `[num_copies, 2, 1, num_kv_heads, kv_len, head_dim]`, K and V
    with equal values in every copy.
    """

    q: Tensor
    dense: Tensor

    @cached_property
    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The copies as k and v, over and over; all peers share the turns, so that none reads what is in a cache."""
        return cycle((k, v) for k, v in self.dense)

    @property
    def num_kv_heads(self) -> int:
        """Heads of K and V."""
        return self.dense.shape[3]

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.q.shape[3] ** -0.5)

    @property
    def group_size(self) -> int:
        """Query heads that read one KV head."""
        return self.q.shape[1] // self.num_kv_heads

    @property
    def q_rows(self) -> Tensor:
        """q with the heads of a group as the rows of one matrix: `[1, num_kv_heads, group_size, head_dim]`."""
        return self.q.view(1, self.num_kv_heads, self.group_size, -1)


def torch_sdpa(problem: Problem) -> Call:
    """torch's flash kernel; with the queries of a group as rows it reads K and V once, not once per query head."""
    q, scale = problem.q_rows, problem.scale

    def call() -> Tensor:
        k, v = next(problem.copies)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return call


def torch_matmul(problem: Problem) -> Call:
    """Two products and a softmax. K times q, not q times the transposed K: oneDNN is up to a third faster so."""
    q = (problem.q_rows * problem.scale).transpose(2, 3)

    def call() -> Tensor:
        k, v = next(problem.copies)
        return torch.softmax((k @ q).transpose(2, 3), -1) @ v

    return call


def flex_attention(problem: Problem) -> Call:
    """torch's compiled attention; queries of a group as rows are faster here than its own enable_gqa."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    torch.compiler.reset()  # torch gives up compiling a function after 8 shapes
    compiled = torch.compile(flex, dynamic=False)
    q, scale = problem.q_rows, problem.scale

    def call() -> Tensor:
        k, v = next(problem.copies)
        out = compiled(q, k, v, scale=scale)
        assert isinstance(out, Tensor)
        return out

    try:
        call()
    except RuntimeError as error:
        raise PeerUnavailableError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return call


def transformers_sdpa(problem: Problem) -> Call:
    """The function that transformers calls as shipped (attn_implementation="sdpa"), one token, no mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, scale = problem.q, problem.scale
    module = SimpleNamespace(num_key_value_groups=problem.group_size, is_causal=True)

    def call() -> Tensor:
        k, v = next(problem.copies)
        out: Tensor = sdpa_attention_forward(module, q, k, v, None, scaling=scale)[0]
        return out

    return call


def llama_cpp(problem: Problem) -> Call:
    """llama.cpp's flash attention over K and V in float16 or bfloat16, whichever is faster here.

    With one thread float16 takes 37 ms and bfloat16 50 for 32:8x128 at 32K, but 89 and 31 for 32:8x64: ggml's sum over
    V in float16 then converts by a lookup for each element. Queries of a group as rows are no faster; K and V as
    llama.cpp keeps them, the heads of a token side by side, take 114 ms instead of 37.
    """
    try:
        from benchmarks.ggml import FlashAttention
    except ImportError as error:
        raise PeerUnavailableError(f"{error}: pip install 'tandemkv[peers]'") from error
    q, num_threads = problem.q.float(), torch.get_num_threads()
    calls = {
        str(dtype): FlashAttention(q, problem.dense.to(dtype, copy=True), problem.scale, num_threads)
        for dtype in (torch.float16, torch.bfloat16)
    }
    ms = medians_in_turn({dtype: in_ms(call) for dtype, call in calls.items()}, budget_s=0.2)
    return calls[min(ms, key=lambda dtype: ms[dtype])]


def onnxruntime_gqa(problem: Problem) -> Call:
    """onnxruntime's GroupQueryAttention; in float32, as float16 takes twice as long there and bfloat16 is refused.

    Past and present are one buffer, into which it writes the last token, as its own generation loop does.
    """
    try:
        import onnxruntime

        model = _gqa_model(problem)
    except ImportError as error:
        raise PeerUnavailableError(f"{error}: pip install 'tandemkv[peers]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if machine.spin().passive else "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    q, out = problem.q.float(), torch.empty(problem.q.shape)
    last_token = torch.tensor([problem.dense.shape[4] - 1], dtype=torch.int32)
    length = last_token[0] + 1

    def bind(kv: Tensor) -> tuple[object, list[Tensor]]:
        new_k, new_v = kv[:, :, :, -1].contiguous()
        inputs = {"q": q, "new_k": new_k, "new_v": new_v, "k": kv[0], "v": kv[1], "last": last_token, "length": length}
        binding = session.io_binding()
        for name, x in inputs.items():
            binding.bind_input(name, "cpu", 0, x.numpy().dtype, _gqa_shape(name, x), x.data_ptr())
        for name, x in {"out": out, "present_k": kv[0], "present_v": kv[1]}.items():
            binding.bind_output(name, "cpu", 0, x.numpy().dtype, _gqa_shape(name, x), x.data_ptr())
        return binding, list(inputs.values())  # a binding keeps addresses, not tensors

    turns = cycle([bind(kv.float()) for kv in problem.dense[::2]])  # twice as wide: every second copy fills as much

    def call() -> Tensor:
        session.run_with_iobinding(next(turns)[0])
        return out

    return call


def _gqa_shape(name: str, x: Tensor) -> list[int]:
    """Tokens come as `[1, 1, heads * head_dim]`, everything else as it is."""
    return [1, 1, x.numel()] if name in ("q", "new_k", "new_v", "out") else list(x.shape)


def _gqa_model(problem: Problem) -> bytes:
    from onnx import TensorProto, helper

    kv = list(problem.dense.shape[2:])
    tokens = [1, 1, "width"]
    inputs = {"q": tokens, "new_k": tokens, "new_v": tokens, "k": kv, "v": kv}
    outputs = {"out": tokens, "present_k": kv, "present_v": kv}
    lengths = {"last": [1], "length": []}
    node = helper.make_node(
        "GroupQueryAttention",
        [*inputs, *lengths],
        list(outputs),
        domain="com.microsoft",
        num_heads=problem.q.shape[1],
        kv_num_heads=problem.num_kv_heads,
        scale=problem.scale,
    )
    graph = helper.make_graph(
        [node],
        "attend",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        + [helper.make_tensor_value_info(name, TensorProto.INT32, shape) for name, shape in lengths.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


PEERS: dict[str, Callable[[Problem], Call]] = {
    "torch_sdpa": torch_sdpa,
    "torch_matmul": torch_matmul,
    "flex_attention": flex_attention,
    "transformers": transformers_sdpa,
    "llama.cpp": llama_cpp,
    "onnxruntime": onnxruntime_gqa,
}
