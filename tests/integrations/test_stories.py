"""Real weights that nobody here made come out token for token, with nearly all KV far."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tandemkv.integrations.transformers as tandem

DATA = Path(os.environ.get("TANDEMKV_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
MODEL = DATA / "models" / "stories260K"


@pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is missing; TANDEMKV_SHARED_DATA names the data folder")
def test_golden_story() -> None:
    golden = json.loads((MODEL / "golden.json").read_text())
    model = tandem.attach(AutoModelForCausalLM.from_pretrained(MODEL))
    cache = tandem.TieredCache(model.config, near_tokens=32, far_bytes="8MiB", page_size=16)
    prompt, expected = golden["prompt_ids"], golden["greedy_ids"]
    # Some files hold the prompt in front of the answer.
    answer = expected[len(prompt) :] if expected[: len(prompt)] == prompt else expected
    found = model.generate(
        torch.tensor([prompt]), past_key_values=cache, max_new_tokens=len(answer), do_sample=False, eos_token_id=None
    )
    assert found[0, len(prompt) :].tolist() == answer
    cache.check()
    far = cache.use()[1]
    assert far.moved_bytes >= far.used_bytes > 0
    assert cache.kv.layer(0).far_tokens >= len(answer) - 64
