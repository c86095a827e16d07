"""Selectors that foresee: the next layer's query, from what enters this one."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import tandemkv.integrations.transformers as tandem
from tandemkv.errors import UnsupportedError
from tandemkv.integrations.transformers.cache import TieredLayer
from tandemkv.integrations.transformers.configs import kv_shape
from tandemkv.integrations.transformers.foresight import Foresight, layers_in
from tandemkv.select import MAX_SELECT_QUERIES, Sparse, Summaries
from tests import models
from tests.integrations.agreement import attached, generate, logits_of, tiered

NUM_LAYERS, PROMPT, BUDGET = 4, 120, 80
EVERYTHING = 4096


class Witness:
    """Scores nothing; remembers what it was asked, and what was foreseen."""

    foresees: ClassVar[bool] = True

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.foreseen: list[Tensor | None] = []

    def score(self, q: Tensor, summaries: Summaries) -> Tensor:
        self.asked.append(q)
        self.foreseen.append(summaries.foreseen)
        return torch.zeros(q.shape[0], summaries.num_kv_heads, summaries.num_blocks)


def deeper(family: str, layer_types: list[str] | None = None) -> Any:
    """A model of twice as many layers as the others have, whose kinds of layers come twice, too, unless they are
    given."""
    changes = dict(models.FAMILIES[family].changes)
    changes = {name: value * 2 for name, value in changes.items() if isinstance(value, list)}
    if layer_types is not None:
        changes["layer_types"] = layer_types
    if family == "bamba":
        changes["attn_layer_indices"] = [1, 3]
    return models.build(family, **{**changes, "num_hidden_layers": NUM_LAYERS})


def filled(model: Any, sparse: Sparse | None, lengths: tuple[int, ...] = (PROMPT,)) -> tuple[Any, Tensor, Tensor]:
    """A cache that holds a prompt, ids of it and more, and their mask."""
    ids, mask = models.left_padded([length + 40 for length in lengths])
    cache = tiered(model)
    cache.kv.sparse = sparse
    with torch.no_grad():
        model(ids[:, :-40], attention_mask=mask[:, :-40], past_key_values=cache)
    return cache, ids, mask


def step(model: Any, cache: Any, ids: Tensor, mask: Tensor, num_tokens: int = 3) -> Tensor:
    """Logits of the next tokens."""
    begin = cache.get_seq_length()
    end = begin + num_tokens
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
    with torch.no_grad():
        new = ids[:, begin:end]
        out = model(new, attention_mask=mask[:, :end], position_ids=places, past_key_values=cache)
    logits: Tensor = out.logits
    return logits


def full_places(cache: Any) -> list[int]:
    """Layers whose far tokens are selected."""
    ours = (i for i, layer in enumerate(cache.layers) if isinstance(layer, TieredLayer))
    return [i for i in ours if cache.layers[i].window is None]


def passing_through(layer: torch.nn.Module) -> Any:
    """Let a layer put out what it takes in."""

    def hook(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return layer.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.filterwarnings("ignore")  # of stock, about configs
@pytest.mark.parametrize(
    ("family", "layer_types"),
    [
        *((family, None) for family in models.FAMILIES),
        ("gemma3_text", ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]),
        ("gemma3_text", ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]),
        ("qwen3_next", ["linear_attention", "linear_attention", "full_attention", "full_attention"]),
        ("qwen3_next", ["linear_attention", "linear_attention", "linear_attention", "full_attention"]),
    ],
)
def test_a_layer_is_foreseen_as_if_the_one_before_added_nothing(family: str, layer_types: list[str] | None) -> None:
    """The oracle is the real query where the layer before is made to add nothing. Padding gives each sequence other
    positions; windows, soft caps, layers that stay stock and RoPE of several kinds come with the families."""
    model = attached(deeper(family, layer_types))
    witness = Witness()
    cache, ids, mask = filled(model, Sparse(witness, BUDGET), (PROMPT, 100))
    places, layers = full_places(cache), layers_in(model.get_decoder())
    assert layers is not None
    fork = copy.deepcopy(cache)
    step(model, fork, ids, mask)
    foreseen = dict(zip(places, witness.foreseen, strict=True))
    assert {place for place, q in foreseen.items() if q is None} == {place for place in places if place < 2}
    for place in (place for place in places if place >= 2):
        witness.asked.clear()
        hook = passing_through(layers[place - 1])
        step(model, copy.deepcopy(cache), ids, mask)
        hook.remove()
        expected, found = witness.asked[places.index(place)], foreseen[place]
        assert found is not None
        assert torch.equal(found, expected)


def rms_norm(x: Tensor, norm: Any, eps: float, offset: float = 0.0) -> Tensor:
    scale: Tensor = offset + norm.weight.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale


def rotated(q: Tensor, first: int, theta: float) -> Tensor:
    """RoPE of `[num_seqs, num_heads, q_len, head_dim]` at positions from `first` on."""
    half = q.shape[-1] // 2
    angle = torch.arange(first, first + q.shape[2])[:, None] * theta ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    a, b = q[..., :half], q[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def query_by_hand(family: str, config: Any, layer: Any, x: Tensor, first: int) -> Tensor:
    """Norm, projection, norm of queries, RoPE, in float64; the caller wants no gradient."""
    _, head_dim = kv_shape(config)
    x = rms_norm(x.double(), layer.input_layernorm, config.rms_norm_eps, offset=1.0 if family == "gemma2" else 0.0)
    weight = layer.self_attn.qkv_proj.weight if family == "phi3" else layer.self_attn.q_proj.weight
    q = x @ weight[: config.num_attention_heads * head_dim].double().T
    if family == "qwen2":
        q = q + layer.self_attn.q_proj.bias.double()
    q = q.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    if family == "qwen3":
        q = rms_norm(q, layer.self_attn.q_norm, config.rms_norm_eps)
    return rotated(q, first, config.rope_parameters["rope_theta"])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("num_tokens", [1, MAX_SELECT_QUERIES])
def test_a_foreseen_query_is_the_one_by_hand(family: str, num_tokens: int) -> None:
    witness, entered = Witness(), {}
    model = attached(deeper(family))
    cache, ids, mask = filled(model, Sparse(witness, BUDGET))
    layers = model.get_decoder().layers

    def note(layer: Any, args: Any, kwargs: Any) -> None:
        entered[layer] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone()

    for layer in layers:
        if family == "qwen2":
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        layer.register_forward_pre_hook(note, with_kwargs=True)
    step(model, cache, ids, mask, num_tokens)
    foreseen = dict(zip(full_places(cache), witness.foreseen, strict=True))
    checked = [place for place in foreseen if place >= 2]
    assert checked
    for place in checked:
        with torch.no_grad():
            expected = query_by_hand(family, model.config, layers[place], entered[layers[place - 1]], PROMPT)
        found = foreseen[place]
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("sparse", [None, Sparse("columns", EVERYTHING)], ids=["dense", "columns"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "qwen3_next"])
def test_nothing_else_changes(family: str, sparse: Sparse | None) -> None:
    """With a budget for everything answers and pages have the same bits as without foresight.

    Dense steps have up to 8 tokens, sparse ones up to 16: between, dense ones take another way.
    """
    model = attached(deeper(family))
    ahead, ids, mask = filled(model, Sparse("lookahead", EVERYTHING))
    other, *_ = filled(model, sparse)
    for num_tokens in (1, 8 if sparse is None else MAX_SELECT_QUERIES, 1, 1):
        assert torch.equal(step(model, ahead, ids, mask, num_tokens), step(model, other, ids, mask, num_tokens))
    for index in range(ahead.kv.spec.num_layers):
        ours, theirs = ahead.kv.layer(index), other.kv.layer(index)
        assert ours.foreseen is None
        for x, y in zip(*(layer.read(layer.first_token, layer.seq_len) for layer in (ours, theirs)), strict=True):
            assert torch.equal(x, y)
    assert ahead.foresight is None
    assert ahead.pending is None
    ahead.check()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_a_budget_for_everything_is_dense(family: str, num_beams: int) -> None:
    model = attached(deeper(family))
    ids, mask = models.left_padded([PROMPT, 90])
    found = []
    for sparse in (Sparse("lookahead", EVERYTHING), None):
        cache = tiered(model)
        cache.kv.sparse = sparse
        found.append(generate(model, ids, mask, past_key_values=cache, num_beams=num_beams))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.equal(logits_of(found[0]), logits_of(found[1]))


def test_a_small_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer from the third on chooses by what was foreseen, and generation runs to its end."""
    model, told = attached(deeper("llama")), []
    foresee = Foresight._foresee

    def tell(self: Foresight, place: int) -> None:
        told.append(place)
        foresee(self, place)

    monkeypatch.setattr(Foresight, "_foresee", tell)
    cache = tiered(model)
    cache.kv.sparse = Sparse("lookahead", BUDGET)
    found = generate(model, models.random_ids(1, PROMPT), past_key_values=cache, max_new_tokens=8)
    assert found.sequences.shape[1] == PROMPT + 8
    # A prompt (the first pass, which ends with nothing far) is none of ours; place 4 is behind the last layer.
    assert [place for place in told if 2 <= place < NUM_LAYERS] == [2, 3] * 7
    cache.check()


