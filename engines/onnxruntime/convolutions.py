"""Convolutions of 3x3 by Winograd's method, in operators that onnxruntime runs fast: a quarter of the multiplications.

onnxruntime multiplies at the processor's peak but has no such method. F(4x4, 3x3) is after Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks" (2015): 36 products of 6x6 inputs give a tile of 4x4 outputs, in place of
144. Stripes of rows are computed one after another, so that intermediate results stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .editor import FLOAT, Rule, constant, reshaped, sliced, static_shape

TILE, KERNEL = 4, 3
PATCH = TILE + KERNEL - 1  # inputs of a tile, in either direction
PRODUCTS = PATCH * PATCH
STRIPE_BYTES = 16 << 20  # of transformed input, which a stripe should not exceed
FEWEST_CHANNELS = 64  # either way: with fewer the transforms cost more than the products save
FEWEST_TILES = 16

# The polynomials of Toom and Cook are evaluated here, and at infinity. At the published 0, 1, -1, 2, -2 a decoder's
# error was twice as large; at these points it is 2.4 times that of a plain convolution.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)


def _transforms() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The transforms of inputs [6, 6], kernel [6, 3] and outputs [4, 6], in one dimension."""
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
    """A 3x3 convolution of stride 1: x [1, C, H, W], padded with zeros -> [1, O, H', W']."""

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
        """Whether channels and tiles are many enough, and the multiplications at most half of those they replace."""
        height, width = self.written
        tiles = self.tiles_across * -(-height // TILE)
        halves = 2 * PRODUCTS * tiles <= KERNEL * KERNEL * height * width
        return min(self.channels) >= FEWEST_CHANNELS and tiles >= FEWEST_TILES and halves

    def stripes(self) -> list[Stripe]:
        """Stripes of whole tiles, as high as the cache has room for."""
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


def convolution(node: Any) -> Convolution | None:
    """The convolution that a node computes, where it is one of 3x3 in fp32 that pays."""
    x, weight, given = static_shape(node.inputs[0]), static_shape(node.inputs[1]), node.attributes
    if node.inputs[0].dtype != FLOAT or x is None or weight is None or x[0] != 1 or weight[2:] != (KERNEL, KERNEL):
        return None
    if given.get_int("group", 1) != 1 or given.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    if any({*given.get_ints(name, [1])} != {1} for name in ("strides", "dilations")):
        return None
    _, channels, height, width = x
    top, left, bottom, right = given.get_ints("pads", [0, 0, 0, 0])
    shape = Convolution((channels, weight[0]), (height, width), (top, left, bottom, right))
    return shape if shape.pays() else None


def _pattern(activated: bool, added: str) -> Callable[..., Any]:
    """conv(x), or conv(SiLU(x * scale + shift)); with a residual added `before` or `behind` it, or without."""

    def pattern(op: Any, x: Any, scale: Any, shift: Any, weight: Any, residual: Any) -> Any:
        if activated:
            shifted = op.Add(op.Mul(x, scale), shift)
            x = op.Mul(shifted, op.Sigmoid(shifted))
        out = op.Conv(x, weight, _allow_other_inputs=True, _outputs=["convolved"])
        if not added:
            return out
        return op.Add(residual, out) if added == "before" else op.Add(out, residual)

    return pattern


def _pays(context: Any, x: Any, scale: Any, shift: Any, residual: Any, convolved: Any, **_: Any) -> bool:
    """Whether the convolution pays, scale and shift are [1, C, 1, 1], and no other residual is added to the result."""
    shape = convolution(convolved.producer())
    if shape is None or residual is not _residual(convolved):
        return False
    return scale is None or all(static_shape(v) == (1, shape.channels[0], 1, 1) for v in (scale, shift))


def _residual(convolved: Any) -> Any | None:
    """The tensor of the same shape that is added to a convolution's result, where nothing else reads the result.

    The result of another convolution is left to that one: onnxruntime lets it add up in place.
    """
    readers = convolved.consumers()
    if [node.op_type for node in readers] != ["Add"] or convolved.is_graph_output():
        return None
    others = [value for value in readers[0].inputs if value is not convolved]
    alike = [value for value in others if static_shape(value) == static_shape(convolved)]
    return next((value for value in alike if not value.producer() or value.producer().op_type != "Conv"), None)


def _replacement(op: Any, x: Any, scale: Any, shift: Any, weight: Any, residual: Any, convolved: Any) -> Any:
    node = convolved.producer()
    shape = convolution(node)
    assert shape is not None
    read, written = shape.channels
    transformed = op.Gemm(
        constant(op, _both(WEIGHT).reshape(PRODUCTS, -1)),
        reshaped(op, weight, written * read, KERNEL * KERNEL),
        transB=1,
    )
    transformed = reshaped(op, transformed, PRODUCTS, written, read)
    bias = reshaped(op, node.inputs[2], 1, written, 1, 1) if len(node.inputs) > 2 else None
    stripes = []
    for stripe in shape.stripes():
        part = sliced(op, x, 2, stripe.read, shape.size[0])
        if scale is not None:
            part = op.Add(op.Mul(part, scale), shift)
            part = op.Mul(part, op.Sigmoid(part))
        part = _convolved(op, shape, stripe, part, transformed)
        part = op.Add(part, bias) if bias is not None else part
        if residual is not None:
            part = op.Add(part, sliced(op, residual, 2, (stripe.first, stripe.last), shape.written[0]))
        stripes.append(part)
    return op.Concat(*stripes, axis=2)


def _convolved(op: Any, shape: Convolution, stripe: Stripe, x: Any, weight: Any) -> Any:
    """The rows that a stripe reads [1, C, ...] -> those it writes [1, O, rows, W'], without bias."""
    (read, written), across = shape.channels, shape.tiles_across
    rows, width, tiles = stripe.read[1] - stripe.read[0], shape.size[1], stripe.tiles * across
    # [C, 36, tiles]: every channel's 6x6 patches, 4 apart, transformed
    left, right = shape.pads[1], TILE * across + KERNEL - 1 - width - shape.pads[1]
    x = op.Conv(
        reshaped(op, x, read, 1, rows, width),
        constant(op, _both(INPUT).reshape(PRODUCTS, 1, PATCH, PATCH)),
        kernel_shape=[PATCH, PATCH],
        strides=[TILE, TILE],
        pads=[stripe.above, left, stripe.below, right],
    )
    x = op.Transpose(reshaped(op, x, read, PRODUCTS, tiles), perm=[1, 0, 2])
    x = op.Transpose(op.MatMul(weight, x), perm=[1, 0, 2])  # [O, 36, tiles]
    back = _both(OUTPUT).reshape(TILE, TILE, PATCH, PATCH).transpose(2, 3, 0, 1).reshape(PRODUCTS, 1, TILE, TILE)
    x = op.ConvTranspose(
        reshaped(op, x, written, PRODUCTS, stripe.tiles, across),
        constant(op, np.ascontiguousarray(back)),
        kernel_shape=[TILE, TILE],
        strides=[TILE, TILE],
    )
    x = reshaped(op, x, 1, written, stripe.tiles * TILE, across * TILE)
    x = sliced(op, x, 2, (0, stripe.last - stripe.first), stripe.tiles * TILE)
    return sliced(op, x, 3, (0, shape.written[1]), across * TILE)


def _both(transform: NDArray[Any]) -> NDArray[np.float32]:
    """A transform [a, b] applied to rows and to columns: [a * a, b * b]."""
    return np.kron(transform, transform).astype(np.float32)


RULES = tuple(
    Rule(_pattern(activated, added), _replacement, _pays)
    for activated in (True, False)
    for added in ("", "before", "behind")
)
