"""The texts of a folder, split by book: what is held out is never trained on."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

_HELD_OUT_SHARE = 12  # one book in twelve


def read_texts(folder: Path, *, held_out: bool) -> dict[str, str]:
    """Name and text of the books of a folder (`*.txt`, UTF-8) that are held out, or of all others."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"expected *.txt in {folder}, found none: give --texts a folder of texts")
    return {path.name: path.read_text("utf-8") for path in paths if _is_held_out(path.name) is held_out}


def read_file(path: Path) -> str:
    """The text of a file, unpacked where its name ends with .gz."""
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")


def encode_texts(texts: dict[str, str], tokenizer: Tokenizer) -> np.ndarray:
    """All texts as one row of token ids, uint16 `[num_tokens]`."""
    rows = [np.asarray(tokenizer.encode(text).ids, dtype=np.uint16) for text in texts.values()]
    return np.concatenate(rows)


def _is_held_out(name: str) -> bool:
    return hashlib.blake2s(name.encode(), digest_size=2).digest()[0] % _HELD_OUT_SHARE == 0
