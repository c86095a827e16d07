"""A decode step whose near tokens are attended by our GPU kernels, on CPU tensors in Triton's interpreter."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl

from tandemkv import attention
from tandemkv.cache import LayerKV
from tandemkv.errors import BackendWarning, InputError, UnavailableError
from tandemkv.kernels import checks, devices
from tandemkv.kernels.gpu import Config, Pull
from tandemkv.lanes import DeviceFlags, pull_into_l2
from tandemkv.types import PagedKV, Partial, ScoreRule
from tests.dense import causal_visible, dense_attention
from tests.test_attention import RULE, SCALE, SPEC, filled
from tests.tolerances import FLOAT32, assert_within, attend_bound

HERE = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/integrations/test_cuda.py has models")


def test_triton_is_what_attends_here() -> None:
    assert devices.backend_of(HERE).name == "triton"


@pytest.mark.parametrize("q_len", [1, 3, 8])
@pytest.mark.parametrize("kv_start", [[0, 0], [0, 70], [90, 99]])
def test_a_step(kv_start: list[int], q_len: int) -> None:
    layer, q, k, v = filled(100, kv_start)
    tail = slice(100 - q_len, 100)
    layer.crop(100 - q_len)
    out = attention._decode_on_device(q[:, :, tail], k[:, :, tail], v[:, :, tail], layer, RULE)
    layer.flags.send(100 - q_len)
    visible = causal_visible(100, q_len, layer.kv_start)
    truth = dense_attention(q[:, :, tail], k, v, visible, SCALE)
    bound = attend_bound(q[:, :, tail], k, v, visible, SCALE, FLOAT32, num_merges=4)
    got = Partial(out.transpose(1, 2).float(), truth.lse.float())
    assert_within(got, truth, bound._replace(lse=torch.full_like(bound.lse, math.inf)))


def test_what_came_late_is_told_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose flags are still under way when the step ends."""

    class Late:
        has_come = False

        def record(self, stream: object) -> None:
            """Nothing to do."""

        def query(self) -> bool:
            return self.has_come

    flags, late = filled(1, [0])[0].flags, Late()
    flags.bits(HERE).fill_(checks.NAN_IN_Q)
    monkeypatch.setattr(flags, "_came", late)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    flags.send(5)
    flags.look()
    flags.bits(HERE).fill_(checks.SLOT_OUT_OF_RANGE)
    flags.send(6)  # the first is still under way: this one's waits
    late.has_come = True
    for _ in range(2):
        with pytest.raises(InputError, match=r"q contains NaN.*; tokens from 5 on"):
            flags.look()
    flags.forget(6)
    with pytest.raises(InputError, match=r"q contains NaN.*; tokens from 5 on"):
        flags.look()
    flags.forget(5)
    flags.send(5)
    flags.look()  # nothing is left of a step that was undone


def test_what_waits_to_be_sent_is_waited_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late:
        has_come = False

        def record(self, stream: object) -> None:
            self.has_come = False

        def query(self) -> bool:
            return self.has_come

        def synchronize(self) -> None:
            self.has_come = True

    flags = DeviceFlags()
    flags.bits(HERE)
    monkeypatch.setattr(flags, "_came", Late())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    flags.send(5)
    flags.bits(HERE).fill_(checks.NAN_IN_Q)
    flags.send(6)
    flags.look()
    with pytest.raises(InputError, match=r"q contains NaN.*; tokens from 6 on"):
        flags.wait()


def test_a_kernel_that_does_not_compile_leaves_the_device_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is right, and the backend's name says who made it."""
    from triton.runtime.errors import OutOfResources

    from tandemkv.kernels.gpu import decode

    class Greedy:
        def __getitem__(self, grid: object) -> Any:
            def launch(*args: object, **kwargs: object) -> None:
                raise OutOfResources(300_000, 232_448, "shared memory")

            return launch

    monkeypatch.setattr(decode, "decode_pages", Greedy())
    monkeypatch.setattr(devices, "_FAILED", {})
    layer, q, k, v = filled(100, [0, 70])
    layer.crop(99)
    out = attention._decode_on_device(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], layer, RULE)
    backend = devices.backend_of(HERE)
    assert backend.name == "torch"
    assert "does not compile for cpu: out of resource: shared memory" in backend.why_not
    visible = causal_visible(100, 1, layer.kv_start)
    truth = dense_attention(q[:, :, -1:], k, v, visible, SCALE)
    assert torch.allclose(out.transpose(1, 2).double(), truth.out, atol=1e-5)


