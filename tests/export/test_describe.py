"""What is described before a build is what the build then finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.core.plan import Batch
from fastvar.core.precision import Precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.engines.spec import EngineSpec
from fastvar.errors import BackendError
from fastvar.export.checkpoints.weight_sources import edge_weights, engine_weights
from fastvar.export.describe import Describer, describe
from fastvar.export.tracing.onnx import layer_weights, trace
from fastvar.runtime.memory.layout import build_layout


def without_files(manifest: Manifest) -> Manifest:
    """What only a compiler and a file system can say, left out."""
    engines = {name: replace(spec, **FILE_FACTS) for name, spec in manifest.engines.items()}
    weights = replace(manifest.weights, sha256="", size_bytes=0)
    return replace(manifest, engines=engines, weights=weights, text_tokenizer=None, precision_choice=None)


FILE_FACTS = {"file": "", "sha256": "", "size_bytes": 0, "target": "", "library_version": ""}


def same_sets(spec: EngineSpec) -> EngineSpec:
    """Engines are bound by name: the order of their tensors is the exporter's."""
    by_name = {key: tuple(sorted(getattr(spec, key), key=lambda t: t.name)) for key in ("inputs", "outputs")}
    return replace(spec, **by_name)


def test_the_described_manifest_is_that_of_the_build(tiny_bundle: Path, tiny_checkpoint):
    built = Bundle.open(tiny_bundle).manifest
    described = describe(tiny_checkpoint, built.plan, backend_class("onnxruntime"), Precision())
    found, expected = without_files(described), without_files(built)
    assert found.engines.keys() == expected.engines.keys()
    for name, spec in found.engines.items():
        assert same_sets(spec) == same_sets(expected.engines[name]), name
    assert replace(found, engines={}) == replace(expected, engines={})
    for rows in (1, 2):
        assert build_layout(described, rows).arena_bytes == build_layout(built, rows).arena_bytes


def test_every_kind_of_graph_has_the_border_that_was_described(tiny_bundle: Path, tiny_checkpoint):
    """Of 16-bit graphs with 8-bit weights, which no backend here runs, one of each kind, stages of the decoder too."""
    precision = Precision("bfloat16", "int8")
    from fastvar.export.assembly import assemble

    c, plan = tiny_checkpoint, Bundle.open(tiny_bundle).manifest.plan
    assembly = assemble(plan, c.transformer, c.image_tokenizer, c.text_encoder, 16, [Batch(2)], decoder_tile=5)
    kinds = {(graph.factory, len(graph.factory(**graph.arguments).inputs)): graph for graph in assembly.graphs.values()}
    sources = engine_weights(c, False, precision) | edge_weights()
    describer = Describer(sources, backend_class("tensorrt-rtx"), precision)
    for graph in kinds.values():
        module = graph.factory(**graph.arguments)
        traced = trace(module, layer_weights(sources, graph.weight_binding(module), graph.layer), precision)
        spec = describer.engine(graph)
        assert set(spec.inputs) == set(traced.inputs), graph.name
        assert set(spec.outputs) == set(traced.outputs), graph.name


def test_no_library_is_needed_to_describe(monkeypatch):
    from fastvar.engines.tensorrt import backend as tensorrt

    monkeypatch.setattr(tensorrt, "import_extra", lambda *_: pytest.fail("the library was asked for"))
    assert backend_class("tensorrt-rtx").address_alignment == 256
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        backend_class("cuda")
