"""The whole cache of a model: two pools, a layer's tables over them, and the arithmetic of what fits."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from tandemkv import machine
from tandemkv.cache.layer import LayerKV
from tandemkv.cache.pool import PagePool
from tandemkv.errors import CacheError, CapacityError, InputError, UnsupportedError
from tandemkv.types import MAX_HEAD_DIM, Arena, PageLayout, format_bytes

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


@dataclass(frozen=True)
class CacheSpec:
    """What a cache must hold, and what it may take.

    near_tokens: per sequence and layer, on the device; at least two pages.
    far_bytes: capacity of the far tier in host memory, all layers and sequences together.
    chunk_tokens: the longest run of tokens that is appended at once.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    near_tokens: int
    far_bytes: int
    page_size: int = 64
    chunk_tokens: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.near_layout  # noqa: B018  refuses a dtype or page_size that no page can have
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise UnsupportedError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {self.head_dim}")
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise InputError(
                f"a cache is for at least one layer and KV head, got {self.num_layers} layers of {self.num_kv_heads}"
            )
        if not isinstance(self.near_tokens, int) or not isinstance(self.chunk_tokens, int):
            raise InputError(
                f"near_tokens and chunk_tokens are whole numbers, got {self.near_tokens}, {self.chunk_tokens}"
            )
        if self.near_tokens < 2 * self.page_size:
            raise InputError(f"near_tokens must be at least two pages, {2 * self.page_size}, got {self.near_tokens}")
        if self.chunk_tokens < self.page_size or self.chunk_tokens % self.page_size:
            raise InputError(f"chunk_tokens must be a multiple of page_size {self.page_size}, got {self.chunk_tokens}")

    @property
    def near_layout(self) -> PageLayout:
        """Rows, as the model writes them and a GPU's kernels read them; panels where the CPU kernel attends."""
        return PageLayout(self.dtype, self.page_size, "panels" if self.device.type == "cpu" else "rows")

    @property
    def far_layout(self) -> PageLayout:
        """Panels, as the CPU kernel reads them."""
        return PageLayout(self.dtype, self.page_size, "panels")

    @property
    def near_page_bytes(self) -> int:
        """K and V of one near page."""
        return 2 * self.near_layout.page_bytes(self.num_kv_heads, self.head_dim)

    @property
    def far_page_bytes(self) -> int:
        """K and V of one far page."""
        return 2 * self.far_layout.page_bytes(self.num_kv_heads, self.head_dim)

    @property
    def num_far_slots(self) -> int:
        """Pages that far_bytes buys."""
        return self.far_bytes // self.far_page_bytes

    def num_near_slots(self, num_seqs: int) -> int:
        """Near pages that never overflow: near_tokens and a chunk, the open page, and one that `crop` may reopen."""
        per_sequence = -(-(self.near_tokens + self.chunk_tokens) // self.page_size) + 2
        return num_seqs * self.num_layers * per_sequence

    def num_far_pages(self, num_seqs: int, num_tokens: int) -> int:
        """Far pages of sequences that grew to num_tokens."""
        pages = max(0, -(-(num_tokens - self.near_tokens) // self.page_size))
        return num_seqs * self.num_layers * pages


@dataclass(frozen=True)
class TierUse:
    """Counters of one tier. moved_bytes: what was ever moved into it from the tier above."""

    name: str
    device: str
    used_bytes: int
    capacity_bytes: int
    moved_bytes: int


class KVCache:
    """Keys and values of every layer: recent tokens near, older ones far.

    Nothing is allocated before the first `reserve` or `layer`. It serves one batch of sequences that grow together.
    """

    def __init__(self, spec: CacheSpec, workers: "WorkerPool | None" = None) -> None:
        """Refuses far_bytes beyond what this machine or its cgroup has at all. `workers` move pages."""
        memory = machine.memory()
        limits = {"physical memory": memory.total_bytes}
        if memory.cgroup is not None:
            limits["cgroup limit"] = memory.cgroup.limit_bytes
        name = min(limits, key=limits.__getitem__)
        if spec.far_bytes > limits[name]:
            raise CapacityError(
                f"far_bytes asks for {format_bytes(spec.far_bytes)}, but the {name} is {format_bytes(limits[name])}; "
                "lower far_bytes"
            )
        self.spec = spec
        self._workers = workers
        self._layers: list[LayerKV] = []
        self._near: PagePool | None = None
        self._far: PagePool | None = None
        self._is_closed = False

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch; 0 before the first use."""
        return self._layers[0].num_seqs if self._layers else 0

    @property
    def seq_len(self) -> int:
        """Tokens that every layer holds."""
        if not self._layers:
            return 0
        return min(layer.seq_len for layer in self._layers)

    def adapt(self, dtype: torch.dtype, device: torch.device) -> None:
        """Take the dtype and device that the model turned out to have; InputError once tokens are held in others."""
        if (dtype, device) == (self.spec.dtype, self.spec.device):
            return
        if any(layer.seq_len for layer in self._layers):
            raise InputError(
                f"this cache holds {self.spec.dtype} on {self.spec.device}, got {dtype} on {device}: use a new cache"
            )
        self.reset()
        self.spec = replace(self.spec, dtype=dtype, device=device)

    def reserve(self, num_seqs: int, num_tokens: int) -> None:
        """Make sure that num_seqs sequences can grow to num_tokens each, before any work starts.

        Raises CapacityError with the arithmetic where far_bytes is too small or the machine has less memory left; a
        cache that is in use goes on unharmed.
        """
        self._refuse_if_closed()
        spec = self.spec
        if num_seqs < 1 or num_tokens < 0:
            raise InputError(
                f"reserve expects at least one sequence and no negative length, got {num_seqs}, {num_tokens}"
            )
        self._refuse_other_batch(num_seqs)
        far_pages = spec.num_far_pages(num_seqs, num_tokens)
        needed = far_pages * spec.far_page_bytes
        if far_pages > spec.num_far_slots:
            far_tokens = max(0, num_tokens - spec.near_tokens)
            raise CapacityError(
                f"{num_seqs} x {num_tokens} tokens leave {num_seqs} x {far_tokens} far: {spec.num_layers} layers "
                f"x {spec.far_page_bytes // spec.page_size} bytes a token need {format_bytes(needed)}, far_bytes is "
                f"{format_bytes(spec.far_bytes)}; raise far_bytes or near_tokens, or shorten the prompt"
            )
        self._require_memory(num_seqs, far_pages)
        if not self._layers:
            self._allocate(num_seqs)

    def layer(self, index: int, num_seqs: int) -> LayerKV:
        """The pages of one layer, made for num_seqs sequences on first use."""
        self._refuse_if_closed()
        self._refuse_other_batch(num_seqs)
        if not self._layers:
            self.reserve(num_seqs, 0)
        return self._layers[index]

    def require_room(self, num_seqs: int, num_tokens: int) -> None:
        """Before a step over all layers: refuse, while nothing has moved, what one of them could not take.

        `num_tokens` more are appended to every layer in chunks of at most chunk_tokens. Raises CapacityError where the
        far tier cannot take what they push out, InputError for another batch size, CacheError where layers differ.
        """
        self._refuse_if_closed()
        self._refuse_other_batch(num_seqs)
        if self._far is None:
            self.reserve(num_seqs, num_tokens)
            return
        if len({layer.seq_len for layer in self._layers}) > 1:
            raise CacheError("the last forward pass did not reach every layer; crop() to a length, or reset()")
        before_last_chunk = self.seq_len + (num_tokens - 1) // self.spec.chunk_tokens * self.spec.chunk_tokens
        needed = self.spec.num_far_pages(self.num_seqs, before_last_chunk)
        self._far.require(max(0, needed - self._far.num_used))
        if num_tokens >= self.spec.page_size:  # a prompt; asking Linux takes 100 us, too long for every token
            self._require_memory(num_seqs, needed)

    def crop(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on, in every layer."""
        if not isinstance(seq_len, int) or isinstance(seq_len, bool):
            raise InputError(f"crop takes a whole number of tokens, got {seq_len!r}")
        for layer in self._layers:
            layer.crop(min(seq_len, layer.seq_len))

    def reset(self) -> None:
        """Forget everything; the next use may have another batch size."""
        for layer in self._layers:
            layer.release()
        self._layers, self._near, self._far = [], None, None

    def close(self) -> None:
        """Give every byte back; the cache cannot be used again."""
        self.reset()
        self._is_closed = True

    def use(self) -> list[TierUse]:
        """Counters of each tier, near first."""
        if self._near is None or self._far is None:
            return []
        return [
            TierUse(
                pool.name,
                str(pool.arena.k.device),
                pool.num_used * pool.page_bytes,
                pool.arena.num_slots * pool.page_bytes,
                moved_bytes,
            )
            for pool, moved_bytes in ((self._near, 0), (self._far, self._far.num_ever_used * self._far.page_bytes))
        ]

    def check(self) -> None:
        """Recount everything: every slot is used once or free, and every layer has the same length."""
        if self._near is None or self._far is None:
            assert not self._layers
            return
        used = [layer.used_slots() for layer in self._layers]
        self._near.check([slot for near, _ in used for slot in near])
        self._far.check([slot for _, far in used for slot in far])
        lengths = {layer.seq_len for layer in self._layers}
        assert len(lengths) == 1, f"layers hold different numbers of tokens: {sorted(lengths)}"

    def _require_memory(self, num_seqs: int, far_pages: int) -> None:
        """The host memory that this growth will touch for the first time must be there."""
        spec = self.spec
        touched = self._far.num_touched if self._far is not None else 0
        new_bytes = max(0, far_pages - touched) * spec.far_page_bytes
        if self._near is None and spec.device.type == "cpu":
            new_bytes += spec.num_near_slots(num_seqs) * spec.near_page_bytes
        available = machine.available_bytes()
        if new_bytes > available.num_bytes:
            raise CapacityError(
                f"{format_bytes(new_bytes)} of host memory needed, {format_bytes(available.num_bytes)} available "
                f"({available.limit}); lower far_bytes, near_tokens or the batch, or free memory"
            )

    @torch.inference_mode(False)  # tensors made inside inference mode could not be written outside it
    def _allocate(self, num_seqs: int) -> None:
        spec = self.spec
        heads, dim = spec.num_kv_heads, spec.head_dim
        near = Arena.allocate(spec.near_layout, spec.num_near_slots(num_seqs), heads, dim, spec.device)
        far = Arena.allocate(spec.far_layout, spec.num_far_slots, heads, dim)
        self._near = PagePool(near, "near", "this is a fault of tandemkv, please report it")
        self._far = PagePool(far, "far", "raise far_bytes or near_tokens, or shorten the prompt")
        self._layers = [
            LayerKV(self._near, self._far, num_seqs, spec.near_tokens, self._workers) for _ in range(spec.num_layers)
        ]

    def _refuse_other_batch(self, num_seqs: int) -> None:
        if self._layers and self.num_seqs != num_seqs:
            raise InputError(
                f"this cache holds {self.num_seqs} sequences, asked for {num_seqs}: use a new cache or reset()"
            )

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise CacheError("this cache was closed; make a new one")
