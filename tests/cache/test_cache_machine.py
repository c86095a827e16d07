"""The tiered cache under random operations equals dense K and V in plain lists, recounted after every step."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tandemkv import kernels
from tandemkv.attention import decode_step, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import CacheError, CapacityError, InputError
from tandemkv.types import ScoreRule
from tests.dense import causal_visible, dense_attention, random_kv
from tests.tolerances import assert_within, attend_bound, kernel_rounding

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, SCALE = 2, 2, 6, 0.4


class CacheMachine(RuleBasedStateMachine):
    """`dense[layer]` is what the cache must hold; `num_far_pages` is the same for every layer and sequence."""

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        page_size=st.sampled_from([16, 32, 48]),
        near_pages=st.integers(2, 4),
        near_rest=st.integers(0, 15),
        chunk_pages=st.integers(1, 3),
        far_pages=st.sampled_from([0, 3, 6, 9]),
        prompt_pages=st.floats(0.0, 9.0),
        num_layers=st.integers(1, 3),
        num_seqs=st.integers(1, 3),
        with_workers=st.booleans(),
    )
    def build(self, dtype: torch.dtype, page_size: int, near_pages: int, near_rest: int, **counts: Any) -> None:
        spec = CacheSpec(
            num_layers=counts["num_layers"],
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            near_tokens=near_pages * page_size + near_rest,
            far_bytes=0,
            page_size=page_size,
            chunk_tokens=counts["chunk_pages"] * page_size,
        )
        num_slots = counts["far_pages"] * counts["num_layers"] * counts["num_seqs"]
        self.spec = CacheSpec(**{**vars(spec), "far_bytes": num_slots * spec.far_page_bytes})
        self.num_far_slots = num_slots
        self.cache = KVCache(self.spec, worker_pool() if counts["with_workers"] else None)
        self.start(counts["num_seqs"])
        self.grow(max(1, int(counts["prompt_pages"] * page_size)))

    def start(self, num_seqs: int) -> None:
        """An empty cache, here and in the model of it."""
        self.num_seqs, self.num_far_pages, self.num_moved_pages, self.seed = num_seqs, 0, 0, 0
        self.dense = [self.new_tokens(0) for _ in range(self.spec.num_layers)]
        self.cache.reserve(num_seqs, 0)

    def new_tokens(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        self.seed += 1
        return random_kv(self.num_seqs, NUM_KV_HEADS, num_tokens, HEAD_DIM, self.spec.dtype, self.seed)

    @property
    def seq_len(self) -> int:
        return self.dense[0][0].shape[2]

    def layers(self) -> list[LayerKV]:
        return [self.cache.layer(index, self.num_seqs) for index in range(self.spec.num_layers)]

    def far_pages_after(self, num_tokens: int) -> int:
        """Far pages of each sequence once num_tokens more were appended, chunk by chunk."""
        seq_len, far = self.seq_len, self.num_far_pages
        for begin in range(0, num_tokens, self.spec.chunk_tokens):
            excess = seq_len + begin - far * self.spec.page_size - self.spec.near_tokens
            far += max(0, -(-excess // self.spec.page_size))
        return far

    def grow(self, num_tokens: int) -> None:
        """Append where it fits; where it does not, `require_room` must say so."""
        far = self.far_pages_after(num_tokens)
        if far * self.num_seqs * self.spec.num_layers > self.num_far_slots:
            with pytest.raises(CapacityError, match=r"far tier is full.*raise far_bytes or near_tokens"):
                self.cache.require_room(self.num_seqs, num_tokens)
            return
        self.cache.require_room(self.num_seqs, num_tokens)
        for index, layer in enumerate(self.layers()):
            k, v = self.new_tokens(num_tokens)
            for begin in range(0, num_tokens, self.spec.chunk_tokens):
                chunk = slice(begin, begin + self.spec.chunk_tokens)
                layer.evict()
                assert layer.num_near_tokens <= self.spec.near_tokens
                layer.append(k[:, :, chunk], v[:, :, chunk])
            old_k, old_v = self.dense[index]
            self.dense[index] = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.num_moved_pages += far - self.num_far_pages
        self.num_far_pages = far

    @rule(num_tokens=st.integers(1, 20))
    def decode_some(self, num_tokens: int) -> None:
        self.grow(num_tokens)

    @rule(q_len=st.integers(1, 8))
    def decode_step_that_fails_and_one_that_works(self, q_len: int) -> None:
        """Append and attend in one call; the failed one, with NaN in q, leaves neither tokens nor pages behind."""
        far = self.far_pages_after(q_len)
        if far * self.num_seqs * self.spec.num_layers > self.num_far_slots:
            return
        no_padding = torch.zeros(self.num_seqs, dtype=torch.int64)
        q, _ = random_kv(self.num_seqs, NUM_KV_HEADS * GROUP_SIZE, q_len, HEAD_DIM, self.spec.dtype, self.seed)
        for index, layer in enumerate(self.layers()):
            new_k, new_v = self.new_tokens(q_len)
            layer.evict()
            before = layer.seq_len, layer.num_pages, layer.used_slots()
            with pytest.raises(InputError, match="q contains NaN"):
                decode_step(q * torch.nan, new_k, new_v, layer, rule=ScoreRule(SCALE))
            assert (layer.seq_len, layer.num_pages, layer.used_slots()) == before
            out = decode_step(q, new_k, new_v, layer, rule=ScoreRule(SCALE)).transpose(1, 2)
            k, v = (torch.cat(pair, 2) for pair in zip(self.dense[index], (new_k, new_v), strict=True))
            self.dense[index] = k, v
            visible = causal_visible(k.shape[2], q_len, no_padding)
            bound = attend_bound(q, k, v, visible, SCALE, kernel_rounding(self.spec.dtype), num_merges=2).out
            bound = bound + out.abs().double() * torch.finfo(out.dtype).eps  # the cast to the model's dtype
            assert bool(((out.double() - dense_attention(q, k, v, visible, SCALE).out).abs() <= bound).all())
        self.num_moved_pages += far - self.num_far_pages
        self.num_far_pages = far

    @rule(pages=st.floats(0.1, 3.0))
    def prefill(self, pages: float) -> None:
        self.grow(max(1, int(pages * self.spec.chunk_tokens)))

    @precondition(lambda self: self.seq_len > 0)
    @rule(part=st.floats(0.0, 1.0), rounding=st.sampled_from(["any", "page", "far", "all far"]))
    def crop(self, part: float, rounding: str) -> None:
        size = self.spec.page_size
        seq_len = int(part * self.seq_len)
        if rounding == "page":
            seq_len = seq_len // size * size
        elif rounding == "far":
            seq_len = int(part * self.num_far_pages * size)
        elif rounding == "all far":
            seq_len = self.num_far_pages * size
        self.cache.crop(seq_len)
        self.dense = [(k[:, :, :seq_len], v[:, :, :seq_len]) for k, v in self.dense]
        self.num_far_pages = min(self.num_far_pages, seq_len // size)

    @rule()
    def crop_to_what_it_cannot_be(self) -> None:
        with pytest.raises(InputError, match="cannot crop"):
            self.cache.crop(-1)
        with pytest.raises(InputError, match="cannot crop"):
            self.layers()[0].crop(self.seq_len + 1)

    @rule(num_seqs=st.integers(1, 3))
    def reset(self, num_seqs: int) -> None:
        self.cache.reset()
        assert self.cache.use() == []
        assert self.cache.num_seqs == self.cache.seq_len == 0
        self.start(num_seqs)

    @rule(num_tokens=st.integers(0, 1500))
    def reserve(self, num_tokens: int) -> None:
        far_tokens = max(0, num_tokens - self.spec.near_tokens)
        far_pages = -(-far_tokens // self.spec.page_size) * self.num_seqs * self.spec.num_layers
        if far_pages > self.num_far_slots:
            with pytest.raises(CapacityError, match=f"{self.num_seqs} x {far_tokens} far.*raise far_bytes"):
                self.cache.reserve(self.num_seqs, num_tokens)
        else:
            self.cache.reserve(self.num_seqs, num_tokens)
        with pytest.raises(InputError, match=f"holds {self.num_seqs} sequences, asked for {self.num_seqs + 1}"):
            self.cache.reserve(self.num_seqs + 1, 0)

    @rule(layer_index=st.integers(0, 2))
    def hold_refuses_changes(self, layer_index: int) -> None:
        layer = self.layers()[layer_index % self.spec.num_layers]
        k, v = self.new_tokens(1)
        with layer.hold():
            with pytest.raises(CacheError, match=r"cannot append.*held"):
                layer.append(k, v)
            with pytest.raises(CacheError, match=r"cannot crop.*held"):
                layer.crop(0)
            if layer.pages_to_evict():
                with pytest.raises(CacheError, match=r"cannot demote.*held"):
                    layer.evict()

    @rule(fault=st.sampled_from(["batch", "heads", "dim", "dtype", "v_length", "rank"]))
    def append_of_wrong_tokens(self, fault: str) -> None:
        k, v = self.new_tokens(3)
        wrong = {
            "batch": (torch.cat([k, k]), torch.cat([v, v])),
            "heads": (k[:, :1], v[:, :1]),
            "dim": (k[..., :4], v[..., :4]),
            "dtype": (k.double(), v),
            "v_length": (k, v[:, :, :2]),
            "rank": (k[0], v[0]),
        }
        with pytest.raises(InputError, match="must be torch"):
            self.layers()[0].append(*wrong[fault])

    @precondition(lambda self: self.seq_len > 0)
    @rule(first=st.floats(0.0, 1.0), last=st.floats(0.0, 1.0), seqs=st.sampled_from([slice(None), slice(0, 1)]))
    def read(self, first: float, last: float, seqs: slice) -> None:
        begin, end = sorted((int(first * (self.seq_len - 1)), int(last * (self.seq_len - 1)) + 1))
        end = max(end, begin + 1)
        for layer, (k, v) in zip(self.layers(), self.dense, strict=True):
            got_k, got_v = layer.read(begin, end, seqs)
            assert torch.equal(got_k, k[seqs, :, begin:end])
            assert torch.equal(got_v, v[seqs, :, begin:end])

    @precondition(lambda self: self.seq_len > 0)
    @rule(q_len=st.integers(1, 8), padding=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
    def attend(self, q_len: int, padding: list[float]) -> None:
        """Queries must be near, so they are no more than the open page holds."""
        q_len = min(q_len, self.seq_len - self.num_far_pages * self.spec.page_size)
        if q_len == 0:
            return
        kv_start = torch.tensor([int(part * self.seq_len) for part in padding[: self.num_seqs]])
        visible = causal_visible(self.seq_len, q_len, kv_start)
        q, _ = random_kv(self.num_seqs, NUM_KV_HEADS * GROUP_SIZE, q_len, HEAD_DIM, self.spec.dtype, self.seed)
        for layer, (k, v) in zip(self.layers(), self.dense, strict=True):
            layer.set_kv_start(kv_start)
            with layer.hold() as held:
                part = kernels.attend(q, *held.far, held.near, rule=ScoreRule(SCALE), causal=True)
            layer.set_kv_start(None)
            bound = attend_bound(q, k, v, visible, SCALE, kernel_rounding(self.spec.dtype), num_merges=2)
            assert_within(part, dense_attention(q, k, v, visible, SCALE), bound)

    @invariant()
    def books_are_right(self) -> None:
        self.cache.check()
        assert self.cache.seq_len == self.seq_len
        per_layer = self.num_seqs * self.spec.num_layers
        size = self.spec.page_size
        near_pages = -(-self.seq_len // size) - self.num_far_pages
        near, far = (asdict(tier) for tier in self.cache.use())
        assert near["used_bytes"] == near_pages * per_layer * self.spec.near_page_bytes <= near["capacity_bytes"]
        assert far["used_bytes"] == self.num_far_pages * per_layer * self.spec.far_page_bytes <= far["capacity_bytes"]
        assert far["moved_bytes"] == self.num_moved_pages * per_layer * self.spec.far_page_bytes
        assert all(layer.far_tokens == self.num_far_pages * size for layer in self.layers())

    @invariant()
    def contents_are_equal_bit_for_bit(self) -> None:
        for layer, (k, v) in zip(self.layers(), self.dense, strict=True):
            if self.seq_len:
                got_k, got_v = layer.read(0, self.seq_len)
                assert torch.equal(got_k, k)
                assert torch.equal(got_v, v)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
            with pytest.raises(CacheError, match="closed"):
                self.cache.reserve(1, 1)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
