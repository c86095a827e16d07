"""The texts of a folder, split by book: what is held out is never trained on."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tandemkv.errors import InputError

_HELD_OUT_SHARE = 12  # one book in twelve


def read_texts(folder: Path, *, held_out: bool) -> dict[str, str]:
    """Name and text of the books of a folder (`*.txt`, UTF-8) that are held out, or of all others.

    One in twelve is held out, by a hash of its name, and at least one. InputError for fewer than two books.
    """
    names = sorted(path.name for path in folder.glob("*.txt"))
    if len(names) < 2:
        raise InputError(f"expected at least 2 *.txt in {folder}, one to hold out, found {len(names)}")
    unseen = {name for name in names if _hash(name) == 0} or {min(names, key=_hash)}
    return {name: (folder / name).read_text("utf-8") for name in names if (name in unseen) is held_out}


def read_file(path: Path) -> str:
    """The text of a file, unpacked where its name ends with .gz."""
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")


def encode_texts(texts: dict[str, str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one row of token ids, uint16 `[num_tokens]`."""
    rows = [np.asarray(tokenizer.encode(text).ids, dtype=np.uint16) for text in texts.values()]
    return np.concatenate(rows)


def _hash(name: str) -> int:
    return hashlib.blake2s(name.encode(), digest_size=2).digest()[0] % _HELD_OUT_SHARE
