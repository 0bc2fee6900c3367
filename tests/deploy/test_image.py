"""What the Dockerfile does, done without docker: its own commands, in a folder that stands for the image.

A path of the image is the same path below that folder. The base image stands aside: this machine's Python is its. What
comes out is started as the image would be: another user, no capabilities, nothing but /tmp to write into.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.deploy.dockerfile import ROOT, Stage, is_ignored, stage_named

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="images are Linux's"),
]

MB = 10**6
MOST = 400 * MB
# No registry was at hand to look at python:3.11-slim-bookworm itself. Pages that show `docker images` have 113 to
# 150 MB for Python's slim images.
BASE = 150 * MB
DEMO = 25 * MB  # the demo's bundle as its stage builds it; 20.1 MB when it was measured
OF_THE_IMAGE = re.compile(r"(?<![\w.$}])/(?=(?:source|wheels|opt|bundles|checkpoint|tmp|nonexistent)\b)")
USER, GROUP = stage_named("").only("USER").split(":")
# Mounts of its own: the file system can be read, /tmp of the image written. Then another user, without a way back.
CONFINE = """
mount -t tmpfs -o mode=1777,noexec,nosuid,nodev tmpfs "$1/tmp" && mount -o remount,bind,ro / && shift &&
exec setpriv --reuid=%s --regid=%s --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
TORCHLESS = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'pip') if u.find_spec(n)])"


class ImageFolder:
    """A folder that stands for the root of images, stage after stage."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, inside: str) -> str:
        """What a text of the Dockerfile says, with paths of the image as they are here."""
        return OF_THE_IMAGE.sub(f"{self.root}/", inside)

    def environment(self, stage: Stage) -> dict[str, str]:
        """Variables of a stage; of those outside only what finds packages and certificates."""
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        start = {**kept, "PATH": f"{self.root}/python/bin:/usr/bin:/bin", "HOME": str(self.root / "home")}
        for name, value in {**stage.pairs("ARG"), **stage.pairs("ENV")}.items():
            start[name] = self.path(value).replace("$PATH", start["PATH"])
        return start

    def copy_context(self, stage: Stage) -> None:
        """COPY of what lies in the repository, as far as .dockerignore lets it."""
        for origin, source, target in stage.copies:
            if not origin:
                shutil.copytree(ROOT / source, self.path(target), ignore=_ignored)

    def run(self, stage: Stage) -> str:
        """RUN, one after the other."""
        said = ""
        for command in stage.all("RUN"):
            done = subprocess.run(
                ["/bin/sh", "-c", self.path(command)],
                capture_output=True,
                text=True,
                cwd=self.root,
                env=self.environment(stage),
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            said += done.stdout
        return said


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if is_ignored((Path(folder) / name).relative_to(ROOT).as_posix())}


def size(*paths: Path) -> int:
    files = (file for path in paths for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


@pytest.fixture(scope="module")
def image() -> Iterator[ImageFolder]:
    """With the environment in it, and no bundle yet. Not in pytest's folders: another user cannot look into those."""
    with tempfile.TemporaryDirectory(prefix="fastvar-image-") as name:
        root = Path(name)
        root.chmod(0o755)
        for folder in ("home", "tmp", "opt", "bundles"):
            (root / folder).mkdir()
        subprocess.run([sys.executable, "-m", "venv", root / "python"], check=True)
        made = ImageFolder(root)
        for stage in map(stage_named, ("wheel", "environment")):
            made.copy_context(stage)
            said = made.run(stage)
        assert "fastvar 0." in said
        for gone in ("source", "wheels", "home"):  # the last stage copies none of it
            shutil.rmtree(root / gone)
        yield made


@pytest.fixture(scope="module")
def demo(image: ImageFolder, batched_bundle: Path) -> Path:
    """A small bundle where the image has the demo's, of the same engines."""
    return shutil.copytree(batched_bundle, image.root / "bundles" / "demo")


