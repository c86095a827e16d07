"""Pages of panels and of codes on a GPU: how fast they become rows, and attention over them beside rows of the same
tokens.

What is foreseen, before anything is measured, is that memory is the limit (all bytes with scales, zeros and exact
channels):

    unpack   (bytes of packed pages + bytes of rows) / copy bandwidth
    attend   bytes of packed pages / copy bandwidth: at most rows' bytes / packed bytes times as fast as rows

Both are bounds. Codes become numbers in registers, for each token once in a program of decode, and a product of tensor
cores waits for that: attention over int4, 3.4 times fewer bytes than rows, is the first to fall short of its bound.

A few random pages are packed on the host, and lie in an arena over and over: how long reading takes does not depend on
what is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.budget import Budget
from benchmarks.gpu.cases import MODELS, PAGE, Case, Form, Model, Question, places_for, shuffled
from benchmarks.gpu.compilers import like
from benchmarks.gpu.ground import LARGE, Times
from benchmarks.gpu.peers import told
from benchmarks.gpu.section import Bench, Found, Row, Section
from tandemkv import kernels
from tandemkv.kernels import gpu
from tandemkv.types import Arena, Packing, PagedKV, PageLayout

LLAMA_2, LLAMA_3 = MODELS[:2]
CASES = (
    Case(LLAMA_3, 32_768, 16),
    Case(LLAMA_2, 8192, 16),
    Case(LLAMA_3, 131_072, 4),
    Case(LLAMA_3, 8192, 64),
)
"""Of 2 GB as rows, so that int4 is large too."""
PACKINGS: tuple[Packing, ...] = ("rows", "panels", "int8", "int4")
NUM_PAGES = 64
"""Different ones."""
ROW_S = 0.4
CASE_S = 2.0
"""With filling memory and checking, but for compiling."""


class Pages(NamedTuple):
    """`NUM_PAGES` on a device, and the rows that they stand for, as `gather` reads them."""

    arena: Arena
    rows: Arena


def pages_of(model: Model, dtype: torch.dtype, device: torch.device) -> dict[Packing, Pages]:
    """The same random tokens in every packing."""
    plain = Arena.allocate(PageLayout(dtype, PAGE), NUM_PAGES, model.num_kv_heads, model.head_dim)
    for x in (plain.k, plain.v):
        x.normal_()
    return {packing: _packed(plain, packing, device) for packing in PACKINGS}


def _packed(plain: Arena, packing: Packing, device: torch.device) -> Pages:
    layout, heads = replace(plain.layout, packing=packing), plain.num_kv_heads
    arena = Arena.allocate(layout, NUM_PAGES, heads, plain.head_dim)
    every = list(range(NUM_PAGES))
    assert kernels.move_pages(plain, arena, every, every) == {}
    rows = replace(plain, k=torch.empty_like(plain.k), v=torch.empty_like(plain.v))
    table = torch.arange(NUM_PAGES, dtype=torch.int32)[:, None, None].expand(-1, heads, 1)
    kernels.gather(arena, table, 0, rows.k, rows.v)
    return Pages(*(replace(each, k=each.k.to(device), v=each.v.to(device)) for each in (arena, rows)))


def repeated(arena: Arena, num_slots: int) -> Arena:
    """Of so many slots at least, of which slot i holds page i % NUM_PAGES."""
    times = -(-num_slots // NUM_PAGES)
    k, v = (x.repeat(times, *[1] * (x.dim() - 1)) for x in (arena.k, arena.v))
    return replace(arena, k=k, v=v)


def packed_bytes(case: Case, packing: Packing) -> int:
    """Of a case's pages."""
    model = case.model
    page_bytes = PageLayout(case.dtype, PAGE, packing).page_bytes(model.num_kv_heads, model.head_dim, model.head_dim)
    return case.batch * case.num_pages * page_bytes


