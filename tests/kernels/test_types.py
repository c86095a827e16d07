"""The nouns check themselves: sizes, layouts, arenas."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tandemkv import machine
from tandemkv.errors import InputError, TandemError
from tandemkv.types import Arena, Packing, PageLayout, ScoreRule, format_bytes, parse_bytes

SIZES = {
    0: 0,
    17179869184: 17179869184,
    "17179869184": 17179869184,
    "512B": 512,
    "16GiB": 16 * 2**30,
    "16 GB": 16 * 10**9,
    "16G": 16 * 2**30,
    "16Gi": 16 * 2**30,
    "1.5MiB": 3 * 2**19,
    " 2 k ": 2048,
    "2KB": 2000,
    "3tib": 3 * 2**40,
    "0.5TB": 5 * 10**11,
}


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_parse_bytes(size: int | str) -> None:
    assert parse_bytes(size) == SIZES[size]


@pytest.mark.parametrize("size", ["", "GiB", "-1GiB", "16XB", "1,5GiB", "16 GiB!", "0x10", "1e9", "nan", "1 6G"])
def test_parse_bytes_refuses(size: str) -> None:
    with pytest.raises(InputError, match=r"expected a size such as '16GiB' or 17179869184, got"):
        parse_bytes(size)


@pytest.mark.parametrize(
    "size", ["9" * 400, "9" * 5000, "9000000TiB", 1 << 63, 10**400], ids=["text", "long", "TiB", "2**63", "int"]
)
def test_parse_bytes_refuses_what_no_machine_has(size: int | str) -> None:
    with pytest.raises(InputError, match="expected a size below 8 EiB"):
        parse_bytes(size)


def test_parse_bytes_refuses_negative_numbers() -> None:
    with pytest.raises(InputError, match="cannot be negative, got -1"):
        parse_bytes(-1)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (-1536, "-1.50 KiB"),
        (1610612736, "1.50 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (5000 * 2**40, "5000.00 TiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 2**50))
def test_format_and_parse_agree_to_the_digits_shown(num_bytes: int) -> None:
    # Half of the second decimal of a number that is at least 1, and the byte that is cut off behind it.
    assert abs(parse_bytes(format_bytes(num_bytes)) - num_bytes) < 0.005 * num_bytes + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_pages_hold_three_dtypes(dtype: torch.dtype) -> None:
    message = f"float32, bfloat16 or float16, got {dtype}: load the model with dtype=torch.bfloat16"
    with pytest.raises(InputError, match=message):
        PageLayout(dtype)


@pytest.mark.parametrize("page_size", [0, -16, 8, 24, 100])
def test_page_size_is_a_multiple_of_16(page_size: int) -> None:
    with pytest.raises(InputError, match=f"page_size must be a multiple of 16, got {page_size}"):
        PageLayout(torch.float32, page_size)


def test_an_unknown_packing_is_refused() -> None:
    with pytest.raises(InputError, match=r"packing must be one of \('rows', 'panels', 'int8', 'int4'\), got 'panel'"):
        PageLayout(torch.float32, 64, "panel")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("packing", "head_dim", "stored_dim"),
    [("rows", 80, 80), ("rows", 2, 2), ("panels", 80, 80), ("panels", 2, 16), ("panels", 66, 80)],
)
def test_what_a_page_takes(packing: Packing, head_dim: int, stored_dim: int) -> None:
    layout = PageLayout(torch.bfloat16, 48, packing)
    assert layout.stored_dim(head_dim) == stored_dim
    assert layout.page_bytes(3, head_dim, head_dim) == 2 * 3 * 48 * stored_dim * 2
    arena = Arena.allocate(layout, 5, 3, head_dim)
    assert arena.k.shape == arena.v.shape == (5, 3, 48, stored_dim)
    assert arena.k.dtype == arena.v.dtype == torch.bfloat16
    assert (arena.num_slots, arena.num_kv_heads, arena.head_dim) == (5, 3, head_dim)
    assert arena.num_bytes == 5 * layout.page_bytes(3, head_dim, head_dim)


def test_v_may_have_another_width() -> None:
    layout = PageLayout(torch.float16, 16, "panels")
    arena = Arena.allocate(layout, 5, 3, 65, v_head_dim=17)
    assert (arena.k.shape, arena.v.shape) == ((5, 3, 16, 80), (5, 3, 16, 32))
    assert (arena.head_dim, arena.v_head_dim) == (65, 17)
    assert arena.num_bytes == 5 * layout.page_bytes(3, 65, 17)
    k, v = torch.zeros(2, 3, 4, 65).half(), torch.zeros(2, 3, 4, 17).half()
    arena.check_tokens(2, k, v)
    with pytest.raises(
        InputError, match=r"v must be torch.float16 \[2, 3, 4, 17\].* got torch.float16 \[2, 3, 4, 65\]"
    ):
        arena.check_tokens(2, k, k)
    with pytest.raises(InputError, match=r"arena slices must be \(16, 80\) for .* got \(16, 32\)"):
        Arena(arena.k, arena.v, layout, 65, 65)


RULES: dict[str, tuple[dict[str, Any], str]] = {
    "no scale": ({"scale": None}, "scale must be finite, got None"),
    "a scale of text": ({"scale": "1"}, "scale must be finite, got '1'"),
    "a cap of 0": ({"softcap": 0.0}, "softcap must be positive and finite, or None, got 0.0"),
    "a negative cap": ({"softcap": -1.0}, "softcap must be positive and finite, or None, got -1.0"),
    "a cap that is 0 in float32": ({"softcap": 1e-46}, "softcap must be positive and finite, or None, got 1e-46"),
    "an infinite cap": ({"softcap": math.inf}, "softcap must be positive and finite, or None, got inf"),
    "a cap of NaN": ({"softcap": math.nan}, "softcap must be positive and finite, or None, got nan"),
    "a cap that is a flag": ({"softcap": True}, "softcap must be positive and finite, or None, got True"),
    "a window of 0": ({"window": 0}, "window must be a whole number of tokens, at least 1, or None, got 0"),
    "a window of 1.5": ({"window": 1.5}, "window must be a whole number of tokens, at least 1, or None, got 1.5"),
    "a window that is a flag": ({"window": True}, "window must be a whole number of tokens, .* got True"),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_refuse(name: str) -> None:
    fields, message = RULES[name]
    with pytest.raises(InputError, match=message):
        ScoreRule(**({"scale": 1.0} | fields))


def test_layouts_are_equal_by_value_and_arenas_by_identity() -> None:
    layout = PageLayout(torch.float32)
    assert layout == PageLayout(torch.float32, 64, "rows")
    arena = Arena.allocate(layout, 1, 1, 8)
    assert arena != Arena(arena.k, arena.v, layout, 8, 8)


LAYOUT = PageLayout(torch.float32, 16)
K = torch.zeros(4, 2, 16, 8)
ARENAS = {
    "fewer slots of v": (K, K[:3], "contiguous and alike"),
    "strided k": (K.mT.contiguous().mT, K, "contiguous and alike"),
    "strided v": (K, torch.zeros(4, 2, 16, 16)[..., ::2], "contiguous and alike"),
    "v elsewhere": (K, K.to("meta"), "on one device, got cpu and meta"),
    "k of bf16": (K.bfloat16(), K, "dtypes torch.bfloat16, torch.float32 do not fit the layout's torch.float32"),
    "both of bf16": (K.bfloat16(), K.bfloat16(), "do not fit the layout's torch.float32"),
    "another page_size": (torch.zeros(4, 2, 32, 8), torch.zeros(4, 2, 32, 8), r"must be \(16, 8\) .* got \(32, 8\)"),
    "another head_dim": (torch.zeros(4, 2, 16, 10), torch.zeros(4, 2, 16, 10), r"must be \(16, 8\) .* got \(16, 10\)"),
    "three dims": (torch.zeros(2, 16, 8), torch.zeros(2, 16, 8), r"must be \(16, 8\) .* got \(8,\)"),
}


@pytest.mark.parametrize("name", ARENAS)
def test_arenas_refuse(name: str) -> None:
    k, v, message = ARENAS[name]
    with pytest.raises(InputError, match=message):
        Arena(k, v, LAYOUT, 8, 8)


def test_panels_store_padded_dims() -> None:
    with pytest.raises(InputError, match=r"must be \(16, 16\) .* got \(16, 8\)"):
        Arena(K, K, PageLayout(torch.float32, 16, "panels"), 8, 8)


def test_an_input_error_is_a_value_error_of_ours() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, TandemError)


@pytest.mark.parametrize("size", [True, 1e6, None, "16i", "", "G", "16 furlongs"])
def test_parse_bytes_refuses_what_is_no_size(size: object) -> None:
    with pytest.raises(InputError, match="expected a size such as '16GiB'"):
        parse_bytes(size)  # type: ignore[arg-type]


def of_mapping(address: int) -> dict[str, str]:
    """The fields that /proc/self/smaps has for the mapping of an address."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)[1:]:
        begin, end = (int(word, 16) for word in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return dict(re.findall(r"^(\w+): +(.*?) *$", mapping, flags=re.MULTILINE))
    raise AssertionError(f"no mapping of {address:#x}")


def test_memory_of_an_arena_is_taken_as_it_fills_in_huge_pages() -> None:
    if not machine.huge_pages().used:
        pytest.skip(f"no transparent huge pages of 2 MiB for who asks: {machine.huge_pages()}")
    arena = Arena.allocate(PageLayout(torch.bfloat16), 4096, 4, 128)  # 256 MiB each
    size = machine.HUGE_PAGE_BYTES
    for x in (arena.k, arena.v):
        begin = -(-x.data_ptr() // size) * size
        fields = of_mapping(begin)
        assert "hg" in fields["VmFlags"].split()
        assert (fields["Rss"], fields["AnonHugePages"]) == ("0 kB", "0 kB"), "allocating took memory"
        x[:80] = 1  # 5 MiB: at least one whole huge page
        fields = of_mapping(begin)
        assert 0 < int(fields["AnonHugePages"].split()[0]) * 1024 <= 6 << 20
        assert int(fields["Rss"].split()[0]) * 1024 <= 8 << 20
