"""How a system answers: a shared context is prefilled densely once, and systems go on from forks of it; one that lives
from what it observed while the context was read, from a context that was read under its eyes."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

import tandemkv.integrations.transformers as tandem
from tandemkv.evaluate.prompts import Asked
from tandemkv.select import MAX_SELECT_QUERIES, Selector, Sparse, Tally

Questions = Sequence[Sequence[Asked]]
Answers = list[list[list[int]]]

PAGE_SIZE = 16
NEAR_TOKENS = 64

# Where far tokens are quantised: keys share a scale over a page, which is by default as long.
QUANTISED_PAGE_SIZE = 64
QUANTISED_NEAR_TOKENS = 128

SPARE_TOKENS = 4  # an answer may be so much longer than the perfect one


class SharedContexts:
    """Contexts of equal length in one cache of an attached model, prefilled densely, to be forked by every system.

    Questions come as `[context][question]`, as many for each context, and answers as `[context][question]` tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        contexts: Sequence[tuple[int, ...]],
        num_new_tokens: int,
        reader: Selector | None = None,
        far_dtype: str | None = None,
    ) -> None:
        """num_new_tokens: the most that a fork will add, all its sequences together. reader: a selector that learns
        something of the contexts while, or when, they are read: it then need not in every fork. far_dtype: of the
        cache, in which the contexts are read."""
        self._model = model
        self.tally = Tally()  # of forks that were verified
        config = model.config.get_text_config(decoder=True)
        is_quantised = far_dtype is not None
        page_size = QUANTISED_PAGE_SIZE if is_quantised else PAGE_SIZE
        near_tokens = QUANTISED_NEAR_TOKENS if is_quantised else NEAR_TOKENS
        self._cache = tandem.TieredCache(config, near_tokens, 0, page_size=page_size, far_dtype=far_dtype)
        spec = self._cache.kv.spec
        far_bytes = spec.far_bytes_of(spec.num_far_pages(len(contexts), len(contexts[0]) + page_size))
        far_bytes += spec.num_full_layers * (num_new_tokens // page_size + 1) * spec.far_page_bytes
        self._cache = tandem.TieredCache(config, near_tokens, far_bytes, page_size=page_size, far_dtype=far_dtype)
        ids = torch.tensor(contexts)
        if reader is not None:  # with room for everything: budgets come with the forks
            self._cache.kv.sparse = Sparse(reader, 2 * ids.shape[1] + near_tokens)
        _forward(model, self._cache, ids[:, :-page_size])
        _forward(model, self._cache, ids[:, -page_size:])  # demotes what a chunk left near: once, not in every fork
        layers = [self._cache.kv.layer(i) for i in range(spec.num_layers)] if reader is not None else []
        for layer in layers:
            if layer.num_far_pages:
                layer.summaries()

    def close(self) -> None:
        """Give every byte back."""
        self._cache.close()

    def ask(self, questions: Questions, sparse: Sparse | None) -> Answers:
        """Each question is asked alone behind its context: all in one batch where they are even, else in turn."""
        if are_even(questions):
            found = self._answer_at_once(questions, sparse)
        else:
            assert len(questions) == 1, "only contexts with even questions share a cache"
            found = [[self._answer_at_once([[question]], sparse)[0][0] for question in questions[0]]]
        return found

    def converse(self, questions: Questions, sparse: Sparse | None) -> Answers:
        """The questions of a context are asked one after another. Behind every answer of its own the model reads the
        perfect one instead, so that one mistake does not spoil the next turn (SCBench, 2412.10319)."""
        fork = self._fork(sparse, 1)
        turns = []
        for asked in zip(*questions, strict=True):
            logits = _feed(self._model, fork, _stack([question.prompt for question in asked]))
            turn = copy.deepcopy(fork)
            turns.append(_continue(self._model, turn, logits, len(asked[0].answer) + SPARE_TOKENS))
            self._close(turn)
            _feed(self._model, fork, _stack([question.answer for question in asked]))
        self._close(fork)
        return [list(answers) for answers in zip(*turns, strict=True)]

    def surprise(self, continuations: Sequence[tuple[int, ...]], sparse: Sparse | None) -> list[float]:
        """For each context the mean negative log-probability, in nats, of the tokens behind it, after the first."""
        fork = self._fork(sparse, 1)
        ids = torch.tensor(continuations)
        logits = torch.cat(list(_feed_all(self._model, fork, ids[:, :-1])), 1).float()
        self._close(fork)
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.mean(1).tolist()

    def _answer_at_once(self, questions: Questions, sparse: Sparse | None) -> Answers:
        flat = [question for of_context in questions for question in of_context]
        each = len(questions[0])
        fork = self._fork(sparse, each)
        prompts = _stack([question.prompt for question in flat])
        found = answer_greedily(self._model, fork, prompts, len(flat[0].answer) + SPARE_TOKENS)
        self._close(fork)
        return [found[i : i + each] for i in range(0, len(found), each)]

    def _fork(self, sparse: Sparse | None, copies: int) -> tandem.TieredCache:
        fork = copy.deepcopy(self._cache)
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        fork.kv.sparse = sparse
        return fork

    def _close(self, fork: tandem.TieredCache) -> None:
        self.tally = Tally.of([self.tally, *fork.kv.tallies])
        fork.close()


def bytes_of_context(model: PreTrainedModel, num_tokens: int) -> int:
    """What a context takes while it is read: K and V, and the widest activations of a layer."""
    config = model.config.get_text_config(decoder=True)
    spec = tandem.TieredCache(config, NEAR_TOKENS, 0, page_size=PAGE_SIZE).kv.spec
    width: int = max(config.hidden_size, getattr(config, "intermediate_size", config.hidden_size))
    token_bytes: int = spec.num_full_layers * spec.far_page_bytes // PAGE_SIZE + 4 * width * model.dtype.itemsize
    return num_tokens * token_bytes


def are_even(questions: Questions) -> bool:
    """Whether all prompts, and all answers, have the same number of tokens."""
    lengths = {(len(question.prompt), len(question.answer)) for of_context in questions for question in of_context}
    return len(lengths) == 1


def _stack(rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor(rows)


def answer_greedily(model: PreTrainedModel, cache: Cache, prompts: Tensor, num_tokens: int) -> list[list[int]]:
    """`num_tokens` new tokens behind each prompt `[num_seqs, prompt_len]`, which is read in runs: see `_feed_all`."""
    return _continue(model, cache, _feed(model, cache, prompts), num_tokens)


def _continue(model: PreTrainedModel, cache: Cache, logits: Tensor, num_tokens: int) -> list[list[int]]:
    token = logits.argmax(-1)
    tokens = [token]
    for _ in range(num_tokens - 1):
        token = _forward(model, cache, token[:, None])[:, -1].argmax(-1)
        tokens.append(token)
    return torch.stack(tokens, 1).tolist()


def _feed(model: PreTrainedModel, cache: Cache, ids: Tensor) -> Tensor:
    """The logits `[num_seqs, vocab_size]` behind the last token; see `_feed_all`."""
    for logits in _feed_all(model, cache, ids, every=False):
        last = logits[:, -1]
    return last


def _feed_all(model: PreTrainedModel, cache: Cache, ids: Tensor, *, every: bool = True) -> Iterator[Tensor]:
    """Logits of every token, or of the last one of each run. A system selects once for a run: were a question read at
    once, its last tokens would find in its first ones what those had found, and every policy would look good."""
    for run in ids.split(MAX_SELECT_QUERIES, 1):
        yield _forward(model, cache, run, every=every)


@torch.inference_mode()
def _forward(model: PreTrainedModel, cache: Cache, ids: Tensor, *, every: bool = False) -> Tensor:
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=0 if every else 1).logits
    return logits
