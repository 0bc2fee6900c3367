"""Passes over exported image coders for CPUs: what stands between and around their convolutions.

* group norms: the compiler's own walks channels-last memory group by group, a few channels at a time; here each row
  of the image gives mean and variance of all its channels at once;
* 3x3 convolutions by our kernel of Winograd's method, an enlargement before or a residual behind one taken along, where
  the CPU has its instructions, channels and pixels are enough, and numbers are bfloat16 or fp32;
* another nearest enlargement with a 3x3 convolution behind it: four 2x2 convolutions of the small image, one for each
  of the four pixels that a pixel becomes, for there the 3x3 kernel meets at most two distinct rows and columns. 16
  multiplications where there were 36, and no enlarged image is stored.

A pass returns how many it replaced.
"""

from __future__ import annotations

from typing import Any

from .graph import Insert, only_user, replacing, value_of
from .operators import WINOGRAD, register, supports_channels

FEWEST_CHANNELS = 32  # either way: with fewer the transforms cost more than the products save
FEWEST_PIXELS = 256  # written: with fewer the transforms of weights do
# As in kernels/winograd.cpp.
POINTS, STRIP = 36, 64
BLOCK_BYTES, LEAST_BLOCK, LARGEST_BLOCK, WEIGHT_BYTES = 448 << 10, 24, 96, 20 << 20


