"""Where images go: files of several formats, folders, stdout; and what is refused before anything is loaded."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.images import files as image_files
from fastvar.runtime.images.formats import read_metadata

PROMPT = "a red circle above a blue square"
COMMAND = [sys.executable, "-m", "fastvar", "generate"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_a_suffix_names_the_format(run, tiny_bundle, tmp_path, name):
    assert run("generate", tiny_bundle, PROMPT, "--seed", 3, "--out", name)[0] == 0
    told = read_metadata(tmp_path / name)
    assert (told["prompt"], told["seed"]) == (PROMPT, "3")
    assert json.loads(told["settings"])["size"] == "256x256"
    with Image.open(tmp_path / name) as image:
        assert image.format == {"a.png": "PNG", "a.webp": "WEBP"}.get(name, "JPEG")


def test_format_and_quality_of_a_folder(run, tiny_bundle, tmp_path):
    options = ("generate", tiny_bundle, "a", "b", "--seed", 3, "--cfg", 1)
    assert run(*options, "--format", "webp", "--out", "new")[0] == 0
    assert sorted(os.listdir(tmp_path / "new")) == ["a-3.webp", "b-3.webp"]
    for quality in (20, 100):
        assert run(*options, "--format", "jpeg", "--quality", quality, "--out", f"q{quality}")[0] == 0
    sizes = [(tmp_path / folder / "a-3.jpg").stat().st_size for folder in ("q20", "q100")]
    assert sizes[0] < sizes[1]


def test_files_that_are_there_are_kept(run, tiny_bundle, tmp_path):
    for name in ("a.jpg", "."):
        for _ in range(2):
            assert run("generate", tiny_bundle, "b", "--seed", 3, "--out", name)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["a-2.jpg", "a.jpg", "b-3-2.png", "b-3.png"]


BAD = {
    "png has no quality": ("--quality", 90),
    "Invalid value for '--quality'": ("--format", "jpeg", "--quality", 101),
    "format 'gif' not understood": ("--format", "gif"),
    "--format jpeg, but --out names a png file": ("--format", "jpeg", "--out", "a.png"),
    "--out names one file for 2 images": ("second", "--out", "-"),
    "prompt and settings take": ("猫" * 12_000, "--format", "jpeg"),
    "cannot write": ("--out", "a.bmp"),
    "cannot write file": ("--out", "file/new"),
}


@pytest.mark.parametrize("message", BAD)
def test_it_is_told_before_the_bundle_is_opened(run, tmp_path, message):
    (tmp_path / "file").touch()
    code, out, err = run("generate", "missing", PROMPT, *BAD[message])
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert os.listdir(tmp_path) == ["file"]


def test_one_bad_prompt_of_many_is_told_before_anything_is_drawn(run, tiny_bundle, tmp_path):
    code, out, err = run("generate", tiny_bundle, "one", "two", "red " * 40, "four")
    assert (code, out) == (2, "")
    assert "expected: at most 16" in err
    assert os.listdir(tmp_path) == []


def test_an_image_that_cannot_be_saved_is_named_and_those_before_stay(run, tiny_bundle, tmp_path, monkeypatch):
    write_new = image_files.write_new

    def full_at_third(path: Path, data: bytes) -> Path:
        if path.name.startswith("three"):
            raise OSError(28, "No space left on device")
        return write_new(path, data)

    monkeypatch.setattr(image_files, "write_new", full_at_third)
    code, out, err = run("generate", tiny_bundle, "one", "two", "three", "four", "--seed", 1)
    assert code == 2
    assert "error: cannot write three-1.png: No space left on device" in err
    assert [line.split()[1] for line in out.splitlines()] == ["one-1.png", "two-1.png"]
    assert sorted(os.listdir(tmp_path)) == ["one-1.png", "two-1.png"]


@pytest.mark.parametrize(("options", "kind"), [((), "PNG"), (("--format", "jpeg", "--quality", "50"), "JPEG")])
def test_stdout_carries_the_image_and_nothing_else(tiny_bundle, tmp_path, options, kind):
    command = [*COMMAND, str(tiny_bundle), PROMPT, "--seed", "5", "--timings", "--out", "-", *options]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    with Image.open(io.BytesIO(done.stdout)) as image:
        image.load()
        assert (image.format, image.size) == (kind, (256, 256))
    assert b"wrote the image to stdout (seed 5" in done.stderr
    assert b"16x16" in done.stderr  # the timings
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_an_image_that_stdout_does_not_take_is_an_error(tiny_bundle):
    with open("/dev/full", "w") as full:
        command = [*COMMAND, str(tiny_bundle), PROMPT, "--out", "-"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write the image to stdout: No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo terminals")
def test_a_terminal_is_given_no_image():
    import pty

    ours, theirs = pty.openpty()
    command = [*COMMAND, "missing", PROMPT, "--out", "-"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 2
    assert "an image on a terminal is no use" in done.stderr


def test_a_closed_stdout_is_given_no_image(monkeypatch):
    from fastvar.console.saving import destination

    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match="stdout is closed"):
        destination(Path("-"), None, None, [PROMPT], 1).__enter__()


def test_editing_commands_write_every_format_too(run, editing_bundle, tmp_path):
    Image.effect_noise((64, 64), 60).save(tmp_path / "small.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 20, 20))
    mask.save(tmp_path / "mask.png")
    small = tmp_path / "small.png"
    assert run("upscale", editing_bundle, small, PROMPT, "--seed", 1, "--out", "up.webp", "--quality", 100)[0] == 0
    options = ("--mask", tmp_path / "mask.png", "--out", "painted", "--format", "jpeg", "--seed", 1)
    assert run("inpaint", editing_bundle, small, PROMPT, *options)[0] == 0
    assert json.loads(read_metadata(tmp_path / "up.webp")["settings"])["task"] == "upscale"
    (painted,) = (tmp_path / "painted").iterdir()
    assert painted.suffix == ".jpg"
