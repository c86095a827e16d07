"""Many questions about one text, which is read once: python examples/shared_prefix.py MODEL FILE.

Plain transformers over a DynamicCache. Over a TieredCache it runs with two lines more, those that README shows.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

QUESTIONS = ("What is it about?", "Who is in it?", "How does it end?")


@torch.no_grad()
def main(path: str, file: str) -> None:
    """Three answers, a retry that is a token longer, and a second turn."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    text = Path(file).read_text()
    prefix = DynamicCache(config=model.config)
    model(**tokenizer(text, return_tensors="pt"), past_key_values=prefix, logits_to_keep=1)
    for question in QUESTIONS:
        cache = copy.deepcopy(prefix)
        inputs = tokenizer(text + question, return_tensors="pt")
        ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
        print(question, tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]))
        cache.crop(-10)
        again = model.generate(ids[:, :-9], past_key_values=cache, max_new_tokens=10, do_sample=False)
        more = model.generate(again, past_key_values=cache, max_new_tokens=10, do_sample=False)
        print("once more:", tokenizer.decode(more[0, inputs.input_ids.shape[1] :]))
    print(prefix.get_seq_length(), "tokens of text were read once")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
