"""Kept inputs under random operations equal dense ones in plain lists; what they cost is counted, and comes back."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tandemkv import machine
from tandemkv.cache import CacheSpec, KVCache, LayerKV
from tandemkv.errors import CacheError, CapacityError, InputError
from tandemkv.machine import Available
from tests.dense import random_kv
from tests.interrupts import every_line, interrupted

HIDDEN, MAX_MEMBERS, MAX_SEQS = 5, 3, 4
SPEC = CacheSpec(
    num_layers=4,
    num_kv_heads=1,
    head_dim=16,
    dtype=torch.float32,
    near_tokens=32,
    far_bytes=1 << 24,
    page_size=16,
    chunk_tokens=32,
    windows=(None, 24, None, None),
    hidden_size=HIDDEN,
)
FULL = (0, 2, 3)
KINDS = {0: 0, 2: 1, 3: 0}  # layers 0 and 3 are told the same about tokens


def made_of(index: int, x: Tensor, beside: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Stands for a model: layer and position are told from what it was given."""
    angle, place = beside
    return (x + index)[:, None], (x * 0 + angle + place[..., None])[:, None]


@dataclass
class Member:
    """A cache, and what entered it: x of each full layer `[num_seqs, seq_len, HIDDEN]`, and beside, of each kind."""

    cache: KVCache
    x: dict[int, Tensor]
    beside: dict[int, tuple[Tensor, Tensor]]

    @property
    def num_seqs(self) -> int:
        return self.x[0].shape[0]

    @property
    def seq_len(self) -> int:
        return self.x[0].shape[1]

    def only(self, place: Any) -> "Member":
        """The same cache, these sequences and tokens."""
        return Member(
            self.cache,
            {index: x[place] for index, x in self.x.items()},
            {kind: (angle[place], number[place]) for kind, (angle, number) in self.beside.items()},
        )


def started(cache: KVCache, num_seqs: int) -> Member:
    cache.reserve(num_seqs, 0)
    none = torch.zeros(num_seqs, 0, 1), torch.zeros((num_seqs, 0), dtype=torch.int64)
    return Member(cache, {index: torch.zeros(num_seqs, 0, HIDDEN) for index in FULL}, {0: none, 1: none})


def entered(cache: KVCache, layer: LayerKV, x: Tensor, beside: tuple[Tensor, ...]) -> None:
    """One layer of a pass."""
    if layer.inputs is not None:
        layer.inputs.extend(layer.index, layer.seq_len, x, beside)
    k, v = random_kv(x.shape[0], 1, x.shape[1], 16, SPEC.dtype)
    for begin in range(0, x.shape[1], SPEC.chunk_tokens):
        chunk = slice(begin, begin + SPEC.chunk_tokens)
        layer.evict()
        layer.append(k[:, :, chunk], v[:, :, chunk])


def grown(member: Member, num_tokens: int, seed: int, num_layers: int = 4) -> Member:
    """After a pass, or after one that was cut off behind num_layers."""
    gen, cache, shape = torch.Generator().manual_seed(seed), member.cache, (member.num_seqs, num_tokens)
    x = {index: torch.randn(*shape, HIDDEN, generator=gen) for index in FULL}
    # Angles of one row for all sequences, as models without padding have them.
    beside = {
        kind: (torch.randn(1, num_tokens, 1, generator=gen), torch.randint(99, shape, generator=gen)) for kind in (0, 1)
    }
    cache.begin_step(member.num_seqs, num_tokens)
    for index in range(num_layers):
        kind = KINDS.get(index, 0)
        entered(cache, cache.layer(index), x.get(index, x[0]), beside[kind])
    if num_layers < SPEC.num_layers:
        return member
    cache.end_step()
    return Member(
        cache,
        {index: torch.cat([member.x[index], x[index]], 1) for index in FULL},
        {
            kind: (
                torch.cat([member.beside[kind][0], angle.expand(member.num_seqs, -1, -1)], 1),
                torch.cat([member.beside[kind][1], number], 1),
            )
            for kind, (angle, number) in beside.items()
        },
    )


