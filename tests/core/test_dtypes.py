from __future__ import annotations

import pytest

from fastvar.core.dtypes import human_bytes, parse_bytes
from fastvar.errors import PlanError

AMOUNTS = {
    "15GiB": 15 << 30,
    "15GB": 15 * 10**9,
    "900MiB": 900 << 20,
    "1.5g": 3 << 29,
    " 2 tib ": 2 << 40,
    "1k": 1024,
    "1KB": 1000,
    "0.5 MiB": 1 << 19,
    "4096": 4096,
    "7B": 7,
}


@pytest.mark.parametrize("text", AMOUNTS)
def test_amounts_of_memory(text: str):
    assert parse_bytes(text) == AMOUNTS[text]


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "1e3", "15 bananas", "1.2.3G", "0", "0.4B", "inf", "nan", "\u0661GiB", "1GiBGiB", "9" * 400],
)
def test_what_is_no_amount_of_memory(text: str):
    with pytest.raises(PlanError, match="not understood") as caught:
        parse_bytes(text)
    assert "15GiB" in caught.value.expected


@pytest.mark.parametrize("size", [1, 1023, 1 << 10, 3 << 29, 15 << 30])
def test_what_is_written_is_read_back(size: int):
    assert parse_bytes(human_bytes(size)) == size
