"""Convolutions of 3x3 by Winograd's method, in operators that onnxruntime runs fast: a quarter of the multiplications.

onnxruntime multiplies at the processor's peak but knows no such method. F(4x4, 3x3) after Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks" (2015): tiles of 4x4 outputs are computed from 6x6 inputs by 36 products
in place of 144. Stripes of rows are computed one after another, so that what lies between the steps stays in the
processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_editor import GraphEditor

TILE, KERNEL = 4, 3
PATCH = TILE + KERNEL - 1  # inputs of a tile, in either direction
PRODUCTS = PATCH * PATCH
FLOAT = 1  # ONNX's number of fp32
STRIPE_BYTES = 16 << 20  # of transformed input, which a stripe should not exceed
FEWEST_CHANNELS = 64  # either way: with fewer the transforms cost more than the products save
FEWEST_TILES = 16

# Where the polynomials of Toom and Cook are evaluated, beside infinity. At the published 0, 1, -1, 2, -2 a decoder's
# error was twice as large; at these it is 2.4 times that of a plain convolution.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)


def _transforms() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of the inputs [6, 6], kernel [6, 3] and outputs [4, 6], in one dimension."""
    others = [[q for q in POINTS if q != p] for p in POINTS]
    inputs = np.zeros((PATCH, PATCH))
    for row, roots in zip(inputs, [*others, POINTS], strict=True):
        row[: len(roots) + 1] = np.poly(roots)[::-1]
    beyond = np.eye(PATCH)[-1:]  # the point at infinity
    weights = [
        [p**k / np.prod([p - q for q in rest]) for k in range(KERNEL)] for p, rest in zip(POINTS, others, strict=True)
    ]
    outputs = [[p**k for k in range(TILE)] for p in POINTS]
    return inputs, np.vstack((weights, beyond[:, -KERNEL:])), np.vstack((outputs, beyond[:, -TILE:])).T


INPUT, WEIGHT, OUTPUT = _transforms()


