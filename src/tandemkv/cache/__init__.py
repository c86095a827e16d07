"""The tiered KV cache: where every token's keys and values lie, and nothing about who asks for them."""

from tandemkv.cache.inputs import InputsSpec, KeptInputs, Rebuild, Tier
from tandemkv.cache.layer import Held, LayerKV
from tandemkv.cache.pool import PagePool
from tandemkv.cache.spec import FAR_PACKINGS, CacheSpec, FarFormat, parse_far_dtype
from tandemkv.cache.tiered import KVCache, Moment, TierUse

__all__ = [
    "FAR_PACKINGS",
    "CacheSpec",
    "FarFormat",
    "Held",
    "InputsSpec",
    "KVCache",
    "KeptInputs",
    "LayerKV",
    "Moment",
    "PagePool",
    "Rebuild",
    "Tier",
    "TierUse",
    "parse_far_dtype",
]
