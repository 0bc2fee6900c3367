"""Models from a hub: published names to files, what is downloaded and told before, and a name that becomes an image."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastvar.core.dtypes import human_bytes
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from tests.fakes.hub import FakeHub, fake_hub
from tests.models import tiny_layouts

INFINITY, T5, VAR, HART = "FoundationVision/Infinity", "google/flan-t5-xl", "FoundationVision/var", "mit-han-lab/hart"
# Finds models and reads them, or finds the weights of one part, one a line of its input; tells what is printed of each,
# as JSON. One process for all of these tests: torch takes its seconds to import.
WORKER = """
import json, os, shutil, sys
from pathlib import Path
from fastvar.errors import FastvarError
from fastvar.export.checkpoints.hub_models import find_checkpoint, find_weights
from fastvar.hub.repository import HubAccess
usage = shutil.disk_usage
for line in sys.stdin:
    source, options, home, free, whole = json.loads(line)
    os.environ["FASTVAR_CACHE"] = home + "/cache"
    shutil.disk_usage = usage if free is None else lambda path: type("Usage", (), {"free": free})
    told = []
    try:
        access = HubAccess(cache_dir=Path(home, "hub"))
        options |= {"access": access, "told": told.append}
        if whole:
            checkpoint = find_checkpoint(source, **options).load()
            told.append(json.dumps([checkpoint.name, checkpoint.digest, checkpoint.origin]))
        else:
            told.append("found " + str(find_weights(source, **options)))
    except FastvarError as error:
        told += str(error).splitlines()
    print(json.dumps(told), flush=True)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as their repositories hold them; read only."""
    root = tmp_path_factory.mktemp("published")
    tiny_layouts.infinity_2b(root / "infinity", text_encoder=False)
    tiny_layouts.infinity_8b(root / "infinity", text_encoder=False)
    tiny_layouts.write_t5(root / "t5")
    (root / "t5" / "pytorch_model.bin").write_bytes(b"the same in another format")
    tiny_layouts.var(root / "var", depths=(16, 20))
    tiny_layouts.hart(root / "hart")
    tiny_layouts.write_qwen2(root / "qwen")
    for folder in root.iterdir():
        (folder / "README.md").write_text("about it")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def published(hub: FakeHub, folders: dict[str, Path]) -> FakeHub:
    hub.repositories.clear()
    for name, folder in ((INFINITY, "infinity"), (T5, "t5"), (VAR, "var"), (HART, "hart")):
        hub.add(name, folders[folder])
    hub.add("mit-han-lab/Qwen2-VL-1.5B-Instruct", folders["qwen"])
    return hub


@pytest.fixture
def child(hub: FakeHub, tmp_path: Path) -> Run:
    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        hub.asked.clear()
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=hub.environment(tmp_path) | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def worker(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    environment = hub.environment(tmp_path_factory.mktemp("worker"))
    command, pipe = [sys.executable, "-c", WORKER], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture
def find(hub: FakeHub, worker: subprocess.Popen[str], tmp_path: Path) -> Callable[..., list[str]]:
    """What is printed of a model: lines before the download, and then what was read."""

    def call(source: object, *, free: int | None = None, whole: bool = True, **options: object) -> list[str]:
        hub.asked.clear()
        assert worker.stdin is not None
        assert worker.stdout is not None
        options = {name: str(value) for name, value in options.items()}
        print(json.dumps([str(source), options, str(tmp_path), free, whole]), file=worker.stdin, flush=True)
        told: list[str] = json.loads(worker.stdout.readline())
        return told

    return call


@pytest.fixture
def weights_of(find: Callable[..., list[str]]) -> Callable[..., tuple[list[str], Path | None]]:
    """What is printed of the weights of one part, and where they lie."""

    def call(source: object, **options: object) -> tuple[list[str], Path | None]:
        told = find(source, whole=False, **options)
        if not told[-1].startswith("found "):
            return told, None
        return told[:-1], Path(told[-1].removeprefix("found "))

    return call


def downloaded(hub: FakeHub) -> set[str]:
    return {asked.path.partition("/resolve/")[2].partition("/")[2] for asked in hub.asked if asked.method == "GET"} - {
        ""
    }


def test_only_the_files_of_the_model_are_downloaded(published, folders, find):
    *told, read = find(f"hub:{INFINITY}", model="infinity_2b")
    commit, text = published.repositories[INFINITY].commit, published.repositories[T5].commit
    assert downloaded(published) == {
        "infinity_2b_reg.pth",
        "infinity_vae_d32reg.pth",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert told[0].startswith("infinity_2b: 2 files, ")
    assert told[0].endswith(f" of hub:{INFINITY}@{commit}")
    assert told[1].startswith("  to download: 2 files, ")
    assert told[2].startswith("flan-t5-xl: 3 files, ")
    name, digest, origin = json.loads(read)
    here = load_checkpoint(folders["infinity"], model="infinity_2b", text_encoder=folders["t5"])
    assert (name, digest) == ("infinity_2b", here.digest)
    assert origin[0].startswith(f"transformer: hub:{INFINITY}@{commit}/infinity_2b_reg.pth")
    assert origin[1].startswith(f"image tokenizer: hub:{INFINITY}@{commit}/infinity_vae_d32reg.pth (")
    assert origin[2] == f"text encoder: hub:{T5}@{text}"


def test_a_second_build_of_commits_asks_nobody(published, find):
    pinned = f"hub:{INFINITY}@{published.repositories[INFINITY].commit}"
    text = f"hub:{T5}@{published.repositories[T5].commit}"
    first = find(pinned, model="infinity_2b", text_encoder=text)
    second = find(pinned, model="infinity_2b", text_encoder=text)
    assert published.asked == []
    assert second == [line for line in first if not line.startswith("  to download")]


def test_shards_come_by_their_index(published, folders, find):
    read = find(f"hub:{INFINITY}", model="infinity_8b")[-1]
    names = {f"infinity_8b_weights/{path.name}" for path in (folders["infinity"] / "infinity_8b_weights").iterdir()}
    assert names <= downloaded(published)
    assert json.loads(read)[0] == "infinity_8b"


def test_a_model_of_classes_takes_no_text_encoder(published, folders, find):
    *told, read = find(f"hub:{VAR}", model="var_d20")
    assert downloaded(published) == {"var_d20.pth", "vae_ch160v4096z32.pth", "config.json"}
    assert len(told) == 2
    assert json.loads(read)[1] == load_checkpoint(folders["var"], model="var_d20").digest


def test_hart_comes_with_its_averaged_weights(published, folders, find):
    read = find(f"hub:{HART}")[-1]
    assert "llm/ema_model.bin" in downloaded(published)
    assert "llm/model.safetensors" not in downloaded(published)
    assert json.loads(read)[1] == load_checkpoint(folders["hart"], text_encoder=folders["qwen"]).digest


def test_parts_of_ones_own_in_place_of_published_ones(published, hub, folders, find):
    files = {path.name: path.read_bytes() for path in folders["t5"].iterdir()}
    hub.add("me/parts", {"vae.pth": (folders["infinity"] / "infinity_vae_d32reg.pth").read_bytes()})
    hub.add("me/text", {f"small/{name}": data for name, data in files.items()})
    parts = {"image_tokenizer": "hub:me/parts/vae.pth", "text_encoder": "hub:me/text/small"}
    origin = json.loads(find(f"hub:{INFINITY}", model="infinity_2b", **parts)[-1])[2]
    assert origin[1].startswith(f"image tokenizer: hub:me/parts@{hub.repositories['me/parts'].commit}/vae.pth")
    assert origin[2] == f"text encoder: hub:me/text@{hub.repositories['me/text'].commit}/small"
    assert not {asked.path for asked in hub.asked if T5 in asked.path}
    # A transformer on this disk may take them too.
    origin = json.loads(find(folders["infinity"] / "infinity_2b_reg.pth", **parts)[-1])[2]
    assert origin[0] == "transformer: infinity_2b_reg.pth"
    assert origin[2].startswith("text encoder: hub:me/text@")


# What is wrong is told before anything is downloaded


def test_a_model_must_be_chosen_among_several(published, find):
    told = find(f"hub:{INFINITY}")
    assert told[0].startswith(f"hub:{INFINITY}: 2 files that could be the transformer: infinity_2b")
    assert "--model NAME" in told[-1]
    assert downloaded(published) == set()


def test_a_model_that_is_not_there(published, find):
    assert find(f"hub:{INFINITY}", model="infinity_9b")[0] == f"hub:{INFINITY}: no model 'infinity_9b' among the files"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "has no weights (model.safetensors, pytorch_model.bin, or shards with an index)"),
    ],
)
def test_a_text_encoder_that_lacks_a_file(published, find, file, words):
    for name in (file, "pytorch_model.bin"):
        del published.repositories[T5].files[name]
    told = find(f"hub:{INFINITY}", model="infinity_2b")
    assert told[0].startswith(f"the text encoder in hub:{T5} has no ")
    assert words in told[0]
    assert downloaded(published) == set()


def test_the_instruction_before_hart_s_prompts_is_missed_before_its_gigabytes_come(published, find):
    del published.repositories["mit-han-lab/Qwen2-VL-1.5B-Instruct"].files["prefix.txt"]
    told = find(f"hub:{HART}")
    assert told[0].endswith("has no prefix.txt")
    assert "name the folder with --text-encoder" in told[-1]
    assert downloaded(published) == set()


def test_no_image_tokenizer(published, find):
    del published.repositories[INFINITY].files["infinity_vae_d32reg.pth"]
    told = find(f"hub:{INFINITY}", model="infinity_2b")
    assert told[0].startswith(f"hub:{INFINITY} has no image tokenizer of infinity_2b")
    assert "--image-tokenizer hub:ORG/NAME/FILE" in told[-1]


def test_an_image_tokenizer_is_a_file(published, find):
    told = find(f"hub:{INFINITY}", model="infinity_2b", image_tokenizer=f"hub:{T5}")
    assert told[0] == f"hub:{T5} is a whole repository"


def test_a_disk_without_room_is_told_before_the_download(published, find):
    told = find(f"hub:{INFINITY}", model="infinity_2b", free=1 << 16)
    assert told[-2].startswith("the download takes ")
    assert "64.0 KiB are free on the disk of" in told[-2]
    assert downloaded(published) == set()


# Parts by themselves, and plans


def test_weights_of_one_part_come_by_themselves(published, folders, weights_of):
    infinity = published.repositories[INFINITY]
    told, found = weights_of(f"hub:{INFINITY}", model="infinity_2b")
    assert downloaded(published) == {"infinity_2b_reg.pth"}
    assert told[0] == f"infinity_2b: 1 file, {human_bytes(found.stat().st_size)}, of hub:{INFINITY}@{infinity.commit}"
    assert found.read_bytes() == (folders["infinity"] / "infinity_2b_reg.pth").read_bytes()
    told, found = weights_of(f"hub:{INFINITY}@{infinity.commit}/infinity_vae_d32reg.pth")
    assert downloaded(published) == {"infinity_vae_d32reg.pth"}
    assert found.name == "infinity_vae_d32reg.pth"
    told, found = weights_of(f"hub:{VAR}/var_d16.pth")
    assert downloaded(published) == {"var_d16.pth", "config.json"}, "what tensors do not say lies beside them"
    names = {path.name for path in (folders["infinity"] / "infinity_8b_weights").iterdir()}
    (index,) = (name for name in names if name.endswith(".index.json"))
    told, found = weights_of(f"hub:{INFINITY}/infinity_8b_weights/{index}")
    assert {path.name for path in found.parent.iterdir()} == names, "an index brings its shards"
    assert weights_of(folders["t5"]) == ([], folders["t5"]), "what lies here is not looked up"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (f"hub:{INFINITY}", {}, "2 files that could be the transformer"),
        (f"hub:{INFINITY}/none.pth", {}, f"{INFINITY} has no file 'none.pth' at main"),
        (f"hub:{VAR}/var_d16.pth", {"model": "var_d20"}, "names a file, and the model 'var_d20' another"),
        ("hub:no-such/thing", {}, "the hub has no repository no-such/thing"),
    ],
)
def test_weights_that_cannot_be_had(published, weights_of, source, options, words):
    told, found = weights_of(source, **options)
    assert words in told[0]
    assert found is None
    assert downloaded(published) == set()


def test_plan_and_convert_take_a_name_of_the_hub(published, folders, child: Run, tmp_path: Path):
    """As they take the files on the disk."""
    pinned = f"hub:{VAR}@{published.repositories[VAR].commit}"
    done = child("-m", "fastvar", "plan", pinned, "--model", "var_d16", "--backend", "onnxruntime", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert downloaded(published) == {"var_d16.pth", "vae_ch160v4096z32.pth", "config.json"}
    local = ("plan", folders["var"], "--model", "var_d16", "--backend", "onnxruntime", "--json")
    assert json.loads(done.stdout) == json.loads(child("-m", "fastvar", *local).stdout)
    done = child("-m", "fastvar", "convert", pinned, "--model", "var_d16", "--offline", "--out", "a.safetensors")
    assert (done.returncode, done.stderr, published.asked) == (0, "", [])
    assert child("-m", "fastvar", "convert", folders["var"] / "var_d16.pth", "--out", "b.safetensors").returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("command", [("plan",), ("convert", "--out", "a.safetensors")], ids=lambda command: command[0])
def test_they_say_what_a_hub_does_not_have(published, child: Run, tmp_path: Path, command: tuple[str, ...]):
    done = child("-m", "fastvar", command[0], f"hub:{INFINITY}", *command[1:])
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 files that could be the transformer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a.safetensors").exists()


def test_convert_looks_at_what_it_writes_before_it_downloads(published, child: Run, tmp_path: Path):
    (tmp_path / "there.safetensors").touch()
    done = child("-m", "fastvar", "convert", f"hub:{INFINITY}", "--out", "there.safetensors")
    assert (done.returncode, published.asked) == (2, [])
    assert "is there already" in done.stderr


# A name becomes an image


@pytest.mark.slow
def test_a_hub_name_becomes_an_image(
    published, folders, child: Run, tiny_policy: Path, engine_cache: Path, tmp_path: Path
):
    options = ("--model", "infinity_2b", "--size", "256x256", "--policy", tiny_policy, "--guidance", "off")
    options += ("--cache", engine_cache, "--jobs", "1")
    done = child("-m", "fastvar", "build", f"hub:{INFINITY}", *options, "--out", "bundle")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("infinity_2b: 2 files, ")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    commit = published.repositories[INFINITY].commit
    assert manifest.model == "infinity_2b"
    assert manifest.origin[0].startswith(f"transformer: hub:{INFINITY}@{commit}/infinity_2b_reg.pth")
    draw = ("a red circle", "--seed", "7", "--cfg", "1", "--out")
    drawn = child("-m", "fastvar", "generate", "bundle", *draw, "hub.png")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    # Offline the same bundle comes of it, and of the files on the disk the same image.
    done = child("-m", "fastvar", "build", f"hub:{INFINITY}", *options, "--offline", "--out", "again")
    assert (done.returncode, published.asked) == (0, [])
    assert (tmp_path / "again/manifest.json").read_bytes() == (tmp_path / "bundle/manifest.json").read_bytes()
    local = (folders["infinity"], *options, "--text-encoder", folders["t5"])
    assert child("-m", "fastvar", "build", *local, "--out", "local").returncode == 0
    assert child("-m", "fastvar", "generate", "local", *draw, "local.png").returncode == 0
    with Image.open(tmp_path / "hub.png") as one, Image.open(tmp_path / "local.png") as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.slow
def test_a_build_that_cannot_be_had_ends_in_words(published, child: Run, tmp_path: Path):
    published.repositories[INFINITY].gated = True
    done = child("-m", "fastvar", "build", f"hub:{INFINITY}", "--model", "infinity_2b", "--out", "bundle")
    assert done.returncode == 2
    assert f"error: {INFINITY} is gated: who downloads it must have accepted its licence" in done.stderr
    assert "Traceback" not in done.stderr
    done = child("-m", "fastvar", "build", f"hub:{INFINITY}", "--offline", "--out", "bundle")
    assert done.returncode == 2
    assert "and the hub may not be asked" in done.stderr
    assert not (tmp_path / "bundle").exists()
