"""Memory that engines work in, estimated from the shapes at their border.

For TensorRT until an engine is compiled: then it says itself what it needs. Against the reports of TensorRT-RTX 1.7.1
for Infinity-2B in bf16 at 1024x1024 and 2048x2048, estimates of engines that need more than 20 MiB are 6 % under to
16 % over. For onnxruntime and AOTInductor, which allocate for themselves and report nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.dtypes import storage_dtype
from ..core.policy import in_turns
from ..core.precision import Precision
from .spec import EngineSpec

FLOAT = 4  # bytes
STRIPES = {"stripe", "inner_stripe"}  # what the stages of a tiled decoder read
ATTN_MLP = {"q", "x_out"}  # tensors that tell the second half of a block


@dataclass(frozen=True)
class Computation:
    """What the shapes at an engine's border do not say.

    Args:
        precision: element types of activations and weights.
        level_channels: channels of the image decoder's levels, the finest first.
        layers: of the transformer.
    """

    precision: Precision
    level_channels: tuple[int, ...]
    layers: int


def is_layer(spec: EngineSpec) -> bool:
    """Whether an engine is a part of a transformer's layer."""
    return any(tensor.name == "q" for tensor in (*spec.inputs, *spec.outputs))


def working_bytes(spec: EngineSpec, computation: Computation) -> int:
    """Tensors that an engine holds between its kernels, where every attention is one of them."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    element = storage_dtype(computation.precision.compute).itemsize
    if is_layer(spec):
        return _attn_mlp(spec, element) if names >= ATTN_MLP else _qkv(spec, element)
    if "residual_noise" in names:
        return _diffusion(spec, element)
    if "logits" in names:
        return _sampling_head(spec, element)
    if names & STRIPES:
        return (
            2
            * element
            * max(tensor_elements(spec, name) for name in names & (STRIPES | {"stripe_out", "inner_stripe_out"}))
        )
    if "image" in names or "latent" in names:
        return _image_coder(spec, computation, element)
    if "features" in names:
        return _text_encoder(spec, element)
    return element * 3 * max(tensor_elements(spec, tensor.name) for tensor in spec.outputs)


def _attn_mlp(spec: EngineSpec, element: int) -> int:
    """The hidden layer of the feed-forward, its input, what comes of it in fp32; where pruned, the restored map, and
    a second one where tokens are selected in turns.
    """
    whole, width = spec.tensor("x").shape
    tokens = tensor_elements(spec, "q") // width
    maps = 1 + in_turns(spec.tensor("q").shape[0])
    inner = max(max(t.shape) for t in spec.inputs if t.name.startswith("ffn.") and len(t.shape) == 2)
    hidden = tokens * inner * element
    pruned = tokens < whole
    fresh = tokens * width * (element * 15 // 4 if not pruned else 2 * FLOAT + element * 3 // 4)
    return hidden + fresh + (maps * whole * width * FLOAT if pruned else 0)


def _qkv(spec: EngineSpec, element: int) -> int:
    """Queries, keys and values before their norm, and the normed input; where pruned, the distances to the mean."""
    whole, width = spec.tensor("x").shape
    tokens = tensor_elements(spec, "q") // width
    return 5 * tokens * width * element + (whole * width * element if tokens < whole else 0)


def _sampling_head(spec: EngineSpec, element: int) -> int:
    """The widest tokens, and the logits of every guidance row; where there are two, what guidance makes of them."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    tokens = max(tensor_elements(spec, name) for name in ("x", "x_next") if name in names)
    logits = tensor_elements(spec, "logits")
    mixed = logits * (element + FLOAT) if "guidance" in names else 0
    return element * tokens + logits * element + mixed


def _diffusion(spec: EngineSpec, element: int) -> int:
    """Stream and modulation of every token and guidance row, and what goes from layer to layer."""
    _, width = spec.tensor("diffusion.times").shape
    return spec.tensor("x").shape[0] * width * (10 * FLOAT + 6 * element)


def _image_coder(spec: EngineSpec, computation: Computation, element: int) -> int:
    """At the image's own resolution: the widest activation, and its norm in fp32; of a VQ decoder's, whose norm groups
    are no power of two wide, the compiler holds twice as much.
    """
    channels = computation.level_channels
    pixels = tensor_elements(spec, "image") // 3
    held = 2 if any(name.startswith("post_quant_conv.") for name in spec.weights) else 1
    return held * pixels * max(channels[:2]) * (element + FLOAT)


def _text_encoder(spec: EngineSpec, element: int) -> int:
    """Scores of one layer and their softmax in fp32, and the hidden layer."""
    length, width = spec.tensor("features").shape
    tensors = {tensor.name: tensor.shape for tensor in spec.inputs}
    heads = max((s[1] for n, s in tensors.items() if n.endswith("relative_attention_bias.weight")), default=1)
    hidden = max((s[0] for n, s in tensors.items() if ".wi" in n and len(s) == 2), default=4 * width)
    return 2 * heads * length * length * FLOAT + length * hidden * element


def tensor_elements(spec: EngineSpec, name: str) -> int:
    elements = 1
    for extent in spec.tensor(name).shape:
        elements *= extent
    return elements
