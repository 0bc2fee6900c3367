"""Estimates of scratch memory against what a compiler reports; a report that is there is never overruled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastvar.core.plan import Batch, make_plan
from fastvar.core.precision import Precision
from fastvar.engines.bundle.estimates import FIXED, library_bytes, with_estimates
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.engines.spec import EngineReport
from fastvar.export.checkpoints.random_weights import random_checkpoint
from fastvar.export.checkpoints.weight_sources import engine_weights
from fastvar.export.describe import describe
from fastvar.export.factory import EngineFactory
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for

BF16 = Precision("bfloat16")


def described(size: int, policy: str = "fastvar", backend: str = "tensorrt-rtx", **options: object) -> Manifest:
    checkpoint, schedule = random_checkpoint("infinity_layer12"), schedule_for((size, size))
    plan = make_plan(schedule, INFINITY.policy(policy, schedule, 12), 12)
    precision = BF16 if backend == "tensorrt-rtx" else Precision()
    return describe(checkpoint, plan, backend_class(backend), precision, BuildOptions(guidance="on", **options))


@pytest.mark.parametrize("kind", ["qkv_pruned", "attn_mlp_pruned", "sampling_head"])
def test_estimates_are_close_to_the_compilers_report(kind: str, engine_cache):
    """One engine of each kind, of the last scale at 512x512."""
    pytest.importorskip("tensorrt_rtx")
    from fastvar.engines.cache.engine_cache import EngineCache
    from fastvar.export.assembly import assemble

    checkpoint, manifest = random_checkpoint("infinity_layer12"), with_estimates(described(512))
    name = getattr(manifest.sets[0].steps[-1], kind)
    graphs = assemble(manifest.plan, checkpoint.transformer, checkpoint.image_tokenizer, None, 512, [Batch(2)]).graphs
    toolchain = make_toolchain("tensorrt-rtx", "sm86")
    factory = EngineFactory(toolchain, EngineCache(engine_cache), engine_weights(checkpoint, False, BF16), 1)
    reported = factory.make({name: graphs[name]}, lambda _: None)[name].engine.report.scratch_bytes
    assert 0.9 < manifest.engines[name].report.scratch_bytes / reported < 1.4  # small ones: most of it is FIXED


def test_a_report_is_never_overruled():
    manifest = described(256)
    name = manifest.decoder
    report = EngineReport(scratch_bytes=7, kernels=3)
    compiled = replace(manifest.engines[name], report=report)
    found = with_estimates(replace(manifest, engines={**manifest.engines, name: compiled})).engines
    assert found[name].report == report
    assert all(spec.report.scratch_bytes >= FIXED for other, spec in found.items() if other != name)


def test_pruned_engines_work_in_less_than_dense_ones():
    dense, pruned = (with_estimates(described(512, policy)) for policy in ("dense", "fastvar"))
    last = [m.engines[m.sets[0].steps[-1].attn_mlp_pruned or m.sets[0].steps[-1].attn_mlp] for m in (dense, pruned)]
    assert last[0].report.scratch_bytes > last[1].report.scratch_bytes


def test_stripes_of_the_decoder_work_in_less_than_the_whole():
    whole = with_estimates(described(512)).engines
    tiled = with_estimates(described(512, decoder_tile=4)).engines
    assert max(e.report.scratch_bytes for n, e in tiled.items() if n.startswith("decoder")) < (
        whole["decoder-32x32"].report.scratch_bytes / 4
    )


def test_on_the_host_the_library_is_estimated_as_a_whole():
    manifest = described(512, backend="onnxruntime")
    assert with_estimates(manifest) is manifest
    assert library_bytes(manifest) > library_bytes(described(256, backend="onnxruntime"))
    assert library_bytes(described(512, backend="onnxruntime", decoder_tile=2)) < library_bytes(manifest) / 2
