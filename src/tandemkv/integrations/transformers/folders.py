"""Local folders of models: what is read of them, and how what is broken in them is told. Nothing is downloaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from tandemkv.errors import InputError, TandemError, UnsupportedError
from tandemkv.integrations.transformers.families import REFUSED, refusal_of, refusal_of_type
from tandemkv.integrations.transformers.hooks import attach

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""What keeps transformers from looking elsewhere."""


def quieten() -> None:
    """transformers' warnings and bars are not shown: what matters of them is an error here."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_config(folder: Path, dtype: Dtype) -> PreTrainedConfig:
    """The configuration of a local model of a supported family; its `dtype` is the one to run in, never None."""
    if not folder.exists():
        raise InputError(f"there is no folder {folder}: a local model folder is needed, nothing is downloaded")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no Hugging Face model folder: it has no config.json")
    told = _check_json(folder / "config.json")
    _check_json(folder / "generation_config.json")
    if "quantization_config" in told:
        raise UnsupportedError(f"{folder}: quantised weights are not supported yet; use the unquantised model")
    family = told.get("model_type")
    if not isinstance(family, str) or family in REFUSED or family not in CONFIG_MAPPING:
        why = refusal_of_type(family)
    else:
        with blaming(folder / "config.json"):
            config = AutoConfig.from_pretrained(folder, **LOCAL)
        is_text = config.get_text_config(decoder=True) is config
        why = refusal_of(config) or (None if is_text else "is more than a language model")
    if why is not None:
        raise UnsupportedError(f"{folder}: model_type {family!r} is not supported: it {why}")
    config.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    if config.dtype not in _DTYPES:
        raise UnsupportedError(
            f"{folder} is stored in {config.dtype}, which is not supported: give --dtype bfloat16, float16 or float32"
        )
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        raise InputError(f"{folder} has no tokenizer: none of {', '.join(names)} is there")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _check_json(folder / name)
    with blaming(folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else folder):
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, vocab_size: int) -> Tensor:
    """Token ids `[1, num_tokens]` of a text, all of them in the model's vocabulary."""
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids.long()
    if ids.shape[1] == 0:
        raise InputError("the prompt has no tokens: the tokenizer knows nothing in it")
    refuse_foreign_tokens(ids[0].tolist(), vocab_size)
    return ids


def refuse_foreign_tokens(ids: list[int], vocab_size: int) -> None:
    """InputError where a tokenizer gives tokens that the model does not have."""
    if max(ids, default=0) >= vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(ids)}, the model has {vocab_size}: they do not belong together"
        )


def special_tokens(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Where text begins and ends. Of generation_config.json nothing else counts: how to generate is told by options,
    and what looks ahead (prompt lookup, an assistant) goes wrong in stock behind a prompt that is in the cache."""
    path = folder / "generation_config.json"
    told = _check_json(path)
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = found[name] = told.get(name, getattr(config, name, None))
        tokens = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(token) is int and 0 <= token < config.vocab_size for token in tokens):
            where = path if name in told else folder / "config.json"
            raise InputError(
                f"{where}: {name} must be a token of the model, 0 to {config.vocab_size - 1}, got {value!r}"
            )
    return GenerationConfig(**found)


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all of its weights, attached."""
    if not any(path for pattern in ("*.safetensors", "*.index.json", "*.bin") for path in folder.glob(pattern)):
        raise InputError(f"{folder} has no weights: no *.safetensors is there")
    for path in sorted(folder.glob("*.safetensors")):
        with blaming(path), safe_open(path, "pt"):
            pass  # opening compares the header with the size of the file; from_pretrained would not name the file
    with blaming(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **LOCAL
        )
    wrong = sorted(found["missing_keys"]) + [key for key, *_ in sorted(found["mismatched_keys"])]
    if wrong:
        raise InputError(
            f"{folder}: the weights do not fit config.json: {len(wrong)} are missing or of another shape, "
            f"the first is {wrong[0]}"
        )
    return attach(model.eval())


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn what libraries raise over a broken file into one line that names it."""
    try:
        yield
    except TandemError:
        raise
    except Exception as error:  # nothing narrower will do: tokenizers raises bare Exception for a broken file
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} is corrupt or not supported ({told[:300]})") from error


def _check_json(path: Path) -> dict[str, Any]:
    """The object in a file, {} where there is no file. transformers ignores or misreports some that are broken."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise InputError(f"{path} is corrupt: it holds no JSON object")
    return told
