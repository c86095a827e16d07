"""What a cache must hold and may take: the arithmetic of pages, before anything is allocated."""

from dataclasses import dataclass, field

import torch

from tandemkv.errors import InputError, UnsupportedError
from tandemkv.types import MAX_HEAD_DIM, PageLayout


@dataclass(frozen=True)
class CacheSpec:
    """What a cache must hold, and what it may take.

    v_head_dim: where it is not head_dim, the width of values (MLA).
    near_tokens: per sequence and layer, on the device; at least two pages.
    far_bytes: capacity of the far tier in host memory, all layers and sequences together.
    chunk_tokens: the longest run of tokens that is appended at once.
    windows: one per layer, tokens that its queries see, or None for all; none at all where every layer is full.
        Layers with a window have no far tokens, and near_tokens does not concern them.
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
    v_head_dim: int | None = None
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        self.near_layout  # noqa: B018  refuses a dtype or page_size that no page can have
        for name, dim in (("head_dim", self.head_dim), ("v_head_dim", self.v_width)):
            if not 1 <= dim <= MAX_HEAD_DIM:
                raise UnsupportedError(f"{name} must be 1 to {MAX_HEAD_DIM}, got {dim}")
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise InputError(
                f"a cache is for at least one layer and KV head, got {self.num_layers} layers of {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise InputError(f"expected a window or None for each of {self.num_layers} layers, got {self.windows}")
        for name in ("near_tokens", "chunk_tokens"):
            if not isinstance(getattr(self, name), int):
                raise InputError(f"{name} is a whole number, got {getattr(self, name)!r}")
        if self.near_tokens < 2 * self.page_size:
            raise InputError(f"near_tokens must be at least two pages, {2 * self.page_size}, got {self.near_tokens}")
        if self.chunk_tokens < self.page_size or self.chunk_tokens % self.page_size:
            raise InputError(f"chunk_tokens must be a multiple of page_size {self.page_size}, got {self.chunk_tokens}")

    @property
    def v_width(self) -> int:
        """Width of values."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def content(self) -> str:
        """What a token of a layer is, for messages."""
        return f"{self.num_kv_heads} heads of {self.head_dim} and {self.v_width} {self.dtype} on {self.device}"

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
        return self._page_bytes(self.near_layout)

    @property
    def far_page_bytes(self) -> int:
        """K and V of one far page."""
        return self._page_bytes(self.far_layout)

    @property
    def num_far_slots(self) -> int:
        """Pages that far_bytes buys."""
        return self.far_bytes // self.far_page_bytes

    def window(self, layer: int) -> int | None:
        """Tokens that queries of a layer see; None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def num_full_layers(self) -> int:
        """Layers that see everything: those with far pages."""
        return self.windows.count(None) if self.windows else self.num_layers

    def kept_tokens(self, layer: int) -> int:
        """What `LayerKV.evict` leaves near. A window keeps a page more than queries see: room for `crop`."""
        window = self.window(layer)
        return self.near_tokens if window is None else window - 1 + self.page_size

    def num_near_slots(self, num_seqs: int) -> int:
        """Near pages that never overflow: what is kept and a chunk, the open page, and one that `crop` may reopen.

        A layer with a window needs what it keeps twice: a prompt of many chunks that fails must be undone.
        """
        pages = 0
        for layer in range(self.num_layers):
            kept, twice = self.kept_tokens(layer), self.window(layer) is not None
            pages += -(-(kept + self.chunk_tokens) // self.page_size) + 2 + twice * (kept // self.page_size + 2)
        return num_seqs * pages

    def num_far_pages(self, num_seqs: int, num_tokens: int) -> int:
        """Far pages of sequences that grew to num_tokens."""
        pages = max(0, -(-(num_tokens - self.near_tokens) // self.page_size))
        return num_seqs * self.num_full_layers * pages

    def _page_bytes(self, layout: PageLayout) -> int:
        widths = self.head_dim, self.v_width
        return sum(layout.page_bytes(self.num_kv_heads, width) for width in widths)
