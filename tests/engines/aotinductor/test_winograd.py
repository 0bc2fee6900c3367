"""Convolutions by Winograd's method: the kernel against a convolution in fp64, and the passes that put it in place."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar.core.precision import Precision
from fastvar.core.tensors import TensorRef
from fastvar.engines.aotinductor import operators
from fastvar.engines.aotinductor.backend import AotInductorBackend
from fastvar.engines.aotinductor.convolutions import scratch_bytes, use_winograd, use_winograd_residuals
from fastvar.engines.aotinductor.graph import tidy
from fastvar.engines.aotinductor.targets import WITH_INT8_PRODUCTS, best_cpu
from fastvar.engines.spec import EngineSpec
from fastvar.errors import BackendError
from fastvar.export.models.common.coders import image_tokenizer_role
from fastvar.export.models.common.step_graph import WeightShape
from fastvar.export.models.infinity.steps import InfinityImageDecoder
from fastvar.export.tracing.torch_export import trace_program
from fastvar.families.infinity import ImageTokenizerConfig
from tests.engines.aotinductor.test_passes import Module

TYPES = (torch.float32, torch.bfloat16)
Kernel = Callable[..., Tensor]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(sum(shape))).to(dtype)


def operands(
    images: int, size: tuple[int, int], channels: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x as norms and SiLU leave it, weights for which results are about 1, bias."""
    read, written = channels
    x = F.silu(random(images, *size, read))
    return x.to(dtype), (random(written, read, 3, 3) / (read * 3)).to(dtype), random(written, dtype=dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor, pads: tuple[int, int] = (1, 1), enlarges: bool = False) -> Tensor:
    """In fp64, channels last."""
    wide = x.double().permute(0, 3, 1, 2)
    wide = F.interpolate(wide, scale_factor=2.0, mode="nearest") if enlarges else wide
    return F.conv2d(wide, weight.double(), bias.double(), padding=pads).permute(0, 2, 3, 1)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def assert_fine(got: Tensor, expected: Tensor, channels: int) -> None:
    """bfloat16: 5 % more than the error of the last rounding, which nobody avoids. fp32: sums of so many numbers."""
    assert got.shape == expected.shape
    error, largest = got.double() - expected, float((got.double() - expected).abs().max())
    if got.dtype == torch.bfloat16:
        assert rms(error) <= 1.05 * rms(expected.bfloat16().double() - expected)
        assert (error.abs() <= expected.abs() * 2**-8 + 0.01).all()
    else:
        assert rms(error) <= 1.2e-7 * channels**0.5
        assert largest <= 1e-6 * channels**0.5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("pads", [(1, 1), (0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize(
    ("images", "size", "channels"),
    [
        (1, (3, 3), (16, 16)),
        (1, (8, 8), (32, 64)),
        (2, (13, 9), (48, 80)),  # a last strip that is narrow, and integers of a last 16 channels
        (3, (5, 22), (80, 144)),
        (1, (33, 41), (128, 64)),
    ],
)
def test_equals_a_convolution_in_fp64(winograd, dtype, pads, images, size, channels):
    layer = operands(images, size, channels, dtype)
    got = winograd(*layer, None, bool(pads[0]), bool(pads[1]), False)
    assert_fine(got, exact(*layer, pads), channels[0])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("images", "size", "channels"), [(1, (1, 1), (16, 16)), (2, (4, 9), (48, 48)), (1, (26, 11), (64, 80))]
)
def test_enlarges_what_it_reads(winograd, dtype, images, size, channels):
    layer = operands(images, size, channels, dtype)
    got = winograd(*layer, None, True, True, True)
    assert_fine(got, exact(*layer, enlarges=True), channels[0])


@pytest.mark.parametrize("enlarges", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_adds_the_residual_before_it_rounds(winograd, dtype, enlarges):
    layer = operands(2, (6, 7), (32, 48), dtype)
    expected = exact(*layer, enlarges=enlarges)
    residual = random(*expected.shape, dtype=dtype)
    got = winograd(*layer, residual, True, True, enlarges)
    assert_fine(got, expected + residual.double(), 32)


@pytest.mark.parametrize("dtype", TYPES)
def test_without_a_bias(winograd, dtype):
    x, weight, bias = operands(1, (6, 7), (32, 48), dtype)
    got = winograd(x, weight, None, None, True, True, False)
    assert_fine(got, exact(x, weight, torch.zeros_like(bias)), 32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("enlarges", [False, True])
def test_same_bits_for_any_number_of_threads(winograd, dtype, enlarges):
    """Several blocks, of other sizes for more threads, and weights that are transformed in two parts."""
    layer = operands(1, (23, 18), (512, 640), dtype)
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(winograd(*layer, None, True, True, enlarges))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_an_image_does_not_see_which_others_there_are(winograd):
    x, *rest = operands(3, (9, 14), (48, 64), torch.bfloat16)
    together = winograd(x, *rest, None, True, True, False)
    for i in range(3):
        assert torch.equal(winograd(x[i : i + 1], *rest, None, True, True, False)[0], together[i])


@pytest.mark.parametrize("dtype", TYPES)
def test_magnitude_does_not_matter(winograd, dtype):
    """Powers of two scale images and weights exactly."""
    x, weight, _ = operands(1, (9, 14), (48, 64), dtype)
    plain = winograd(x, weight, None, None, True, True, False)
    for image, kernel in ((2.0**40, 1.0), (2.0**-40, 1.0), (1.0, 2.0**30), (2.0**-20, 2.0**-20)):
        scaled = winograd(x * image, weight * kernel, None, None, True, True, False)
        assert torch.equal(scaled, plain * (image * kernel))


def test_long_sums_at_their_largest_stay_in_range(winograd):
    """Every product of the longest sums has one sign: at the point 0 they are as large as norms allow."""
    C = operators.MOST_CHANNELS
    x, weight = torch.ones(1, 6, 6, C, dtype=torch.bfloat16), torch.ones(16, C, 3, 3, dtype=torch.bfloat16)
    weight[1] = -1
    got = winograd(x, weight, None, None, False, False, False).double()
    assert ((got[..., 0] / (9 * C) - 1).abs() < 2**-8).all()
    assert ((got[..., 1] / (9 * C) + 1).abs() < 2**-8).all()


def test_zeros_give_the_bias(winograd):
    x, weight, bias = operands(1, (7, 9), (32, 48), torch.bfloat16)
    assert torch.equal(winograd(x * 0, weight, bias, None, True, True, False), bias.expand(1, 7, 9, -1))
    assert torch.equal(winograd(x, weight * 0, bias, None, True, True, False), bias.expand(1, 7, 9, -1))


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_no_number_stays_visible_and_in_its_tiles(winograd, dtype, what):
    x, *rest = operands(1, (20, 20), (32, 32), dtype)
    clean = winograd(x, *rest, None, True, True, False)
    x[0, 9, 10, 5] = what
    got = winograd(x, *rest, None, True, True, False)
    assert not got[0, 8:11, 9:12].isfinite().any()
    for far in (got[0, :4], got[0, 16:], got[0, :, :4], got[0, :, 16:]):
        assert far.isfinite().all()
    assert torch.equal(got[0, :4], clean[0, :4])


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda x, w, b: (x[..., :24].contiguous(), w[:, :24].contiguous(), b), (1, 1, 0), "24 to 48 channels"),
        (lambda x, w, b: (x, w[:40], b[:40]), (1, 1, 0), "32 to 40 channels"),
        (lambda x, w, b: (x[0], w, b), (1, 1, 0), r"x \[6, 7, 32\]"),
        (lambda x, w, b: (x, w[..., :2].contiguous(), b), (1, 1, 0), r"weight \[48, 32, 3, 2\]"),
        (lambda x, w, b: (x.half(), w.half(), b.half()), (1, 1, 0), "x in torch.float16, expected torch.bfloat16 or"),
        (lambda x, w, b: (x, w.bfloat16(), b), (1, 1, 0), "weight in torch.bfloat16, expected torch.float32"),
        (lambda x, w, b: (x.transpose(1, 2), w, b), (1, 1, 0), "x with strides"),
        (lambda x, w, b: (x, w, b), (0, 1, 1), "enlarged image: expected padding"),
        (lambda x, w, b: (x[:, :2].contiguous(), w, b), (0, 1, 0), "2 rows and 7 columns: expected three"),
    ],
)
def test_refuses_what_the_kernel_cannot_take(winograd, change, flags, message):
    layer = change(*operands(1, (6, 7), (32, 48), torch.float32))
    with pytest.raises(ValueError, match=message):
        winograd(*layer, None, *map(bool, flags))


def test_refuses_a_residual_of_another_size(winograd):
    layer = operands(1, (6, 7), (32, 48), torch.float32)
    with pytest.raises(ValueError, match=r"residual \[1, 6, 7, 48\], expected \[1, 12, 14, 48\]"):
        winograd(*layer, random(1, 6, 7, 48), True, True, True)


def test_on_another_cpu_it_says_what_is_lacking(winograd, monkeypatch):
    monkeypatch.setattr(operators, "cpu_lacks", lambda needed: needed[-1:])
    operators._function.cache_clear()
    with pytest.raises(BackendError, match=r"this CPU lacks avx512_vnni\nfix: use conv2d"):
        winograd(*operands(1, (6, 7), (32, 48), torch.float32), None, True, True, False)


def changed(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[list[Any], Any]:
    """The calls of the kernel after both passes, and the program."""
    with torch.no_grad():
        program = torch.export.export(Module(function), tensors)
    tidy(torch, program)
    count = use_winograd_residuals(torch, program) + use_winograd(torch, program)
    calls = [node for node in program.graph.nodes if "winograd" in str(node.target)]
    assert len(calls) == count
    return calls, program


def test_a_decoders_convolutions_go_to_the_kernel(winograd):
    """Two in a row, a residual on either side, one behind an enlargement, one behind a shortcut of 1x1."""

    def block(x: Tensor, w: Tensor, b: Tensor, shortcut: Tensor) -> Tensor:
        h = x + F.conv2d(F.silu(F.conv2d(x, w, b, padding=1)), w, b, padding=1)
        h = F.conv2d(h, w, b, padding=1) + h
        h = F.conv2d(F.interpolate(h, scale_factor=2.0, mode="nearest"), w, b, padding=1)
        inner = F.conv2d(F.silu(h), w, b, padding=(0, 1))
        return F.conv2d(h[:, :, 1:-1], shortcut) + inner

    layer = random(1, 32, 16, 18), random(32, 32, 3, 3) / 20, random(32), random(32, 32, 1, 1) / 6
    calls, program = changed(block, *layer)
    residual, flags = [call.args[3] is not None for call in calls], [call.args[4:] for call in calls]
    assert residual == [False, True, True, False, True]
    assert flags == [(True, True, False)] * 3 + [(True, True, True), (False, True, False)]
    assert sum("conv2d" in str(node.target) for node in program.graph.nodes) == 1
    assert not any("upsample" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*layer), block(*layer), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
        lambda x, w: F.conv2d(x, w, dilation=2, padding=1),
        lambda x, w: F.conv2d(x, w, padding=2),
        lambda x, w: F.conv2d(x, w[:, :, :2, :2]),
        lambda x, w: F.conv2d(x[:, :24], w[:, :24]),  # channels that are no multiple of 16
        lambda x, w: F.conv2d(x[:, :16], w[:, :16]),  # few channels
        lambda x, w: F.conv2d(x, w[:, :16], groups=2),
        lambda x, w: F.conv2d(x[:, :, :12, :12], w),  # few pixels
        lambda x, w: F.conv2d(x.half(), w.half()),
    ],
)
def test_other_convolutions_stay(function):
    calls, _ = changed(function, random(1, 32, 20, 20), random(32, 32, 3, 3))
    assert not calls


