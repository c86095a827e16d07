"""The stream that `tandemkv generate` writes: its pieces are the whole text, and Ctrl-C repeats none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tandemkv.generate import TextStream
from tests.models import byte_tokenizer, word_tokenizer

BYTES, WORDS = byte_tokenizer(), word_tokenizer()


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The pieces that a stream writes."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor([[5, 6, 7]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.ids == ids
    assert stream.text == "".join(pieces)
    return pieces


@given(st.text(max_size=20), st.lists(st.integers(0, 257), max_size=20))
def test_pieces_of_bytes_make_the_whole_text(text: str, ids: list[int]) -> None:
    ids = BYTES(text).input_ids + ids
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 7), max_size=20))
def test_pieces_of_words_make_the_whole_text(ids: list[int]) -> None:
    assert "".join(streamed(WORDS, ids)) == WORDS.decode(ids, skip_special_tokens=True)


def test_a_character_waits_for_its_last_byte_and_the_last_piece_is_written() -> None:
    ids = BYTES("é…").input_ids
    assert streamed(BYTES, ids) == ["é", "…"]
    assert streamed(BYTES, [*ids[:2], 1, ids[2]]) == ["é", "\N{REPLACEMENT CHARACTER}"]


def test_ctrl_c_while_a_piece_is_written_writes_it_once() -> None:
    pieces: list[str] = []

    def interrupted(text: str) -> None:
        pieces.append(text)
        raise KeyboardInterrupt

    stream = TextStream(BYTES, interrupted)
    stream.put(torch.tensor([[5]]))
    with pytest.raises(KeyboardInterrupt):
        stream.put(torch.tensor(BYTES("x").input_ids))
    stream.end()
    assert pieces == ["x"]
