"""The whole cache of a model: a layer's tables over two pools, and what happens to them all at once.

A forward pass is a step: `begin_step`, then every layer grows, then `end_step`. One that fails is undone, and one that
an interrupt cut off is undone before the next thing happens to the cache or to one of its forks. Every change becomes
true in one assignment, and an interrupt falls before it or after it: `_step` for a step, `_layers` for a selection.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandemkv import machine
from tandemkv.cache.inputs import InputsSpec, KeptInputs, Rebuild, Tier
from tandemkv.cache.knowledge import Knowledge
from tandemkv.cache.layer import LayerKV
from tandemkv.cache.pool import PagePool
from tandemkv.cache.spec import CacheSpec
from tandemkv.cache.store import PageStore
from tandemkv.errors import CacheError, CapacityError, InputError, UnsupportedError
from tandemkv.lanes import Crew, DeviceFlags
from tandemkv.select import Sparse, Tally
from tandemkv.types import Arena, Arenas, format_bytes, is_number

if TYPE_CHECKING:
    from tandemkv.kernels.cpu import WorkerPool


@dataclass(frozen=True)
class TierUse:
    """Counters of one tier, pages and kept inputs. moved_bytes: what was ever moved into it from the tier above."""

    name: str
    device: str
    used_bytes: int
    capacity_bytes: int
    moved_bytes: int


class Moment(NamedTuple):
    """A point in the life of a cache."""

    num_selections: int
    seq_len: int


class _Step(NamedTuple):
    """A forward pass under way. windows: copies of the layers whose past it may leave behind, to undo it with, and
    knowledge: what was known of the blocks of each."""

    begin: int
    end: int
    windows: dict[int, LayerKV]
    knowledge: list[Knowledge]


class KVCache:
    """Keys and values of every layer: recent tokens near, older ones far.

    Nothing is allocated before the first `reserve` or step. It serves one batch of sequences that grow together. Forks
    share its pages, and its far_bytes; a cache and its forks are for one thread at a time.
    """

    def __init__(self, spec: CacheSpec, workers: "WorkerPool | None" = None) -> None:
        """Refuses far_bytes beyond what this machine or its cgroup has at all. `workers` move pages."""
        whole = machine.memory().whole
        if spec.far_bytes > whole.num_bytes:
            raise CapacityError(
                f"far_bytes asks for {format_bytes(spec.far_bytes)}, but the {whole.limit} is "
                f"{format_bytes(whole.num_bytes)}; lower far_bytes"
            )
        self.spec = spec
        self._workers = workers
        self._layers: list[LayerKV] = []
        self._store: PageStore | None = None
        self._step: _Step | None = None
        self._num_selections = 0
        self._sparse: Sparse | None = None
        self._crew: Crew | None = None
        self._l2_share = 0.0
        self._asked = InputsSpec()
        self._rebuild: Rebuild | None = None
        self._is_closed = False

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch; 0 before the first use."""
        return self._layers[0].num_seqs if self._layers else 0

    @property
    def seq_len(self) -> int:
        """Tokens that every layer holds; those of a step count when it has ended."""
        if self._step is not None:
            return self._step.begin
        return min((layer.seq_len for layer in self._layers), default=0)

    @property
    def step_end(self) -> int:
        """Tokens that every layer holds when the step under way has ended."""
        return self.seq_len if self._step is None else self._step.end

    @property
    def moment(self) -> Moment:
        """What tells whether a step, a crop or a selection has happened."""
        return Moment(self._num_selections, self.seq_len)

    @property
    def sparse(self) -> Sparse | None:
        """What picks the far tokens that take part in a step, from the next one on; None: every token does.

        Prompts (more than MAX_SELECT_QUERIES tokens at once) attend to everything. A fork takes it along.
        """
        return self._sparse

    @sparse.setter
    def sparse(self, sparse: Sparse | None) -> None:
        if sparse is not None:
            if not isinstance(sparse, Sparse):
                raise InputError(f"sparse is a Sparse(selector, budget_tokens) or None, got {type(sparse).__name__}")
            sparse.check(self.spec.near_tokens)
            self._refuse_on_device(sparse)
            self._require_code_memory(sparse)
        self.settle()
        for layer in self._layers:  # what takes long, and may fail, comes before any layer has the mode
            layer.make_codes(sparse)
        self._sparse = sparse
        for layer in self._layers:
            layer.sparse = sparse
        if self._store is not None:
            modes = [member._sparse for member in self._family()]
            self._store.keep_codes({mode.summariser for mode in modes if mode is not None})

    @property
    def crew(self) -> Crew | None:
        """Who works on steps, each on what its scheduler gives it, from the next one on; None: the near device on near
        tokens, the processors of host memory on far ones. A fork takes it along."""
        return self._crew

    @crew.setter
    def crew(self, crew: Crew | None) -> None:
        if not isinstance(crew, Crew | None):
            raise InputError(f"crew is a Crew(rig, scheduler) or None, got {type(crew).__name__}")
        if crew is not None and self.spec.device.type != "cpu":
            raise UnsupportedError(
                f"a rig's device is a processor of this machine, the near tier is {self.spec.device}"
            )
        self.settle()
        self._crew = crew
        for layer in self._layers:
            layer.crew = crew

    @property
    def l2_share(self) -> float:
        """Of a CUDA device's L2, how much near pages of the next layer may take while a layer's MLP computes, from the
        next step on; 0, which is the default: none are asked for before their turn. A fork takes it along."""
        return self._l2_share

    @l2_share.setter
    def l2_share(self, share: float) -> None:
        if not is_number(share) or not 0 <= share <= 1:
            raise InputError(f"l2_share is a part of a device's L2, 0 to 1, got {share!r}")
        self._l2_share = share
        for layer in self._layers:
            layer.l2_share = share

    @property
    def tallies(self) -> list[Tally]:
        """Of every layer of `full_layers` what came of a promise about the error; none where none was given."""
        if self._sparse is None or self._sparse.verified is None:
            return []
        return [self._layers[index].knowledge.tally for index in self.full_layers]

    @property
    def full_layers(self) -> list[int]:
        """Layers with far tokens: those without a window."""
        return [layer.index for layer in self._layers if layer.window is None]

    def keep_inputs(self, num_tokens: int, where: Tier = "near") -> None:
        """Keep what enters every layer without a window with the first num_tokens of each sequence, so that their keys
        and values can be made again (KVPR): near, or in host memory, beside far_bytes. 0 keeps nothing.

        Memory for num_tokens is taken with the first tokens. InputError once tokens are held, for a number that cannot
        be, and where no layer could keep any.
        """
        asked = InputsSpec(num_tokens, where)
        self._refuse_if_closed()
        self.settle()
        if any(layer.seq_len for layer in self._layers):
            raise InputError(f"inputs are kept from the first token on, this cache holds {self.seq_len}: reset() it")
        if num_tokens and (self.spec.hidden_size is None or not self.spec.num_full_layers):
            lacks = "hidden_size" if self.spec.hidden_size is None else "layers without a window"
            raise InputError(f"no inputs can be kept: this cache's spec has no {lacks}")
        self._asked = asked
        self._keep_in(self._layers)

    @property
    def num_kept_inputs(self) -> int:
        """Of the first tokens of each sequence, those whose inputs are to be kept."""
        return self._asked.num_tokens

    @property
    def inputs(self) -> KeptInputs | None:
        """What is kept of them; its layers are those without a window."""
        if not self._asked.num_tokens:
            return None
        return next((layer.inputs for layer in self._layers if layer.inputs is not None), None)

    def rebuild_with(self, rebuild: Rebuild) -> None:
        """Make keys and values of inputs so."""
        self._rebuild = rebuild
        if self.inputs is not None:
            self.inputs.rebuild = rebuild

    def _keep_in(self, layers: list[LayerKV]) -> None:
        """Layers that are new, or hold nothing, keep what is asked for."""
        inputs = KeptInputs(self.spec, self._asked, layers[0].num_seqs) if layers and self._asked.num_tokens else None
        _share(layers, inputs)
        if inputs is not None:
            inputs.rebuild = self._rebuild

    def _refuse_on_device(self, sparse: Sparse) -> None:
        """UnsupportedError for what needs the near tokens' attention in host memory."""
        device = self.spec.device
        joins = getattr(sparse.policy, "joins_logits", False)
        if device.type != "cpu" and (sparse.observer is not None or sparse.estimates or joins):
            why = "lives from what near tokens are attended with"
            if sparse.estimates or joins:
                why = "estimates what is left out" if sparse.estimates else "joins logits of far and near tokens"
            raise UnsupportedError(
                f"{sparse.selector!r} {why}, which works with a CPU as the near device, got {device}: use bounds, "
                "columns or window, without verified"
            )

    # -- before work starts --------------------------------------------------------------------------------------------

    def adapt(self, spec: CacheSpec) -> None:
        """Take the shape, dtype and device that the model turned out to have; InputError once tokens are held."""
        if spec == self.spec:
            return
        if any(layer.seq_len for layer in self._layers):
            raise InputError(f"this cache holds {self.spec.content}, got {spec.content}: use a new cache")
        self.reset()
        self.spec = spec
        if self._sparse is not None:
            self._refuse_on_device(self._sparse)

    def reserve(self, num_seqs: int, num_tokens: int) -> None:
        """Make sure that num_seqs sequences can grow to num_tokens each, before any work starts.

        Raises CapacityError with the arithmetic where far_bytes is too small or the machine has less memory left; a
        cache that is in use goes on unharmed.
        """
        self._refuse_if_closed()
        self.settle()
        spec = self.spec
        are_whole = isinstance(num_seqs, int) and isinstance(num_tokens, int)
        if not are_whole or num_seqs < 1 or num_tokens < 0:
            raise InputError(
                "reserve expects whole numbers, at least one sequence and no negative length, got "
                f"{num_seqs!r}, {num_tokens!r}"
            )
        self._take_batch(num_seqs)
        far_pages = spec.num_far_pages(num_seqs, num_tokens)
        far_bytes = spec.far_bytes_of(far_pages)
        if far_bytes > spec.far_bytes:
            far_tokens = max(0, num_tokens - spec.near_tokens)
            raise CapacityError(
                f"{num_seqs} x {num_tokens} tokens leave {num_seqs} x {far_tokens} far: {spec.num_full_layers} layers "
                f"x {far_bytes / (sum(far_pages) * spec.page_size):.5g} bytes a token need "
                f"{format_bytes(far_bytes)}, far_bytes is {format_bytes(spec.far_bytes)}; raise far_bytes or "
                f"near_tokens, {'' if spec.far_formats else 'give far_dtype, '}or shorten the prompt"
            )
        self._require_far(far_pages)
        self._require_memory(num_seqs, far_pages)
        if not self._layers:
            self._allocate(num_seqs)

    def _num_new_far(self, num_pages: tuple[int, ...]) -> tuple[int, ...]:
        """What this cache lacks of so many far pages of each part.

        Of pages that become narrower, those that a fork refers to, too, stay as they are beside the new ones.
        """
        spec, held = self.spec, [0] * len(num_pages)
        will_be_far = sum(num_pages) // max(1, self.num_seqs * spec.num_full_layers)
        for num_far, num_layers in Counter(layer.num_far_pages for layer in self._layers).items():
            spans = spec.far_spans(num_far), spec.far_spans(max(num_far, will_be_far))
            for (part, begin, end), (_, stays_from, _) in zip(*spans, strict=True):
                held[part] += self.num_seqs * num_layers * (end - begin)
                leaves_until = min(end, stays_from)
                if leaves_until > begin and len(spec.far_formats) > 1:
                    held[part] -= self._num_shared(num_far, begin, leaves_until)
        return tuple(max(0, num - has) for num, has in zip(num_pages, held, strict=True))

    def _num_shared(self, num_far: int, begin: int, end: int) -> int:
        """Of these pages of layers with so many far ones, those that somebody else refers to, too."""
        layers = (layer for layer in self._layers if layer.num_far_pages == num_far)
        return sum(layer.num_shared_far(begin, end) for layer in layers)

    def _require_far(self, num_pages: tuple[int, ...]) -> None:
        """The far pool, which forks share, must have what this cache lacks of so many pages."""
        if self._store is not None:
            self._store.require_far(self._num_new_far(num_pages))

    def _code_bytes(self, sparse: Sparse | None) -> int:
        """What a selector's codes of a far page take."""
        summariser = None if sparse is None else sparse.summariser
        if summariser is None:
            return 0
        one = Arena.allocate(self.spec.far_layouts[0], 1, self.spec.num_kv_heads, self.spec.head_dim)
        return summariser.allocate(one).num_bytes

    def _require_code_memory(self, sparse: Sparse) -> None:
        """CapacityError where the codes of the pages that are far already would not fit."""
        num_pages = self.num_seqs * sum(layer.num_far_pages for layer in self._layers)
        needed, available = num_pages * self._code_bytes(sparse), machine.available_bytes()
        if needed > available.num_bytes:
            raise CapacityError(
                f"{format_bytes(needed)} of host memory needed for codes of {num_pages} far pages, "
                f"{format_bytes(available.num_bytes)} available ({available.limit}); take a selector without codes, "
                "such as 'window', or free memory"
            )

    def _require_memory(self, num_seqs: int, far_pages: tuple[int, ...]) -> None:
        """The host memory that growth to so many far pages will touch for the first time must be there."""
        spec, store = self.spec, self._store
        if store is None:
            far, near = spec.far_bytes_of(far_pages), spec.num_near_slots(num_seqs) * spec.near_page_bytes
            num_new = far_pages
        else:  # forks may fill the near pool too
            num_new = self._num_new_far(far_pages)
            far, near = store.far.untouched_bytes(num_new), store.near.untouched_bytes()
        host_bytes = far + sum(num_new) * self._code_bytes(self._sparse)
        new_bytes = host_bytes + (near if spec.device.type == "cpu" else 0)
        available = machine.available_bytes()
        if new_bytes > available.num_bytes:
            raise CapacityError(
                f"{format_bytes(new_bytes)} of host memory needed, {format_bytes(available.num_bytes)} available "
                f"({available.limit}); lower far_bytes, near_tokens or the batch, or free memory"
            )
        if self._asked.num_tokens and (self.inputs is None or not self.inputs.is_allocated):
            pages = Counter({torch.device("cpu"): host_bytes})
            pages[spec.device] += near
            self._asked.require(spec, num_seqs, pages)

    # -- a forward pass ------------------------------------------------------------------------------------------------

    def layer(self, index: int) -> LayerKV:
        """The pages of one layer; they exist from the first `reserve` or `begin_step` on."""
        self._refuse_if_closed()
        if not self._layers:
            raise CacheError("this cache has no pages yet: reserve() or begin_step() comes first")
        return self._layers[index]

    def begin_step(self, num_seqs: int, num_tokens: int) -> None:
        """Before a forward pass: refuse, while nothing has moved, what one of the layers could not take.

        `num_tokens` more will be appended to every layer in chunks of at most chunk_tokens. Raises CapacityError where
        the far tier cannot take what they push out, InputError for another batch size, and for NaN that a device found
        in a query of a step before, until the cache is cropped to what it held then: nobody waited for it.
        """
        self._refuse_if_closed()
        self.settle()
        if self._layers:
            self._layers[0].flags.look()
        self._take_batch(num_seqs)
        if self._store is None:
            self.reserve(num_seqs, num_tokens)
        begin, chunk_tokens = self.seq_len, self.spec.chunk_tokens
        needed = self.spec.num_far_pages(self.num_seqs, begin + (num_tokens - 1) // chunk_tokens * chunk_tokens)
        self._require_far(needed)
        if num_tokens >= self.spec.page_size:  # a prompt; asking Linux takes 100 us, too long for every token
            self._require_memory(num_seqs, needed)
        self._the_store.is_busy = True
        past = {}
        for index, layer in enumerate(self._layers) if num_tokens > chunk_tokens else ():  # one chunk can be cropped
            if layer.window is not None:
                layer.evict()  # what the window has left behind already need not be kept twice
                past[index] = layer.fork()
        self._step = _Step(begin, begin + num_tokens, past, [layer.knowledge for layer in self._layers])

    def refuse_out_of_turn(self, index: int) -> None:
        """CacheError where layer `index` is not the next one to grow."""
        step, layers = self._step, self._layers
        is_next = step is not None and layers[index - 1].seq_len == step.end and layers[index].seq_len == step.begin
        if not is_next:
            raise CacheError(
                f"layer {index} is not the next to grow: the forward pass has left out a layer, or another thread has "
                "used this cache or a fork of it meanwhile; these belong to one thread at a time"
            )

    def end_step(self) -> None:
        """From here on the new tokens count. CacheError, and they do not, where a layer has not grown."""
        step = self._step
        if step is None:
            raise CacheError(
                "a forward pass ends that this cache knows nothing of: either no layer of the model attended over it "
                "(call attach(model) again; no gradient checkpointing), or it was undone on its way by another use of "
                "this cache or a fork of it; these belong to one thread at a time"
            )
        if any(layer.seq_len != step.end for layer in self._layers):
            self.settle()
            raise CacheError("a forward pass has left out some of this cache's layers: it is undone")
        self._layers[0].flags.send(step.begin)
        self._step = None
        if self.inputs is not None:
            self.inputs.end_pass()
        for past in step.windows.values():
            past.release()
        self._the_store.is_busy = False

    # -- all layers at once --------------------------------------------------------------------------------------------

    def crop(self, seq_len: int) -> None:
        """Forget every token from `seq_len` on, in every layer; CacheError, and none, where a window has moved on."""
        if not isinstance(seq_len, int) or isinstance(seq_len, bool):
            raise InputError(f"crop takes a whole number of tokens, got {seq_len!r}")
        with self._changing():
            for layer in sorted(self._layers, key=lambda layer: layer.can_crop(min(seq_len, layer.seq_len))):
                layer.crop(min(seq_len, layer.seq_len))  # one that cannot comes first, and raises
            for layer in self._layers[:1]:
                layer.flags.forget(seq_len)

    def select(self, seqs: Tensor) -> None:
        """Become the sequences `seqs`, int64 `[num_seqs]` on the CPU, of this batch: beams, copies, or fewer."""
        if not self._layers or torch.equal(seqs, torch.arange(self.num_seqs)):
            return
        with self._changing():
            new, inputs = self._forks(seqs), self.inputs
            old, self._layers, self._num_selections = self._layers, new, self._num_selections + 1
            for layer in old:
                layer.release()
            if inputs is not None:
                inputs.release()
            self._limit_near()

    def fork(self) -> "KVCache":
        """The same tokens in a cache that grows on its own. Pages are shared until one of the two writes to them."""
        self._refuse_if_closed()
        if self._layers:
            self._layers[0].flags.wait()
        twin = KVCache(self.spec, self._workers)
        twin._sparse, twin._crew, twin._l2_share = self._sparse, self._crew, self._l2_share
        twin._asked, twin._rebuild = self._asked, self._rebuild
        if self._store is not None:
            with self._changing():
                twin._join(self._store, self._forks())
        return twin

    def _forks(self, seqs: Tensor | None = None) -> list[LayerKV]:
        layers = [layer.fork(seqs) for layer in self._layers]
        if self.inputs is not None:
            _share(layers, self.inputs.fork(seqs))
        return layers

    def __deepcopy__(self, memo: dict[int, object]) -> "KVCache":
        return self.fork()

    def reset(self) -> None:
        """Forget everything; the next use may have another batch size."""
        store = self._store
        if store is not None:
            store.is_busy = True  # until its forks have recounted the books
        self._store, self._layers, self._step = None, [], None
        if store is not None:
            store.leave(self)

    def close(self) -> None:
        """Give every byte back; the cache cannot be used again."""
        self.reset()
        self._is_closed = True

    # -- counting ------------------------------------------------------------------------------------------------------

    def use(self) -> list[TierUse]:
        """Counters of each tier, near first; of a cache and its forks together."""
        if self._store is None:
            return []
        if self._store.has_lost_members:
            self._recount()
        near, far = self._store.near, self._store.far
        found = []
        tiers: tuple[tuple[Tier, PagePool, int], ...] = (("near", near, 0), ("far", far, far.moved_bytes))
        for tier, pool, moved_bytes in tiers:
            inputs = self._input_bytes(tier)
            used_bytes, capacity_bytes = pool.used_bytes + inputs, pool.held_bytes + inputs
            found.append(TierUse(pool.name, str(pool.arena.k.device), used_bytes, capacity_bytes, moved_bytes))
        return found

    def _input_bytes(self, tier: Tier) -> int:
        """Of the inputs of a cache and its forks."""
        kept = [member.inputs for member in self._family() if member.inputs is not None]
        return sum({id(x): x.nbytes for inputs in kept for x in inputs.buffers(tier)}.values())

    def check(self) -> None:
        """Undo what was cut off, then recount: every slot has its references, and every layer has the same length."""
        self.settle()
        if self._store is None:
            assert not self._layers
            return
        self._store.check(*_used(self._family()))
        lengths = {layer.seq_len for layer in self._layers}
        assert len(lengths) == 1, f"layers hold different numbers of tokens: {sorted(lengths)}"

    # -- keeping the books ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Undo every step that was not ended, of this cache and its forks, and recount."""
        store = self._store
        if store is None or not (store.is_busy or store.has_lost_members):
            return
        self._recount()  # to undo may take a page
        for member in self._family():
            member._undo_open_step()
        self._recount()
        self._limit_near()
        store.is_busy = False

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Where this is cut off, the books are recounted before the next thing happens."""
        self.settle()
        store = self._store
        if store is not None:
            store.is_busy = True
        yield
        if store is not None:
            store.is_busy = False

    def _family(self) -> "list[KVCache]":
        """Those whose tables the store's books are counted from; one may have been cut off while it came or went."""
        members = (member for member in self._the_store.members if isinstance(member, KVCache))
        return [member for member in members if member._store is self._store]

    def _recount(self) -> None:
        store, family = self._the_store, self._family()  # held: none is lost between the count and the note of it
        for stray in set(store.members).difference(family):  # its reset was cut off
            store.leave(stray)
        store.recount(len(family), *_used(family))

    def _undo_open_step(self) -> None:
        step, seq_len = self._step, self.seq_len
        if self.inputs is not None:
            self.inputs.end_pass()
        for layer in self._layers[:1]:
            layer.flags.forget(seq_len)
        for index, layer in enumerate(self._layers):
            layer.let_go()
            past = step.windows.get(index) if step is not None else None
            if past is not None and layer.seq_len != seq_len:
                layer.replace_with(past)
            layer.crop(min(seq_len, layer.seq_len))
            if step is not None:
                layer.knowledge = step.knowledge[index]
        self._step = None

    @property
    def _the_store(self) -> PageStore:
        assert self._store is not None
        return self._store

    @torch.inference_mode(False)  # tensors made inside inference mode could not be written outside it
    def _allocate(self, num_seqs: int) -> None:
        spec = self.spec
        heads, widths = spec.num_kv_heads, (spec.head_dim, spec.v_width)
        near = Arena.allocate(
            spec.near_layout, spec.num_near_slots(num_seqs), heads, widths[0], spec.device, v_head_dim=widths[1]
        )
        parts = [
            Arena.allocate(layout, num_slots, heads, widths[0], v_head_dim=widths[1])
            for layout, num_slots in zip(spec.far_layouts, spec.num_far_slots, strict=True)
        ]
        far = Arenas(tuple(parts)) if len(parts) > 1 else parts[0]
        store = PageStore(
            PagePool(near, "near", "this is a fault of tandemkv, please report it"),
            PagePool(far, "far", "raise far_bytes or near_tokens, or shorten the prompt", spec.far_bytes),
            self._workers,
        )
        layers = [LayerKV(store, num_seqs, spec, index) for index in range(spec.num_layers)]
        for layer in layers:
            layer.sparse, layer.crew, layer.l2_share = self._sparse, self._crew, self._l2_share
        self._keep_in(layers)
        self._join(store, layers)

    def _join(self, store: PageStore, layers: list[LayerKV]) -> None:
        """Become one of those whose tables the store's books are counted from."""
        store.join(self)
        flags = DeviceFlags()
        for layer in layers:
            layer.flags = flags
        self._store, self._layers = store, layers
        self._limit_near()

    def _limit_near(self) -> None:
        """The near pool may grow to what all members can need."""
        needs = [member.spec.num_near_slots(member.num_seqs) for member in self._family()]
        self._the_store.near.limit(sum(needs))

    def _take_batch(self, num_seqs: int) -> None:
        """InputError where another batch is held; one without tokens makes way."""
        if self._layers and self.num_seqs != num_seqs:
            if self.seq_len:
                raise InputError(
                    f"this cache holds {self.num_seqs} sequences, asked for {num_seqs}: use a new cache or reset()"
                )
            self.reset()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise CacheError("this cache was closed; make a new one")


def _share(layers: list[LayerKV], inputs: KeptInputs | None) -> None:
    """One object for all that keep theirs."""
    for layer in layers:
        if layer.window is None:
            layer.inputs = inputs


def _used(family: list[KVCache]) -> tuple[Tensor, Tensor]:
    """Near and far slots of these caches, once for every table that has them."""
    layers = [layer for member in family for layer in member._layers]
    layers += [past for member in family if member._step is not None for past in member._step.windows.values()]
    used = [layer.used_slots() for layer in layers]
    return torch.cat([near for near, _ in used]), torch.cat([far for _, far in used])