@dataclass(frozen=True)
class Stripe:
    """Output rows `first` to `last` of a convolution: the input rows they see, and zeros beyond the image."""

    first: int
    last: int
    read: tuple[int, int]
    above: int
    below: int

    @property
    def tiles(self) -> int:
        """Rows of tiles."""
        return -(-(self.last - self.first) // TILE)


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution of stride 1: x [1, C, H, W] -> [1, O, H', W'] with zeros around by `pads`."""

    channels: tuple[int, int]  # read, written
    size: tuple[int, int]  # of the input
    pads: tuple[int, int, int, int]  # top, left, bottom, right

    @property
    def written(self) -> tuple[int, int]:
        (top, left, bottom, right), (height, width) = self.pads, self.size
        return height + top + bottom - KERNEL + 1, width + left + right - KERNEL + 1

    @property
    def tiles_across(self) -> int:
        return -(-self.written[1] // TILE)

    def pays(self) -> bool:
        """Enough channels and tiles, of which not too much is thrown away: at most half the multiplications."""
        height, width = self.written
        tiles = self.tiles_across * -(-height // TILE)
        halves = 2 * PRODUCTS * tiles <= KERNEL * KERNEL * height * width
        return min(self.channels) >= FEWEST_CHANNELS and tiles >= FEWEST_TILES and halves

    def stripes(self) -> list[Stripe]:
        """Of whole tiles, as high as the cache has room for."""
        row_bytes = PRODUCTS * max(self.channels) * self.tiles_across * 4
        rows = max(1, STRIPE_BYTES // row_bytes) * TILE
        (height, _), top = self.written, self.pads[0]
        found = []
        for first in range(0, height, rows):
            last = min(first + rows, height)
            start, end = first - top, first - top + TILE * -(-(last - first) // TILE) + KERNEL - 1
            read = max(start, 0), min(end, self.size[0])
            found.append(Stripe(first, last, read, read[0] - start, end - read[1]))
        return found


def rewrite_convolutions(editor: GraphEditor) -> int:
    """Rewrite every 3x3 convolution that it pays for; gives how many those were."""
    found = [(node, shape) for node in editor.nodes if (shape := convolution(editor, node)) is not None]
    for node, shape in found:
        _rewrite(editor, node, shape)
    return len(found)


def convolution(editor: GraphEditor, node: Any) -> Convolution | None:
    """What a node convolves, if it is by 3x3 in fp32 and large enough."""
    if node.op_type != "Conv" or editor.types.get(node.input[0]) != FLOAT:
        return None
    (batch, channels, *size), weight = editor.shapes[node.input[0]], editor.shapes[node.input[1]]
    plain = [("group", 1), ("auto_pad", b"NOTSET"), ("strides", [1, 1]), ("dilations", [1, 1])]
    if batch != 1 or weight[2:] != (KERNEL, KERNEL) or len(size) != 2:
        return None
    if any((editor.attribute(node, name) or default) != default for name, default in plain):
        return None
    top, left, bottom, right = editor.attribute(node, "pads", [0, 0, 0, 0])
    shape = Convolution((channels, weight[0]), (size[0], size[1]), (top, left, bottom, right))
    return shape if shape.pays() else None


@dataclass(frozen=True)
class Source:
    """What a convolution reads, with what happens to it before: that is done stripe by stripe as well.

    Either SiLU(x * scale + shift) by channels, or x itself.
    """

    x: str
    scale: str = ""
    shift: str = ""
    nodes: tuple[Any, ...] = ()


def _rewrite(editor: GraphEditor, node: Any, shape: Convolution) -> None:
    read, written = shape.channels
    weight = editor.reshaped(node.input[1], written * read, KERNEL * KERNEL)
    transformed = editor.add("Gemm", [editor.constant(_both(WEIGHT).reshape(PRODUCTS, -1)), weight], transB=1)
    transformed = editor.reshaped(transformed, PRODUCTS, written, read)
    source = _activation(editor, node.input[0])
    bias = editor.reshaped(node.input[2], 1, written, 1, 1) if len(node.input) > 2 else ""
    last, residual = _residual(editor, node)
    stripes = []
    for stripe in shape.stripes():
        x = _stripe(editor, shape, stripe, source, transformed)
        x = editor.add("Add", [x, bias]) if bias else x
        if residual:
            rest = editor.sliced(residual, 2, (stripe.first, stripe.last), shape.written[0])
            x = editor.add("Add", [x, rest])
        stripes.append(x)
    editor.add("Concat", stripes, last.output[0], axis=2)
    editor.replace(last, node, *source.nodes)


def _residual(editor: GraphEditor, node: Any) -> tuple[Any, str]:
    """The addition of a tensor of the same shape that follows a convolution, and that tensor; else the convolution.

    The result of another convolution is left to that one: onnxruntime lets it add up in place.
    """
    add = editor.only_reader(node.output[0], "Add")
    if add is None:
        return node, ""
    other = next((name for name in add.input if name != node.output[0]), "")
    alike = editor.shapes.get(other) == editor.shapes[node.output[0]] and editor.maker(other, "Conv") is None
    return (add, other) if alike else (node, "")


def _stripe(editor: GraphEditor, shape: Convolution, stripe: Stripe, source: Source, weight: str) -> str:
    """[1, O, rows, W'] of a stripe, without bias."""
    (read, written), across = shape.channels, shape.tiles_across
    rows, width, tiles = stripe.read[1] - stripe.read[0], shape.size[1], stripe.tiles * across
    x = editor.sliced(source.x, 2, stripe.read, shape.size[0])
    if source.scale:
        x = editor.add("Add", [editor.add("Mul", [x, source.scale]), source.shift])
        x = editor.add("Mul", [x, editor.add("Sigmoid", [x])])
    # [C, 36, tiles]: every channel's 6x6 patches, 4 apart, transformed
    left, right = shape.pads[1], TILE * across + KERNEL - 1 - width - shape.pads[1]
    x = editor.add(
        "Conv",
        [editor.reshaped(x, read, 1, rows, width), editor.constant(_both(INPUT).reshape(PRODUCTS, 1, PATCH, PATCH))],
        kernel_shape=[PATCH, PATCH],
        strides=[TILE, TILE],
        pads=[stripe.above, left, stripe.below, right],
    )
    x = editor.add("Transpose", [editor.reshaped(x, read, PRODUCTS, tiles)], perm=[1, 0, 2])
    x = editor.add("Transpose", [editor.add("MatMul", [weight, x])], perm=[1, 0, 2])  # [O, 36, tiles]
    back = _both(OUTPUT).reshape(TILE, TILE, PATCH, PATCH).transpose(2, 3, 0, 1).reshape(PRODUCTS, 1, TILE, TILE)
    x = editor.add(
        "ConvTranspose",
        [editor.reshaped(x, written, PRODUCTS, stripe.tiles, across), editor.constant(np.ascontiguousarray(back))],
        kernel_shape=[TILE, TILE],
        strides=[TILE, TILE],
    )
    x = editor.reshaped(x, 1, written, stripe.tiles * TILE, across * TILE)
    x = editor.sliced(x, 2, (0, stripe.last - stripe.first), stripe.tiles * TILE)
    return editor.sliced(x, 3, (0, shape.written[1]), across * TILE)


def _activation(editor: GraphEditor, name: str) -> Source:
    """The source of a convolution, with scale, shift and SiLU where nothing else reads what is between."""
    plain = Source(name)
    product = editor.maker(name, "Mul")
    if product is None or not editor.read_by(name, 1):
        return plain
    shifted = product.input[0]
    sigmoid, add = editor.maker(product.input[1], "Sigmoid"), editor.maker(shifted, "Add")
    if sigmoid is None or add is None or sigmoid.input[0] != shifted:
        return plain
    scaled = editor.maker(add.input[0], "Mul")
    if scaled is None or not editor.read_by(shifted, 2) or not editor.read_by(add.input[0], 1):
        return plain
    x, scale, shift = scaled.input[0], scaled.input[1], add.input[1]
    channels = editor.shapes.get(x, (0, 0))[1]
    if any(editor.shapes.get(n) != (1, channels, 1, 1) for n in (scale, shift)):
        return plain
    return Source(x, scale, shift, nodes=(product, sigmoid, add, scaled))


def _both(transform: NDArray[Any]) -> NDArray[np.float32]:
    """A transform of rows and columns alike: [a * a, b * b]."""
    return np.kron(transform, transform).astype(np.float32)
