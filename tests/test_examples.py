"""The examples run as a reader would run them."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples import custom_selector, lm_eval_offline, merge_partials
from tests.test_generate import save_tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_merge_partials_equals_the_whole() -> None:
    assert merge_partials.main() < 1e-5


def test_long_prompt_continues_and_fills_the_far_tier(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("a line of a long text\n" * 100)
    command = [sys.executable, str(EXAMPLES / "long_prompt.py"), str(model), str(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    far = next(line for line in done.stderr.splitlines() if line.startswith("far:"))
    assert not far.startswith("far: 0 bytes")


ADDED = {
    "import AutoModelForCausalLM": "from tandemkv.integrations.transformers import TieredCache as DynamicCache"
    ", attach\n",
    "model = AutoModel": "    attach(model)\n",
}


def test_a_script_for_a_dynamic_cache_runs_with_two_added_lines(tmp_path: Path) -> None:
    """README's promise: forks of a prefix, crops and turns, some of it far, and the same answers."""
    stock = (EXAMPLES / "shared_prefix.py").read_text().splitlines(keepends=True)
    ours = [line + "".join(added for part, added in ADDED.items() if part in line) for line in stock]
    assert "".join(ours).count("\n") == len(stock) + 2
    asked = '    print("far", prefix.use()[1].used_bytes, file=sys.stderr)\n'  # only here, to see that it is ours
    at = next(index for index, line in enumerate(ours) if "for question in" in line)
    (tmp_path / "ours.py").write_text("".join([*ours[:at], asked, *ours[at:]]))
    (tmp_path / "text.txt").write_text("a line of a long text\n" * 300)
    model = save_tiny_llama(tmp_path / "model")
    said, far = [], []
    for script in (EXAMPLES / "shared_prefix.py", tmp_path / "ours.py"):
        command = [sys.executable, str(script), str(model), str(tmp_path / "text.txt")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said.append(done.stdout)
        far += [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("far ")]
    assert said[0] == said[1]
    assert far[0] > 0


def test_long_prompt_without_arguments_says_what_it_takes() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "long_prompt.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "python examples/long_prompt.py MODEL FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_lm_eval_s_tasks_answer_as_stock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generate_until tasks through attach's generate hook: equal answers on every sample, most of them right."""
    monkeypatch.setattr(socket.socket, "connect", None)  # offline: whoever tries fails
    found = lm_eval_offline.compare()
    assert set(found.stock) == set(found.ours) == set(lm_eval_offline.TASKS)
    assert all(len(answers) == 8 for answers in found.ours.values())
    assert found.ours == found.stock
    assert min(found.share_found.values()) >= 0.75
    tiers = [dict(zip(("near", "far"), cache.use(), strict=True)) for cache in found.caches]
    assert len(tiers) == 8, "a cache for each batch of two"
    assert all(each["far"].used_bytes > each["near"].used_bytes > 0 for each in tiers)
    assert all(each["far"].moved_bytes > 0 for each in tiers)


def test_one_s_own_selector_decides_what_is_attended() -> None:
    """Where the fact stands it finds it. Elsewhere it does not, which it would if nobody asked it."""
    assert custom_selector.main(1000) == " 9467240"
    assert "9467240" not in custom_selector.main(2500)
