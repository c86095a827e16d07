"""tandemkv: exact attention over keys and values that do not fit the device.

Importing this package loads torch and nothing heavier: no native module, no transformers, no CUDA.
"""

from tandemkv.errors import (
    CacheError,
    CapacityError,
    InputError,
    TandemError,
    UnavailableError,
    UnsupportedError,
)
from tandemkv.types import PagedKV, PageLayout, Partial

__all__ = [
    "CacheError",
    "CapacityError",
    "InputError",
    "PageLayout",
    "PagedKV",
    "Partial",
    "TandemError",
    "UnavailableError",
    "UnsupportedError",
]
__version__ = "0.1.0"
