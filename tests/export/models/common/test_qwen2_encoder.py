"""HART's text encoder against transformers' own forward, in torch and as an engine."""

import functools

import pytest
import torch

from fastvar.core.precision import Precision
from fastvar.core.tensors import TensorRef
from fastvar.engines.registry import get_backend
from fastvar.engines.spec import EngineSpec
from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.models.common.qwen2_encoder import Qwen2Encoder, qwen2_role, qwen2_shapes, qwen2_vl_text
from fastvar.export.models.common.weights import plain_weights
from fastvar.export.tracing.onnx import layer_weights, trace

LENGTH, PREFIX, COUNTED = 14, 5, 10
CONTEXT = LENGTH - PREFIX


def config(**changes):
    from transformers import Qwen2Config

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2Config(**sizes, **heads, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **changes)


@functools.cache
def weights():
    return {name: tensor.float() for name, tensor in RandomWeights(qwen2_shapes(config())).items()}


def text(left=False):
    ids = torch.arange(LENGTH)[None] * 2
    counted = torch.arange(LENGTH) >= LENGTH - COUNTED if left else torch.arange(LENGTH) < COUNTED
    return ids, counted.long()[None]


def published(ids, mask):
    """transformers' forward, attention and mask its own."""
    from transformers import Qwen2Model

    model = Qwen2Model._from_config(config(), attn_implementation="eager").eval()
    model.load_state_dict(weights())
    with torch.no_grad():
        return model(ids, attention_mask=mask).last_hidden_state[0, -CONTEXT:]


def test_features_are_those_of_transformers_padding_included():
    module = Qwen2Encoder(config(), CONTEXT, PREFIX)
    ids, mask = text()
    assert (ids.shape, mask.shape) == tuple(module.input_shapes().values())
    features = module(ids, mask, weights())
    assert features.shape == module.output_shapes()["features"]
    assert torch.allclose(features, published(ids, mask), atol=1e-5)
    assert not torch.allclose(features, module(ids, torch.ones_like(mask), weights()), atol=1e-2)


def test_padding_in_front_that_sees_nothing_is_finite():
    ids, mask = text(left=True)
    features = Qwen2Encoder(config(), LENGTH)(ids, mask, weights())
    assert features.isfinite().all()
    assert torch.allclose(features[-CONTEXT:], published(ids, mask), atol=1e-5)


def test_the_engine_gives_the_same():
    module, backend = Qwen2Encoder(config(), CONTEXT, PREFIX), get_backend("onnxruntime")
    sources = plain_weights("", qwen2_shapes(config()), weights(), qwen2_role)
    sources = {name.removeprefix("."): source for name, source in sources.items()}
    traced = trace(module, layer_weights(sources, {name: name for name in module.weights}))
    target, version = backend.resolve_target(None, Precision()), backend.version()
    engine = backend.build(traced.graph, target).engine
    assert len(engine) < 100_000  # no weight is inside
    spec = EngineSpec("t", "", "", len(engine), traced.inputs, traced.outputs, {}, "onnxruntime", target, version)
    features = torch.empty(CONTEXT, 32)
    ids, mask = text()
    tensors = {**weights(), "ids": ids, "attention_mask": mask, "features": features}
    types = {torch.int64: "int64", torch.float32: "float32"}
    refs = {name: TensorRef(t.data_ptr(), types[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    backend.load(engine, spec).prepare(refs)()
    assert torch.allclose(features, published(ids, mask), atol=1e-5)


@pytest.mark.parametrize(("compute", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_in_16_bits_the_stream_stays_fp32(compute, tolerance):
    module, streams = Qwen2Encoder(config(), CONTEXT, PREFIX), []
    module.model.layers[0].register_forward_hook(lambda _, __, out: streams.append(out.dtype))
    ids, mask = text()
    types = {name: getattr(torch, qwen2_role(name).dtype(Precision(compute))) for name in module.weights}
    features = module(ids, mask, {name: weights()[name].to(types[name]) for name in module.weights})
    exact = published(ids, mask)
    assert 0 < (features - exact).norm() / exact.norm() < tolerance
    assert streams == [torch.float32]
    assert types["norm.weight"] == types["layers.1.input_layernorm.weight"] == torch.float32


def test_the_published_size():
    shapes = qwen2_shapes(qwen2_vl_text())
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_543_714_304
    assert shapes["layers.27.self_attn.k_proj.weight"] == (256, 1536)


def test_a_sliding_window_is_refused():
    with pytest.raises(CheckpointError, match="sliding window"):
        Qwen2Encoder(config(use_sliding_window=True, sliding_window=4), CONTEXT, PREFIX)
