"""From checkpoints to engines. What the exporter needs beside the runtime is the extra `export`."""

from importlib.util import find_spec

from ..errors import BuildError

NEEDED = ("torch", "onnx", "onnxscript", "transformers")

if _missing := [name for name in NEEDED if find_spec(name) is None]:
    raise BuildError(
        f"building needs packages that are not installed: {', '.join(_missing)}",
        expected=f"{', '.join(NEEDED)} beside the runtime",
        fix='pip install "fastvar-runtime[export]"',
    )
