"""Bundles in a repository of the hub: loaded by name from Python and by commands, pinned, offline, and refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.errors import BackendError, HubError, InputError
from tests.fakes.hub import FakeHub, FakeRepository

NAME = "org/bundle"
# Draws from what the arguments of `from_pretrained`, as JSON, name; tells the image's digest, and what was imported.
DRAW = """
import hashlib, json, sys
from fastvar import Pipeline
from fastvar.errors import FastvarError
try:
    with Pipeline.from_pretrained(sys.argv[1], **json.loads(sys.argv[2])) as pipe:
        image = pipe("a red circle", seed=7).images[0]
        print(hashlib.sha256(image.tobytes()).hexdigest(), pipe.bundle.path, "torch" in sys.modules)
except FastvarError as error:
    print(error)
"""
Draw = Callable[..., str]


@pytest.fixture
def repository(hub: FakeHub, tiny_bundle: Path) -> FakeRepository:
    return hub.add(NAME, tiny_bundle)


@pytest.fixture
def child(hub: FakeHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        hub.asked.clear()
        command = [sys.executable, *map(str, arguments)]
        environment = hub.environment(tmp_path) | environment
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )

    return run


@pytest.fixture
def draw(child) -> Draw:
    def call(name: str, **options: object) -> str:
        done = child("-c", DRAW, name, json.dumps(options))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


@pytest.fixture(scope="module")
def drawn_here(tiny_bundle: Path) -> str:
    with Pipeline.load(tiny_bundle) as pipe:
        return hashlib.sha256(pipe("a red circle", seed=7).images[0].tobytes()).hexdigest()


def test_a_name_becomes_the_image_that_the_folder_draws(hub, repository, draw: Draw, drawn_here: str):
    digest, folder, torch = draw(NAME).split()
    assert digest == drawn_here
    assert torch == "False"
    assert folder.endswith(f"models--org--bundle/snapshots/{repository.commit}")
    assert draw(f"hub:{NAME}@{repository.commit}").split()[0] == drawn_here
    assert hub.asked == []  # the commit is here already
    assert draw(NAME, local_files_only=True).split()[0] == drawn_here
    assert hub.asked == []


def test_what_the_manifest_does_not_name_is_not_downloaded(hub, repository, draw: Draw):
    repository.files |= {"README.md": b"about it", "evil.py": b"print()"}
    folder = Path(draw(NAME, revision="main").split()[1])
    assert not {"README.md", "evil.py"} & {path.name for path in folder.iterdir()}


def test_the_token_is_sent_to_the_hub_and_is_in_no_message(hub, repository, draw: Draw):
    repository.private = True
    assert draw(NAME).startswith("the hub has no repository org/bundle, or a private one")
    told = draw(NAME, token="hf_wrong")
    assert told.startswith("the hub does not know the access token")
    assert "hf_wrong" not in told
    assert len(draw(NAME, token=hub.token).split()) == 3


def test_a_cache_of_ones_own(repository, draw: Draw, tmp_path: Path):
    assert str(tmp_path / "mine") in draw(NAME, cache_dir=str(tmp_path / "mine"))


def test_a_model_is_no_bundle(hub, draw: Draw):
    hub.add("org/model", {"model.pth": b"weights"})
    told = draw("org/model")
    assert told.startswith("hub:org/model is not a bundle: it has no manifest.json\n")
    assert "fastvar build hub:org/model --out bundle" in told


def test_half_a_bundle(repository, draw: Draw):
    del repository.files["weights.safetensors"]
    told = draw(NAME)
    assert told.startswith("hub:org/bundle holds half a bundle: weights.safetensors is missing")


def test_another_program_s_manifest(hub, draw: Draw):
    hub.add(NAME, {"manifest.json": b"{}"})
    assert draw(NAME).startswith("hub:org/bundle is not a bundle: its manifest.json is another program's")


@pytest.mark.parametrize("command", [["inspect"], ["generate", "a red circle", "--seed", "7"]])
def test_commands_take_the_name_of_a_repository(repository, child, tmp_path: Path, command: list[str]):
    name, *options = command
    done = child("-m", "fastvar", name, f"hub:{NAME}", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(tmp_path.glob("*.png"))) == (name == "generate")
    done = child("-m", "fastvar", name, "hub:org/other", *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the hub has no repository org/other")


@pytest.mark.skipif(os.name == "nt", reason="signals of that kind are not there")
def test_an_interrupted_download_ends_in_words(hub, repository, tmp_path: Path):
    repository.stalled |= {"weights.safetensors"}
    command = [sys.executable, "-m", "fastvar", "inspect", f"hub:{NAME}"]
    environment = hub.environment(tmp_path)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not any("weights" in asked.path and asked.method == "GET" for asked in hub.asked):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # who starts tests in the background has them ignore SIGINT
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    repository.stalled.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# In this process: nothing is asked


def test_a_folder_is_loaded_as_ever(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tiny_bundle.parent.parent)
    plain = f"{tiny_bundle.parent.name}/{tiny_bundle.name}"  # ORG/NAME too, but for the folder
    for path in (tiny_bundle, str(tiny_bundle), plain):
        with Pipeline.from_pretrained(path, threads=1) as pipe:
            assert pipe.bundle.path.resolve() == tiny_bundle.resolve()


def test_what_is_wrong_in_a_call_is_told_before_anything_is_asked(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="a folder has no revision 'v1'"):
        Pipeline.from_pretrained(tiny_bundle, revision="v1")
    with pytest.raises(InputError, match="local_files_only 'no' is text"):
        Pipeline.from_pretrained("org/name", local_files_only="no")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(InputError, match="7 is a int\nexpected: the folder of a bundle, or ORG/NAME"):
        Pipeline.from_pretrained(7)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError, match="thread"):
        Pipeline.from_pretrained("org/name", thread=2)
    with pytest.raises(HubError, match="names no repository of the hub"):
        Pipeline.from_pretrained("hub:name")


def test_without_the_library_it_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for module in ("huggingface_hub", "huggingface_hub.constants", "huggingface_hub.errors"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=r'pip install "fastvar-runtime\[hub\]"'):
        Pipeline.from_pretrained("org/name")
