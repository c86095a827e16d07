"""tandemkv: exact attention over keys and values that do not fit the device.

Importing this package loads nothing: no torch, no native module, no transformers, no CUDA. Names load on first use,
so that a program can still choose how torch's threads wait (GOMP_SPINCOUNT) before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tandemkv.errors import (
        CacheError,
        CapacityError,
        InputError,
        TandemError,
        UnavailableError,
        UnsupportedError,
    )
    from tandemkv.kernels import attend, merge
    from tandemkv.types import Arena, PagedKV, PageLayout, Partial, ScoreRule

__all__ = [
    "Arena",
    "CacheError",
    "CapacityError",
    "InputError",
    "PageLayout",
    "PagedKV",
    "Partial",
    "ScoreRule",
    "TandemError",
    "UnavailableError",
    "UnsupportedError",
    "attend",
    "merge",
]
__version__ = "0.1.0"

_HOMES = {
    "tandemkv.types": ("Arena", "PageLayout", "PagedKV", "Partial", "ScoreRule"),
    "tandemkv.kernels": ("attend", "merge"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tandemkv' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "tandemkv.errors")
    return getattr(import_module(home), name)
