"""What onnxruntime's own optimiser leaves undone on the CPU, done to a graph when its engine is built.

The graphs of export/ serve every backend, so what is good for this one alone happens here. Equal within rounding.
"""

from __future__ import annotations

from .onnx_attention import rewrite_attention
from .onnx_convolutions import rewrite_convolutions
from .onnx_editor import GraphEditor
from .onnx_graph import import_onnx
from .onnx_norms import rewrite_group_norms
from .onnx_restoration import rewrite_restorations


def rewritten(graph: bytes) -> bytes:
    """A clean graph as onnxruntime runs it fastest; the same bytes where it holds nothing to rewrite."""
    onnx, _ = import_onnx()
    editor = GraphEditor(onnx, onnx.load_model_from_string(graph))
    for rewrite in (rewrite_group_norms, rewrite_convolutions, rewrite_restorations, rewrite_attention):
        rewrite(editor)
    return bytes(editor.finished().SerializeToString(deterministic=True)) if editor.changed else graph