def test_a_probe_that_computes_something_else_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandemkv.kernels import gpu

    wrong = Partial(torch.zeros(1, 1, 1, 16), torch.full((1, 1, 1), 3.0))
    monkeypatch.setattr("tandemkv.kernels.gpu.works.attend", lambda *args, **kwargs: wrong)
    assert gpu.failure(HERE) == "a kernel on cpu computes 3.0 and 0.0 for 19.4657 and 1"

    def failing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("tandemkv.kernels.gpu.works.attend", failing)
    assert gpu.failure(HERE).endswith("does not run on cpu: Failed to find C compiler")


def test_near_pages_of_the_next_layer_are_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the share of L2 allows, and nothing that was pulled changes."""
    asked: list[int] = []

    def note(asm: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> None:
        asked.append(int(args[0].handle.data.reshape(-1)[0]))

    layer, q, *_ = filled(100, [0, 0])
    q = q[:, :, -1:]
    page_bytes = 2 * SPEC.page_size * SPEC.head_dim * 4  # of a head, K and V
    monkeypatch.setattr(tl, "inline_asm_elementwise", note)
    monkeypatch.setattr("tandemkv.kernels.gpu.moves.l2_bytes", lambda device: 6 * page_bytes)
    assert pull_into_l2(q, near_of(layer), ScoreRule(1.0), 0.5) == 0  # an interpreter has nothing to ask with
    monkeypatch.setattr("tandemkv.kernels.gpu.moves.asks_for_pieces", lambda *args: ("k", "v"))
    monkeypatch.setattr("tandemkv.kernels.gpu.calls.config_for", lambda *args: Config(block_n=SPEC.page_size))
    assert pull_into_l2(q, near_of(layer), ScoreRule(1.0), 0.5) == 3 * page_bytes
    assert len(asked) == len(set(asked)) == 6
    assert pull_into_l2(q, near_of(layer), ScoreRule(1.0), 0.1) == 0


def near_of(layer: LayerKV) -> PagedKV:
    with layer.hold() as held:
        return held.near


def test_torch_has_nothing_to_pull_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandemkv.kernels import torch_ops

    layer, q, _, _ = filled(100, [0])
    torch_backend = devices.Backend("torch", torch_ops, "no Triton")
    monkeypatch.setattr(devices, "_FAILED", {HERE: torch_backend})
    assert pull_into_l2(q[:, :, -1:], near_of(layer), ScoreRule(1.0), 0.5) == 0


def test_a_side_stream_waits_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def wait_stream(self, stream: str) -> None:
            log.append(f"side waits for {stream}")

    class On:
        def __init__(self, stream: Stream) -> None:
            pass

        def __enter__(self) -> None:
            log.append("on side")

        def __exit__(self, *_: object) -> None:
            log.append("on main")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
    monkeypatch.setattr("tandemkv.lanes.l2._side_stream", Stream)
    read = SimpleNamespace(record_stream=lambda stream: log.append("kept until side is done"))
    pull = Pull(7, (read,), lambda: log.append("pull"))  # type: ignore[arg-type]
    monkeypatch.setattr(devices, "prepare_pull", lambda *args: pull)
    q: Any = SimpleNamespace(device=torch.device("cuda", 0))
    assert pull_into_l2(q, near_of(filled(1, [0])[0]), ScoreRule(1.0), 0.5) == 7
    assert log == ["side waits for main", "on side", "pull", "on main", "kept until side is done"]


def test_a_pull_that_does_not_compile_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch() -> None:
        raise UnavailableError("a kernel does not compile for cpu: shared memory")

    monkeypatch.setattr(devices, "_FAILED", {})
    monkeypatch.setattr(devices, "prepare_pull", lambda *args: Pull(7, (), launch))
    layer, q, *_ = filled(100, [0])
    monkeypatch.setattr(devices, "_WITHOUT", set())
    with pytest.warns(BackendWarning, match="pull is done without on cpu: a kernel does not compile for cpu"):
        assert pull_into_l2(q[:, :, -1:], near_of(layer), ScoreRule(1.0), 0.5) == 0
    assert not devices.has("pull", HERE)
    assert devices.has("unpack", HERE)
