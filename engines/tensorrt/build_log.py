"""The report of a TensorRT build, read from the builder's log: errors, scratch memory, kernels, attentions."""

from __future__ import annotations

import re
from typing import Any

from ..spec import EngineReport

ERRORS = ("ERROR", "INTERNAL_ERROR")
_LAYERS = "Layers:\n"
_LAYER = re.compile(r"^Name: (?P<name>\S+), LayerType: (?P<kind>\w+),", re.MULTILINE)
_NO_KERNELS = {"signal", "wait"}  # order between streams
_FUSED_ATTENTION = re.compile(r"mha")  # `_gemm_mha_v2` and its relatives: one kernel from queries to output
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")


class BuildLog:
    """The library's messages in order, as (severity, text); with `only_errors` the errors alone."""

    def __init__(self, only_errors: bool = False) -> None:
        self.messages: list[tuple[str, str]] = []
        self._only_errors = only_errors

    def add(self, severity: str, text: str) -> None:
        if severity in ERRORS or not self._only_errors:
            self.messages.append((severity, text))

    def reason(self) -> str:
        """The last error in the log: the builder returns no reason where it fails."""
        errors = [text for severity, text in self.messages if severity in ERRORS]
        return errors[-1] if errors else "no reason given"

    def report(self) -> EngineReport:
        """The report of the engine built last: scratch in bytes, kernels, fused attentions.

        The builder must run with detailed verbosity.
        """
        text = [message for _, message in self.messages]
        scratch = [int(found[1]) for message in text if (found := _SCRATCH.search(message))]
        layers = [message for message in text if message.startswith(_LAYERS)]
        listed = _LAYER.finditer(layers[-1] if layers else "")
        kernels = [layer["name"] for layer in listed if layer["kind"] not in _NO_KERNELS]
        fused = sum(bool(_FUSED_ATTENTION.search(name)) for name in kernels)
        return EngineReport(max(scratch, default=0), len(kernels), fused)


def listening_logger(trt: Any, log: BuildLog) -> Any:
    """A logger of the library that fills `log`; it must outlive every object that it is given to."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known at run time
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()
