"""Fixtures for all tests: a tiny random model, built into bundles once per run, whatever the number of its processes.

A process of the run has one core for itself: the threads of several pools would wait for each other.
"""

import contextlib
import functools
import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

# Before a library reads them. Programs that tests start inherit them, and the core.
for pool in ("OMP", "MKL", "OPENBLAS"):
    os.environ.setdefault(f"{pool}_NUM_THREADS", "1")
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # a sandbox may refuse
        os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})

REPOSITORY = Path(__file__).parent.parent
TOKENIZER = REPOSITORY / "demo" / "checkpoint" / "text_encoder" / "tokenizer.json"

# Few scales, two layers, one of them pruned: every kind of engine, as few of them as possible.
TINY_POLICY = """
restore_scale = 2
layers = [1, 2]
[scale.1]
skip = true
[scale.3]
skip = true
[scale.4]
skip = true
[scale.5]
skip = true
[scale.6]
keep = 0.5
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """A quarter of a trace's time goes into looking for garbage among what lives as long as the process."""
    if "onnxscript" in sys.modules:
        trace_fast()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@functools.cache
def trace_fast() -> None:
    """Another third goes into parsing the source of all operators of torch's exporter, anew for every graph.

    Graphs are traced in this process, where that is done once, unless a test asks for workers.
    """
    from fastvar.export import factory

    factory.usable_cores = lambda: 1
    with contextlib.suppress(ImportError, AttributeError):  # torch's own affair, which another version may settle
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say why they do not run."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _why_no_gpu() if marked else ""
    for item in marked:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    from fastvar.engines.tensorrt.cuda_device import CudaDevice
    from fastvar.errors import BackendError

    try:
        CudaDevice()
    except BackendError as error:
        return error.problem
    return ""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run a command line in an empty folder; gives (exit code, stdout, stderr)."""
    from fastvar import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run, the same for all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """What `make` writes to the path it is given, made by the first process that asks; the others wait."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            make(part)
            part.rename(path)
    return path


@pytest.fixture(scope="session")
def engine_cache(pytestconfig: pytest.Config) -> Path:
    """Engines kept from run to run in .pytest_cache: tracing takes a minute, and a key holds all it depends on."""
    return pytestconfig.cache.mkdir("engines")


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy file that skips most scales and prunes the last."""
    path = tmp_path_factory.mktemp("policy") / "tiny.toml"
    path.write_text(TINY_POLICY)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint():
    """Random weights in a model of two layers that reads the demo's words."""
    trace_fast()
    from transformers import T5Config

    from fastvar.export.checkpoints.random_weights import random_checkpoint_for
    from fastvar.families.infinity import ImageTokenizerConfig, TransformerConfig

    transformer = TransformerConfig(
        depth=2, width=64, heads=2, mlp_width=128, text_width=128, text_length=16, code_channels=8, chunks=1
    )
    images = ImageTokenizerConfig(bits=8, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1)
    encoder = T5Config(
        vocab_size=40, d_model=128, d_kv=32, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return random_checkpoint_for(transformer, images, encoder, name="tiny", tokenizer_file=TOKENIZER)


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(shared: Path, tiny_checkpoint) -> Path:
    """The tiny model as files in the official formats; read only."""
    import torch
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        encoder = folder / "text_encoder"
        encoder.mkdir(parents=True)
        torch.save(dict(tiny_checkpoint.transformer_weights), folder / "transformer.pth")
        torch.save({"vae": dict(tiny_checkpoint.image_tokenizer_weights)}, folder / "image_tokenizer.pth")
        tiny_checkpoint.text_encoder.save_pretrained(encoder)
        tied = "encoder.embed_tokens.weight"  # stored once, as shared.weight
        weights = {name: tensor for name, tensor in tiny_checkpoint.text_encoder_weights.items() if name != tied}
        save_file(weights, encoder / "model.safetensors")
        shutil.copy(TOKENIZER, encoder / "tokenizer.json")

    return made_once(shared / "tiny-checkpoint", write)


@pytest.fixture(scope="session")
def tiny_bundle(shared: Path, tiny_checkpoint, tiny_policy: Path, engine_cache: Path) -> Path:
    """A bundle of the tiny model at 256x256; read only: a test that damages a bundle copies it first."""
    import fastvar

    def build(out: Path) -> None:
        fastvar.build(tiny_checkpoint, size="256x256", policy=str(tiny_policy), out=out, cache=engine_cache)

    return made_once(shared / "tiny", build)


@pytest.fixture(scope="session")
def editing_bundle(shared: Path, tiny_checkpoint, tiny_policy: Path, engine_cache: Path) -> Path:
    """The tiny bundle with an image encoder; read only."""
    import fastvar

    def build(out: Path) -> None:
        options = {"size": "256x256", "policy": str(tiny_policy), "with_encoder": True}
        fastvar.build(tiny_checkpoint, out=out, cache=engine_cache, **options)

    return made_once(shared / "editing", build)


@pytest.fixture(scope="session")
def batched_bundle(shared: Path, tiny_checkpoint, tiny_policy: Path, engine_cache: Path) -> Path:
    """The tiny bundle with an image encoder, for passes of one, two and four images; read only."""
    import fastvar

    def build(out: Path) -> None:
        options = {"size": "256x256", "policy": str(tiny_policy), "with_encoder": True, "batch": (2, 4)}
        fastvar.build(tiny_checkpoint, out=out, cache=engine_cache, **options)

    return made_once(shared / "batched", build)


@pytest.fixture(scope="session")
def var_editing_bundle(shared: Path, engine_cache: Path) -> Path:
    """A tiny class-conditional bundle with an image encoder; read only."""
    trace_fast()
    from tests.models import tiny_var

    return made_once(shared / "var-editing", lambda out: tiny_var.build(out, engine_cache))
