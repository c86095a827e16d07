"""lm-eval's generate_until tasks through stock transformers and through tandemkv: the same answers, offline.

    pip install 'tandemkv[lm-eval]'
    python -m examples.lm_eval_offline

The tasks are in lm_eval_tasks; their documents are written on the spot.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tandemkv.integrations.transformers as tandem
from tandemkv import assets

TASKS = ["tandem_needle", "tandem_lines"]

Answers = dict[str, list[str]]
"""By task, sample by sample."""


@dataclass(frozen=True)
class Comparison:
    stock: Answers
    ours: Answers
    share_found: dict[str, float]
    caches: list[tandem.TieredCache]


def compare(limit: int | None = None) -> Comparison:
    """All samples of the tasks, or `limit` of each, through stock and through tandemkv, exact."""
    caches: list[tandem.TieredCache] = []

    def make_cache(config: Any) -> tandem.TieredCache:
        caches.append(tandem.TieredCache(config, near_tokens=256, far_bytes="1GiB"))
        return caches[-1]

    model = AutoModelForCausalLM.from_pretrained(assets.MODEL)
    stock = run(model, limit)
    ours = run(tandem.attach(model, make_cache), limit)
    shares = {task: float(ours["results"][task]["found,none"]) for task in TASKS}
    return Comparison(answers_of(stock), answers_of(ours), shares, caches)


def run(model: PreTrainedModel, limit: int | None) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(assets.MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    folder = str(Path(__file__).parent / "lm_eval_tasks")
    results: dict[str, Any] = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=8192),
        tasks=TASKS,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    return results


def answers_of(results: dict[str, Any]) -> Answers:
    return {task: [sample["resps"][0][0] for sample in samples] for task, samples in results["samples"].items()}


def main() -> None:
    found = compare()
    for task in TASKS:
        equal = sum(a == b for a, b in zip(found.stock[task], found.ours[task], strict=True))
        print(f"{task}: {found.share_found[task]:.0%} right, {equal} of {len(found.ours[task])} answers as stock's")
    near, far = found.caches[0].use()
    print(f"in the first batch {near.used_bytes:,} bytes were near and {far.used_bytes:,} far")


if __name__ == "__main__":
    main()
