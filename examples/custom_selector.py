"""A selector of one's own: of the far blocks those around a place in the text. It prints the number planted there."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tandemkv.integrations.transformers as tandem
from tandemkv import assets
from tandemkv.evaluate.answers import answer_greedily
from tandemkv.select import Sparse, Summaries

FACT = " One of the special magic numbers for nodded-pen is: 9467240."
QUESTION = "\nWhat is the special magic number for nodded-pen? The special magic number for nodded-pen is:"


@dataclass(frozen=True)
class Around:
    token: int

    def score(self, q: torch.Tensor, summaries: Summaries) -> torch.Tensor:
        distance = (torch.arange(summaries.num_blocks) - self.token // 16).abs().float()
        return -distance.expand(len(q), summaries.num_kv_heads, -1)  # the highest are attended


@torch.no_grad()
def main(token: int = 1000) -> str:
    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL)
    model = tandem.attach(AutoModelForCausalLM.from_pretrained(assets.MODEL))
    novel, fact, question = (tokenizer(text).input_ids for text in (assets.held_out_text()[:20_000], FACT, QUESTION))
    cache = tandem.TieredCache(model.config, near_tokens=256, far_bytes="1GiB")
    model(torch.tensor([novel[:1000] + fact + novel[1000:4000]]), past_key_values=cache)  # a prompt: all is attended
    cache.kv.sparse = Sparse(Around(token), budget_tokens=512)
    answer: str = tokenizer.decode(answer_greedily(model, cache, torch.tensor([question]), num_tokens=8)[0])
    return answer


if __name__ == "__main__":
    print(main())
