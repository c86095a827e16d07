"""What tandemkv ships: a small model that remembers, and a text that it has not read."""

import gzip
from pathlib import Path

MODEL = Path(__file__).parent / "recall-8k"
"""A folder as transformers reads it; README.md in it is the model's card."""

JUDGED_TOKENS = 8192
"""The longest context at which it was accepted as a judge."""


def held_out_text() -> str:
    """Jane Austen, Persuasion (1818), in the public domain: no text that the shipped model was trained on."""
    return gzip.decompress((Path(__file__).parent / "persuasion.txt.gz").read_bytes()).decode()
