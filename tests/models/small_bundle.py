"""Graphs of a few nodes and a bundle of a few bytes, to test the machinery around real ones."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from fastvar.core.plan import make_plan
from fastvar.core.schedule import ScaleSchedule
from fastvar.engines.bundle.bundle import BundleWriter
from fastvar.engines.bundle.manifest import EngineSet, Manifest, StepEngines
from fastvar.engines.bundle.weight_file import write_weights
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.families.infinity import ImageTokenizerConfig, TransformerConfig
from fastvar.families.infinity_presets import fastvar_policy

ROOT = Path(__file__).parents[2]  # where child processes find this module
TRANSFORMER = TransformerConfig(
    depth=2, width=64, heads=4, mlp_width=256, text_width=128, text_length=8, code_channels=16, max_scales=7
)
SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16)), (64, 64))


def tensor(name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(
    nodes: list[NodeProto], inputs: list[ValueInfoProto], outputs: list[ValueInfoProto], opset: int = 20
) -> bytes:
    model = helper.make_model(
        helper.make_graph(nodes, "small", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    return model.SerializeToString()


def linear(rows: int = 3, width: int = 4) -> bytes:
    """y = x @ w"""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return graph([node], [tensor("x", [rows, width]), tensor("w", [width, width])], [tensor("y", [rows, width])])


def linear_spec(version: str = "1.30.0", rows: int = 3, width: int = 4) -> EngineSpec:
    inputs = (TensorSpec("x", "float32", (rows, width)), TensorSpec("w", "float32", (width, width)))
    outputs = (TensorSpec("y", "float32", (rows, width)),)
    return EngineSpec(
        "linear", "engines/linear.onnx", "", 0, inputs, outputs, {"w": "layer.{layer}.w"}, "onnxruntime", "cpu", version
    )


def write_bundle(writer: BundleWriter, engine: bytes = b"engine", value: float = 1.0) -> Manifest:
    """Fill a bundle up to the point of `writer.commit`."""
    file, sha256, size = writer.add_engine("linear", engine, ".onnx")
    spec = dataclasses.replace(linear_spec(), file=file, sha256=sha256, size_bytes=size)
    weights = write_weights(
        writer.path("weights.safetensors"),
        {"layer.0.w": TensorSpec("layer.0.w", "float32", (4, 4))},
        lambda _: np.full((4, 4), value, np.float32),
    )
    source = writer.path("source.json")
    source.write_text("{}")
    tokenizer = writer.add_file(source, "tokenizer.json")
    source.unlink()
    plan = make_plan(SCHEDULE, fastvar_policy(SCHEDULE, 2), 2)
    step = StepEngines("linear", "linear", "linear", "linear", "linear")
    return Manifest(
        family="infinity",
        model="small",
        transformer=TRANSFORMER,
        image_tokenizer=ImageTokenizerConfig(bits=16, base_channels=32),
        plan=plan,
        text_length=8,
        engines={"linear": spec},
        sets=(EngineSet(2, "linear", "linear", (step,) * len(plan.steps)),),
        text_encoder="linear",
        decoder="linear",
        weights=weights,
        text_tokenizer=tokenizer,
        checkpoint_digest="0" * 64,
        fastvar_version="0.1.0",
    )


def make_bundle(out: Path, engine: bytes = b"engine", value: float = 1.0) -> Manifest:
    with BundleWriter(out) as writer:
        manifest = write_bundle(writer, engine, value)
        writer.commit(manifest)
    return manifest