class Packed(Question):
    """A case over pages of a packing, at places that L2 does not hold."""

    def __init__(self, case: Case, pages: Pages, l2_bytes: int) -> None:
        num_bytes = packed_bytes(case, pages.arena.layout.packing)
        super().__init__(case, pages.arena.k.device, places_for(num_bytes, l2_bytes))
        num_slots = case.batch * case.num_pages
        arena = repeated(pages.arena, self.num_places * num_slots)
        self.runs = [shuffled(arena, case, place * num_slots) for place in range(self.num_places)]
        self._rows = pages.rows

    def of_pages(self, place: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
        """`RowsOf` what the pages stand for."""
        pages = self.runs[place].page_table[seq, head].long() % NUM_PAGES
        k, v = (x[pages, head].flatten(0, 1)[: self.case.context] for x in (self._rows.k, self._rows.v))
        return k, v

    def ours(self) -> Form:
        """The decode kernel over the pages as they are."""
        return self.over(self.runs, self.of_pages)


class Unpacking:
    """So many pages that they and their rows are large, from slots in an order of no sense, at places that L2 does not
    hold."""

    def __init__(self, pages: Pages, l2_bytes: int) -> None:
        self._rows, device = pages.rows, pages.arena.k.device
        page_bytes = (pages.arena.num_bytes + pages.rows.num_bytes) // NUM_PAGES
        self.num_pages = -(-LARGE * l2_bytes // page_bytes)
        self.num_bytes = self.num_pages * page_bytes
        num_places = places_for(self.num_bytes, l2_bytes)
        self._source = repeated(pages.arena, num_places * self.num_pages)
        self._target = repeated(pages.rows, num_places * self.num_pages)
        self._slots, self._targets = (
            [torch.randperm(self.num_pages, device=device).int() + i * self.num_pages for i in range(num_places)]
            for _ in range(2)
        )

    def call(self, turn: int) -> None:
        """A place's pages become rows."""
        place = turn % len(self._slots)
        gpu.unpack(self._source, self._target, self._slots[place], self._targets[place])

    def wrong(self) -> str:
        """What is, of every page and bit, or ''."""
        for x in (self._target.k, self._target.v):
            x.fill_(torch.nan)
        for place, (slots, targets) in enumerate(zip(self._slots, self._targets, strict=True)):
            self.call(place)
            pages = slots.long() % NUM_PAGES
            both = (self._target.k, self._rows.k), (self._target.v, self._rows.v)
            if not all(torch.equal(found[targets.long()], truth[pages]) for found, truth in both):
                return f"wrong: rows of place {place} are not those that gather reads"
        return ""


def measure(bench: Bench, budget: Budget, found: Found) -> None:
    """A row for each packing unpacked, and for each attended in each case."""
    jobs = [(like(case), packing) for case in CASES for packing in PACKINGS]
    bench.compilers.each(compile_one, jobs, budget.left_s / 2)
    bench.pools.release()
    made: dict[Model, dict[Packing, Pages]] = {}
    for i, case in enumerate(CASES):
        if not budget.has(CASE_S):
            found.missed.append(f"packed, {case}: no time was left")
            continue
        if case.model not in made:
            made[case.model] = pages_of(case.model, case.dtype, bench.ground.device)
        if i == 0:
            found.rows += _unpacked(bench, case, made[case.model])
            bench.tell("unpacked " + _told(found.rows))
        _attended(bench, case, made[case.model], found)


def _unpacked(bench: Bench, case: Case, pages: Mapping[Packing, Pages]) -> list[Row]:
    l2_bytes = bench.ground.facts.l2_bytes
    all_ = {packing: Unpacking(pages[packing], l2_bytes) for packing in PACKINGS if packing != "rows"}
    wrong: dict[Packing, str] = {}
    for packing, each in all_.items():
        try:
            wrong[packing] = each.wrong()
        except Exception as error:  # noqa: BLE001  told with the row, and in the exit code
            wrong[packing] = told(error)
    calls = {str(packing): each.call for packing, each in all_.items() if not wrong[packing]}
    times = bench.ground.in_turn(calls, ROW_S) if calls else {}
    rows = []
    for packing, each in all_.items():
        row = {"what": "unpack", "model": case.model.name, "packing": packing, "num_pages": each.num_pages}
        rows.append(row | _times_row(bench, each.num_bytes, times.get(packing)) | {"wrong": wrong[packing]})
    return rows


def _attended(bench: Bench, case: Case, pages: Mapping[Packing, Pages], found: Found) -> None:
    l2_bytes = bench.ground.facts.l2_bytes
    needed = sum(places_for(packed_bytes(case, each), l2_bytes) * packed_bytes(case, each) for each in PACKINGS)
    if needed > bench.pools.free_bytes():
        found.missed.append(f"packed, {case}: {needed / 1e9:.0f} GB of pages do not fit")
        return
    forms: dict[Packing, Form] = {}
    wrong: dict[Packing, tuple[float | None, str]] = {}
    for packing in PACKINGS:
        try:
            problem = Packed(case, pages[packing], l2_bytes)
            forms[packing] = problem.ours()
            wrong[packing] = problem.check(forms[packing])
        except Exception as error:  # noqa: BLE001  told with the row, and in the exit code
            wrong[packing] = None, told(error)
    calls = {str(packing): form.call for packing, form in forms.items() if not wrong[packing][1]}
    rows = rows_of(bench, case, bench.ground.in_turn(calls, ROW_S) if calls else {})
    found.rows += [row | dict(zip(("error", "wrong"), wrong[row["packing"]], strict=True)) for row in rows]
    bench.tell(f"packed {case}: {_told(found.rows[-len(rows) :])}")


def rows_of(bench: Bench, case: Case, times: Mapping[str, Times]) -> list[Row]:
    """times_rows: as fast as attention over rows. foreseen_times_rows: at most, by bytes."""
    rows, plain, plain_bytes = [], times.get("rows"), packed_bytes(case, "rows")
    for packing in PACKINGS:
        num_bytes, own = packed_bytes(case, packing), times.get(packing)
        row = {"what": "attend", **case.to_row(), "packing": packing} | _times_row(bench, num_bytes, own)
        row["times_rows"] = None if own is None or plain is None else plain.us / own.us
        rows.append(row | {"foreseen_times_rows": plain_bytes / num_bytes})
    return rows


def _times_row(bench: Bench, num_bytes: int, times: Times | None) -> Row:
    """num_bytes: that the call reads and writes."""
    row: Row = {"num_bytes": num_bytes, "foreseen_us": num_bytes / bench.ground.speeds.copy_gbps / 1e3}
    if times is None:
        return row | dict.fromkeys(("us", "low_us", "high_us", "gbps", "share_of_copy"))
    row |= {"us": times.us, "low_us": times.low_us, "high_us": times.high_us, "gbps": num_bytes / times.us / 1e3}
    return row | {"share_of_copy": bench.ground.share(num_bytes, times.us)}


def compile_one(device: str, case: Case, packing: Packing) -> None:
    """Attention over such pages and their unpacking, by doing both once; in a process of its own."""
    model, num_slots = case.model, case.batch * case.num_pages
    arena, rows = (
        Arena.allocate(PageLayout(case.dtype, PAGE, each), num_slots, model.num_kv_heads, model.head_dim, device)
        for each in (packing, "rows")
    )
    for x in (arena.k, arena.v):
        x.zero_()
    run: PagedKV = shuffled(arena, case)
    Question(case, arena.k.device, 1).over([run], _nothing).call(0)
    slots = torch.arange(1, dtype=torch.int32, device=device)
    gpu.unpack(arena, rows, slots, slots)


def _nothing(place: int, seq: int, head: int) -> tuple[Tensor, Tensor]:
    raise AssertionError("what is compiled is not checked")


def _told(rows: Sequence[Row]) -> str:
    return "; ".join(f"{row['packing']} {_speed(row)}" for row in rows)


def _speed(row: Row) -> str:
    if row["us"] is None:
        return str(row["wrong"])
    ratio = row.get("times_rows")
    beside = "" if ratio is None or row["packing"] == "rows" else f", {ratio:.2f} times rows"
    return f"{row['us']:.1f} us, {row['share_of_copy']:.1%} of copy{beside}"


def summary(found: Found) -> Iterator[tuple[str, str]]:
    """Unpacking, then a line for each case."""
    unpacked = [row for row in found.rows if row["what"] == "unpack"]
    if unpacked:
        yield "unpacked", _told(unpacked)
    attended = [row for row in found.rows if row["what"] == "attend"]
    for key in dict.fromkeys((row["model"], row["context"], row["batch"]) for row in attended):
        rows = [row for row in attended if (row["model"], row["context"], row["batch"]) == key]
        yield f"packed {key[0]} {key[1]:,} x {key[2]}", _told(rows)


SECTION = Section(measure, 2, summary, in_quick=False, has_csv=False)
