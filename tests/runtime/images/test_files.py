"""Image files: whole or not at all, and never over a file that is there."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.images.files import check_writable, save_image, write_new

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")


def no_links(*_arguments: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no links":
        monkeypatch.setattr(os, "link", no_links)


@pytest.mark.usefixtures("file_system")
def test_a_name_that_is_taken_gets_a_number(tmp_path: Path):
    names = [save_image(image, tmp_path / "a.png", {}).name for image in (RED, BLUE, RED)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "a-3.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "a-2.png").read_bytes()


@pytest.mark.usefixtures("file_system")
def test_a_link_that_leads_nowhere_is_not_followed(tmp_path: Path):
    (tmp_path / "a.png").symlink_to("elsewhere.png")
    assert save_image(RED, tmp_path / "a.png", {}).name == "a-2.png"
    assert not (tmp_path / "elsewhere.png").exists()


@pytest.mark.usefixtures("file_system")
def test_threads_that_want_one_name_all_keep_their_file(tmp_path: Path):
    start, written = threading.Barrier(16), []

    def write(data: bytes) -> None:
        start.wait()
        written.append((write_new(tmp_path / "a.png", data), data))

    threads = [threading.Thread(target=write, args=(bytes([i]) * 1000,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir(tmp_path)) == len({path for path, _ in written}) == 16
    assert all(path.read_bytes() == data for path, data in written)


def test_processes_that_want_one_name_all_keep_their_image(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from PIL import Image\n"
        "from fastvar.runtime.images.files import save_image\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(20): print(save_image(Image.new('RGB', (8, 6)), Path('a.png'), {'by': sys.argv[1]}))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    started = [subprocess.Popen([sys.executable, "-c", code, str(i)], **pipes) for i in range(4)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    names = [name for process in started for name in process.communicate()[0].split()]
    assert len(names) == len(set(names)) == 80
    assert set(os.listdir(tmp_path)) == set(names)


def test_permissions_are_those_of_any_new_file_and_the_umask_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def touched(_mask: int) -> int:
        raise AssertionError("the umask belongs to the whole process")

    (tmp_path / "plain").touch()
    monkeypatch.setattr(os, "umask", touched)
    save_image(RED, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("function", ["fsync", "link"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whatever_stops_it_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function, failure):
    (tmp_path / "a.png").write_bytes(b"precious")

    def fail(*_arguments: object) -> None:
        raise failure

    if isinstance(failure, OSError) and function == "link":  # else the placeholder would be tried, and do
        monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(InputError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        save_image(RED, tmp_path / "a.png", {})
    if isinstance(failure, OSError):
        assert str(tmp_path / "a.png") in str(caught.value)
        assert "No space left" in str(caught.value)
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"precious"


def test_a_killed_process_leaves_a_file_that_can_be_told(tmp_path: Path):
    code = (
        "import os, signal; from pathlib import Path; from fastvar.runtime.images.files import write_new\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); write_new(Path('a.png'), b'image')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".fastvar-")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(mounted, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_what_was_written(small_disk: Path):
    noise = Image.effect_noise((100, 80), 90).convert("RGB")  # some 8 KB
    written: list[Path] = []

    def fill() -> None:
        for _ in range(20):
            written.append(save_image(noise, small_disk / "new" / "a.png", {"prompt": "noise"}))

    with pytest.raises(InputError, match="No space left on device") as caught:
        fill()
    assert "cannot write " + str(small_disk / "new" / "a.png") in str(caught.value)
    assert len(written) > 1
    assert set(os.listdir(small_disk / "new")) == {path.name for path in written}
    for path in written:
        with Image.open(path) as image:
            assert image.tobytes() == noise.tobytes()


def test_unwritable_place_is_the_users_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        save_image(RED, tmp_path / "file" / "a.png", {})
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "file" / "deeper")
    with pytest.raises(InputError, match="name too long"):
        save_image(RED, tmp_path / f"{'x' * 255}.png", {})


def test_check_writable_leaves_no_trace(tmp_path: Path):
    check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []
