"""The command line on GPU engines, on a machine that has no GPU: it builds, shows, and says what is missing."""

import json
import lzma
from pathlib import Path

import pytest

from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.tensorrt.cuda_device import NO_DRIVER
from tests.fakes.tensorrt import fake_gpu_bundle
from tests.runtime.test_damaged_bundle import flip

pytest.importorskip("tensorrt_rtx")
NO_GPU = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is a GPU")
RTX = ("--backend", "tensorrt-rtx")


@pytest.fixture(scope="module")
def built(
    tiny_checkpoint_folder: Path, tiny_policy: Path, engine_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model for three generations of GPUs, from the command line."""
    from fastvar import cli

    out = tmp_path_factory.mktemp("rtx") / "bundle"
    size = ("--size", "256x256", "--policy", str(tiny_policy), "--guidance", "on", "--cache", str(engine_cache))
    arguments = ("build", str(tiny_checkpoint_folder), *size, *RTX, "--target", "SM120,sm86, sm89", "--out", str(out))
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    return out


def test_engines_are_built_for_every_target_at_once(built: Path):
    manifest = Bundle.open(built, verify="all").manifest
    assert {(spec.backend, spec.target) for spec in manifest.engines.values()} == {("tensorrt-rtx", "sm86,sm89,sm120")}
    assert manifest.precision.label == "bf16"
    for spec in manifest.engines.values():
        assert spec.file.endswith(".engine.xz")
        assert spec.report.kernels > 0
        assert lzma.decompress((built / spec.file).read_bytes()), spec.name


def test_every_attention_of_every_block_is_one_kernel(built: Path, run):
    """In the table and in the JSON behind it."""
    code, out, _ = run("inspect", built, "--json")
    facts = json.loads(out)
    assert code == 0
    blocks = {name: engine for name, engine in facts["engines"].items() if name.startswith("attn_mlp")}
    assert blocks
    for name, engine in blocks.items():
        assert engine["attentions"] == engine["fused_attentions"] == 2, name
    code, out, _ = run("inspect", built, "--engines")
    assert code == 0
    assert "4/4" in out
    assert "scratch" in out
    assert "tensorrt-rtx" in out
    assert "target sm86,sm89,sm120" in out
    assert "bf16, auto" in out


@NO_GPU
def test_drawing_without_a_driver_is_told_in_one_line(built: Path, run, tmp_path: Path):
    code, out, err = run("generate", built, "a red circle")
    assert (code, out, err) == (2, "", f"error: {NO_DRIVER}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_refused_before_the_library_sees_it(tiny_bundle: Path, run, tmp_path: Path):
    path = fake_gpu_bundle(tiny_bundle, tmp_path / "bundle")
    engine = next((path / "engines").iterdir())
    flip(engine)
    code, _, err = run("generate", path, "a red circle")
    assert code == 2
    assert f"{engine.name} is damaged" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((*RTX, "--target", "sm86", "--weights", "fp8"), "sm86 has no fp8: --weights fp8 needs"),
        ((*RTX, "--target", "sm89,sm86", "--weights", "fp8"), "sm86 has no fp8"),
        ((*RTX, "--target", "sm75"), "builds for no GPU 'sm75'"),
        ((*RTX, "--target", "sm99"), "builds for no GPU 'sm99'"),
        ((*RTX, "--target", "cpu"), "builds for no GPU 'cpu'"),
        ((*RTX, "--target", "sm86", "--precision", "int4"), "no precision 'int4'"),
        (("--precision", "bf16"), "onnxruntime does not compute in bfloat16"),
        (("--target", "sm86"), "onnxruntime does not build for target 'sm86'"),
        ((*RTX, "--target", "sm86", "--via", "torch-tensorrt"), "for the backend tensorrt, not tensorrt-rtx"),
        (("--backend", "tensort"), "no backend 'tensort'"),
    ],
)
def test_what_cannot_be_built_is_told_plainly_and_leaves_nothing(
    tiny_checkpoint_folder: Path, run, tmp_path: Path, options: tuple[str, ...], said: str
):
    code, out, err = run("build", tiny_checkpoint_folder, "--size", "256x256", "--out", "bundle", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert list(tmp_path.iterdir()) == []


@NO_GPU
def test_the_gpu_in_this_machine_is_none(tiny_checkpoint_folder: Path, run):
    code, _, err = run("build", tiny_checkpoint_folder, "--size", "256x256", "--out", "bundle", *RTX)
    assert code == 2
    assert "--target, sm86 for an RTX 3090" in err


def test_fp32_attention_needs_a_word_of_consent(
    tiny_checkpoint_folder: Path, tiny_policy: Path, engine_cache: Path, run, tmp_path: Path
):
    size = ("--size", "256x256", "--policy", tiny_policy, "--guidance", "on", "--cache", engine_cache, "--out", "b")
    options = (*size, *RTX, "--target", "sm86", "--precision", "fp32")
    code, _, err = run("build", tiny_checkpoint_folder, *options)
    assert code == 2
    assert "attentions became one kernel each" in err
    assert "--allow-unfused" in err
    assert not (tmp_path / "b").exists()
    code, out, _ = run("build", tiny_checkpoint_folder, *options, "--allow-unfused")
    assert code == 0
    assert "built b" in out
