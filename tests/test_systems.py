"""Every named system does what defines it, on a small cache, on the command line and in the evaluation."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import tandemkv.integrations.transformers as tandem
from tandemkv import assets, cli, machine
from tandemkv.attention import worker_pool
from tandemkv.cache import CacheSpec, KVCache
from tandemkv.errors import InputError
from tandemkv.evaluate.answers import NEAR_TOKENS, PAGE_SIZE
from tandemkv.evaluate.ledger import Contestant, contestants
from tandemkv.evaluate.prompts import Context
from tandemkv.evaluate.run import Settings, evaluate, write_prompts
from tandemkv.select import MAX_SELECT_QUERIES, Sparse, Tally, Verified
from tandemkv.select.clusters import Clustered, Clusters
from tandemkv.selection import sparse_mode
from tandemkv.systems import EVALUATED, SYSTEMS
from tandemkv.types import BLOCK_TOKENS
from tests import models
from tests.integrations.agreement import attached
from tests.profiles import store_profile
from tests.sparse import assert_attends_to
from tests.test_generate import PROMPT, save_tiny_llama
from tests.test_selectors import GROUP_SIZE, NUM_KV_HEADS, SCALE, Text, cache_of, chosen_of, feed, spec_of

NAMES = {
    *("dense", "window", "streaming_llm", "h2o", "keyformer", "corm", "hgca", "quest", "infinigen", "retroinfer"),
    *("flexgen", "moe-lightning", "kvpr", "hybridgen", "headinfer", "tandem", "tandem-sparse", "tandem-verified"),
}
EXACT = {"dense", "flexgen", "moe-lightning", "kvpr", "headinfer", "tandem"}
SPARSE = sorted(NAMES - EXACT)
LANES_OF = {
    "hgca": ("attend",),
    "flexgen": ("stream",),
    "moe-lightning": ("attend",),
    "kvpr": ("recompute", "stream"),
    "hybridgen": ("logits",),
    "headinfer": ("stream",),
    "tandem": ("recompute", "attend", "logits", "stream"),
}
OBSERVING = ["corm", "h2o", "hgca", "keyformer"]
FORGETFUL = ["corm", "h2o", "keyformer"]
ESTIMATING = ["retroinfer", "tandem-sparse", "tandem-verified"]
SPEC, READ, BUDGET = spec_of(16), 600, 240
LARGE = 4096  # more than any text here has


def read_under(system: str, budget_tokens: int, text: Text, num_tokens: int = READ, spec: CacheSpec = SPEC) -> KVCache:
    """A cache that has read so many tokens, as a prompt, under a system."""
    cache = cache_of(text, sparse_mode(system, budget_tokens), spec)
    feed(cache, text, num_tokens)
    return cache


def attended(cache: KVCache, blocks: list[list[set[int]]] | None) -> Tensor:
    """bool `[num_seqs, num_kv_heads, num_tokens]`: these far blocks, or all, and what is near."""
    layer = cache.layer(0)
    kept = torch.ones(layer.num_seqs, NUM_KV_HEADS, layer.seq_len, dtype=torch.bool)
    if blocks is not None:
        kept[..., : layer.first_near_token] = False
        for seq, heads in enumerate(blocks):
            for head, of_head in enumerate(heads):
                for block in of_head:
                    kept[seq, head, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS] = True
    return kept


def assert_sees(cache: KVCache, text: Text, out: Tensor, blocks: list[list[set[int]]] | None) -> None:
    """The last step gave attention over these far blocks, or all, and near tokens, and over nothing else."""
    q, k, v = (x[:, :, : cache.seq_len] for x in (text.q, text.k, text.v))
    kept = attended(cache, blocks)
    assert_attends_to(kept, out, q[:, :, -out.shape[1] :], k, v, cache.layer(0).kv_start, SCALE)


def test_the_table() -> None:
    assert set(SYSTEMS) == NAMES
    assert set(EVALUATED) == {"dense", *SPARSE}
    assert {name: system.lanes for name, system in SYSTEMS.items() if system.lanes} == LANES_OF
    assert {name for name, system in SYSTEMS.items() if system.stages_heads} == {"headinfer"}
    assert {name for name, system in SYSTEMS.items() if system.joins_logits} == {"hybridgen"}
    assert all(sparse_mode(name, None) is sparse_mode(name, 100) is None for name in EXACT)
    for name in SPARSE:
        mode = sparse_mode(name, 960)
        assert mode is not None
        assert (mode.budget_tokens, mode.num_sink_tokens) == (960, 4)
        assert (mode.verified is not None) == (name == "tandem-verified")
    papers = {name: re.findall(r"\d{4}\.\d{5}", system.about) for name, system in SYSTEMS.items()}
    assert all(found for name, found in papers.items() if name not in {"dense", "window"} and "tandem" not in name)
    assert all(SYSTEMS[name].where_it_differs for name, found in papers.items() if found)


# -- What defines each -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", sorted(set(SPARSE) - set(ESTIMATING)))
def test_what_is_left_out_counts_for_nothing(system: str) -> None:
    text = Text()
    cache = read_under(system, BUDGET, text)
    out = feed(cache, text, 1)
    chosen = chosen_of(cache.layer(0))
    assert max(len(blocks) for heads in chosen for blocks in heads) < cache.layer(0).num_far_blocks
    assert_sees(cache, text, out, chosen)


@pytest.mark.parametrize("system", ["streaming_llm", "window"])
def test_streaming_llm_attends_to_the_first_tokens_and_the_newest(system: str) -> None:
    text = Text()
    cache = read_under(system, BUDGET, text)
    feed(cache, text, 1)
    num_far, num_near = cache.layer(0).num_far_blocks, cache.layer(0).num_near_tokens
    newest = range(num_far - (BUDGET - num_near) // BLOCK_TOKENS + 1, num_far)
    first = [start // BLOCK_TOKENS for start in text.kv_start]
    assert chosen_of(cache.layer(0)) == [[{block, *newest}] * NUM_KV_HEADS for block in first]


@pytest.mark.parametrize("system", OBSERVING)
def test_hgca_deletes_nothing_and_the_others_do(system: str) -> None:
    """With room for everything, what was left out once is attended again, or is gone."""
    text = Text()
    cache = read_under(system, BUDGET, text)
    feed(cache, text, 1)
    before, num_far = chosen_of(cache.layer(0)), cache.layer(0).num_far_blocks
    cache.sparse = sparse_mode(system, LARGE)
    out = feed(cache, text, 1)
    if system == "hgca":
        assert_sees(cache, text, out, None)
        return
    after = chosen_of(cache.layer(0))
    new = set(range(num_far, cache.layer(0).num_far_blocks))
    for old_heads, heads in zip(before, after, strict=True):
        assert all(blocks <= old | new for old, blocks in zip(old_heads, heads, strict=True))
    assert_sees(cache, text, out, after)


def test_hgca_s_heads_keep_sets_of_their_own_sizes() -> None:
    """What weighed more than its head's mean, though the budget has room for more."""
    text = Text()
    cache = read_under("hgca", 500, text)
    feed(cache, text, 1)
    layer, chosen = cache.layer(0), chosen_of(cache.layer(0))
    room = (500 - layer.num_near_tokens) // BLOCK_TOKENS
    sizes = [len(blocks) for heads in chosen for blocks in heads]
    assert len(set(sizes)) > 1
    assert max(sizes) < room < layer.num_far_blocks