def test_prompts_and_other_selectors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(deeper("llama"))
    cache, ids, mask = filled(model, Sparse("lookahead", EVERYTHING))
    monkeypatch.setattr(Foresight, "_foresee", lambda *_: pytest.fail("foreseen"))
    step(model, cache, ids, mask, MAX_SELECT_QUERIES + 1)
    cache.kv.sparse = Sparse("columns", EVERYTHING)
    step(model, cache, ids, mask)
    cache.kv.sparse = None
    step(model, cache, ids, mask)


def test_detach_takes_every_hook_away() -> None:
    model = deeper("llama")
    before = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in model.modules()]
    tandem.attach(tandem.attach(model))
    hooked = [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in model.modules()]
    assert sum(num for num, _ in hooked) == sum(num for num, _ in before) + 1 + NUM_LAYERS
    tandem.detach(model)
    assert before == [(len(part._forward_pre_hooks), len(part._forward_hooks)) for part in model.modules()]


def test_hooks_of_others_see_each_layer_once() -> None:
    model, seen = attached(deeper("llama")), []
    cache, ids, mask = filled(model, Sparse("lookahead", BUDGET))
    for place, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, place=place: seen.append(place))
    step(model, cache, ids, mask)
    assert seen == list(range(NUM_LAYERS))


