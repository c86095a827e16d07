"""The model, its files, its loss on weighted documents, and whether it answers right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tandemkv.errors import InputError
from training.documents import ANSWER, REPEATED, TEXT, Document
from training.tokenizer import END, VOCAB_SIZE

MAX_POSITIONS = 16384

# Plain causal attention: without this, positions that skip would be read as a pack of separate sequences.
_CAUSAL: Any = {"full_attention": None}

_TIED = "lm_head.weight"


def make_model() -> Qwen3ForCausalLM:
    """Qwen3 with 3.4 M parameters: 4 layers x 256, 4 query and 2 KV heads of 64, tied embeddings."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=None,
            eos_token_id=0,
            attn_implementation="sdpa",
            dtype="float32",  # to run in; on disk it is float16
        )
    )


def save_model(model: Qwen3ForCausalLM, folder: Path, progress: dict[str, int]) -> None:
    """fp16 weights, config and progress, as transformers reads them; each file is replaced when it is whole, progress
    last: a stop between two of them repeats some steps."""
    new = folder / "new"
    new.mkdir(exist_ok=True)
    weights = {name: p.detach().to("cpu", torch.float16).contiguous() for name, p in model.state_dict().items()}
    weights.pop(_TIED)
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(new)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": MAX_POSITIONS}
    (new / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    (new / "progress.json").write_text(json.dumps(progress) + "\n")
    for path in sorted(new.iterdir(), key=lambda path: path.name == "progress.json"):
        path.replace(folder / path.name)
    new.rmdir()


def load_weights(model: Qwen3ForCausalLM, folder: Path) -> dict[str, int]:
    """Take over the weights that lie in a folder; how far they were trained, {} where there are none."""
    if not (folder / "model.safetensors").exists():
        return {}
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if unexpected or set(missing) - {_TIED}:
        raise InputError(f"{folder} holds another model: {[*unexpected, *missing]} do not fit; give another --out")
    progress: dict[str, int] = json.loads((folder / "progress.json").read_text())
    return progress


def weighted_loss(
    model: Qwen3ForCausalLM, body: nn.Module, documents: list[Document], positions: list[np.ndarray]
) -> tuple[Tensor, tuple[float, ...]]:
    """The weighted mean of the losses of tokens that have a weight; the plain means over answers, repeats and text.

    body: `model.model`, or that compiled. Logits are made of weighted tokens only.
    """
    device = model.device
    ids = torch.from_numpy(np.stack([d.ids for d in documents]).astype(np.int64)).to(device)
    weights = torch.from_numpy(np.stack([d.weights for d in documents]))[:, 1:].to(device)
    places = torch.from_numpy(np.stack(positions)).to(device)
    kept = weights > 0
    with torch.autocast(device.type, torch.bfloat16):
        hidden = body(input_ids=ids, position_ids=places, attention_mask=_CAUSAL, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][kept])
    losses = nn.functional.cross_entropy(logits.float(), ids[:, 1:][kept], reduction="none")
    weights = weights[kept]
    means = tuple(losses[weights == weight].detach().mean().item() for weight in (ANSWER, REPEATED, TEXT))
    return (losses * weights).sum() / weights.sum(), means


@torch.no_grad()
def answers_right(model: Qwen3ForCausalLM, document: Document) -> list[bool]:
    """For each answer in a document whether every token of it is the most probable one, given those before."""
    ids = torch.from_numpy(document.ids.astype(np.int64))[None].to(model.device)
    answer = document.weights == ANSWER
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, attention_mask=_CAUSAL, use_cache=False).last_hidden_state[0, :-1]
        best = model.lm_head(hidden[answer[1:]]).argmax(-1).cpu().numpy()
    right = best == document.ids[1:][answer[1:]]
    begins = (answer & ~np.roll(answer, 1))[answer]
    return [bool(each.all()) for each in np.split(right, np.flatnonzero(begins)[1:])]
