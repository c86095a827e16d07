"""A shared context is prefilled once, and every system answers as if it had been alone with it."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandemkv.evaluate import answers
from tandemkv.evaluate.answers import NEAR_TOKENS, PAGE_SIZE, SPARE_TOKENS, SharedContexts
from tandemkv.evaluate.prompts import Asked
from tandemkv.select import MAX_SELECT_QUERIES, SELECTORS, Sparse, Summaries
from tests import models
from tests.integrations.agreement import attached

LENGTH, NUM_CONTEXTS, NUM_QUESTIONS = 300, 3, 2
WINDOW = Sparse("window", 160)


def tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(2, models.VOCAB_SIZE) for _ in range(length))


def asked(seed: int, prompt: int = 21, answer: int = 5) -> Asked:
    rng = random.Random(seed)
    return Asked(tokens(rng, prompt), tokens(rng, answer), ("?",))


CONTEXTS = [tokens(random.Random(100 + i), LENGTH) for i in range(NUM_CONTEXTS)]
QUESTIONS = [[asked(10 * i + j) for j in range(NUM_QUESTIONS)] for i in range(NUM_CONTEXTS)]


@pytest.fixture(scope="module")
def stock() -> Any:
    return models.llama()


@pytest.fixture(scope="module")
def model(stock: Any) -> Any:
    return attached(stock)


@pytest.fixture
def shared(model: Any) -> Any:
    contexts = SharedContexts(model, CONTEXTS, 1000)
    yield contexts
    contexts.close()


def stock_answer(stock: Any, ids: tuple[int, ...], num_tokens: int) -> list[int]:
    """Greedy, with stock transformers alone."""
    out = stock.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def test_dense_answers_are_stock_s(stock: Any, shared: SharedContexts) -> None:
    """All questions of all contexts in one batch, forked from one prefill."""
    found = shared.ask(QUESTIONS, None)
    for context, of_context, answered in zip(CONTEXTS, QUESTIONS, found, strict=True):
        for question, answer in zip(of_context, answered, strict=True):
            assert answer == stock_answer(stock, context + question.prompt, len(question.answer) + SPARE_TOKENS)


def test_turns_read_the_perfect_answers_before_them(stock: Any, shared: SharedContexts) -> None:
    found = shared.converse(QUESTIONS, None)
    for context, (first, second), answered in zip(CONTEXTS, QUESTIONS, found, strict=True):
        num_tokens = len(first.answer) + SPARE_TOKENS
        past = context + first.prompt
        assert answered[0] == stock_answer(stock, past, num_tokens)
        assert answered[1] == stock_answer(stock, past + first.answer + second.prompt, num_tokens)


def test_questions_of_uneven_length(stock: Any, model: Any) -> None:
    """A context alone; each question is a batch of its own."""
    questions = [[asked(1, 5), asked(2, 40, 3), asked(3, 17)]]
    shared = SharedContexts(model, CONTEXTS[:1], 1000)
    for form in (shared.ask, shared.converse):
        answered = form(questions, None)[0]
        past = CONTEXTS[0]
        for question, answer in zip(questions[0], answered, strict=True):
            assert answer == stock_answer(stock, past + question.prompt, len(question.answer) + SPARE_TOKENS)
            past += (question.prompt + question.answer) if form == shared.converse else ()


def test_surprise_is_stock_s(stock: Any, shared: SharedContexts) -> None:
    continuations = [tokens(random.Random(i), 50) for i in range(NUM_CONTEXTS)]
    found = shared.surprise(continuations, None)
    for context, continuation, surprise in zip(CONTEXTS, continuations, found, strict=True):
        logits = stock(torch.tensor([context + continuation])).logits[0, LENGTH:-1].double()
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(continuation[1:]))
        assert surprise == pytest.approx(expected.item(), abs=1e-4)


def test_a_system_reads_the_question_and_the_answer_but_not_the_context(model: Any, shared: SharedContexts) -> None:
    """One selection for at most 16 tokens, in every layer, and none while the context was read: what it would have left
    out then is found by another system after it. So in requests, in turns, where the perfect answer is read too, and in
    text. Dense answers stay what they were."""
    seen: list[int] = []
    continuations = [tokens(random.Random(i), 40) for i in range(NUM_CONTEXTS)]

    class Spy:
        def score(self, q: Tensor, summaries: Summaries) -> Tensor:
            seen.append(q.shape[2])
            return SELECTORS["spied"].score(q, summaries)

    before = shared.ask(QUESTIONS, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SELECTORS, "spied", SELECTORS["window"])
        patch.setitem(SELECTORS, "window", Spy())

        def chunks_of(run: Any, *args: Any) -> list[int]:
            seen.clear()
            run(*args, WINDOW)
            num_layers = model.config.num_hidden_layers
            assert all(len(set(seen[i : i + num_layers])) == 1 for i in range(0, len(seen), num_layers))
            return seen[::num_layers]

        prompt, answer = len(QUESTIONS[0][0].prompt), len(QUESTIONS[0][0].answer)
        reading = [MAX_SELECT_QUERIES, prompt - MAX_SELECT_QUERIES]
        writing = [1] * (answer + SPARE_TOKENS - 1)
        assert chunks_of(shared.ask, QUESTIONS) == reading + writing
        assert chunks_of(shared.converse, QUESTIONS) == (reading + writing + [answer]) * len(QUESTIONS[0])
        assert chunks_of(shared.surprise, continuations) == [16, 16, 7]
    assert shared.ask(QUESTIONS, None) == before


def test_a_system_changes_what_is_found(shared: SharedContexts) -> None:
    continuations = [tokens(random.Random(i), 40) for i in range(NUM_CONTEXTS)]
    assert shared.ask(QUESTIONS, WINDOW) != shared.ask(QUESTIONS, None)
    assert shared.converse(QUESTIONS, WINDOW) != shared.converse(QUESTIONS, None)
    assert shared.surprise(continuations, WINDOW) != shared.surprise(continuations, None)


def test_a_window_is_a_model_that_cannot_see_the_rest(stock: Any, model: Any) -> None:
    """Token by token against stock in eager attention with a mask that hides what the window leaves out. One question
    of one token, so that nothing but the context is hidden from it."""
    question = asked(5, prompt=1, answer=1)
    shared = SharedContexts(model, CONTEXTS[:1], 1000)
    fork = shared._fork(WINDOW, 1)
    token = torch.tensor([question.prompt])
    found = answers._forward(model, fork, token)[0, -1]
    layer = fork.kv.layer(0)
    first_near = layer.first_near_token
    newest = (WINDOW.budget_tokens - (layer.seq_len - first_near)) // PAGE_SIZE - 1
    hidden = slice(PAGE_SIZE, first_near - newest * PAGE_SIZE)
    assert hidden.stop > hidden.start
    past = stock(torch.tensor([CONTEXTS[0]]), use_cache=True).past_key_values
    mask = torch.zeros(1, 1, 1, LENGTH + 1)
    mask[..., hidden] = torch.finfo(torch.float32).min
    position = torch.tensor([[LENGTH]])
    expected = stock(token, past_key_values=past, attention_mask=mask, position_ids=position).logits[0, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    everything = stock(torch.tensor([CONTEXTS[0] + question.prompt])).logits[0, -1]
    assert (expected - everything).abs().max() > 0.05, "the window must matter here"


def test_a_budget_for_everything_is_dense(shared: SharedContexts) -> None:
    assert shared.ask(QUESTIONS, replace(WINDOW, budget_tokens=4096)) == shared.ask(QUESTIONS, None)
    assert shared.ask(QUESTIONS, WINDOW) != shared.ask(QUESTIONS, None)


def test_the_context_is_far_before_it_is_forked(shared: SharedContexts) -> None:
    """Else every fork would demote what a prompt's last chunk left near."""
    layer = shared._cache.kv.layer(0)
    assert layer.num_near_tokens <= NEAR_TOKENS + PAGE_SIZE
