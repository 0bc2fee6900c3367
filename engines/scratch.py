"""Memory that engines work in, estimated from the shapes at their border.

For TensorRT until an engine is compiled: then it says itself what it needs. Against the reports of TensorRT-RTX 1.7.1
for Infinity-2B in bf16 at 1024x1024 and 2048x2048, estimates of engines that need more than 20 MiB are 6 % under to
16 % over. For onnxruntime and AOTInductor, which allocate for themselves and report nothing.
"""

from __future__ import annotations

from dataclasses import replace

from .dtypes import storage_dtype
from .manifest import EngineReport, EngineSpec, Manifest
from .onnx_attention import FUSED_BYTES
from .onnx_convolutions import FEWEST_CHANNELS, PRODUCTS, STRIPE_BYTES
from .registry import backend_class

FLOAT = 4  # bytes
STRIPES = {"stripe", "inner_stripe"}  # what the stages of a tiled decoder read
HOST_FIXED, HOST_SESSION = 32 << 20, 1 << 19  # onnxruntime: its code as it is paged in, and each of its sessions
TORCH_FIXED = 230 << 20  # torch's code, and the compiled libraries, of which there are about a dozen
LONGEST_TOPK = 3840  # numbers that TensorRT ranks at once
ATTEND = {"q", "x_out"}  # tensors that tell the second half of a block
FIXED = 8 << 20  # what the library's matrix products ask for whatever their size


def with_estimates(manifest: Manifest) -> Manifest:
    """The manifest with an estimate for every report that is missing; unchanged where engines run on the host."""
    if backend_class(manifest.backend).runs_on_host(manifest.target):
        return manifest
    engines = {name: _estimated(spec, manifest) for name, spec in manifest.engines.items()}
    return replace(manifest, engines=engines)


def _estimated(spec: EngineSpec, manifest: Manifest) -> EngineSpec:
    if spec.report.kernels or spec.report.scratch_bytes:
        return spec
    return replace(spec, report=EngineReport(scratch_bytes=FIXED + working_bytes(spec, manifest)))


def working_bytes(spec: EngineSpec, manifest: Manifest) -> int:
    """Tensors that an engine holds between its kernels, where every attention is one of them."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    element = storage_dtype(manifest.precision.compute).itemsize
    if names >= ATTEND:
        return _attend(spec, element)
    if "q" in names:
        return _project(spec, element)
    if "residual_noise" in names:
        return _diffusion(spec, element)
    if "logits" in names:
        return _bridge(spec, element)
    if names & STRIPES:
        return 2 * element * max(_size(spec, name) for name in names & (STRIPES | {"stripe_out", "inner_stripe_out"}))
    if "image" in names or "latent" in names:
        return _image_coder(spec, manifest, element)
    if "features" in names:
        return _text_encoder(spec, element)
    return element * 3 * max(_size(spec, tensor.name) for tensor in spec.outputs)


def library_bytes(manifest: Manifest) -> int:
    """What the library takes beside weights and arena: its code, its engines, and tensors between its kernels.

    The image decoder decides; with onnxruntime attention comes next, with its scores and their softmax.
    """
    if manifest.backend == "aotinductor":
        return TORCH_FIXED + max(working_bytes(spec, manifest) for spec in manifest.engines.values())
    working = (_host_working(spec, manifest) for spec in manifest.engines.values())
    return HOST_FIXED + HOST_SESSION * len(manifest.engines) + max(working)


def _host_working(spec: EngineSpec, manifest: Manifest) -> int:
    """Tensors that an engine of onnxruntime holds between its kernels, as its graph is rewritten for it."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if names >= ATTEND:
        return max(working_bytes(spec, manifest), _host_attention(spec))
    channels = manifest.image_tokenizer.level_channels
    if names & STRIPES:
        return 8 * FLOAT * max(_size(spec, name) for name in names & STRIPES) + _winograd(max(channels))
    if names & {"image", "latent"}:
        own, wider = (*channels, 0)[:2]
        return _size(spec, "image") // 3 * FLOAT * (3 * own + 2 * wider) + _winograd(max(channels))
    return working_bytes(spec, manifest)


