"""Tables: three formats come to the same rows, and what cannot be understood is a row of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fastvar import SamplingParams
from fastvar.bulk.items import BadItem, Item, items_of
from fastvar.bulk.rows import BadRow, Row, read_rows
from fastvar.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red circle, large", "seed": 7, "guidance_scale": 2.5, "negative_prompt": "blue"},
    {"prompt": "Ж", "tau": 0.5, "num_images": 2, "id": "second"},
    {"class_label": "3", "top_k": 5},
]


def table(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"table{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        names = sorted({name for row in rows for name in row})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{n: row.get(n) for n in names} for row in rows]), file)
    elif suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, sorted({name for row in rows for name in row}))
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str):
    first, second, third = read_rows(table(tmp_path, suffix, ROWS))
    assert isinstance(first, Row)
    assert (first.number, first.kind, first.subject) == (1, "prompt", "a red circle, large")
    assert first.params == SamplingParams(guidance_scale=2.5, seed=7, negative_prompt="blue")
    assert isinstance(second, Row)
    assert (second.subject, second.name, second.params.tau, second.params.num_images) == ("Ж", "second", 0.5, 2)
    assert isinstance(third, Row)
    assert (third.kind, third.subject, third.params.top_k) == ("class_label", "3", 5)


def test_a_seed_that_is_not_given_is_the_same_every_time_and_another_in_every_row(tmp_path: Path):
    file = table(tmp_path, ".jsonl", [{"prompt": "a"}, {"prompt": "a"}])
    seeds = [[row.params.seed for row in read_rows(file) if isinstance(row, Row)] for _ in range(2)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_what_rows_leave_unsaid_is_what_was_given(tmp_path: Path):
    file = table(tmp_path, ".jsonl", [{"prompt": "a"}, {"prompt": "b", "guidance_scale": 2}])
    given = SamplingParams(guidance_scale=5.0, tau=0.5)
    scales = [(row.params.guidance_scale, row.params.tau) for row in read_rows(file, given) if isinstance(row, Row)]
    assert scales == [(5.0, 0.5), (2, 0.5)]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"seed": 3}, "no prompt"),
        ({"prompt": "a", "class_label": 3}, "both prompt and class_label"),
        ({"prompt": 3}, "prompt 3 is a int"),
        ({"prompt": "a", "steps": 3}, "unknown field 'steps'"),
        ({"prompt": "a", "seed": "x"}, "seed 'x' not understood"),
        ({"prompt": "a", "seed": -1}, "seed -1 is out of range"),
        ({"prompt": "a", "tau": 0}, "tau 0 is out of range"),
        ({"prompt": "a", "mask": "m.png"}, "a mask without an image"),
        ({"prompt": "a", "fit": "crop"}, "fit without an image"),
        ({"prompt": "a", "tau": 1, "temperature": 1}, "the same parameter"),
    ],
)
def test_a_bad_row_says_what_is_wrong_and_the_rest_goes_on(tmp_path: Path, row: dict[str, Any], told: str):
    bad, good = read_rows(table(tmp_path, ".jsonl", [{"id": "x", **row}, {"prompt": "a"}]))
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.name) == (1, "x")
    assert told in str(bad.error)
    assert isinstance(good, Row)


def test_lines_that_are_no_objects_are_bad_rows(tmp_path: Path):
    file = tmp_path / "table.jsonl"
    file.write_text('{"prompt": "a"}\n\nnot json\n[1]\n{"prompt": "b"}\n')
    kinds = [type(row) for row in read_rows(file)]
    assert kinds == [Row, BadRow, BadRow, Row]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("table.txt", b"a", "no table that is read"),
        ("table.csv", b"prompt,source\na,b\n", "columns that are not known: 'source'"),
        ("table.csv", b"\xff\xfe", "cannot read"),
        ("table.parquet", b"no parquet", "cannot be read"),
        ("absent.jsonl", None, "cannot read"),
    ],
)
def test_what_is_no_table(tmp_path: Path, name: str, content: bytes | None, told: str):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=told):
        list(read_rows(file))


def test_values_and_columns_of_other_numbers(tmp_path: Path):
    file = tmp_path / "table.csv"
    file.write_text("prompt,seed\na,1\nb,2,3\nc\nd,4\n")
    assert [type(row) for row in read_rows(file)] == [Row, BadRow, BadRow, Row]


# Keys


def keys(folder: Path, rows: list[dict[str, Any]], digest: str = "d") -> list[str]:
    return [item.key for item in items_of(read_rows(table(folder, ".jsonl", rows)), digest)]


def test_a_key_says_all_that_decides_an_image(tmp_path: Path):
    base = {"prompt": "a", "seed": 1}
    others: list[dict[str, Any]] = [
        {"seed": 2},
        {"prompt": "b"},
        {"guidance_scale": 2},
        {"tau": 0.5},
        {"negative_prompt": "x"},
    ]
    found = keys(tmp_path, [base, *(base | other for other in others)])
    assert len(set(found)) == len(found)
    assert keys(tmp_path, [base], "other")[0] != found[0]
    assert keys(tmp_path, [{"prompt": "z"}, base | {"id": "named"}])[1] == found[0], "neither place nor name decide"


def test_images_of_a_row_have_a_key_each(tmp_path: Path):
    several = keys(tmp_path, [{"prompt": "a", "seed": 1, "num_images": 3}])
    assert several == keys(tmp_path, [{"prompt": "a", "seed": seed} for seed in (1, 2, 3)])


def test_images_count_by_their_content(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"one")
    (tmp_path / "c.png").write_bytes(b"two")
    rows = [{"prompt": "p", "seed": 1, "image": f"{name}.png"} for name in "abc"]
    a, b, c = keys(tmp_path, rows)
    assert a == b != c
    (item,) = items_of(read_rows(table(tmp_path, ".jsonl", [{"prompt": "p", "image": "none.png"}])), "d")
    assert isinstance(item, BadItem)
    assert "cannot read" in item.error["problem"]


def test_items_travel_as_json(tmp_path: Path):
    for item in items_of(read_rows(table(tmp_path, ".jsonl", ROWS)), "d"):
        assert isinstance(item, Item)
        assert Item(**json.loads(json.dumps(item.to_json()))) == item
