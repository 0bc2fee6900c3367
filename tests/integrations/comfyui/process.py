"""A real ComfyUI as its users have it: a process of its own, without a screen, on the CPU, with the pack in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

from .websocket import WebSocket
from .workflows import PACK, Info, Prompt

ROOT = Path(__file__).parents[3]
FOLDER, PYTHON = "COMFYUI_DIR", "COMFYUI_PYTHON"
needs_comfyui = pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} does not say where a ComfyUI is")
STARTS = 300.0  # seconds, on a machine that is busy with other tests
ANSWERS = 120.0
PREVIEW, WORDS, PREVIEW_WITH_METADATA = 1, 3, 4  # what a binary message is
ENDS = ("execution_success", "execution_error", "execution_interrupted")
DRAW = """
import json, sys
import numpy
from fastvar import Pipeline
bundle, method, arguments, out = sys.argv[1:]
drawn = getattr(Pipeline.load(bundle, threads=1), method)(**json.loads(arguments))
numpy.save(out, numpy.stack([numpy.asarray(image) for image in drawn.images]))
"""
NODES = "fastvar-nodes"  # the pack's folder in custom_nodes


@dataclass
class Run:
    """What a client was told of a run."""

    id: str
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[tuple[dict[str, Any], Image.Image]] = field(default_factory=list)  # and what was said with each
    words: list[tuple[str, str]] = field(default_factory=list)  # (node, line)
    images: list[Image.Image] = field(default_factory=list)  # that were saved, in order

    @property
    def end(self) -> str:
        return next((kind for kind, _ in self.messages if kind in ENDS), "")

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.messages if name == kind]

    @property
    def progress(self) -> list[tuple[int, int, str]]:
        """(value, total, node) of every step of the bar."""
        return [(data["value"], data["max"], data["node"]) for data in self.told("progress")]

    @property
    def cached(self) -> set[str]:
        return {node for data in self.told("execution_cached") for node in data["nodes"]}

    @property
    def error(self) -> str:
        (data,) = self.told("execution_error")
        return str(data["exception_message"])


class Refused(Exception):  # noqa: N818  what a test waits for
    """ComfyUI did not accept a workflow. `details`: of each node that is wrong, by id."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(json.dumps(answer))
        self.details = {
            node: [f"{error['message']}: {error['details']}" for error in found["errors"]]
            for node, found in answer["node_errors"].items()
        }


@dataclass
class ComfyUI:
    """A running ComfyUI. `base` holds its models, custom_nodes, input and output."""

    url: str
    base: Path
    python: str
    environment: dict[str, str]

    @property
    def models(self) -> Path:
        return self.base / "models" / "fastvar"

    def get(self, path: str) -> Any:
        with urlopen(self.url + path, timeout=ANSWERS) as answer:
            return json.load(answer)

    def post(self, path: str, content: object = None) -> Any:
        body = json.dumps(content or {}).encode()
        request = Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=ANSWERS) as answer:
                text = answer.read()
        except HTTPError as error:
            raise Refused(json.load(error)) from None
        return json.loads(text) if text else None

    def infos(self) -> dict[str, Info]:
        found = self.get("/object_info")
        assert isinstance(found, dict)
        return found

    def run(self, prompt: Prompt, metadata: bool = False, on_message: Callable[[Run], None] | None = None) -> Run:
        """Run a workflow to its end.

        Args:
            metadata: the client understands previews that say of which node they are, as ComfyUI's page does.
            on_message: called after every message.

        Raises:
            Refused: it was not accepted.
        """
        client = uuid.uuid4().hex
        with WebSocket(f"{self.url}/ws?clientId={client}", ANSWERS) as messages:
            if metadata:
                features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                messages.send(json.dumps(features))
            run = Run(self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"])
            while not run.end:
                _note(run, messages.receive())
                if on_message is not None:
                    on_message(run)
        run.images = self.saved(run.id)
        return run

    def drawn(self, bundle: str, method: str = "__call__", **arguments: Any) -> list[np.ndarray]:
        """What `Pipeline` draws of a bundle of the models, in the same Python. Images are given by their path."""
        out = self.base / "temp" / f"{uuid.uuid4().hex}.npy"
        given = [str(self.models / bundle), method, json.dumps(arguments), str(out)]
        subprocess.run([self.python, "-c", DRAW, *given], env=self.environment, check=True)
        return list(np.load(out))

    def saved(self, prompt_id: str) -> list[Image.Image]:
        """The images that a run has saved, in order."""
        end = time.monotonic() + ANSWERS
        while not (history := self.get(f"/history/{prompt_id}")):  # written a moment after the last message
            assert time.monotonic() < end, f"no history of {prompt_id}"
            time.sleep(0.05)
        found = [one for out in history[prompt_id]["outputs"].values() for one in out.get("images", [])]
        images = []
        for one in found:
            with urlopen(f"{self.url}/view?{urlencode(one)}", timeout=ANSWERS) as answer:
                images.append(Image.open(io.BytesIO(answer.read())))
        return images


def _note(run: Run, message: str | bytes) -> None:
    if isinstance(message, str):
        read = json.loads(message)
        if read["data"].get("prompt_id", run.id) == run.id:
            run.messages.append((read["type"], read["data"]))
        return
    (kind,) = struct.unpack(">I", message[:4])
    rest = message[4:]
    if kind == PREVIEW:
        run.previews.append(({}, Image.open(io.BytesIO(rest[4:]))))
    elif kind in (PREVIEW_WITH_METADATA, WORDS):
        (length,) = struct.unpack(">I", rest[:4])
        head, body = rest[4 : 4 + length].decode(), rest[4 + length :]
        if kind == WORDS:
            run.words.append((head, body.decode()))
        else:
            run.previews.append((json.loads(head), Image.open(io.BytesIO(body))))


@contextlib.contextmanager
def comfyui(base: Path, bundles: Mapping[str, Path]) -> Iterator[ComfyUI]:
    """ComfyUI from COMFYUI_DIR, its folders at `base`: the pack linked into them, and copies of bundles, by name."""
    folder = os.environ[FOLDER]
    assert (Path(folder) / "main.py").is_file(), f"{FOLDER} {folder} holds no main.py"
    python = os.environ.get(PYTHON, sys.executable)
    for name in ("custom_nodes", "input", "output", "temp", "user", "models/fastvar", "source"):
        (base / name).mkdir(parents=True)
    (base / "custom_nodes" / NODES).symlink_to(PACK)
    (base / "source" / "fastvar").symlink_to(ROOT)  # whatever this checkout's folder is called
    for name, path in bundles.items():
        shutil.copytree(path, base / "models" / "fastvar" / name)
    port = _free_port()
    options = ["--cpu", "--base-directory", str(base), "--listen", "127.0.0.1", "--port", str(port)]
    options += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    environment = {**os.environ, "PYTHONPATH": str(base / "source"), "FASTVAR_THREADS": "1"}
    log = base / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [python, "main.py", *options], cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        found = ComfyUI(f"http://127.0.0.1:{port}", base, python, environment)
        _wait(found, process, log)
        yield found
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _wait(started: ComfyUI, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS
    while True:
        try:
            started.get("/system_stats")
            return
        except (URLError, ConnectionError):
            text = log.read_text(encoding="utf-8", errors="replace")
            assert process.poll() is None, f"ComfyUI ended with {process.returncode}:\n{text}"
            assert time.monotonic() < end, f"ComfyUI did not answer in {STARTS:g} s:\n{text}"
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