def test_corm_drops_what_nobody_recalled_though_there_is_room() -> None:
    """Keys that point away from every query get less than an even share; H2O, with room for them, keeps them."""
    text, ignored, found = Text(), set(range(7, 33, 2)), {}
    text.q[..., 0] += 4
    for block in ignored:
        text.k[:, :, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS, 0] -= 12
    for system in ("corm", "h2o"):
        cache = read_under(system, LARGE, text)
        feed(cache, text, 1)
        found[system] = chosen_of(cache.layer(0))
    assert all(not blocks & ignored for heads in found["corm"] for blocks in heads)
    everything = set(range(cache.layer(0).num_far_blocks))
    real = [everything - set(range(start // BLOCK_TOKENS)) for start in text.kv_start]
    assert found["h2o"] == [[blocks] * NUM_KV_HEADS for blocks in real]


def test_keyformer_is_h2o_with_noise() -> None:
    """The same text and budget: more blocks are the same than by chance, and not all."""
    text, found = Text(), {}
    for system in ("h2o", "keyformer"):
        cache = read_under(system, BUDGET, text)
        feed(cache, text, 1)
        found[system] = [blocks for heads in chosen_of(cache.layer(0)) for blocks in heads]
    num_shared = sum(len(a & b) for a, b in zip(found["h2o"], found["keyformer"], strict=True))
    share = num_shared / sum(map(len, found["h2o"]))
    assert 1.2 * len(found["h2o"][0]) / cache.layer(0).num_far_blocks < share < 1


def test_quest_takes_the_blocks_whose_bounds_are_highest() -> None:
    """Of channel minima and maxima in float64; int8 may swap a few that are nearly equal."""
    text = Text(num_tokens=1400)
    cache = read_under("quest", 400, text, 1200)
    feed(cache, text, 1)
    layer = cache.layer(0)
    keys = text.k[:, :, : layer.far_tokens].double().unflatten(2, (-1, BLOCK_TOKENS))
    q = text.q[:, :, cache.seq_len - 1].double().unflatten(1, (NUM_KV_HEADS, GROUP_SIZE))[:, :, :, None]
    box = keys.amin(3)[:, :, None], keys.amax(3)[:, :, None]
    bounds = torch.maximum(q * box[0], q * box[1]).sum(-1).amax(2)
    num_right = num_all = 0
    for seq, heads in enumerate(chosen_of(layer)):
        first = text.kv_start[seq] // BLOCK_TOKENS
        bounds[seq, :, :first] = -math.inf
        for head, blocks in enumerate(heads):
            free = blocks - {first}
            best = bounds[seq, head].clone()
            best[first] = -math.inf
            num_right += len(free & set(best.topk(len(free)).indices.tolist()))
            num_all += len(free)
    assert num_right >= 0.95 * num_all


@pytest.mark.parametrize("system", ["infinigen", "quest", "tandem-verified"])
def test_infinigen_asks_with_a_foreseen_query_and_the_others_do_not(system: str) -> None:
    """Another query is foreseen than the one that comes: the choice is that of the foreseen one, and the attention that
    of the true one."""
    text, other = Text(), Text()
    other.q = text.q.clone()
    other.q[:, :, READ] = -text.q[:, :, READ]
    cache = read_under(system, BUDGET, text)
    twin, of_foreseen = cache.fork(), cache.fork()
    feed(twin, text, 1)
    feed(of_foreseen, other, 1)
    cache.layer(0).foreseen = other.q[:, :, READ : READ + 1]
    out = feed(cache, text, 1)
    with_it, plain, expected = (chosen_of(each.layer(0)) for each in (cache, twin, of_foreseen))
    assert plain != expected, "the queries ask for the same: nothing is shown"
    assert with_it == (expected if system == "infinigen" else plain)
    if system == "infinigen":
        assert_sees(cache, text, out, expected)


@pytest.mark.parametrize("system", ESTIMATING)
def test_what_is_left_out_is_estimated(system: str) -> None:
    """Flat attention, of which the budget has a small share: an estimate of the rest brings each step nearer to all."""
    text = Text(num_tokens=3100)
    text.q *= 0.25
    text.v[:, :, 2900:] += 4  # near tokens are like no others: without the rest they weigh too much
    cache = read_under(system, 480, text, 3000)
    exact, plain = cache.fork(), cache.fork()
    exact.sparse = None
    plain.sparse = Sparse("columns", 480)
    steps = [[feed(each, text, 1) for each in (cache, exact, plain)] for _ in range(16)]
    for out, whole, read in steps:
        assert (out - whole).norm() < 0.7 * (read - whole).norm()


def test_tandem_sparse_chooses_by_columns_and_estimates_by_clusters() -> None:
    """The choice is that of `columns` with the same budget; what it adds is what clusters say of the rest."""
    text = Text(num_tokens=1400)
    tandem, columns = (read_under(system, 480, text, 1200) for system in ("tandem-sparse", "tandem-verified"))
    feed(tandem, text, 1)
    feed(columns, text, 1)
    assert chosen_of(tandem.layer(0)) == chosen_of(columns.layer(0))
    digest, layer = tandem.layer(0).knowledge.digest, tandem.layer(0)
    of_clusters = Clusters(4).digest(None, layer.far, layer._read_blocks)
    assert isinstance(digest, Clustered)
    assert torch.equal(digest.labels, of_clusters.labels) and torch.equal(digest.values, of_clusters.values)
    assert columns.layer(0).knowledge.digest is None


def test_tandem_verified_keeps_its_promise_and_reads_less_than_all() -> None:
    """5 % of error in all but 5 % of rows; tandem-sparse, which promises nothing, has more."""
    text = Text(num_tokens=6050)
    text.q *= 0.4
    text.v += 1
    errors = {}
    for system in ("tandem-verified", "tandem-sparse"):
        cache = read_under(system, 480, text, 6000, spec_of(64))
        exact = cache.fork()
        exact.sparse = None
        pairs = [(feed(cache, text, 1), feed(exact, text, 1)) for _ in range(12)]
        found = torch.cat([((out - whole).norm(dim=-1) / whole.norm(dim=-1)).flatten() for out, whole in pairs])
        errors[system] = float((found > 0.05).double().mean())
        if system == "tandem-verified":
            assert cache.sparse is not None
            assert cache.sparse.verified == Verified(0.05, 0.05)
            told = cache.tallies[0].to_dict()
            assert 0 < told["estimated_error_mean"] <= told["estimated_error_max"]
            assert 0 < told["share_read"] < 1
        else:
            assert cache.tallies == []
    assert errors["tandem-verified"] <= 0.1
    assert errors["tandem-sparse"] > 0.2


# -- Refusals ----------------------------------------------------------------------------------------------------------


def set_mode(system: str, budget_tokens: int | None) -> None:
    KVCache(SPEC, worker_pool()).sparse = sparse_mode(system, budget_tokens)


LEAST = BLOCK_TOKENS + SPEC.near_tokens + MAX_SELECT_QUERIES


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: sparse_mode("best", 512), f"unknown system 'best': the known ones are {', '.join(SYSTEMS)}"),
        (lambda: sparse_mode("dens", None), f"unknown system 'dens': the known ones are {', '.join(SYSTEMS)}"),
        (lambda: contestants(["best"], [512]), f"unknown system 'best': the known ones are {', '.join(SYSTEMS)}"),
        *(
            (lambda name=name: sparse_mode(name, None), f"system '{name}' needs a budget, in tokens per KV head")
            for name in SPARSE
        ),
        *(
            (lambda name=name: set_mode(name, LEAST - 1), f"budget_tokens must be at least {LEAST}: 16 for the blocks")
            for name in SPARSE
        ),
        *(
            (lambda name=name: contestants([name], [512]), f"system '{name}' attends to every token: its answers are")
            for name in sorted(EXACT - {"dense"})
        ),
        (lambda: contestants(SPARSE, [95]), "budget_tokens must be at least 96: 16 for the blocks of the first 4"),
    ],
)
def test_refusals(make: Callable[[], object], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        make()


@pytest.mark.parametrize("system", SPARSE)
def test_the_smallest_budget_is_enough(system: str) -> None:
    text = Text()
    cache = read_under(system, LEAST, text)
    for _ in range(20):
        feed(cache, text, 1)
    cache.check()


# -- The command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a prompt beside it."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("systems") / "llama")
    (folder / "prompt.txt").write_text(PROMPT)
    return folder


@pytest.fixture
def command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`tandemkv generate` in this process: (exit code, stdout, stderr)."""
    store_profile(tmp_path, monkeypatch)

    def call(*args: object) -> tuple[int, str, str]:
        prompt = ("--prompt-file", source / "prompt.txt", "--near-tokens", 128, "--max-new-tokens", 6)
        monkeypatch.setattr(sys, "argv", ["tandemkv", "generate", str(source), *map(str, (*prompt, *args))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    monkeypatch.setattr(machine, "set_passive_spin", lambda: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    num_threads = torch.get_num_threads()
    yield call
    torch.set_num_threads(num_threads)


def test_generate_runs_every_system(command: Any) -> None:
    said = {}
    for system in SYSTEMS:
        budget = () if system in EXACT else ("--budget", 320)
        code, out, err = command("--system", system, *budget, "--json")
        assert code == 0, err
        report = json.loads(out)
        assert report["tiers"][1]["used_bytes"] > 0
        verified = report["verified"]
        assert (verified is not None) == ("estimated error" in err) == (system == "tandem-verified")
        if verified is not None:
            layers = verified.pop("layers")
            assert set(verified) == set(Tally().to_dict()) and len(layers) > 1
            assert [layer.pop("layer") for layer in layers] == list(range(len(layers)))
            assert all(0 <= share <= 1 for each in (verified, *layers) for share in each.values())
            assert verified["share_read_max"] == max(layer["share_read_max"] for layer in layers)
        said[system] = report["new_ids"]
        lanes = set() if report["plan"] is None else set(report["plan"]["tokens"])
        assert lanes <= set(SYSTEMS[system].lanes)
        assert bool(lanes) == bool(SYSTEMS[system].lanes)
    assert said["window"] == said["streaming_llm"] != said["dense"]
    assert all(said[name] == said["dense"] for name in EXACT)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--budget", 512), "system 'dense' attends to every token: leave --budget out"),
        (("--system", "dense", "--budget", 512), "system 'dense' attends to every token: leave --budget out"),
        (("--system", "quest"), "system 'quest' needs a budget, in tokens per KV head: give --budget"),
        (("--system", "quest", "--budget", 159), "--budget must be at least 160: 16 for the blocks of the first 4"),
        (("--system", "quest", "--budget", 0), "--budget must be a whole number of at least 1, got 0"),
        (("--system", "best", "--budget", 512), f"unknown system 'best': the known ones are {', '.join(SYSTEMS)}"),
    ],
)
def test_a_bad_choice_is_one_line(command: Any, args: tuple[object, ...], told: str) -> None:
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["generate", "eval"])
def test_help_lists_the_systems(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "set_passive_spin", lambda: True)
    monkeypatch.setattr(sys, "argv", ["tandemkv", name, "--help"])
    monkeypatch.setenv("COLUMNS", str(shutil.get_terminal_size().columns))
    with pytest.raises(SystemExit):
        cli.main()
    shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)  # however it was wrapped
    assert ",".join(SYSTEMS if name == "generate" else EVALUATED) in shown


# -- The evaluation ----------------------------------------------------------------------------------------------------


def test_contestants_of_every_system() -> None:
    found = contestants(list(EVALUATED), [512, 1024])
    others = [name for name in EVALUATED if name != "dense"]
    expected = [Contestant("dense"), *(Contestant(name, b) for name in others for b in (512, 1024))]
    assert found == expected
    readers = {*OBSERVING, "retroinfer", "tandem-sparse"}
    assert {each.system for each in found if each.reader is not None} == readers
    assert [each.sparse for each in found] == [sparse_mode(each.system, each.budget_tokens) for each in found]


def test_a_short_evaluation_of_every_system(tmp_path: Path) -> None:
    """What an observer is told it is told while the context is read: a cache that was prefilled so gives the same.

    A question comes in runs of several tokens, in which hgca attends to everything.
    """
    model = attached(models.llama(vocab_size=300, max_position_embeddings=4096))
    everybody = tuple(contestants(list(EVALUATED), [160]))
    text = assets.held_out_text()[:60_000]
    asked = Settings(("perplexity",), everybody, 700, text, tmp_path, num_contexts=2, num_questions=1)
    prompts = write_prompts(models.byte_tokenizer(), asked, model.config, Console(quiet=True))
    found = evaluate(model, "tiny", prompts, asked, Console(quiet=True)).found
    losses: dict[str, list[float]] = {name: [] for name in EVALUATED}
    for context in range(2):
        for name in EVALUATED:
            budget = None if name == "dense" else 160
            losses[name].append(found["perplexity", "text", context, Contestant(name, budget)].scores[0])
    assert set(losses) == {"dense", *SPARSE}
    assert all(math.isfinite(loss) for each in losses.values() for loss in each)
    assert losses["hgca"] == pytest.approx(losses["dense"], abs=1e-4)
    others = {tuple(each) for name, each in losses.items() if name not in {"hgca", "window"}}
    assert len(others) == len(losses) - 2
    assert losses["window"] == losses["streaming_llm"]
    for scores in found.values():  # what a promise cost is kept beside the scores
        shares = [share for share in (scores.share_read, scores.share_fallbacks) if share is not None]
        assert len(shares) == (2 if scores.system == "tandem-verified" else 0)
        assert all(0 <= share <= 1 for share in shares) and (not shares or shares[0] > 0.2)
    contexts = prompts.contexts["perplexity"]
    for name in OBSERVING:
        assert losses[name] == pytest.approx(surprise(model, contexts, name), abs=1e-3), name
    for name in FORGETFUL:
        unwatched = surprise(model, contexts, name, watched=False)
        assert losses[name] != pytest.approx(unwatched, abs=1e-3), name


@torch.inference_mode()
def surprise(model: Any, contexts: list[Context], system: str, *, watched: bool = True) -> list[float]:
    """Of the tokens behind contexts that are read under a system's eyes, with room for all; then its budget holds."""
    cache = tandem.TieredCache(model.config, NEAR_TOKENS, "64MiB", page_size=PAGE_SIZE)
    ids = torch.tensor([context.ids for context in contexts])
    room = 2 * ids.shape[1] + NEAR_TOKENS  # keyformer's noise depends on it
    cache.kv.sparse = sparse_mode(system, room) if watched else None
    for part in (ids[:, :-PAGE_SIZE], ids[:, -PAGE_SIZE:]):
        model(part, past_key_values=cache)
    cache.kv.sparse = sparse_mode(system, 160)
    rows = torch.tensor([context.questions[0].answer for context in contexts])
    runs = rows[:, :-1].split(MAX_SELECT_QUERIES, 1)
    logits = torch.cat([model(run, past_key_values=cache).logits.float() for run in runs], 1)
    return [
        float(torch.nn.functional.cross_entropy(of_context, row))
        for of_context, row in zip(logits, rows[:, 1:], strict=True)
    ]