def assert_kept(member: Member) -> None:
    """Every token up to the capacity, in every full layer, and no others."""
    cache = member.cache
    num_kept = min(member.seq_len, cache.num_kept_inputs)
    assert cache.layer(1).num_inputs == 0
    for index in FULL:
        layer = cache.layer(index)
        assert layer.num_inputs == num_kept
        if num_kept:
            assert layer.inputs is not None
            assert torch.equal(layer.inputs.x(index, 0, num_kept), member.x[index][:, :num_kept])
            begin = num_kept // 3
            expected = made_of(index, *member_slice(member, index, begin, num_kept))
            for found, wanted in zip(layer.rebuild(begin, num_kept), expected, strict=True):
                assert torch.equal(found, wanted)


def member_slice(member: Member, index: int, begin: int, end: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    some = member.only((slice(None), slice(begin, end)))
    return some.x[index], some.beside[KINDS[index]]


members = st.integers(0, MAX_MEMBERS - 1)


class InputsMachine(RuleBasedStateMachine):
    """A family: one cache at first, then forks of it; every rule picks a member."""

    @initialize(capacity=st.integers(1, 90), where=st.sampled_from(["near", "far"]), num_seqs=st.integers(1, MAX_SEQS))
    def build(self, capacity: int, where: Any, num_seqs: int) -> None:
        cache = KVCache(SPEC)
        cache.keep_inputs(capacity, where)
        cache.rebuild_with(made_of)
        self.seed = 0
        self.members = [started(cache, num_seqs)]

    @rule(who=members, num_tokens=st.integers(1, 60))
    def grow(self, who: int, num_tokens: int) -> None:
        self.seed += 1
        place = who % len(self.members)
        self.members[place] = grown(self.members[place], num_tokens, self.seed)

    @rule(who=members, num_tokens=st.integers(1, 60), num_layers=st.integers(0, 3), is_noticed=st.booleans())
    def pass_that_is_cut_off(self, who: int, num_tokens: int, num_layers: int, is_noticed: bool) -> None:
        self.seed += 1
        member = self.members[who % len(self.members)]
        grown(member, num_tokens, self.seed, num_layers)
        if is_noticed:
            member.cache.settle()

    @rule(who=members, part=st.floats(0.0, 1.0))
    def crop(self, who: int, part: float) -> None:
        place = who % len(self.members)
        member = self.members[place]
        seq_len = int(part * member.seq_len)
        try:
            member.cache.crop(seq_len)
        except CacheError:  # a window has moved on
            return
        self.members[place] = member.only((slice(None), slice(seq_len)))

    @precondition(lambda self: len(self.members) < MAX_MEMBERS)
    @rule(who=members)
    def fork(self, who: int) -> None:
        """Costs no memory."""
        member = self.members[who % len(self.members)]
        before = member.cache.use()
        self.members.append(replace(member, cache=member.cache.fork()))
        assert member.cache.use() == before

    @rule(who=members, seqs=st.lists(st.integers(0, MAX_SEQS - 1), min_size=1, max_size=MAX_SEQS))
    def select(self, who: int, seqs: list[int]) -> None:
        place = who % len(self.members)
        index = torch.tensor(seqs) % self.members[place].num_seqs
        self.members[place].cache.select(index)
        self.members[place] = self.members[place].only(index)

    @precondition(lambda self: len(self.members) > 1)
    @rule(who=members, how=st.sampled_from(["close", "collect", "reset"]))
    def lose_a_member(self, who: int, how: str) -> None:
        member = self.members.pop(who % len(self.members))
        if how != "collect":
            getattr(member.cache, how)()

    @precondition(lambda self: len(self.members) == 1)
    @rule(num_seqs=st.integers(1, MAX_SEQS))
    def reset(self, num_seqs: int) -> None:
        """What is to be kept is asked for once."""
        self.members[0].cache.reset()
        assert self.members[0].cache.use() == []
        self.members = [started(self.members[0].cache, num_seqs)]

    @invariant()
    def everything_is_kept(self) -> None:
        for member in getattr(self, "members", []):
            member.cache.check()
            assert_kept(member)


TestInputs = InputsMachine.TestCase
TestInputs.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def keeping(num_tokens: int = 64, where: Any = "near", num_seqs: int = 2) -> Member:
    cache = KVCache(SPEC)
    cache.keep_inputs(num_tokens, where)
    cache.rebuild_with(made_of)
    return started(cache, num_seqs)


def test_nothing_is_kept_unless_asked_for() -> None:
    member = grown(started(KVCache(SPEC), 2), 40, 0)
    layer = member.cache.layer(0)
    assert member.cache.inputs is layer.inputs is None
    assert layer.num_inputs == member.cache.num_kept_inputs == 0
    with pytest.raises(InputError, match=r"inputs of tokens \[0, 1\) of \[0, 0\)"):
        layer.rebuild(0, 1)


@pytest.mark.parametrize(
    ("num_tokens", "where", "message"),
    [
        (-1, "near", "a number of tokens, 0 or more, got -1"),
        (1.5, "near", "got 1.5"),
        (True, "near", "got True"),
        ("64", "near", "got '64'"),
        (64, "disk", "kept 'near' or 'far', got 'disk'"),
    ],
)
def test_what_cannot_be_asked_for(num_tokens: Any, where: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        KVCache(SPEC).keep_inputs(num_tokens, where)


def test_what_no_inputs_can_be_kept_of() -> None:
    with pytest.raises(InputError, match="spec has no hidden_size"):
        KVCache(replace(SPEC, hidden_size=None)).keep_inputs(1)
    with pytest.raises(InputError, match="spec has no layers without a window"):
        KVCache(replace(SPEC, windows=(8,) * 4)).keep_inputs(1)


def test_too_late() -> None:
    cache = grown(started(KVCache(SPEC), 1), 3, 0).cache
    with pytest.raises(InputError, match=r"from the first token on, this cache holds 3: reset\(\) it"):
        cache.keep_inputs(64)
    cache.reset()
    cache.keep_inputs(64)
    cache.close()
    with pytest.raises(CacheError, match="closed"):
        cache.keep_inputs(64)


def test_a_change_of_mind_before_the_first_token() -> None:
    member = keeping(64)
    member.cache.keep_inputs(10, "far")
    member = grown(member, 20, 0)
    assert_kept(member)
    member.cache.reset()
    member.cache.keep_inputs(0)
    assert grown(started(member.cache, 1), 20, 0).cache.inputs is None


def test_what_does_not_fit_is_refused_and_nothing_has_changed() -> None:
    member = grown(keeping(), 20, 0)
    inputs = member.cache.inputs
    assert inputs is not None
    x, beside = member_slice(member, 0, 0, 20)
    wrong: list[tuple[Tensor, tuple[Tensor, ...], str]] = [
        (x[:1], beside, r"must be \[2, 20, 5\] in torch.float32, got \[1, 20, 5\]"),
        (x[..., :4], beside, r"got \[2, 20, 4\]"),
        (x.double(), beside, "in torch.float64"),
        (x, beside[:1], "told something else about tokens"),
        (x, (beside[0], beside[1].float()), "told something else about tokens"),
    ]
    for bad_x, bad_beside, message in wrong:
        member.cache.begin_step(2, 20)
        with pytest.raises(InputError, match=message):
            inputs.extend(0, 20, bad_x, bad_beside)
        member.cache.settle()
        assert_kept(member)
    member.cache.begin_step(2, 20)
    inputs.extend(0, 20, x, beside)
    with pytest.raises(InputError, match="layers 0 and 3 were told the same"):
        inputs.extend(3, 20, x, (beside[0], beside[1] + 1))
    inputs.extend(3, 20, x, (beside[0].clone(), beside[1].clone()))
    member.cache.settle()
    assert_kept(member)


def without_inputs(cache: KVCache, num_tokens: int) -> None:
    cache.begin_step(2, num_tokens)
    for index in range(SPEC.num_layers):
        cache.layer(index).append(*random_kv(2, 1, num_tokens, 16, SPEC.dtype))
    cache.end_step()


def test_a_gap_ends_what_is_kept() -> None:
    """Tokens that came without their inputs."""
    member = grown(keeping(), 10, 0)
    without_inputs(member.cache, 5)
    after = grown(member, 5, 1)
    assert after.cache.layer(0).num_inputs == 10
    with pytest.raises(InputError, match=r"inputs of tokens \[4, 11\) of \[0, 10\)"):
        after.cache.layer(0).rebuild(4, 11)


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_inputs_do_not_outlive_their_tokens(is_cut_off: bool) -> None:
    """Others may take their place, which came without theirs."""
    member = grown(keeping(), 10, 0)
    if is_cut_off:
        grown(member, 7, 1, num_layers=3)
    else:
        member.cache.crop(4)
    held = member.cache.seq_len
    without_inputs(member.cache, 9)
    assert [member.cache.layer(index).num_inputs for index in FULL] == [held] * 3


def test_inputs_that_came_over_a_link() -> None:
    layer = grown(keeping(where="far"), 30, 0).cache.layer(0)
    assert layer.inputs is not None
    staged = layer.inputs.x(0, 3, 9).clone() * 2
    assert torch.equal(layer.rebuild(3, 9, staged)[0], layer.rebuild(3, 9)[0] * 2)
    with pytest.raises(InputError, match=r"inputs of tokens \[3, 9\) are \[2, 6, 5\], got \[2, 5, 5\]"):
        layer.rebuild(3, 9, staged[:, 1:])


def test_nobody_has_told_how_to_rebuild() -> None:
    member = keeping()
    member.cache.inputs.rebuild = None  # type: ignore[union-attr]
    with pytest.raises(CacheError, match="nobody has told"):
        grown(member, 4, 0).cache.layer(0).rebuild(0, 4)


# -- what it costs -----------------------------------------------------------------------------------------------------


def used(cache: KVCache) -> list[int]:
    return [tier.used_bytes for tier in cache.use()]


@pytest.mark.parametrize(("where", "tier"), [("near", 0), ("far", 1)])
def test_bytes_are_counted(where: str, tier: int) -> None:
    plain, kept = grown(started(KVCache(SPEC), 2), 20, 0), grown(keeping(64, where), 20, 0)
    more = [a - b for a, b in zip(used(kept.cache), used(plain.cache), strict=True)]
    beside_bytes = 2 * 2 * 64 * (4 + 8)  # two kinds
    expected = [beside_bytes, 0]
    expected[tier] += 3 * 2 * 64 * HIDDEN * 4
    assert more == expected
    capacities = [tier.capacity_bytes for tier in kept.cache.use()]
    assert all(has >= uses for has, uses in zip(capacities, used(kept.cache), strict=True))


@pytest.mark.parametrize("where", ["near", "far"])
@pytest.mark.parametrize("door", ["reserve", "begin_step", "fork"])
def test_a_machine_that_is_too_small(monkeypatch: pytest.MonkeyPatch, where: str, door: str) -> None:
    """It says what inputs are made of; a cache that holds some is not harmed."""
    num_bytes = 3 * 2 * 10**6 * HIDDEN * 4 + 2 * 10**6 * (2 * 16 * 4 + 8)
    spec = replace(SPEC, far_bytes=1 << 16)
    cache = KVCache(spec)
    cache.keep_inputs(10**6, where)  # type: ignore[arg-type]
    acts: dict[str, Callable[[], Any]] = {
        "reserve": lambda: cache.reserve(2, 16),
        "begin_step": lambda: cache.begin_step(2, 16),
    }
    if door == "fork":
        member = grown(started(cache, 2), 16, 0)
        twin = replace(member, cache=cache.fork())
        acts["fork"] = lambda: grown(twin, 1, 1)
    monkeypatch.setattr(machine, "available_bytes", lambda: Available(num_bytes - 1, "cgroup limit"))
    with pytest.raises(
        CapacityError,
        match=r"needed on cpu, .* available \(cgroup limit\): inputs of 2 x 1000000 tokens x 3 layers x 5 x 4 bytes "
        r"are 114\.44 MiB, their positions 259\.40 MiB; keep_inputs of fewer tokens",
    ):
        acts[door]()
    if door == "fork":
        twin.cache.settle()
        cache.rebuild_with(made_of)
        twin.cache.rebuild_with(made_of)
        for each in (member, twin):
            each.cache.check()
            assert_kept(each)
    else:
        monkeypatch.undo()
        acts[door]()


def buffers_of(cache: KVCache) -> "list[weakref.ref[Tensor]]":
    assert cache.inputs is not None
    return [weakref.ref(x) for tier in ("near", "far") for x in cache.inputs.buffers(tier)]


@pytest.mark.parametrize("end", ["close", "reset", "del"])
def test_memory_comes_back(end: str) -> None:
    cache = grown(keeping(), 20, 0).cache
    buffers = buffers_of(cache)
    assert len(buffers) == 5
    if end == "del":
        del cache
    else:
        getattr(cache, end)()
    assert all(each() is None for each in buffers)


def test_a_fork_that_writes_has_its_own_and_gives_it_back() -> None:
    member = grown(keeping(), 20, 0)
    before, buffers = used(member.cache), buffers_of(member.cache)
    twin = grown(replace(member, cache=member.cache.fork()), 1, 1)
    assert used(member.cache)[0] > before[0] + 3 * 2 * 64 * HIDDEN * 4
    others = buffers_of(twin.cache)
    assert not set(others) & set(buffers)
    assert_kept(member)
    assert_kept(twin)
    del twin
    assert all(each() is None for each in others)
    assert used(member.cache) == before
    member = grown(member, 1, 2)  # alone again: nothing is copied
    assert buffers_of(member.cache) == buffers


def test_a_fork_at_capacity_copies_nothing() -> None:
    member = grown(keeping(16), 20, 0)
    twin = grown(replace(member, cache=member.cache.fork()), 9, 1)
    assert buffers_of(twin.cache) == buffers_of(member.cache)
    assert_kept(twin)


def test_sequences_that_are_left_give_the_others_memory_back() -> None:
    """Beams share what they come from; half of the rows gone, the rest is copied."""
    member = grown(keeping(num_seqs=4), 20, 0)
    before, buffers = used(member.cache), buffers_of(member.cache)
    for seqs, is_copied in (([3, 0, 1, 3], False), ([0, 0, 3, 3], True)):
        member.cache.select(torch.tensor(seqs))
        member = member.only(torch.tensor(seqs))
        assert_kept(member)
        assert (buffers_of(member.cache) != buffers) == is_copied
    assert all(each() is None for each in buffers)
    assert used(member.cache)[0] < before[0]


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def changes() -> dict[str, Callable[[Member], Any]]:
    return {
        "pass": lambda member: grown(member, 40, 1),
        "crop": lambda member: member.cache.crop(30),
        "fork": lambda member: member.cache.fork(),
        "select": lambda member: member.cache.select(torch.tensor([1, 1])),
        "few": lambda member: member.cache.select(torch.tensor([1])),
    }


@pytest.mark.parametrize("name", changes())
def test_cut_off_at_every_line(name: str) -> None:
    """On a fork, whose parent must not notice; it has happened, or not, and then it is done again."""
    parent = grown(keeping(64), 50, 0)
    before = used(parent.cache)

    def forked() -> Member:
        return replace(parent, cache=parent.cache.fork())

    act = changes()[name]
    moments = every_line(forked, act, "first and last")
    assert len(moments) > 20
    for moment in moments[::3]:
        member = forked()
        with interrupted(moment), pytest.raises(KeyboardInterrupt):
            act(member)
        cache = member.cache
        cache.check()
        parent.cache.check()
        assert_kept(parent)
        if cache.moment.num_selections:
            member = member.only(torch.tensor([1, 1] if name == "select" else [1]))
        if cache.seq_len == 50:
            member = grown(member, 9, 2)
            assert_kept(member)
        else:
            assert all(cache.layer(index).num_inputs == min(cache.seq_len, 64) for index in FULL)
        cache.close()
        assert used(parent.cache) == before
