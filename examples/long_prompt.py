"""Continue a long text, most of its keys and values outside near memory: python examples/long_prompt.py MODEL FILE."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import tandemkv.integrations.transformers as tandem


def main(path: str, prompt: str) -> None:
    """Greedy, streamed to stdout."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = tandem.attach(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))
    cache = tandem.TieredCache(model.config, near_tokens=1024, far_bytes="2GiB")
    inputs = tokenizer(Path(prompt).read_text(), return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=64, do_sample=False, streamer=streamer)
    for tier in cache.use():
        print(f"{tier.name}: {tier.used_bytes:,} bytes used, {tier.moved_bytes:,} moved in", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