def test_open_sizes_stay():
    with torch.no_grad():
        rows = {2: torch.export.Dim("rows", min=16)}
        layer = random(1, 32, 20, 20), random(32, 32, 3, 3)
        program = torch.export.export(Module(F.conv2d), layer, dynamic_shapes=((rows, None),))
    tidy(torch, program)
    assert use_winograd(torch, program) == 0


def test_a_result_that_others_read_keeps_its_addition():
    def both(x: Tensor, w: Tensor) -> Tensor:
        h = F.conv2d(x, w, padding=1)
        return (x + h) * h

    (call,), _ = changed(both, random(1, 32, 20, 20), random(32, 32, 3, 3))
    assert call.args[3] is None


def test_memory_that_it_works_in():
    """Weights of 512 channels at 36 points, and a block of patches a thread; there is a limit to both."""
    weights = 36 * 512 * 512 * 2
    one, two = (scratch_bytes(512, 2, threads) for threads in (1, 2))
    assert weights < one < weights + (2 << 20)
    assert one < two < one + (2 << 20)
    assert scratch_bytes(1024, 4, 1) < 32 << 20


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_compiled_decoder(winograd, precision):
    """As close to fp32 as eager torch is in the same precision, and the same for any number of threads."""
    if best_cpu(torch) not in WITH_INT8_PRODUCTS:
        pytest.skip(f"{best_cpu(torch)} keeps torch's convolutions")
    images = ImageTokenizerConfig(bits=16, base_channels=32, channel_multipliers=(1, 2), residual_blocks=0)
    step, compute = InfinityImageDecoder(images, (18, 22)), Precision(precision)
    shapes = {n: WeightShape(tuple(t.shape), image_tokenizer_role(n)) for n, t in step.coder.state_dict().items()}
    held = {n: random(*w.shape) / max(w.shape[0], 1) ** 0.5 / 3 ** (len(w.shape) == 4) for n, w in shapes.items()}
    codes = random(1, 16, 18, 22)
    expected = step(codes, weights=held)
    stored = {n: held[n].to(getattr(torch, w.role.stored_dtype(compute))) for n, w in shapes.items()}
    eager = step(codes, weights=stored)

    backend = AotInductorBackend()
    target = backend.resolve_target(None, compute)
    traced = trace_program(InfinityImageDecoder(images, (18, 22)), shapes, compute)
    spec = EngineSpec("e", "e", "", 0, traced.inputs, traced.outputs, {}, "aotinductor", target, backend.version())
    engine = backend.load(backend.build(traced.graph, target).engine, spec)
    tensors = {"summed": codes, "image": torch.zeros_like(expected), **stored}
    refs = {n: TensorRef(t.data_ptr(), str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    launch, found = engine.prepare(refs), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        launch()
        found.append(tensors["image"].clone())
    assert torch.equal(*found)
    limit = 1.1 * rms(eager - expected) if precision == "bfloat16" else 1e-5
    assert rms(found[0] - expected) <= limit