def test_a_copy_of_an_attached_model_foresees_by_itself() -> None:
    model = attached(deeper("llama"))
    twin = copy.deepcopy(model)
    tandem.detach(model)
    torch.nn.init.normal_(model.get_decoder().layers[2].self_attn.q_proj.weight)
    ours, reference = Witness(), Witness()
    for witness, one in ((ours, twin), (reference, attached(deeper("llama")))):
        cache, ids, mask = filled(one, Sparse(witness, BUDGET))
        step(one, cache, ids, mask)
    assert ours.foreseen[:2] == [None, None]
    for found, expected in zip(ours.foreseen[2:], reference.foreseen[2:], strict=True):
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 2])
def test_a_pass_that_is_cut_off_while_it_foresees_is_undone(error: type[BaseException], call: int) -> None:
    """call: of the third layer's norm, whose first is foresight."""
    model = attached(deeper("llama"))
    cache, ids, mask = filled(model, Sparse("lookahead", EVERYTHING))
    dense, *_ = filled(model, None)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == call:
            raise error

    hook = model.get_decoder().layers[2].input_layernorm.register_forward_pre_hook(fail)
    with pytest.raises(error):
        step(model, cache, ids, mask)
    hook.remove()
    cache.check()
    assert cache.get_seq_length() == PROMPT
    assert all(cache.kv.layer(index).foreseen is None for index in range(NUM_LAYERS))
    assert torch.equal(step(model, cache, ids, mask), step(model, dense, ids, mask))


@pytest.mark.filterwarnings("ignore")  # dynamo's own, of many kinds
@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_compiled_models_are_refused(family: str) -> None:
    torch.compiler.reset()
    model = attached(deeper(family))
    cache, ids, mask = filled(model, Sparse("lookahead", BUDGET))
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedError, match=r"not supported under torch.compile.*Sparse\('columns'"):
        step(compiled, cache, ids, mask, 1)
    assert cache.get_seq_length() == PROMPT
    cache.kv.sparse = Sparse("columns", BUDGET)
    assert step(compiled, cache, ids, mask, 1).isfinite().all()


def test_a_decoder_without_a_list_of_layers_is_refused() -> None:
    model = attached(deeper("llama"))
    cache, ids, mask = filled(model, Sparse("lookahead", BUDGET))
    model.get_decoder().more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(NUM_LAYERS))
    with pytest.raises(UnsupportedError, match="layers of a llama model were not found"):
        step(model, cache, ids, mask)
