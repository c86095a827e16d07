"""Caches and their forks under random operations equal dense K and V in plain lists, recounted after every step."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tandemkv import kernels
from tandemkv.attention import decode_step, worker_pool
from tandemkv.cache import CacheSpec, KVCache, LayerKV, parse_far_dtype, pool
from tandemkv.errors import CacheError, CapacityError, InputError
from tandemkv.types import ScoreRule
from tests.dense import causal_visible, dense_attention, random_kv
from tests.tolerances import Bound, assert_within, attend_bound, kernel_rounding

NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, SCALE = 2, 2, 6, 0.4
WIDE_HEAD_DIM = 64  # that int4 has groups for
# Weights of codes are off by half of a 32639th of the largest: of a score in 16 channels with codes of 127, of out in
# 64 tokens.
CODE_ERROR = SCALE * 16 * 0.5 * 2 * 6 / 32639 + 64 * 0.5 * 2 / 32639
MAX_MEMBERS, MAX_SEQS = 3, 4
FEW = pool._FEW


@dataclass
class Member:
    """A cache, and what each of its layers must hold."""

    cache: KVCache
    dense: list[tuple[Tensor, Tensor]]

    @property
    def layers(self) -> list[LayerKV]:
        return [self.cache.layer(index) for index in range(len(self.dense))]

    @property
    def num_seqs(self) -> int:
        return self.dense[0][0].shape[0]

    @property
    def seq_len(self) -> int:
        return self.dense[0][0].shape[2]

    def extend(self, index: int, k: Tensor, v: Tensor) -> None:
        old_k, old_v = self.dense[index]
        self.dense[index] = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)


members = st.integers(0, MAX_MEMBERS - 1)


class CacheMachine(RuleBasedStateMachine):
    """A family: one cache at first, then forks of it; every rule picks a member."""

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        page_size=st.sampled_from([16, 32, 48]),
        near_pages=st.integers(2, 4),
        near_rest=st.integers(0, 15),
        chunk_pages=st.integers(1, 3),
        far_pages=st.sampled_from([0, 3, 6, 9, 30]),
        prompt_pages=st.floats(0.0, 9.0),
        windows=st.lists(st.none() | st.integers(1, 90), min_size=1, max_size=3),
        num_seqs=st.integers(1, 3),
        with_workers=st.booleans(),
        far_dtype=st.sampled_from([None, None, "int8", "int4", "model:48,int8", "int8:48,int4", "int8:48,int8/16"]),
        few=st.sampled_from([2, pool._FEW]),
    )
    def build(
        self, dtype: torch.dtype, page_size: int, windows: list[int | None], far_dtype: str | None, **counts: Any
    ) -> None:
        self.far_dtype, pool._FEW = far_dtype, counts["few"]  # in small tables, many slots are three
        if far_dtype == "int8:48,int4":
            dtype = torch.float32  # in which a number exists that neither loses
        spec = CacheSpec(
            num_layers=len(windows),
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM if far_dtype is None else WIDE_HEAD_DIM,
            dtype=dtype,
            near_tokens=counts["near_pages"] * page_size + counts["near_rest"],
            far_bytes=0,
            page_size=page_size,
            chunk_tokens=counts["chunk_pages"] * page_size,
            windows=tuple(windows),
            far_formats=parse_far_dtype(far_dtype),
        )
        num_slots = counts["far_pages"] * spec.num_full_layers * counts["num_seqs"]
        self.spec = replace(spec, far_bytes=num_slots * spec.far_page_bytes)
        self.seed = 0
        cache = KVCache(self.spec, worker_pool() if counts["with_workers"] else None)
        self.members = [self.started(cache, counts["num_seqs"])]
        self.grow(self.members[0], max(1, int(counts["prompt_pages"] * page_size)))

    def started(self, cache: KVCache, num_seqs: int) -> Member:
        cache.reserve(num_seqs, 0)
        return Member(cache, [self.new_tokens(num_seqs, 0) for _ in range(self.spec.num_layers)])

    def new_tokens(self, num_seqs: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Where they are quantised, numbers of which codes lose nothing: 0 and the highest code, in 16 channels.

        127 and 15 times a bf16 number for both formats, which has 11 bits.
        """
        self.seed += 1
        k, v = random_kv(num_seqs, NUM_KV_HEADS, num_tokens, self.spec.head_dim, self.spec.dtype, self.seed)
        if self.far_dtype is None:
            return k, v
        highest = {"int4": 15 / 8, "int8:48,int4": 127 * 15 / 1024}.get(self.far_dtype, 127 / 64)
        k, v = ((x > 0.5).to(x.dtype) * highest for x in (k, v))
        k[..., 16:] = 0.0
        return k, v

    @property
    def code_error(self) -> float:
        return 0.0 if self.far_dtype is None else CODE_ERROR

    def pick(self, index: int) -> Member:
        return self.members[index % len(self.members)]

    def far_bytes_short(self, member: Member, num_tokens: int) -> int:
        """Bytes of far pages that a step of so many tokens may take beyond those that are free."""
        last_chunk = (num_tokens - 1) // self.spec.chunk_tokens * self.spec.chunk_tokens
        needed = self.spec.num_far_pages(member.num_seqs, member.seq_len + last_chunk)
        own = [0] * len(needed)
        for layer in member.layers:
            for part, begin, end in self.spec.far_spans(layer.num_far_pages):
                own[part] += (end - begin) * member.num_seqs
        more = tuple(max(0, num - has) for num, has in zip(needed, own, strict=True))
        if not any(more):
            return 0
        used = torch.cat([layer.used_slots()[1] for each in self.members for layer in each.layers]).unique()
        far = member.layers[0]._store.far  # copies that no table has go
        held = torch.bincount(far.part_of(used), minlength=len(needed)).tolist()
        return self.spec.far_bytes_of(more) - (far.capacity_bytes - self.spec.far_bytes_of(tuple(held)))

    def begins(self, member: Member, num_tokens: int) -> bool:
        """Whether a step begins, which it must where there is room, and must not where there is none."""
        if self.far_bytes_short(member, num_tokens) > 0:
            with pytest.raises(CapacityError, match=r"far tier is full.*raise far_bytes or near_tokens"):
                member.cache.begin_step(member.num_seqs, num_tokens)
            return False
        try:
            member.cache.begin_step(member.num_seqs, num_tokens)
        except CapacityError:
            # Pages that become narrower stay for others as they are; whether these have narrowed them is not asked.
            assert len(self.members) > 1
            assert "," in (self.far_dtype or "")
            return False
        return True

    def grow(self, member: Member, num_tokens: int, num_layers: int | None = None) -> None:
        """Append where it fits; where it does not, `begin_step` must say so. Some layers only: a cut-off pass."""
        cache = member.cache
        if not self.begins(member, num_tokens):
            return
        for index, layer in enumerate(member.layers[:num_layers]):
            k, v = self.new_tokens(member.num_seqs, num_tokens)
            for begin in range(0, num_tokens, self.spec.chunk_tokens):
                chunk = slice(begin, begin + self.spec.chunk_tokens)
                layer.evict()
                assert layer.num_near_tokens < self.spec.kept_tokens(index) + self.spec.page_size
                layer.append(k[:, :, chunk], v[:, :, chunk])
            if num_layers is None:
                member.extend(index, k, v)
        if num_layers is None:
            cache.end_step()

    @rule(who=members, num_tokens=st.integers(1, 20))
    def decode_some(self, who: int, num_tokens: int) -> None:
        self.grow(self.pick(who), num_tokens)

    @rule(who=members, pages=st.floats(0.1, 3.0))
    def prefill(self, who: int, pages: float) -> None:
        self.grow(self.pick(who), max(1, int(pages * self.spec.chunk_tokens)))

    @rule(who=members, pages=st.floats(0.01, 3.0), is_noticed=st.booleans())
    def forward_pass_that_is_cut_off(self, who: int, pages: float, is_noticed: bool) -> None:
        """Before the last layer; undone at once, or by whatever happens next to anybody."""
        member = self.pick(who)
        self.grow(member, max(1, int(pages * self.spec.chunk_tokens)), num_layers=self.spec.num_layers - 1)
        assert member.cache.seq_len == member.seq_len
        if is_noticed:
            member.cache.settle()

    @rule(who=members, q_len=st.integers(1, 8))
    def decode_step_that_fails_and_one_that_works(self, who: int, q_len: int) -> None:
        """Append and attend in one call; the failed one, with NaN in q, leaves neither tokens nor pages behind."""
        member = self.pick(who)
        if not self.begins(member, q_len):
            return
        q, _ = random_kv(
            member.num_seqs, NUM_KV_HEADS * GROUP_SIZE, q_len, self.spec.head_dim, self.spec.dtype, self.seed
        )
        for index, layer in enumerate(member.layers):
            new_k, new_v = self.new_tokens(member.num_seqs, q_len)
            score_rule = ScoreRule(SCALE, window=layer.window)
            layer.evict()
            before = layer.seq_len, [len(slots) for slots in layer.used_slots()]
            with pytest.raises(InputError, match="q contains NaN"):
                decode_step(q * torch.nan, new_k, new_v, layer, score_rule)
            assert (layer.seq_len, [len(slots) for slots in layer.used_slots()]) == before
            out = decode_step(q, new_k, new_v, layer, score_rule).transpose(1, 2)
            member.extend(index, new_k, new_v)
            k, v = member.dense[index]
            visible = causal_visible(k.shape[2], q_len, torch.zeros(member.num_seqs, dtype=torch.int64), layer.window)
            bound = attend_bound(q, k, v, visible, SCALE, kernel_rounding(self.spec.dtype), num_merges=2).out
            bound = bound + out.abs().double() * torch.finfo(out.dtype).eps  # the cast to the model's dtype
            bound = bound + self.code_error
            assert bool(((out.double() - dense_attention(q, k, v, visible, SCALE).out).abs() <= bound).all())
        member.cache.end_step()

    @rule(who=members, part=st.floats(0.0, 1.0), rounding=st.sampled_from(["any", "page", "far", "all far", "few"]))
    def crop(self, who: int, part: float, rounding: str) -> None:
        member, size = self.pick(who), self.spec.page_size
        num_far = max(layer.num_far_pages for layer in member.layers)
        seq_len = {
            "any": int(part * member.seq_len),
            "page": int(part * member.seq_len) // size * size,
            "far": int(part * num_far * size),
            "all far": num_far * size,
            "few": max(0, member.seq_len - int(part * size)),
        }[rounding]
        if not all(layer.can_crop(seq_len) for layer in member.layers):
            with pytest.raises(CacheError, match=r"sliding window of \d+ tokens has left those before"):
                member.cache.crop(seq_len)
            return
        member.cache.crop(seq_len)
        member.dense = [(k[:, :, :seq_len], v[:, :, :seq_len]) for k, v in member.dense]

    @rule(who=members)
    def crop_to_what_it_cannot_be(self, who: int) -> None:
        member = self.pick(who)
        with pytest.raises(InputError, match="cannot crop"):
            member.cache.crop(-1)
        with pytest.raises(InputError, match="cannot crop"):
            member.layers[0].crop(member.seq_len + 1)

    @precondition(lambda self: len(self.members) < MAX_MEMBERS)
    @rule(who=members)
    def fork(self, who: int) -> None:
        """Costs no page."""
        member = self.pick(who)
        before = member.cache.use()
        self.members.append(Member(member.cache.fork(), list(member.dense)))
        assert member.cache.use() == before

    @rule(who=members, seqs=st.lists(st.integers(0, MAX_SEQS - 1), min_size=1, max_size=MAX_SEQS))
    def select(self, who: int, seqs: list[int]) -> None:
        """Beams change places; sequences are copied, or dropped. Costs no page."""
        member = self.pick(who)
        index = torch.tensor(seqs) % member.num_seqs
        before = [tier.used_bytes for tier in member.cache.use()]
        member.cache.select(index)
        member.dense = [(k[index], v[index]) for k, v in member.dense]
        assert all(now.used_bytes <= was for now, was in zip(member.cache.use(), before, strict=True))

    @precondition(lambda self: len(self.members) > 1)
    @rule(who=members, how=st.sampled_from(["close", "collect", "reset"]))
    def lose_a_member(self, who: int, how: str) -> None:
        """Its pages come back, those that others share stay."""
        member = self.members.pop(who % len(self.members))
        if how != "collect":
            getattr(member.cache, how)()
            assert member.cache.use() == []

    @precondition(lambda self: len(self.members) == 1)
    @rule(num_seqs=st.integers(1, 3))
    def reset(self, num_seqs: int) -> None:
        cache = self.members[0].cache
        cache.reset()
        assert cache.use() == []
        assert cache.num_seqs == cache.seq_len == 0
        self.members = [self.started(cache, num_seqs)]

    @rule(who=members, num_tokens=st.integers(0, 1500))
    def reserve(self, who: int, num_tokens: int) -> None:
        member = self.pick(who)
        far_tokens = max(0, num_tokens - self.spec.near_tokens)
        far_pages = self.spec.num_far_pages(member.num_seqs, num_tokens)
        if self.spec.far_bytes_of(far_pages) > self.spec.far_bytes:
            with pytest.raises(CapacityError, match=f"{member.num_seqs} x {far_tokens} far.*raise far_bytes"):
                member.cache.reserve(member.num_seqs, num_tokens)
        elif len(self.members) == 1:
            member.cache.reserve(member.num_seqs, num_tokens)
        if member.seq_len:
            with pytest.raises(InputError, match=f"holds {member.num_seqs} sequences, asked for {member.num_seqs + 1}"):
                member.cache.reserve(member.num_seqs + 1, 0)
        else:  # makes way for another batch
            num_seqs = member.num_seqs % 3 + 1
            member.cache.reserve(num_seqs, 0)
            member.dense = [self.new_tokens(num_seqs, 0) for _ in member.dense]

    @rule(who=members, layer_index=st.integers(0, 2))
    def hold_refuses_changes(self, who: int, layer_index: int) -> None:
        member = self.pick(who)
        layer = member.layers[layer_index % self.spec.num_layers]
        k, v = self.new_tokens(member.num_seqs, 1)
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
        member = self.members[0]
        k, v = self.new_tokens(member.num_seqs, 3)
        wrong = {
            "batch": (torch.cat([k, k]), torch.cat([v, v])),
            "heads": (k[:, :1], v[:, :1]),
            "dim": (k[..., :4], v[..., :4]),
            "dtype": (k.double(), v),
            "v_length": (k, v[:, :, :2]),
            "rank": (k[0], v[0]),
        }
        with pytest.raises(InputError, match="must be torch"):
            member.layers[0].append(*wrong[fault])

    @rule(who=members, first=st.floats(0.0, 1.0), last=st.floats(0.0, 1.0), one=st.booleans())
    def read(self, who: int, first: float, last: float, one: bool) -> None:
        member, seqs = self.pick(who), slice(0, 1) if one else slice(None)
        for layer, (k, v) in zip(member.layers, member.dense, strict=True):
            held = member.seq_len - layer.first_token
            if held > 0:
                begin, end = (layer.first_token + int(part * held) for part in sorted((first, last)))
                begin, end = min(begin, member.seq_len - 1), max(end, begin + 1)
                got_k, got_v = layer.read(begin, min(end, member.seq_len), seqs)
                assert torch.equal(got_k, k[seqs, :, begin:end])
                assert torch.equal(got_v, v[seqs, :, begin:end])

    @rule(who=members, q_len=st.integers(1, 8), padding=st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4))
    def attend(self, who: int, q_len: int, padding: list[float]) -> None:
        """Queries must be near, so they are no more than the near pages hold."""
        member = self.pick(who)
        kv_start = torch.tensor([int(part * member.seq_len) for part in padding[: member.num_seqs]])
        num_q_heads = NUM_KV_HEADS * GROUP_SIZE
        for layer, (k, v) in zip(member.layers, member.dense, strict=True):
            q_len = min(q_len, layer.num_near_tokens)
            if q_len == 0 or (layer.window is not None and not layer.can_crop(member.seq_len - q_len)):
                continue
            q, _ = random_kv(member.num_seqs, num_q_heads, q_len, self.spec.head_dim, self.spec.dtype, self.seed)
            layer.set_kv_start(kv_start)
            with layer.hold() as held:
                score_rule = ScoreRule(SCALE, window=layer.window)
                part = kernels.attend(q, *held.far, held.near, rule=score_rule, causal=True)
            layer.set_kv_start(None)
            visible = causal_visible(member.seq_len, q_len, kv_start, layer.window)
            bound = attend_bound(q, k, v, visible, SCALE, kernel_rounding(self.spec.dtype), num_merges=2)
            bound = Bound(bound.out + self.code_error, bound.lse + self.code_error)
            assert_within(part, dense_attention(q, k, v, visible, SCALE), bound)

    @invariant()
    def books_are_right(self) -> None:
        for member in self.members:
            member.cache.check()
            assert member.cache.seq_len == member.seq_len
        if len(self.members) == 1:
            self.no_page_is_counted_that_nobody_has(self.members[0])

    def no_page_is_counted_that_nobody_has(self, member: Member) -> None:
        near, far = (asdict(tier) for tier in member.cache.use())
        used = [layer.used_slots() for layer in member.layers]
        num_near, num_far = (len(torch.unique(torch.cat(slots))) for slots in zip(*used, strict=True))
        assert near["used_bytes"] == num_near * self.spec.near_page_bytes <= near["capacity_bytes"]
        least = min(self.spec.far_page_sizes)
        assert num_far * least <= far["used_bytes"] <= far["capacity_bytes"]
        if not any(layer.num_far_pages for layer in member.layers):
            assert far["used_bytes"] == 0

    @invariant()
    def contents_are_equal_bit_for_bit(self) -> None:
        for member in self.members:
            for layer, (k, v) in zip(member.layers, member.dense, strict=True):
                if layer.first_token < member.seq_len:
                    got_k, got_v = layer.read(layer.first_token, member.seq_len)
                    assert torch.equal(got_k, k[:, :, layer.first_token :])
                    assert torch.equal(got_v, v[:, :, layer.first_token :])

    def teardown(self) -> None:
        pool._FEW = FEW
        for member in getattr(self, "members", []):
            member.cache.close()
            with pytest.raises(CacheError, match="closed"):
                member.cache.reserve(1, 1)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
