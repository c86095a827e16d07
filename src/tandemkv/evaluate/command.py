"""`tandemkv eval`: a local model, or the shipped one, through the tasks; what it found as table, JSON and picture."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tandemkv import assets
from tandemkv.attention import use_threads
from tandemkv.errors import InputError
from tandemkv.evaluate.report import LEAST_COUNTED, Report, draw, make_report
from tandemkv.evaluate.run import Settings, evaluate, open_ledger, write_prompts
from tandemkv.integrations.transformers.folders import Dtype, load_model, quieten, read_config, read_tokenizer


@dataclass(frozen=True)
class Evaluated:
    """picture: where it was drawn, or why it was not."""

    report: Report
    picture: str


def evaluate_folder(folder: Path, settings: Settings, dtype: Dtype, threads: int | None, console: Console) -> Evaluated:
    """Everything that `settings` ask for and that its ledger lacks, then the report over the whole ledger."""
    quieten()
    use_threads(threads)
    config = read_config(folder, dtype)
    tokenizer = read_tokenizer(folder)
    prompts = write_prompts(tokenizer, settings, config.get_text_config(decoder=True), console)
    name = f"{_fingerprint(folder)} {config.dtype}"
    open_ledger(name, prompts, settings)  # refuses before the weights are read
    with console.status("loading the weights"):
        model = load_model(folder, config.dtype)
    ledger = evaluate(model, name, prompts, settings, console)
    report = make_report(ledger, list(settings.contestants), settings.tasks, settings.forms)
    return Evaluated(report, _draw(report, settings.out / "accuracy.png"))


def read_text(path: Path | None) -> str:
    """What facts are hidden in: a file, all *.txt of a folder, or the shipped novel."""
    if path is None:
        return assets.held_out_text()
    if not path.exists():
        raise InputError(f"--text {path}: there is no such file or folder")
    paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"--text {path} holds no *.txt: give a text or a folder of texts")
    try:
        return "\n\n".join(each.read_text("utf-8") for each in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path} cannot be read as UTF-8: {error}") from error


def _fingerprint(folder: Path) -> str:
    """Tells models apart, whatever their folders are called."""
    digest = hashlib.blake2s(digest_size=8)
    told = ("*.safetensors", "pytorch_model*.bin", "config.json", "tokenizer.json", "tokenizer.model")
    for path in sorted({path for pattern in told for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def _draw(report: Report, path: Path) -> str:
    if not report.is_a_judge or all(who.budget_tokens is None for who in report.averages):
        return f"none: fewer than {LEAST_COUNTED} tasks count, or no system has a budget"
    try:
        draw(report, path)
    except ImportError:
        return "none: pip install 'tandemkv[plot]'"
    except OSError as error:
        return f"none: {error}"
    return str(path)
