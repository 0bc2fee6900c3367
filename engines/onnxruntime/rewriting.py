"""Rewriting of graphs for onnxruntime on the CPU, where its own optimiser leaves speed unused.

The graphs of export/ serve every backend, so what is good for this one alone happens here. Results are equal within
rounding.
"""

from __future__ import annotations

from ...core.platform import import_extra
from ..onnx_graph import import_onnx
from . import attention as onnx_attention
from . import convolutions as onnx_convolutions
from . import norms as onnx_norms
from . import restoration as onnx_restoration
from .editor import apply


def rewritten(graph: bytes) -> bytes:
    """A clean ONNX graph -> the form that onnxruntime runs fastest; the same bytes where no rule applies.

    Raises:
        BackendError: onnx or onnxscript is not installed.
    """
    onnx, _ = import_onnx()
    ir, passes = (import_extra(name, "export") for name in ("onnx_ir", "onnx_ir.passes.common"))
    model = ir.from_proto(onnx.load_model_from_string(graph))
    steps = (onnx_norms.RULES, onnx_convolutions.RULES, onnx_restoration.RULES, onnx_attention.RULES)
    if not sum(apply(rules, model) for rules in steps):
        return graph
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(size_limit=0)(model)
    passes.DeduplicateInitializersPass(size_limit=1 << 20)(model)
    result = ir.to_proto(model)
    result.graph.ClearField("value_info")  # onnxruntime infers the shapes itself
    return bytes(result.SerializeToString(deterministic=True))
