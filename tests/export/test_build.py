import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastvar.core.policy import ScaleRule
from fastvar.core.precision import Precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.errors import BuildError, FastvarError, NumericsError, PlanError
from fastvar.export.build import build, build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import Toolchain, make_toolchain
from fastvar.families.infinity import ImageTokenizerConfig
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from tests.conftest import REPOSITORY
from tests.models import tiny_models as tiny

# A dense scale, the cached one, a pruned one, and one that is pruned behind scales left out.
PLAN = tiny.plan(replace(tiny.POLICY, rules={**tiny.POLICY.rules, **dict.fromkeys((1, 5), ScaleRule(skip=True))}))
IMAGES = ImageTokenizerConfig(bits=6, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The tiny model as a checkpoint; it takes text features, not prompts."""
    made = random_checkpoint_for(tiny.CONFIG, IMAGES, name="tiny")
    return replace(made, transformer_weights=dict(tiny.model().state_dict()))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Bundle:
    out = tmp_path_factory.mktemp("built") / "bundle"
    build_bundle(checkpoint, PLAN, out, cache=engine_cache)
    return Bundle.open(out)


@pytest.mark.parametrize("rows", [1, 2])
def test_chained_engines_equal_the_reference(bundle: Bundle, rows: int):
    model, (features, mask) = tiny.model(), tiny.text(lengths=(5, 8)[:rows])
    sampling = Sampling(guidance_scale=3.0 if rows == 2 else 1.0, tau=0.7, top_p=0.9)
    workspace = Session(bundle).workspace(rows)
    uncond = features[1].numpy() if rows == 2 else None
    workspace.set_features(features[0].numpy(), uncond, (5, 8)[:rows])
    settings = SamplingSettings(sampling.guidance_scale, sampling.tau, sampling.top_p)
    expected = generate_scales(model, features, mask, PLAN, tiny.noise, sampling)
    ran = workspace.run_scales(lambda i, shape: tiny.noise(i, shape).numpy(), settings)
    for (calls, _), trace in zip(ran, expected, strict=True):
        logits = torch.from_numpy(workspace.read(calls.sampling_head, "logits"))
        assert (logits - trace.logits).norm() <= 1e-4 * trace.logits.norm()
        summed = torch.from_numpy(workspace.summed_codes(calls))
        torch.testing.assert_close(summed, trace.summed_codes[0], atol=1e-5, rtol=1e-5)


def test_a_second_build_traces_nothing(checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path, engine_cache: Path):
    again = build_bundle(checkpoint, PLAN, tmp_path / "b", cache=engine_cache)
    assert again.graphs_traced == 0
    assert Bundle.open(tmp_path / "b").digest == bundle.digest


def test_another_policy_reuses_what_is_equal(
    checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path, engine_cache: Path
):
    rules = {**PLAN.policy.rules, 6: ScaleRule(0.5)}
    policy = replace(tiny.POLICY, rules=rules)
    report = build_bundle(
        checkpoint,
        tiny.plan(policy),
        tmp_path / "b",
        options=BuildOptions(guidance="on"),
        cache=engine_cache,
    )
    # Only the two pruned halves of the last scale know its keep ratio.
    assert len(Bundle.open(tmp_path / "b").manifest.engines.keys() - bundle.manifest.engines.keys()) == 2
    assert report.graphs_traced <= 2, "none where an earlier run of this test has filled the cache"
    assert report.graphs_cached > 12


def test_manifest_bindings_exist_with_the_right_shapes(bundle: Bundle):
    weights = WeightFile(bundle.path / bundle.manifest.weights.file)
    for spec in bundle.manifest.engines.values():
        for tensor in spec.inputs:
            if tensor.name in spec.weights:
                assert weights.shape(spec.weights[tensor.name].format(layer=2)) == tensor.shape


@pytest.mark.parametrize(
    ("name", "weights", "named"),
    [
        ("head.weight", None, r"head\.weight"),
        ("blocks.1.sa.proj.weight", "int8", r"blocks\.1\.sa\.proj\.weight\.scale"),  # int8 itself knows no NaN
    ],
)
def test_weights_that_are_not_finite_leave_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, engine_cache: Path, name: str, weights: str | None, named: str
):
    broken = dict(checkpoint.transformer_weights)
    broken[name] = broken[name].clone()
    broken[name][0, 0] = float("nan")
    poisoned = replace(checkpoint, transformer_weights=broken)
    toolchain = make_toolchain(weights=weights)
    with pytest.raises(NumericsError, match=named):
        build_bundle(
            poisoned,
            tiny.first_and_last(),
            tmp_path / "b",
            BuildOptions(guidance="off"),
            toolchain=toolchain,
            cache=engine_cache,
        )
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.parametrize("length", [1, 9])
def test_text_length_beyond_the_model_is_refused(checkpoint: Checkpoint, tmp_path: Path, length: int):
    with pytest.raises(PlanError, match="text length"):
        build_bundle(checkpoint, PLAN, tmp_path / "b", BuildOptions(text_length=length))


def test_a_schedule_beyond_the_level_embedding_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path):
    short = replace(tiny_checkpoint, transformer=replace(tiny_checkpoint.transformer, max_scales=5))
    with pytest.raises(PlanError, match="7 scales"):
        build(short, size="256x256", policy="dense", out=tmp_path / "b")


def test_unknown_guidance_and_size_are_user_errors(tiny_checkpoint: Checkpoint, tmp_path: Path):
    with pytest.raises(FastvarError, match="guidance"):
        build(tiny_checkpoint, size="256x256", out=tmp_path / "b", guidance="maybe")
    with pytest.raises(PlanError, match="256x256"):
        build(tiny_checkpoint, size="250x250", out=tmp_path / "b")


@pytest.mark.parametrize("tile", [0, -1, 2.0, "3", True])
def test_a_tile_that_is_no_number_of_rows_is_refused(checkpoint: Checkpoint, tmp_path: Path, tile: object):
    with pytest.raises(BuildError, match=f"decoder tile {tile!r} not understood") as error:
        build_bundle(checkpoint, PLAN, tmp_path / "b", BuildOptions(decoder_tile=tile))
    assert "1 or more" in error.value.expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("channels", "alignment", "what"),
    [(24, 256, "a stripe's statistics of 24 channels takes 192 bytes"), (32, 2048, "a row of 32 channels and 8 col")],
)
def test_a_tile_whose_rows_a_library_does_not_address_is_refused(
    tmp_path: Path, channels: int, alignment: int, what: str
):
    class Choosy(OnnxRuntimeBackend):
        address_alignment = alignment

    made = random_checkpoint_for(tiny.CONFIG, replace(IMAGES, base_channels=channels), name="tiny")
    toolchain = Toolchain(Choosy(), "cpu", Precision())
    with pytest.raises(BuildError, match=what) as error:
        build_bundle(made, PLAN, tmp_path / "b", BuildOptions(decoder_tile=2), toolchain=toolchain)
    assert "--decoder-tile" in error.value.fix
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from tests.models import tiny_models as tiny
from tests.export.test_build import IMAGES, PLAN

def progress(name, done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

made = random_checkpoint_for(tiny.CONFIG, IMAGES, name="tiny")
build_bundle(made, PLAN, sys.argv[1], cache=sys.argv[2], progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_build_killed_in_the_middle_can_be_run_again(
    checkpoint: Checkpoint, bundle: Bundle, tmp_path: Path, engine_cache: Path
):
    out = tmp_path / "b"
    code = KILLED.replace("sys.argv[1]", "Path(sys.argv[1])").replace("sys.argv[2]", "Path(sys.argv[2])")
    command = [sys.executable, "-c", "from pathlib import Path\n" + code, str(out), str(engine_cache)]
    killed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists()
    build_bundle(checkpoint, PLAN, out, cache=engine_cache)
    assert Bundle.open(out).digest == bundle.digest
    assert [p.name for p in tmp_path.iterdir() if "building" in p.name] == []
