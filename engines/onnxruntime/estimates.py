"""Memory that onnxruntime takes for itself, estimated: it reports nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..scratch_estimates import ATTN_MLP, FLOAT, STRIPES, Computation, tensor_elements, working_bytes
from ..spec import EngineSpec
from .attention import FUSED_BYTES
from .convolutions import FEWEST_CHANNELS, PRODUCTS, STRIPE_BYTES

FIXED, SESSION = 32 << 20, 1 << 19  # onnxruntime: its code as it is paged in, and each of its sessions


def library_bytes(engines: Sequence[EngineSpec], computation: Computation) -> int:
    """Code, sessions, and the tensors between the kernels of the engine that holds most.

    The image decoder decides; attention comes next, with its scores and their softmax.
    """
    return FIXED + SESSION * len(engines) + max(_host_working(spec, computation) for spec in engines)


def _host_working(spec: EngineSpec, computation: Computation) -> int:
    """Tensors that an engine of onnxruntime holds between its kernels, as its graph is rewritten for it."""
    names = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if names >= ATTN_MLP:
        return max(working_bytes(spec, computation), _host_attention(spec))
    channels = computation.level_channels
    if names & STRIPES:
        return 8 * FLOAT * max(tensor_elements(spec, name) for name in names & STRIPES) + _winograd(max(channels))
    if names & {"image", "latent"}:
        own, wider = (*channels, 0)[:2]
        return tensor_elements(spec, "image") // 3 * FLOAT * (3 * own + 2 * wider) + _winograd(max(channels))
    return working_bytes(spec, computation)


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
