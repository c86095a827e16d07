"""`tandemkv generate`: the text is stock's, the numbers are there, bad input is one line, Ctrl-C keeps the text."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tandemkv import machine, profiling
from tests.command import Done, run_command
from tests.models import build, byte_tokenizer, random_ids
from tests.models import tokenizer as numbered_words
from tests.schedule.test_profile import PROFILE

PROMPT = "Once upon a time, in a café by the sea…\n" * 25
"""About 1100 bytes, a token each: two chunks and a rest."""


def save_tiny_llama(folder: Path) -> Path:
    """A tiny Llama of random float32 weights, large enough that its text varies, beside a tokenizer of bytes."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, tmp_path / "llama"))


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    return path


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`tandemkv generate args` in this process, to spare the imports; whoever connects anywhere fails."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection to {args[1:]}")

    def call(*args: object) -> Done:
        return run_command(monkeypatch, capsys, "generate", *args)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(machine, "set_passive_spin", lambda: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("COLUMNS", "200")
    num_threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(num_threads)


@pytest.fixture
def profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up profile of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace(PROFILE, measured_on=profiling.measured_on()).save(profiling.stored_profile_path())


def stock(folder: Path, text: str, max_new_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[str, list[int]]:
    """What stock transformers generates greedily, as text without special tokens and as ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    inputs = tokenizer(text, return_tensors="pt")
    out = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
    )
    new = out[0, inputs.input_ids.shape[1] :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), new


def set_json(path: Path, **values: object) -> None:
    """Change values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_greedy_text_is_that_of_stock_transformers(run: Run, source: Path, prompt: Path) -> None:
    text, ids = stock(source, PROMPT, 80)
    assert len(set(ids)) > 8, "the model repeats itself: the comparison would show little"
    done = run(source, "--prompt-file", prompt, "--near-tokens", 128, "--max-new-tokens", 80)
    assert done.code == 0, done.err
    assert done.out == text + "\n"
    for shown in ("prefill", "tokens/s", "time to first token", "decode", "near (cpu)", "far (cpu)", "moved there"):
        assert shown in done.err


def test_json_is_one_object_with_text_and_numbers(run: Run, source: Path, prompt: Path) -> None:
    text, ids = stock(source, PROMPT, 20)
    done = run(source, "--prompt-file", prompt, "--near-tokens", 128, "--max-new-tokens", 20, "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    report = done.report
    assert (report["text"], report["new_ids"], report["num_new_tokens"]) == (text, ids, 20)
    assert report["num_prompt_tokens"] == len(PROMPT.encode())
    assert report["finish"] == "length"
    assert min(report["prefill_tokens_per_s"], report["decode_tokens_per_s"], report["first_token_seconds"]) > 0
    near, far = report["tiers"]
    assert near["moved_bytes"] == 0
    assert 0 < near["used_bytes"] <= near["capacity_bytes"]
    assert far["moved_bytes"] == far["used_bytes"]
    # float32 K and V of two layers and two heads of 16: all but about 128 tokens of the 1120
    assert far["used_bytes"] == pytest.approx((len(PROMPT.encode()) + 20 - 128) * 2 * 2 * 2 * 16 * 4, rel=0.1)
    assert far["capacity_bytes"] - far["used_bytes"] <= 2 * 64 * 2 * 2 * 16 * 4  # enough, and no more than a page each


def test_a_prompt_of_one_token_from_stdin(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    done = run(source, "--prompt-file", "-", "--max-new-tokens", 1, "--json")
    assert done.report["new_ids"] == stock(source, "x", 1)[1]
    assert done.report["decode_tokens_per_s"] is None


def test_sixteen_bits_take_half(run: Run, source: Path, prompt: Path) -> None:
    args = (source, "--prompt-file", prompt, "--near-tokens", 128, "--max-new-tokens", 1, "--json")
    dtypes = ("float32", "bfloat16", "float16")
    whole, *halves = (run(*args, "--dtype", dtype).report["tiers"][1]["used_bytes"] for dtype in dtypes)
    assert [half * 2 for half in halves] == [whole, whole]


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_oss", "lfm2", "qwen3_next"])
def test_other_families(run: Run, tmp_path: Path, family: str) -> None:
    """Windows and layers of other kinds are in the arithmetic, too."""
    build(family).save_pretrained(tmp_path)
    tokenizer = numbered_words()
    tokenizer.save_pretrained(tmp_path)
    text = tokenizer.decode(random_ids(1, 400)[0])
    (tmp_path / "prompt.txt").write_text(text)
    done = run(
        tmp_path, "--prompt-file", tmp_path / "prompt.txt", "--near-tokens", 128, "--max-new-tokens", 12, "--json"
    )
    assert done.report["new_ids"] == stock(tmp_path, text, 12)[1]
    assert done.report["tiers"][1]["used_bytes"] > 0


def test_a_long_prompt_of_long_factors_is_read_at_once(run: Run, tmp_path: Path) -> None:
    """Read in pieces, the first ones of Phi-3 would have the RoPE of short texts."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    positions = {"original_max_position_embeddings": 600}
    build("phi3", rope_parameters={**factors, **positions}, **positions).save_pretrained(tmp_path)
    tokenizer = numbered_words()
    tokenizer.save_pretrained(tmp_path)
    text = tokenizer.decode(random_ids(1, 700)[0])
    (tmp_path / "prompt.txt").write_text(text)
    prompt = ("--prompt-file", tmp_path / "prompt.txt")
    done = run(tmp_path, *prompt, "--near-tokens", 128, "--max-new-tokens", 12, "--json")
    assert done.report["new_ids"] == stock(tmp_path, text, 12)[1]


def test_it_stops_at_the_end_of_text(run: Run, folder: Path, prompt: Path) -> None:
    _, ids = stock(folder, PROMPT, 40)
    end = next(index for index in range(10, 40) if ids[index] not in ids[:index])
    set_json(folder / "generation_config.json", eos_token_id=[1, ids[end]])
    report = run(folder, "--prompt-file", prompt, "--near-tokens", 128, "--max-new-tokens", 40, "--json").report
    assert report["new_ids"] == ids[: end + 1]
    assert report["finish"] == "eos"


def test_a_folder_that_asks_for_sampling_is_still_greedy_by_default(run: Run, folder: Path, prompt: Path) -> None:
    _, ids = stock(folder, PROMPT, 30)
    set_json(folder / "generation_config.json", do_sample=True, temperature=9.0, top_k=3, top_p=0.5, num_beams=2)
    set_json(folder / "generation_config.json", prompt_lookup_num_tokens=3, stop_strings=["a"], prefill_chunk_size=0)
    set_json(folder / "generation_config.json", cache_implementation="static", repetition_penalty="x")
    report = run(folder, "--prompt-file", prompt, "--max-new-tokens", 30, "--json").report
    assert report["new_ids"] == ids


def test_sampling_repeats_with_a_seed_and_varies_without(run: Run, source: Path, prompt: Path) -> None:
    def sample(*args: object) -> list[int]:
        sampling = ("--temperature", 1.5, "--max-new-tokens", 30, "--json")
        ids: list[int] = run(source, "--prompt-file", prompt, *sampling, *args).report["new_ids"]
        return ids

    assert sample("--seed", 1) == sample("--seed", 1)
    assert sample("--seed", 1) != sample("--seed", 2)
    assert sample("--seed", 1, "--top-p", 1e-9) == stock(source, PROMPT, 30)[1]


def test_text_comes_before_the_end_and_ctrl_c_keeps_it(source: Path, prompt: Path) -> None:
    """In a process of its own, which must be offline without being told."""
    text, _ = stock(source, PROMPT, 200)
    code = (
        "import sys\nfrom tandemkv.cli import main\n"
        f"sys.argv = {['tandemkv', 'generate', str(source), '--prompt-file', str(prompt)]!r}"
        " + ['--near-tokens', '128', '--max-new-tokens', '6000']\n"
        "try:\n    main()\n"
        "finally:\n    import huggingface_hub.constants as hub; print('offline', hub.HF_HUB_OFFLINE, file=sys.stderr)"
    )
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
    )
    try:
        assert command.stdout is not None
        begin = command.stdout.read(20)
        command.send_signal(signal.SIGINT)
        rest, err = command.communicate(timeout=30)
    finally:
        command.kill()
    assert command.returncode == 130, err.decode()
    out = (begin + rest).decode()
    assert out.endswith("\n")
    out = out[:-1].rstrip("\N{REPLACEMENT CHARACTER}")  # the interrupt may have cut a character
    assert text.startswith(out) or out.startswith(text)
    *_, line, offline = err.decode().splitlines()
    assert line.startswith("interrupted after ")
    assert offline == "offline True"


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_during_prefill(
    run: Run, source: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    forward, calls = LlamaForCausalLM.forward, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", interrupted)
    done = run(source, "--prompt-file", prompt, *(["--json"] if as_json else []))
    assert done.code == 130
    assert done.err.splitlines()[-1] == "interrupted after 0 new tokens"
    assert len(calls) == 2
    if as_json:
        assert (done.report["finish"], done.report["text"]) == ("interrupted", "")
        assert done.report["first_token_seconds"] is None
    else:
        assert done.out == "\n"


def spoil_config(**values: object) -> Callable[[Path], None]:
    return lambda folder: set_json(folder / "config.json", **values)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_a_shard(folder: Path) -> None:
    remove("model.safetensors")(folder)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def corrupt_pickle(folder: Path) -> None:
    remove("model.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02garbage")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "not a model": (remove("config.json"), "no config.json"),
    "config cut": (write("config.json", b'{"model_type": "lla'), "config.json is not JSON"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "config a list": (write("config.json", b"[]"), "config.json is corrupt"),
    "config without type": (write("config.json", b"{}"), "model_type None is not supported: it has not been tested"),
    "type a list": (
        spoil_config(model_type=["llama"]),
        "model_type ['llama'] is not supported",
    ),
    "config of nonsense": (spoil_config(hidden_size="many"), "config.json is corrupt or not supported"),
    "layers below zero": (spoil_config(num_hidden_layers=-1), "config.json is corrupt or not supported"),
    "no heads": (spoil_config(num_attention_heads=0), "config.json is corrupt or not supported"),
    "unknown activation": (spoil_config(hidden_act="zork"), "config.json is corrupt or not supported"),
    "generation config cut": (write("generation_config.json", b"{"), "generation_config.json is not JSON"),
    "no such end of text": (
        write("generation_config.json", b'{"eos_token_id": 100000}'),
        "generation_config.json: eos_token_id must be a token of the model, 0 to",
    ),
    "an end of text of letters": (write("generation_config.json", b'{"eos_token_id": ["a"]}'), "got ['a']"),
    "family unknown": (
        spoil_config(model_type="zork"),
        "model_type 'zork' is not supported: it has not been tested; supported: afmoe",
    ),
    "family with a reason": (
        spoil_config(model_type="falcon"),
        "'falcon' is not supported: it computes attention in code of",
    ),
    "encoder and decoder": (spoil_config(model_type="t5"), "'t5' is not supported: it is an encoder and"),
    "MLA": (
        spoil_config(model_type="deepseek_v3"),
        "'deepseek_v3' is not supported: it keeps one latent",
    ),
    "more than text": (
        spoil_config(model_type="gemma3"),
        "'gemma3' is not supported: it is more than a",
    ),
    "quantised": (spoil_config(quantization_config={"quant_method": "gptq"}), "quantised weights"),
    "float64": (spoil_config(dtype="float64"), "torch.float64, which is not supported: give --dtype bfloat16"),
    "head_dim": (spoil_config(head_dim=320), "head_dim 320"),
    "group": (
        spoil_config(num_attention_heads=4, num_key_value_heads=3, head_dim=16),
        "1.33333 query heads per KV head",
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer: none of tokenizer.json"),
    "tokenizer cut": (write("tokenizer.json", b'{"version'), "tokenizer.json is not JSON"),
    "tokenizer of nonsense": (write("tokenizer.json", b'{"model": 5}'), "tokenizer.json is corrupt"),
    "tokenizer config cut": (write("tokenizer_config.json", b"{"), "tokenizer_config.json is not JSON"),
    "tokenizer too large": (spoil_config(vocab_size=60), "do not belong together"),
    "no weights": (remove("model.safetensors"), "has no weights: no *.safetensors is there"),
    "weights cut": (truncate_weights, "model.safetensors is corrupt"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors is corrupt"),
    "a weight missing": (drop_a_weight, "1 are missing or of another shape, the first is model.layers.1.mlp.up_proj"),
    "weights of another shape": (spoil_config(intermediate_size=96), "6 are missing or of another shape"),
    "a shard missing": (lose_a_shard, "model-00002-of-00002.safetensors"),
    "pickle corrupt": (corrupt_pickle, "is corrupt or not supported (UnpicklingError"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_one_line(run: Run, folder: Path, prompt: Path, name: str) -> None:
    spoil, expected = BAD_FOLDERS[name]
    spoil(folder)
    assert_refused(run(folder, "--prompt-file", prompt), expected)


BAD_PROMPTS = {
    "empty": (b"", "is empty"),
    "blank": (b" \n", "is empty"),
    "not UTF-8": (b"abc\xff", "is not UTF-8: invalid start byte at byte 3"),
    "too long": (b"a" * 8192, "has 8192 tokens, the model 8192 positions: shorten the prompt by at least 1 tokens"),
    "no room for new tokens": (b"a" * 8000, "lower --max-new-tokens to 192 or shorten the prompt"),
}
BAD_OPTIONS = {
    "far_bytes too small": (
        ["--far-bytes", "64KiB"],
        "raise --far-bytes or --near-tokens, give --far-dtype, or shorten the prompt",
    ),
    "far_bytes beyond the machine": (["--far-bytes", "900TiB"], "lower --far-bytes"),
    "far_bytes nonsense": (["--far-bytes", "much"], "expected a size such as '16GiB'"),
    "near_tokens too small": (["--near-tokens", "64"], "--near-tokens must be at least two pages, 128, got 64"),
    "near_tokens beyond memory": (["--near-tokens", str(1 << 44)], "lower --near-tokens"),
    "max_new_tokens": (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    "temperature": (["--temperature", "-1"], "--temperature must be 0"),
    "temperature of almost nothing": (
        ["--temperature", "1e-40"],
        "--temperature must be 0 (greedy), or 1e-30 or above",
    ),
    "temperature nan": (["--temperature", "nan"], "--temperature must be 0"),
    "top_p": (["--temperature", "1", "--top-p", "1.5"], "--top-p must be above 0 and at most 1"),
    "top_p of greedy": (["--top-p", "0.5"], "give a --temperature above 0"),
    "seed": (["--temperature", "1", "--seed", "-1"], "--seed must be at least 0"),
    "threads": (["--threads", "0"], "--threads must be 1 to"),
    "more threads than processors": (["--threads", "100000"], ", the processors here, got 100000"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_one_line(run: Run, source: Path, prompt: Path, name: str) -> None:
    content, expected = BAD_PROMPTS[name]
    prompt.write_bytes(content)
    assert_refused(run(source, "--prompt-file", prompt), expected)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_one_line(run: Run, source: Path, prompt: Path, name: str) -> None:
    args, expected = BAD_OPTIONS[name]
    assert_refused(run(source, "--prompt-file", prompt, "--near-tokens", 128, *args), expected)


def test_a_prompt_file_that_cannot_be_read_is_one_line(run: Run, source: Path, tmp_path: Path) -> None:
    assert_refused(run(source, "--prompt-file", tmp_path / "none"), "none cannot be read: No such file or directory")
    assert_refused(run(source, "--prompt-file", tmp_path), "cannot be read: Is a directory")


def test_more_than_the_machine_has_is_refused_before_the_weights_are_read(
    run: Run, folder: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove("model.safetensors")(folder)
    monkeypatch.setattr(machine, "available_bytes", lambda: machine.Available(500_000, "cgroup limit"))
    expected = "256 tokens are needed, 488.28 KiB available (cgroup limit): shorten the prompt, lower --near-tokens"
    prompt.write_bytes(b"a" * 1000)
    assert_refused(run(folder, "--prompt-file", prompt), expected)


@pytest.mark.parametrize("args", [["--frob"], ["--dtype", "float8"], ["--near-tokens", "few"]])
def test_an_option_that_typer_refuses_is_named(run: Run, source: Path, prompt: Path, args: list[str]) -> None:
    done = run(source, "--prompt-file", prompt, *args)
    assert (done.code, done.out) == (2, "")
    assert args[0] in done.err
    assert "Traceback" not in done.err


def assert_refused(done: Done, expected: str) -> None:
    """One line on stderr that says so, exit code 2, nothing on stdout."""
    assert done.code == 2
    assert expected in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.out == ""


@pytest.mark.skipif(machine.usable_cpus() < 2, reason="a device and a host need two processors")
@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize("most", [4096, 3])
def test_a_trace_of_decoding(
    run: Run, folder: Path, prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Both layers of every token but the first, which comes with the prompt's last; no more steps than a file may
    have."""
    monkeypatch.setattr("tandemkv.generate.MAX_TRACED_STEPS", most)
    path = tmp_path / "run.json"
    args = (folder, "--prompt-file", prompt, "--dtype", "bfloat16", "--near-tokens", 128, "--max-new-tokens", 4)
    done = run(*args, "--system", "tandem", "--link", "2", "--trace", path, "--json")
    assert done.code == 0, done.err
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"step", "near kernel", "link up", "link down"} & rows >= {"step", "near kernel"}
    num_steps = sum(event["ph"] == "X" and event["name"].startswith("step ") for event in events)
    num_decoded = 2 * len(done.report["new_ids"])
    assert num_steps == min(num_decoded, most)
    told = f"{num_steps} steps of layers" if most > 3 else f"the first 3 of {num_decoded} steps of layers"
    assert done.report["trace"] == f"{path}: {told}"
    assert f"{path}: {told}" in done.err


@pytest.mark.skipif(machine.usable_cpus() < 2, reason="a device and a host need two processors")
@pytest.mark.usefixtures("profiled")
def test_a_trace_that_is_not_written_in_the_end_loses_no_text(run: Run, folder: Path, prompt: Path) -> None:
    args = (folder, "--prompt-file", prompt, "--dtype", "bfloat16", "--near-tokens", 128, "--max-new-tokens", 4)
    done = run(*args, "--system", "flexgen", "--link", "2", "--trace", "/dev/full", "--json")
    assert done.code == 0, done.err
    assert done.report["trace"] == "the trace /dev/full cannot be written: No space left on device"
    assert len(done.report["new_ids"]) == 4


@pytest.mark.skipif(machine.usable_cpus() < 2, reason="a device and a host need two processors")
@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize("system", ["flexgen", "moe-lightning", "kvpr", "headinfer", "tandem"])
def test_a_prompt_shorter_than_near_tokens_has_nothing_far(run: Run, folder: Path, tmp_path: Path, system: str) -> None:
    short = tmp_path / "short.txt"
    short.write_text("some words")
    args = (folder, "--prompt-file", short, "--dtype", "bfloat16", "--max-new-tokens", 4, "--json")
    done = run(*args, "--system", system, "--link", "2")
    assert done.code == 0, done.err
    assert done.report["new_ids"] == run(*args).report["new_ids"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--trace", "a.json"], "--link, --plan and --trace are for systems with lanes, such as 'tandem', got 'dense'"),
        (["--system", "tandem", "--trace", "/no/where.json"], "--trace /no/where.json: there is no folder /no"),
    ],
)
def test_a_trace_that_cannot_be(run: Run, folder: Path, prompt: Path, args: list[str], expected: str) -> None:
    done = run(folder, "--prompt-file", prompt, *args)
    assert (done.code, done.err) == (2, f"error: {expected}\n")
