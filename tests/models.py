"""Tiny models of fixed random weights, one row per supported family, and prompts for them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers.models
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 97
MAX_POSITIONS = 1024

# What of this a family's config has, it gets. No end-of-sequence token: random weights would end a text anywhere.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.3,  # the default of 0.02 makes attention flat: a lost page would hardly show
    "init_std": 0.3,  # OPT's name for it
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_EVERY = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # also where a name is mapped
_WINDOW = 24  # of sliding layers: smaller than the prompts, no multiple of a page
_MIXED = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


class Family(NamedTuple):
    """A row of README's table. title: what people call it. changes: to the config, beyond what all have."""

    title: str
    changes: Mapping[str, Any] = MappingProxyType({})
    note: str = "full attention in every layer"


FAMILIES: dict[str, Family] = {
    "afmoe": Family(
        "Arcee Trinity (AFMoE)", {"sliding_window": _WINDOW, "global_attn_every_n_layers": 2}, "sliding layers"
    ),
    "apertus": Family("Apertus"),
    "arcee": Family("Arcee"),
    "bamba": Family("Bamba", {"attn_layer_indices": [1]}, "Mamba layers stay stock"),
    "biogpt": Family("BioGPT"),
    "bitnet": Family("BitNet"),
    "cohere": Family("Cohere (Command R)"),
    "cohere2": Family("Cohere 2 (Command R7B and A)", _MIXED, "sliding layers"),
    "cwm": Family("CWM", _MIXED, "sliding layers"),
    "ernie4_5": Family("ERNIE 4.5"),
    "ernie4_5_moe": Family("ERNIE 4.5 MoE"),
    "exaone4": Family("EXAONE 4", _MIXED, "sliding layers"),
    "flex_olmo": Family("FlexOlmo"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2", {**_MIXED, "query_pre_attn_scalar": 16}, "soft cap, sliding layers"),
    "gemma3_text": Family("Gemma 3 (text)", {**_MIXED, "query_pre_attn_scalar": 16}, "sliding layers"),
    "glm": Family("GLM", {"partial_rotary_factor": 0.5}, "partial RoPE"),
    "glm4": Family("GLM-4", {"partial_rotary_factor": 0.5}, "partial RoPE"),
    "glm4_moe": Family("GLM-4.5 (MoE)"),
    "gpt2": Family("GPT-2"),
    "gpt_bigcode": Family("StarCoder (GPT-BigCode)", {"multi_query": True}, "one KV head"),
    "gpt_neox": Family("GPT-NeoX and Pythia", {}, "partial RoPE"),
    "gpt_oss": Family("GPT-OSS", _MIXED, "attention sinks, sliding layers"),
    "granite": Family("Granite"),
    "granitemoe": Family("Granite MoE"),
    "granitemoehybrid": Family(
        "Granite 4",
        {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope"},
        "Mamba layers stay stock",
    ),
    "helium": Family("Helium"),
    "hunyuan_v1_dense": Family("Hunyuan"),
    "hunyuan_v1_moe": Family("Hunyuan MoE"),
    "hy_v3": Family("Hunyuan 3"),
    "jais2": Family("Jais 2"),
    "jamba": Family("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, "Mamba layers stay stock"),
    "lfm2": Family("LFM2", {"layer_types": ["conv", "full_attention"]}, "convolution layers stay stock"),
    "lfm2_moe": Family("LFM2 MoE", {"layer_types": ["conv", "full_attention"]}, "convolution layers stay stock"),
    "llama": Family("Llama", {"num_hidden_layers": 3}),
    "minimax_m2": Family("MiniMax M2"),
    "ministral": Family("Ministral", _MIXED, "sliding layers"),
    "ministral3": Family("Ministral 3"),
    "mistral": Family("Mistral", {"sliding_window": None}),
    "mixtral": Family("Mixtral"),
    "nanochat": Family("nanochat"),
    "nemotron": Family("Nemotron", {"partial_rotary_factor": 0.5}, "partial RoPE"),
    "nemotron_h": Family("Nemotron-H", {"layers_block_type": ["mamba", "attention"]}, "Mamba layers stay stock"),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2"),
    "olmo3": Family("OLMo 3", _MIXED, "sliding layers"),
    "olmo_hybrid": Family(
        "OLMo Hybrid", {"layer_types": ["linear_attention", "full_attention"]}, "linear layers stay stock"
    ),
    "olmoe": Family("OLMoE"),
    "opt": Family("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "persimmon": Family("Persimmon"),
    "phi": Family("Phi 1 and 2", {}, "partial RoPE"),
    "phi3": Family("Phi-3 and 4", {"sliding_window": None}),
    "phimoe": Family("Phi-3.5 MoE", {"sliding_window": None}),
    "qwen2": Family("Qwen 2 and 2.5"),
    "qwen2_moe": Family("Qwen 2 MoE"),
    "qwen3": Family("Qwen 3", {"head_dim": 24}),
    "qwen3_5_moe_text": Family(
        "Qwen 3.5 MoE (text)", {"layer_types": ["linear_attention", "full_attention"]}, "linear layers stay stock"
    ),
    "qwen3_5_text": Family(
        "Qwen 3.5 (text)", {"layer_types": ["linear_attention", "full_attention"]}, "linear layers stay stock"
    ),
    "qwen3_moe": Family("Qwen 3 MoE"),
    "qwen3_next": Family(
        "Qwen 3 Next", {"layer_types": ["linear_attention", "full_attention"]}, "linear layers stay stock"
    ),
    "seed_oss": Family("Seed-OSS"),
    "smollm3": Family("SmolLM 3"),
    "solar_open": Family("Solar Open"),
    "stablelm": Family("StableLM", {}, "partial RoPE"),
    "starcoder2": Family("StarCoder 2", {"sliding_window": None}),
}


def build(model_type: str, **changes: Any) -> Any:
    """A tiny model of a family, in eval mode, with eager attention: the oracle, because sdpa ignores some keywords."""
    config_class: Any = CONFIG_MAPPING[model_type]
    known = config_class()
    derived = {name for name in _COMMON if isinstance(getattr(config_class, name, None), property)}
    takes = {name for name in _COMMON if name in _EVERY or hasattr(known, name)} - derived
    common = {name: value for name, value in _COMMON.items() if name in takes}
    config = config_class(**{**common, **FAMILIES[model_type].changes, **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config).eval()


def llama(**changes: Any) -> Any:
    """Grouped heads, 3 layers."""
    return build("llama", **changes)


def tokenizer() -> Any:
    """A word for every token of the vocabulary: "w2 w3" and so on."""
    words = Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")


def byte_tokenizer() -> Any:
    """A token per byte, and two special ones."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, vocab_size=258, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_tokenizer() -> Any:
    """Words that carry the space before them, as SentencePiece has it, and one special token."""
    words = ["<unk>", "<s>", "▁a", "▁b", "c", "▁", "\n", "é"]
    tokenizer = Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


# Whose tests of ways to generate stand for all: learned positions, biases, a wide head_dim; every rule of scores.
PLAIN = ("llama", "opt", "qwen2", "qwen3")
VARIED = ("gemma2", "gpt_oss", *PLAIN)


def random_ids(num_seqs: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Token ids `[num_seqs, num_tokens]`, none of them padding."""
    return torch.randint(2, VOCAB_SIZE, (num_seqs, num_tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `[num_seqs, longest]` of prompts of these lengths."""
    ids = random_ids(len(lengths), max(lengths), seed)
    starts = torch.tensor([max(lengths) - length for length in lengths])
    mask = torch.arange(max(lengths)) >= starts[:, None]
    return ids * mask, mask.long()