def _host_attention(spec: EngineSpec) -> int:
    """Scores and their softmax, of the text as well; where many, copies of queries, keys, values and result instead."""
    queries, heads, head_dim = spec.tensor("q").shape
    lengths = {tensor.name: tensor.shape[0] for tensor in spec.inputs}
    keys, text = lengths["keys"], lengths.get("text_keys", 0)
    scores = FLOAT * heads * queries * keys
    own = 2 * scores if scores < FUSED_BYTES else 2 * FLOAT * heads * head_dim * (queries + keys)
    return max(own, 2 * FLOAT * heads * queries * text)


def _winograd(channels: int) -> int:
    """Of convolutions with so many channels: a transformed kernel, and three tensors between a stripe's steps."""
    return 3 * STRIPE_BYTES + FLOAT * PRODUCTS * channels**2 if channels >= FEWEST_CHANNELS else 0


def _attend(spec: EngineSpec, element: int) -> int:
    """The hidden layer of the feed-forward, its input, what comes of it in fp32; where pruned, the restored map, and
    a second one where tokens are selected in turns.
    """
    whole, width = spec.tensor("x").shape
    tokens = _size(spec, "q") // width
    maps = 1 + (spec.tensor("q").shape[0] > LONGEST_TOPK)
    inner = max(max(t.shape) for t in spec.inputs if t.name.startswith("ffn.") and len(t.shape) == 2)
    hidden = tokens * inner * element
    pruned = tokens < whole
    fresh = tokens * width * (element * 15 // 4 if not pruned else 2 * FLOAT + element * 3 // 4)
    return hidden + fresh + (maps * whole * width * FLOAT if pruned else 0)


def _project(spec: EngineSpec, element: int) -> int:
    """Queries, keys and values before their norm, and the normed input; where pruned, the distances to the mean."""
    whole, width = spec.tensor("x").shape
    tokens = _size(spec, "q") // width
    return 5 * tokens * width * element + (whole * width * element if tokens < whole else 0)


def _bridge(spec: EngineSpec, element: int) -> int:
    """The widest tokens, and the logits of every guidance row; where there are two, what guidance makes of them."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    tokens = max(_size(spec, name) for name in ("x", "x_next") if name in names)
    logits = _size(spec, "logits")
    mixed = logits * (element + FLOAT) if "guidance" in names else 0
    return element * tokens + logits * element + mixed


def _diffusion(spec: EngineSpec, element: int) -> int:
    """Stream and modulation of every token and guidance row, and what goes from layer to layer."""
    _, width = spec.tensor("diffusion.times").shape
    return spec.tensor("x").shape[0] * width * (10 * FLOAT + 6 * element)


def _image_coder(spec: EngineSpec, manifest: Manifest, element: int) -> int:
    """At the image's own resolution: the widest activation, and its norm in fp32; of a VQ decoder's, whose norm groups
    are no power of two wide, the compiler holds twice as much.
    """
    channels = manifest.image_tokenizer.level_channels
    pixels = _size(spec, "image") // 3
    held = 2 if any(name.startswith("post_quant_conv.") for name in spec.weights) else 1
    return held * pixels * max(channels[:2]) * (element + FLOAT)


def _text_encoder(spec: EngineSpec, element: int) -> int:
    """Scores of one layer and their softmax in fp32, and the hidden layer."""
    length, width = spec.tensor("features").shape
    tensors = {tensor.name: tensor.shape for tensor in spec.inputs}
    heads = max((s[1] for n, s in tensors.items() if n.endswith("relative_attention_bias.weight")), default=1)
    hidden = max((s[0] for n, s in tensors.items() if ".wi" in n and len(s) == 2), default=4 * width)
    return 2 * heads * length * length * FLOAT + length * hidden * element


def _size(spec: EngineSpec, name: str) -> int:
    elements = 1
    for extent in spec.tensor(name).shape:
        elements *= extent
    return elements
