"""Measured speeds on the disk: whole or not at all, by CPU, and never believed where they cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fastvar.core.version import __version__
from fastvar.engines.cache.contents import MEASURED, contents, remove
from fastvar.engines.cache.product_speeds import CLEARLY, SPEEDS, ProductSpeeds, fastest, keep_speeds, kept_speeds

GFLOPS = {"float32": 99.2, "bfloat16": 190.2, "float16": 21.4, "int8": 323.5}


def speeds(cpu: str = "here", torch: str = "2.13.0", **changes) -> ProductSpeeds:
    found = {"cpu": cpu, "torch": torch, "fastvar": __version__, "when": "", "gflops": GFLOPS, "compute": "bfloat16"}
    return ProductSpeeds(**found | changes)


def test_coarser_numbers_must_be_clearly_faster():
    assert fastest({"float32": 100.0, "bfloat16": 100.0 * CLEARLY}) == "float32"
    assert fastest({"float32": 100.0, "bfloat16": 101.0 * CLEARLY}) == "bfloat16"
    assert fastest({"float32": 121.0, "bfloat16": 77.0, "float16": 135.0}) == "float16"
    assert fastest({"float32": 1.0}) == "float32"


def test_of_two_short_types_the_wider_range_unless_the_other_is_clearly_faster():
    assert fastest({"float32": 10.0, "bfloat16": 100.0, "float16": 105.0}) == "bfloat16"
    assert fastest({"float32": 10.0, "bfloat16": 100.0, "float16": 115.0}) == "float16"
    assert fastest({"float32": 10.0, "bfloat16": 100.0, "float16": 115.0}, ("float32", "bfloat16")) == "bfloat16"


def test_int8_is_never_chosen():
    assert fastest({"float32": 10.0, "int8": 1000.0}) == "float32"


def test_what_was_measured_is_found_by_cpu_and_torch(tmp_path: Path):
    assert kept_speeds(tmp_path, "here") is None
    for found in (speeds(), speeds("there"), speeds(torch="2.14.0"), speeds(fastvar="0.0.1", torch="2.15.0")):
        keep_speeds(tmp_path, found)
    assert kept_speeds(tmp_path, "here", "2.13.0") == speeds()
    assert kept_speeds(tmp_path, "here") == speeds(torch="2.14.0"), "the last of this version of fastvar"
    assert kept_speeds(tmp_path, "here", "2.15.0") is None
    assert kept_speeds(tmp_path, "elsewhere") is None
    keep_speeds(tmp_path, speeds(compute="float32"))
    assert kept_speeds(tmp_path, "here", "2.13.0") == speeds(compute="float32"), "in place of the older"


@pytest.mark.parametrize(
    "damage",
    [
        lambda entries: b"",
        lambda entries: b"[",
        lambda entries: b"\xff\xfe",
        lambda entries: b"[" * 10_000,
        lambda entries: b"{}",
        lambda entries: [{**entries[0], "gflops": {**GFLOPS, "float32": -1.0}}],
        lambda entries: [{**entries[0], "gflops": {**GFLOPS, "float32": 0.0}}],
        lambda entries: [{**entries[0], "gflops": {**GFLOPS, "float32": 1e30}}],
        lambda entries: [{**entries[0], "gflops": {**GFLOPS, "bfloat16": "fast"}}],
        lambda entries: [{**entries[0], "gflops": {**GFLOPS, "float8": 1.0}}],
        lambda entries: [{**entries[0], "gflops": {"float32": 1.0, "bfloat16": 1.0}}],
        lambda entries: [{**entries[0], "compute": "int8"}],
        lambda entries: [{**entries[0], "compute": "float64"}],
        lambda entries: [{**entries[0], "more": 1}],
        lambda entries: [{name: value for name, value in entries[0].items() if name != "compute"}],
    ],
)
def test_a_file_that_is_not_whole_is_measured_anew(tmp_path: Path, damage, caplog: pytest.LogCaptureFixture):
    keep_speeds(tmp_path, speeds())
    damaged = damage(json.loads((tmp_path / SPEEDS).read_bytes()))
    (tmp_path / SPEEDS).write_bytes(damaged if isinstance(damaged, bytes) else json.dumps(damaged).encode())
    with caplog.at_level(logging.WARNING):
        assert kept_speeds(tmp_path, "here") is None
    assert ("damaged" in caplog.text) == (damaged != b"")
    keep_speeds(tmp_path, speeds())
    assert kept_speeds(tmp_path, "here") == speeds(), "and kept again"


def test_what_cannot_be_kept_is_told_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        keep_speeds(tmp_path / "file", speeds())
    assert SPEEDS in caplog.text


def test_it_is_removed_with_the_cache(tmp_path: Path):
    keep_speeds(tmp_path, speeds())
    (item,) = contents(tmp_path)
    assert (item.kind, [file.name for file in item.files]) == (MEASURED, [SPEEDS])
    remove([item])
    assert kept_speeds(tmp_path, "here") is None
