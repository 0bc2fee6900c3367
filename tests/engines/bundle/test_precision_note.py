"""A bundle's precision was chosen on the CPU that built it: what is told of it elsewhere, and when nothing is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.core.precision import Precision, PrecisionChoice
from fastvar.core.version import __version__
from fastvar.engines.bundle import precision_note as noting
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest, manifest_from_json, manifest_to_json
from fastvar.engines.bundle.manifest_checks import check_manifest
from fastvar.engines.bundle.manifest_file import print_manifest
from fastvar.engines.bundle.precision_note import precision_note
from fastvar.engines.cache.product_speeds import ProductSpeeds, keep_speeds
from fastvar.errors import BundleError, OtherCpuWarning

MEASURED = PrecisionChoice(
    False, "measured to be clearly the fastest", "CPU there", "torch 2.13.0", {"float32": 99.2, "bfloat16": 190.2}
)
NOTE = (
    "the bundle computes in bf16, the fastest on the CPU that built it (CPU there): here it is fp32, with fp32 121, "
    "bf16 77, fp16 12 GFLOP/s a thread on CPU here. Build it here, or anywhere with --precision fp32"
)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder in which this CPU was measured to be fastest in fp32."""
    monkeypatch.setattr(noting, "cpu_identity", lambda: "CPU here")
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path / "cache"))
    keep(tmp_path / "cache", "float32")
    return tmp_path / "cache"


def keep(folder: Path, compute: str) -> None:
    gflops = {"float32": 121.0, "bfloat16": 77.0, "float16": 12.0}
    keep_speeds(folder, ProductSpeeds("CPU here", "2.13.0", __version__, "", gflops, compute))


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    found = Bundle.open(tiny_bundle).manifest
    return replace(found, precision=Precision("bfloat16"), precision_choice=MEASURED)


def test_another_precision_is_faster_here(manifest: Manifest, kept: Path):
    assert precision_note(manifest) == precision_note(manifest, kept) == NOTE


def test_nothing_is_told_where_it_suits_or_nothing_is_known(manifest: Manifest, kept: Path, tmp_path: Path):
    own = [
        None,  # an older bundle
        PrecisionChoice(True),
        PrecisionChoice(False, "onnxruntime computes in it unless it is asked for another"),
        replace(MEASURED, cpu="CPU here"),
    ]
    assert [precision_note(replace(manifest, precision_choice=choice)) for choice in own] == [""] * 4
    assert precision_note(replace(manifest, precision=Precision("float32"))) == ""
    assert precision_note(manifest, tmp_path / "nothing kept") == ""
    keep(kept, "bfloat16")
    assert precision_note(manifest) == ""


def noted(tiny_bundle: Path, out: Path, choice: PrecisionChoice) -> Path:
    """The tiny bundle, which computes in fp32, with another note."""
    shutil.copytree(tiny_bundle, out)
    manifest = replace(Bundle.open(tiny_bundle).manifest, precision_choice=choice)
    (out / "manifest.json").write_bytes(print_manifest(manifest))
    return out


def test_it_is_told_when_a_pipeline_is_loaded(tiny_bundle: Path, kept: Path, tmp_path: Path):
    bundle = noted(tiny_bundle, tmp_path / "bundle", MEASURED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.load(bundle).close()  # fp32 is the fastest here
    keep(kept, "bfloat16")
    with pytest.warns(OtherCpuWarning, match="computes in fp32, the fastest on the CPU that built it") as told:
        Pipeline.load(bundle).close()
    assert told[0].filename == __file__


def test_it_is_told_by_inspect_and_doctor(tiny_bundle: Path, kept: Path, tmp_path: Path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # it is not needed for it
    bundle = noted(tiny_bundle, tmp_path / "bundle", MEASURED)
    facts = json.loads(run("inspect", bundle, "--json")[1])
    line = f"fp32, {MEASURED.told}"
    assert facts["precision_choice"]["told"] == line
    assert "fp32 99, bf16 190 GFLOP/s a thread on CPU there with torch 2.13.0" in line
    assert facts["precision_choice"]["note"] == ""
    assert line in " ".join(run("inspect", bundle)[1].split())
    keep(kept, "bfloat16")
    note = json.loads(run("inspect", bundle, "--json")[1])["precision_choice"]["note"]
    assert note.startswith("the bundle computes in fp32")
    for command in ("inspect", "doctor"):
        out = " ".join(run(command, bundle)[1].split())
        assert line in out, command
        assert "Build it here, or anywhere with --precision bf16" in out, command


def test_a_bundle_of_an_older_version_is_read(tiny_bundle: Path, tmp_path: Path, run):
    data = manifest_to_json(Bundle.open(tiny_bundle).manifest)
    del data["precision_choice"]
    manifest = manifest_from_json(data)
    check_manifest(manifest)
    assert manifest.precision_choice is None
    shutil.copytree(tiny_bundle, tmp_path / "old")
    text = (tmp_path / "old" / "manifest.json").read_text()
    data = json.loads(text)
    del data["checksum"], data["precision_choice"]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(data))
    assert "fp32; why was not noted" in run("inspect", tmp_path / "old")[1]
    Pipeline.load(tmp_path / "old").close()


def test_what_is_noted_survives_the_disk(manifest: Manifest):
    data = json.loads(json.dumps(manifest_to_json(manifest)))
    assert manifest_from_json(data).precision_choice == MEASURED


@pytest.mark.parametrize(
    "changes",
    [
        {"gflops": {"float8": 1.0}},
        {"gflops": {"float32": -1.0}},
        {"gflops": {"float32": 1e9}},
        {"reason": "x" * 1000},
        {"cpu": "\x1b[2J"},
        {"library": "a\nb"},
    ],
)
def test_a_note_that_makes_no_sense_is_refused(manifest: Manifest, changes):
    with pytest.raises(BundleError, match="inconsistent"):
        check_manifest(replace(manifest, precision_choice=replace(MEASURED, **changes)))


def test_no_library_is_imported_for_it():
    """By a process that reads bundles."""
    code = "import sys, fastvar.engines.bundle.precision_note; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