def scratch_bytes(channels: int, element: int, threads: int) -> int:
    """What our kernel works in for a convolution of so many channels to as many, of elements of so many bytes.

    Transformed weights, and for each thread a block of transformed pixels with its products.
    """
    column = POINTS * channels * element
    weights = column * min(max(WEIGHT_BYTES // column // STRIP, 1) * STRIP, 4 * channels)
    block = min(max(BLOCK_BYTES // column, LEAST_BLOCK), LARGEST_BLOCK)
    own = block * (column + POINTS * (STRIP + 1) * 4) + POINTS * channels * 4 + channels * 4
    return weights + threads * max(own, 9 * 16 * channels * 4)


def _is_plain_norm(torch: Any, node: Any) -> bool:
    shape = value_of(node.args[0]).shape
    return len(shape) == 4 and shape[0] == 1 and all(argument is None for argument in node.args[2:4])


@replacing(lambda torch: torch.ops.aten.group_norm.default, _is_plain_norm)
def use_row_statistics(torch: Any, node: Any, add: Insert) -> Any:
    """Group norms without an affine part, on [1, C, H, W]."""
    aten, (x, groups) = torch.ops.aten, node.args[:2]
    eps = node.kwargs.get("eps", node.args[4] if len(node.args) > 4 else 1e-5)
    channels = value_of(x).shape[1]

    # A product with a matrix makes the compiler store its result; a mean it would take anew at every pixel.
    group = add(aten.floor_divide.default, add(aten.arange.default, channels), channels // groups)
    same = add(aten.eq.Tensor, add(aten.unsqueeze.default, group, 0), add(aten.unsqueeze.default, group, 1))
    average = add(aten.div.Tensor, add(aten.to.dtype, same, torch.float32), channels // groups)  # [C, C]
    pixels = add(aten.to.dtype, add(aten.permute.default, x, [0, 2, 3, 1]), torch.float32)  # [1, H, W, C]
    mean = add(aten.mm.default, _pixel_mean(torch, add, pixels), average)  # [1, C], alike inside a group
    centred = add(aten.sub.Tensor, pixels, mean)
    variance = add(aten.mm.default, _pixel_mean(torch, add, add(aten.mul.Tensor, centred, centred)), average)
    scale = add(aten.mm.default, add(aten.rsqrt.default, add(aten.add.Scalar, variance, eps)), average)
    normed = add(aten.permute.default, add(aten.mul.Tensor, centred, scale), [0, 3, 1, 2])
    return add(aten.to.dtype, normed, value_of(x).dtype)


def _pixel_mean(torch: Any, add: Insert, pixels: Any) -> Any:
    """[1, H, W, C] -> [1, C]: the mean of every row of the image, then of all rows."""
    mean = torch.ops.aten.mean.dim
    return add(mean, add(mean, pixels, [2]), [1])


def _enlarges(torch: Any, conv: Any) -> bool:
    """Whether a 3x3 convolution with a bias, of stride 1 and padding 1, alone reads a nearest enlargement by two."""
    aten, (node, weight, bias, stride, padding) = torch.ops.aten, (*conv.args, None, None, None)[:5]
    if node.target is not aten.upsample_nearest2d.vec or only_user(node, aten.conv2d.default) is not conv:
        return False
    plain = bias is not None and stride == padding == [1, 1]
    return bool(plain and node.args[2] == [2.0, 2.0] and value_of(weight).shape[2:] == (3, 3))


@replacing(lambda torch: torch.ops.aten.conv2d.default, _enlarges)
def use_small_enlargements(torch: Any, conv: Any, add: Insert) -> Any:
    """3x3 convolutions of stride 1 and padding 1 behind a nearest enlargement by two."""
    aten, (node, weight, bias) = torch.ops.aten, conv.args[:3]
    x, outputs = node.args[0], value_of(weight).shape[0]
    _, _, height, width = value_of(x).shape
    kernels = _phases(torch, add, _phases(torch, add, [weight], 2), 3)  # four of [O, I, 2, 2], row-wise
    stacked = add(aten.cat.default, kernels)  # [4 * O, I, 2, 2]
    around = add(aten.conv2d.default, x, stacked, add(aten.cat.default, [bias] * 4), [1, 1], [1, 1])
    around = add(aten.permute.default, around, [0, 2, 3, 1])  # [1, H + 1, W + 1, 4 * O], as it lies in memory
    phases = [  # pixel (row + down, column + right) of `around` holds output pixel (2 row + down, 2 column + right)
        add(aten.slice.Tensor, add(aten.slice.Tensor, around, 1, down, down + height), 2, right, right + width)
        for down in (0, 1)
        for right in (0, 1)
    ]
    inner = [add(aten.slice.Tensor, p, 3, n * outputs, (n + 1) * outputs) for n, p in enumerate(phases)]
    lines = [add(aten.stack.default, inner[n : n + 2], 3) for n in (0, 2)]  # [1, H, W, 2, O]
    quads = add(aten.stack.default, lines, 2)  # [1, H, 2, W, 2, O]
    enlarged = add(aten.view.default, quads, [1, 2 * height, 2 * width, outputs])
    return add(aten.permute.default, enlarged, [0, 3, 1, 2])


def _phases(torch: Any, add: Insert, kernels: list[Any], axis: int) -> list[Any]:
    """Kernels of three taps along an axis, as two of two taps each.

    The first half of an enlarged pixel sees the pixel before and its own twice; the second half its own twice and the
    pixel behind.
    """
    aten, found = torch.ops.aten, []
    for kernel in kernels:
        wide = add(aten.to.dtype, kernel, torch.float32)
        before, own, behind = (add(aten.slice.Tensor, wide, axis, tap, tap + 1) for tap in range(3))
        for pair in ([before, add(aten.add.Tensor, own, behind)], [add(aten.add.Tensor, before, own), behind]):
            found.append(add(aten.to.dtype, add(aten.cat.default, pair, axis), value_of(kernel).dtype))
    return found


def _suits_winograd(torch: Any, conv: Any) -> bool:
    """Whether a convolution is one of 3x3, of stride 1 and at most a pixel of padding, that our kernel does faster."""
    x, weight = map(value_of, conv.args[:2])
    outputs, inputs, *kernel = weight.shape
    _, stride, padding, dilation, groups = _arguments(conv)
    if kernel != [3, 3] or any(list(given) != [1, 1] for given in (stride, dilation)) or groups != 1:
        return False
    if any(pad not in (0, 1) for pad in padding) or x.dtype != weight.dtype:
        return False
    if not all(isinstance(size, int) for size in x.shape):  # left open: whether they are enough is not known
        return False
    enough = min(inputs, outputs) >= FEWEST_CHANNELS and value_of(conv).shape[2:].numel() >= FEWEST_PIXELS
    known = str(x.dtype).removeprefix("torch.") in WINOGRAD.types
    return bool(enough and known and supports_channels(int(inputs), int(outputs)))


def _arguments(conv: Any) -> tuple[Any, ...]:
    """Bias, stride, padding, dilation and groups."""
    given = conv.args[2:]
    return (*given, *(None, [1, 1], [0, 0], [1, 1], 1)[len(given) :])


def _residual(torch: Any, node: Any) -> tuple[Any, Any] | None:
    """The convolution for our kernel that an addition alone reads, and what it is added to."""
    for conv, other in (node.args[:2], node.args[1::-1]):
        if getattr(conv, "target", None) is not torch.ops.aten.conv2d.default or node.kwargs or len(conv.users) > 1:
            continue
        alike = hasattr(other, "meta") and value_of(other).shape == value_of(conv).shape
        if alike and value_of(other).dtype == value_of(conv).dtype and _suits_winograd(torch, conv):
            return conv, other
    return None


@replacing(lambda torch: torch.ops.aten.add.Tensor, lambda torch, node: _residual(torch, node) is not None)
def use_winograd_residuals(torch: Any, node: Any, add: Insert) -> Any:
    """Convolutions for our kernel with the addition that alone reads one."""
    found = _residual(torch, node)
    assert found is not None
    return _winograd(torch, add, *found)


@replacing(lambda torch: torch.ops.aten.conv2d.default, _suits_winograd)
def use_winograd(torch: Any, conv: Any, add: Insert) -> Any:
    """All other convolutions for our kernel, with the enlargement that one alone reads."""
    return _winograd(torch, add, conv, None)


def _winograd(torch: Any, add: Insert, conv: Any, residual: Any) -> Any:
    x, weight = conv.args[:2]
    bias, _, padding, *_ = _arguments(conv)
    enlarges = _enlarges(torch, conv)
    operands = [_channels_last(torch, add, tensor) for tensor in (x.args[0] if enlarges else x, residual)]
    out = add(register(WINOGRAD), operands[0], weight, bias, operands[1], *map(bool, padding), enlarges)
    return add(torch.ops.aten.permute.default, out, [0, 3, 1, 2])


def _channels_last(torch: Any, add: Insert, node: Any) -> Any:
    """[N, C, H, W] -> [N, H, W, C], contiguous."""
    if node is None:
        return None
    turned = add(torch.ops.aten.permute.default, node, [0, 2, 3, 1])
    if value_of(turned).is_contiguous():
        return turned
    return add(torch.ops.aten.contiguous.default, turned)
