"""Stock transformers models over a tiered cache: attach(model), TieredCache, detach(model).

    import tandemkv.integrations.transformers as tandem
    model = tandem.attach(AutoModelForCausalLM.from_pretrained(path))
    cache = tandem.TieredCache(model.config, near_tokens=4096, far_bytes="16GiB")
    model.generate(**inputs, past_key_values=cache, max_new_tokens=256)

How the parts meet: the model calls `Cache.update`, which only marks the new keys with the layer they belong to; then it
calls the attention function, which finds the layer on the keys, appends them and attends. transformers does not hand
the cache to the attention function, so the mark is the only way; a model that changes keys after `update` loses it and
is refused. Without a mark (another cache, no cache, training) an attached model behaves as it did before.
"""

from tandemkv.integrations.transformers.cache import TieredCache
from tandemkv.integrations.transformers.configs import depends_on_length
from tandemkv.integrations.transformers.families import FAMILIES, REFUSED, refusal_of, refusal_of_type
from tandemkv.integrations.transformers.hooks import attach, detach

__all__ = [
    "FAMILIES",
    "REFUSED",
    "TieredCache",
    "attach",
    "depends_on_length",
    "detach",
    "refusal_of",
    "refusal_of_type",
]
