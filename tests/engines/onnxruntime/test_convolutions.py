"""Winograd convolutions and group norms of scale and shift, against the graph as it was."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import NodeProto, helper

from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.engines.onnxruntime.convolutions import FEWEST_CHANNELS, Convolution
from fastvar.engines.onnxruntime.rewriting import rewritten
from tests.models.small_bundle import graph, tensor

READ, WRITTEN = FEWEST_CHANNELS, FEWEST_CHANNELS + 8


def run(model: bytes, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """As the backend does: the thread pool is the process's, whichever test made it."""
    results: list[np.ndarray] = OnnxRuntimeBackend()._session(model).run(None, given)
    return results


def numbers(model: bytes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, of a mean that is not zero, in the shapes that a model takes."""
    rng = np.random.default_rng(seed)
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load_from_string(model).graph.input
    }
    return {name: rng.standard_normal(shape, np.float32) + np.float32(0.5) for name, shape in shapes.items()}


def operators(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(model).graph.node)


def assert_equal_within_rounding(model: bytes, given: dict[str, np.ndarray] | None = None) -> bytes:
    """The rewritten graph, which is another one and gives the same."""
    changed, given = rewritten(model), given or numbers(model)
    assert changed != model
    for before, after in zip(run(model, given), run(changed, given), strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=3e-5 * np.abs(before).max())
    return changed


def convolution(
    size: tuple[int, int], pads: tuple[int, ...], channels: tuple[int, int] = (READ, WRITTEN), **attributes: object
) -> bytes:
    """y = conv(x)"""
    (height, width), (read, written) = size, channels
    out = (height + pads[0] + pads[2] - 2, width + pads[1] + pads[3] - 2)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[3, 3], pads=pads, **attributes)
    inputs = [tensor("x", [1, read, *size]), tensor("w", [written, read, 3, 3]), tensor("b", [written])]
    return graph([node], inputs, [tensor("y", [1, written, *out])])


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0), (1, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (19, 22), (34, 18)], ids=str)
def test_a_convolution_is_the_same_whatever_its_size_and_padding(size: tuple[int, int], pads: tuple[int, ...]):
    changed = assert_equal_within_rounding(convolution(size, pads))
    assert operators(changed)["ConvTranspose"] == 1


def test_stripes_are_the_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastvar.engines.onnxruntime.convolutions.STRIPE_BYTES", 1)
    changed = assert_equal_within_rounding(convolution((19, 17), (1, 1, 1, 1)))
    assert operators(changed)["ConvTranspose"] == 5


@pytest.mark.parametrize("size", [(64, 64), (37, 512), (6, 1024)], ids=str)
def test_stripes_lie_side_by_side_and_read_what_they_need(size: tuple[int, int]):
    shape = Convolution((256, 256), size, (1, 1, 1, 1))
    stripes = shape.stripes()
    assert (stripes[0].first, stripes[-1].last) == (0, size[0])
    assert all(one.last == following.first for one, following in pairwise(stripes))
    for stripe in stripes:
        assert stripe.above + stripe.read[1] - stripe.read[0] + stripe.below == 4 * stripe.tiles + 2
        assert stripe.first - 1 == stripe.read[0] - stripe.above


@pytest.mark.parametrize(
    ("channels", "size"),
    [((READ, 3), (16, 16)), ((3, WRITTEN), (16, 16)), ((READ, WRITTEN), (8, 8)), ((READ, WRITTEN), (1, 256))],
    ids=["few-written", "few-read", "small", "one-row"],
)
def test_convolutions_that_gain_nothing_are_left(channels: tuple[int, int], size: tuple[int, int]):
    model = convolution(size, (1, 1, 1, 1), channels)
    assert rewritten(model) is model


def test_strides_groups_and_other_kernels_are_left():
    plain = onnx.load_from_string(convolution((33, 33), (1, 1, 1, 1)))
    for name, value, shape in (("strides", [2, 2], (17, 17)), ("dilations", [2, 2], (31, 31))):
        model = onnx.ModelProto()
        model.CopyFrom(plain)
        model.graph.node[0].attribute.append(helper.make_attribute(name, value))
        for dimension, extent in zip(model.graph.output[0].type.tensor_type.shape.dim[2:], shape, strict=True):
            dimension.dim_value = extent
        data = model.SerializeToString()
        assert rewritten(data) is data


def block(size: tuple[int, int], channels: int = READ, groups: int = 4) -> bytes:
    """y = conv(SiLU(norm(x))) + residual, as export/ traces a half of the decoder's blocks."""
    whole, column = [1, channels, *size], helper.make_node
    nodes: list[NodeProto] = [
        column("Constant", [], ["channels"], value_ints=[channels]),
        column("ConstantOfShape", ["channels"], ["ones"], value=helper.make_tensor("one", 1, [1], [1.0])),
        column("ConstantOfShape", ["channels"], ["zeros"]),
        column("GroupNormalization", ["x", "ones", "zeros"], ["normed"], num_groups=groups, epsilon=1e-6),
        column("Constant", [], ["column"], value_ints=[1, channels, 1, 1]),
        column("Reshape", ["gamma", "column"], ["scale"]),
        column("Reshape", ["beta", "column"], ["shift"]),
        column("Mul", ["normed", "scale"], ["scaled"]),
        column("Add", ["scaled", "shift"], ["shifted"]),
        column("Sigmoid", ["shifted"], ["gate"]),
        column("Mul", ["shifted", "gate"], ["active"]),
        column("Conv", ["active", "w", "b"], ["made"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        column("Add", ["residual", "made"], ["y"]),
    ]
    inputs = [tensor("x", whole), tensor("residual", whole), tensor("w", [channels, channels, 3, 3])]
    inputs += [tensor(name, [channels]) for name in ("gamma", "beta", "b")]
    model = onnx.load_from_string(graph(nodes, inputs, [tensor("y", whole)], opset=23))
    model.graph.value_info.append(tensor("normed", whole))  # onnx infers no shape behind this norm
    return model.SerializeToString()


def test_norm_activation_and_residual_are_taken_into_the_stripes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastvar.engines.onnxruntime.convolutions.STRIPE_BYTES", 1)
    monkeypatch.setattr("fastvar.engines.onnxruntime.norms.PART_BYTES", 1)
    found = operators(assert_equal_within_rounding(block((16, 20))))
    assert found["GroupNormalization"] == 0
    assert found["Sigmoid"] == found["ConvTranspose"] == 4
    assert found["ReduceMean"] == 2 * 4  # every group by itself


def test_a_norm_of_large_mean_keeps_its_digits():
    """Deviations of 0.1 around 20: by the mean of squares, as onnxruntime takes them, two digits would be left."""
    model = onnx.load_from_string(block((16, 16)))
    model.graph.output.append(tensor("shifted", [1, READ, 16, 16]))
    given = numbers(model.SerializeToString())
    given["x"] = np.float32(20) + given["x"] * np.float32(0.1)
    grouped = given["x"].astype(np.float64).reshape(4, -1)
    exact = (grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + 1e-6)
    expected = exact.reshape(READ, 16, 16) * given["gamma"][:, None, None] + given["beta"][:, None, None]
    _, found = run(rewritten(model.SerializeToString()), given)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=5e-4)


def test_what_others_read_as_well_is_kept():
    model = onnx.load_from_string(block((16, 16)))
    model.graph.output.append(tensor("active", [1, READ, 16, 16]))
    changed = assert_equal_within_rounding(model.SerializeToString())
    assert operators(changed)["Sigmoid"] == 1


def test_a_norm_without_a_convolution_behind_it_is_rewritten_too():
    model = onnx.load_from_string(block((8, 8)))
    found = operators(assert_equal_within_rounding(model.SerializeToString()))
    assert (found["GroupNormalization"], found["Conv"], found["ConvTranspose"]) == (0, 1, 0)