def test_torch_is_not_in_it(image: ImageFolder):
    done = subprocess.run([image.path("/opt/fastvar/bin/python"), "-c", TORCHLESS], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_it_is_small(image: ImageFolder):
    environment = size(image.root / "opt")
    print(f"environment {environment / MB:.1f} MB")
    assert environment > 50 * MB
    assert environment + DEMO + BASE < MOST


# Running


def confined(image: ImageFolder, command: list[str]) -> list[str]:
    """The command as a container runs it, as far as this machine permits.

    Skips the test where it permits nothing: then nothing can be said of a file system that cannot be written.
    """
    prefix = ["unshare", "--mount", "/bin/sh", "-c", CONFINE % (USER, GROUP), "sh", str(image.root)]
    probe = subprocess.run([*prefix, sys.executable, "-c", ""], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"another user with mounts of its own cannot be had here: {probe.stderr.strip()}")
    return [*prefix, *command]


class Served:
    """The image's entry point under way, asked over HTTP."""

    def __init__(self, image: ImageFolder, arguments: list[str]) -> None:
        final = stage_named("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        program, *own = map(image.path, final.words("ENTRYPOINT") + final.words("CMD"))
        paths = {**image.environment(final), "TMPDIR": str(image.root / "tmp")}
        paths["PATH"] = paths["PATH"].replace(f"{image.root}/python/bin:", "")
        self.environment = {name: value for name, value in paths.items() if not name.startswith("PIP_")}
        self.check = [part.replace(":8000", f":{self.port}") for part in final.health_check]
        self._image = image
        found = shutil.which(program, path=paths["PATH"])
        assert found is not None
        command = [found, *own, "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self.process = subprocess.Popen(
            confined(image, command),
            cwd=image.path(final.only("WORKDIR")),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def is_healthy(self) -> bool:
        """What HEALTHCHECK finds."""
        done = subprocess.run(
            confined(self._image, self.check), env=self.environment, cwd="/", capture_output=True, check=False
        )
        assert done.returncode in (0, 1)
        return done.returncode == 0

    def ask(self, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, {"content-type": kind})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)

    def wait(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError):
                self.ask("/ready")
                return
            time.sleep(0.2)
        self.process.kill()
        pytest.fail(f"not ready: {self.process.communicate()[0]}")


@pytest.fixture
def served(image: ImageFolder, demo: Path) -> Iterator[Served]:
    found = Served(image, [])
    try:
        found.wait()
        yield found
    finally:
        found.process.kill()
        found.process.communicate()


def drawn(answer: Any) -> np.ndarray:
    (one,) = answer["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).convert("RGB"))


def form(**parts: bytes) -> tuple[bytes, str]:
    """A multipart body of text and, under image and mask, files."""
    body = b""
    for name, value in parts.items():
        file = f'; filename="{name}.png"' if name in ("image", "mask") else ""
        body += f'--edge\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
    return body + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_file_system_is_one_that_it_cannot_write_to(image: ImageFolder):
    """Else what follows would say nothing."""
    places = [image.root, image.root / "opt", image.root / "bundles", Path("/"), Path("/var/tmp")]
    script = (
        "import os, sys; print(os.getuid(), [p for p in sys.argv[1:] if not os.system(f'touch {p}/file 2>/dev/null')])"
    )
    command = confined(image, [sys.executable, "-c", script, *map(str, places), str(image.root / "tmp")])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == [USER, f"['{image.root / 'tmp'}']\n"]


def test_it_serves_draws_and_ends(served: Served):
    assert served.is_healthy()
    image = drawn(served.ask("/v1/images/generations", b'{"prompt": "a red circle", "seed": 7}'))
    assert image.shape == (256, 256, 3)
    assert image.std() > 5
    served.process.send_signal(signal.SIGTERM)
    said = served.process.communicate(timeout=60)[0]
    assert served.process.returncode == 0, said
    assert "Traceback" not in said
    assert not served.is_healthy()


def test_large_uploads_find_room(served: Served):
    """Above 1 MiB they go through a file."""
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    mask = np.zeros((1024, 1024), np.uint8)
    mask[256:768, 256:768] = 255
    body, kind = form(image=png(noise), mask=png(mask), prompt=b"a red circle", seed=b"7")
    assert len(body) > 2 << 20
    assert drawn(served.ask("/v1/images/edits", body, kind)).shape == (256, 256, 3)
