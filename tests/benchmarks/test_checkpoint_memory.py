"""Reading a checkpoint in shards and writing a bundle's weights takes a shard's memory, not a checkpoint's."""

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import checkpoint_memory
from benchmarks.checkpoint_memory import Measured, Peak
from fastvar.core.precision import Precision

MIB = 1 << 20
READING = 192 * MIB  # of tensors in hand, and of what libraries take when they are first used
PREVIEW = 384 * MIB  # of the image decoder, which runs once on small latents


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="anonymous memory is counted by Linux")
@pytest.mark.parametrize("pickled", [True, False], ids=["pickle", "safetensors"])
def test_memory_follows_the_shards_and_not_the_checkpoint(tmp_path: Path, pickled: bool):
    """400 M numbers, 800 MiB in all: what is allowed is less."""
    found = checkpoint_memory.measured(tmp_path, "var_d16", pickled, 24 * MIB, Precision("bfloat16"))
    assert found.checkpoint_bytes > 600 * MIB
    assert found.weight_bytes > 600 * MIB
    assert found.shards > 10
    for peak, working in ((found.loading, READING), (found.writing, READING + PREVIEW)):
        allowed = 1.3 * found.largest_shard + working
        assert peak.anonymous - peak.before < allowed < found.checkpoint_bytes
    assert found.loading.resident > found.checkpoint_bytes / 2  # its pages were mapped
    assert not (tmp_path / "checkpoint").exists()


def test_a_record_keeps_other_models_and_a_broken_bound_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, anonymous = tmp_path / "record.json", 3 << 30

    def measured(_place: Path, model: str, pickled: bool, shard_bytes: int, precision: Precision) -> Measured:
        peak = Peak(0, anonymous, anonymous, 1.0)
        form = "pickle" if pickled else "safetensors"
        return Measured(model, form, 2, shard_bytes, 3 * shard_bytes, 0, precision.label, peak, peak)

    monkeypatch.setattr(checkpoint_memory, "measured", measured)
    app = typer.Typer()
    app.command()(checkpoint_memory.main)
    call = lambda *options: CliRunner().invoke(app, [*options, "--out", str(out)]).exit_code  # noqa: E731
    assert call("--models", "a", "--shard", "1GiB") == 0
    anonymous = 5 << 30
    assert call("--models", "b", "--shard", "1GiB", "--formats", "pickle") == 1
    rows = json.loads(out.read_text())["measured"]
    assert [(row["model"], row["format"]) for row in rows] == [("a", "pickle"), ("a", "safetensors"), ("b", "pickle")]
    assert rows[0]["bound"] == int(1.3 * (1 << 30)) + (2 << 30)
