"""Which families of models are supported, and why others are not."""

from typing import Any

from transformers import PreTrainedConfig

FAMILIES = (
    "afmoe",
    "apertus",
    "arcee",
    "bamba",
    "biogpt",
    "bitnet",
    "cohere",
    "cohere2",
    "cwm",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "jais2",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "llama",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
)
"""`model_type` of every family that is tested; others are refused until a test row exists for them."""

_ALIBI = "adds a bias of distance to its scores (ALiBi)"
_OWN_ATTENTION = "computes attention in code of its own, in which no other attention can take part"
_SHARED = "has layers that attend to keys and values of another layer"
_WIDE = "has layers of different head widths, some of them 512"
_SEVERAL = "has layers that keep keys and values and a linear state at once"
REFUSED = {
    "bloom": _ALIBI,
    "codegen": _OWN_ATTENTION,
    "falcon": _OWN_ATTENTION,
    "falcon_h1": _SEVERAL,
    "gemma3n_text": _SHARED,
    "gemma4_text": _WIDE,
    "gpt_neo": _OWN_ATTENTION,
    "gptj": _OWN_ATTENTION,
    "minimax": "wants a cache of a class of its own",
    "mpt": _ALIBI,
    "xglm": _OWN_ATTENTION,
}
"""Families that people ask for and that cannot be supported as they are, and why."""


def refusal_of(config: PreTrainedConfig) -> str | None:
    """Why a model of this config is not supported, to be read behind its name; None where it is."""
    if config.is_encoder_decoder:
        return "is an encoder and a decoder, which attends to the encoder as well"
    if getattr(config, "add_cross_attention", False):
        return "attends to an encoder as well (add_cross_attention)"
    text: Any = config.get_text_config(decoder=True)
    if text.model_type not in FAMILIES and getattr(text, "kv_lora_rank", None) is not None:
        return "keeps one latent for all heads in its cache and makes keys and values of it at every step (MLA)"
    return refusal_of_type(text.model_type)


def refusal_of_type(model_type: str | None) -> str | None:
    """The same where only the `model_type` is known."""
    if model_type in FAMILIES:
        return None
    return REFUSED.get(str(model_type), f"has not been tested; supported: {', '.join(FAMILIES)}")
