"""What `make gpu` prepares: the Python at hand, a folder beside it, packed libraries that unpack within limits."""

from __future__ import annotations

import importlib.util
import io
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import archives
from benchmarks.gpu import install as installation
from benchmarks.gpu.archives import halve, pack, unpack
from benchmarks.gpu.install import (
    NEEDED,
    ROOT,
    beside,
    has_cuda_torch,
    install,
    lacking,
    linker_variables,
    prepare,
    python_at_hand,
    unpack_all,
)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a small library in place of TensorRT-RTX, and a dictionary in proportion."""
    smaller = [archives.FILTERS[0], {**archives.FILTERS[1], "dict_size": 1 << 20}]
    monkeypatch.setattr(archives, "FILTERS", smaller)
    folder = tmp_path / "site-packages" / "tensorrt_rtx_libs"
    folder.mkdir(parents=True)
    (folder / "libtensorrt.so").write_bytes(os.urandom(100_000))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder.parent / "numpy").mkdir()
    return folder.parent


LIBRARY = "tensorrt_rtx_libs/libtensorrt.so"


def test_what_is_packed_is_installed_elsewhere(packages: Path, tmp_path: Path):
    archive = pack(packages, tmp_path / "out")
    target = tmp_path / "other"
    target.mkdir()
    install(archive.parent, target)
    found = sorted(
        str(path.relative_to(target)) for path in target.rglob("*") if not path.is_relative_to(target / "fastvar")
    )
    assert found == ["tensorrt_rtx_libs", LIBRARY]
    assert (target / LIBRARY).read_bytes() == (packages / LIBRARY).read_bytes()
    assert (target / "fastvar").resolve() == ROOT
    install(archive.parent, target)  # again, over what is there


def test_in_two_halves(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    archive = pack(packages, tmp_path / "out")
    size = archive.stat().st_size
    first, second = halve(archive)
    assert not archive.exists()
    assert abs(first.stat().st_size - size / 2) < 1
    unpack_all(archive.parent, tmp_path / "target")
    assert (tmp_path / "target" / LIBRARY).read_bytes() == (packages / LIBRARY).read_bytes()
    second.rename(tmp_path / "elsewhere")
    unpack_all(archive.parent, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert "one half is missing" in capsys.readouterr().err


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with lzma.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def link_member(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped"])
def test_members_that_lead_outside_are_refused(tmp_path: Path, name: str):
    path = archive_of(tmp_path / "bad.tar.xz", (tarfile.TarInfo(name), b""))
    with pytest.raises(SystemExit, match="escaped"):
        unpack(path, tmp_path / "inner")
    assert not (tmp_path / "escaped").exists()


def test_links_are_refused_and_so_is_a_way_through_one_that_lies_there(tmp_path: Path):
    path = archive_of(tmp_path / "link.tar.xz", (link_member("a", "/etc/passwd"), b""))
    with pytest.raises(SystemExit, match="'a'"):
        unpack(path, tmp_path / "inner")
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "inner" / "fastvar").symlink_to(tmp_path / "outside")
    path = archive_of(tmp_path / "through.tar.xz", (tarfile.TarInfo("fastvar/x"), b"x"))
    with pytest.raises(SystemExit, match="fastvar/x"):
        unpack(path, tmp_path / "inner")
    assert not (tmp_path / "outside" / "x").exists()


def test_more_bytes_than_the_library_ever_took_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 1 << 20)
    big = archive_of(
        tmp_path / "big.tar.xz", (tarfile.TarInfo("a"), b"a" * (1 << 19)), (tarfile.TarInfo("b"), bytes(1 << 20))
    )
    with pytest.raises(SystemExit, match="more than it may"):
        unpack(big, tmp_path / "inner")
    assert not (tmp_path / "inner" / "b").exists()


def test_and_so_are_more_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archives, "MOST_FILES", 3)
    many = archive_of(tmp_path / "many.tar.xz", *((tarfile.TarInfo(f"f{i}"), b"") for i in range(5)))
    with pytest.raises(SystemExit, match="3 files"):
        unpack(many, tmp_path / "inner")


def test_and_bytes_that_no_header_tells_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A long name takes bytes without being a member of any size."""
    monkeypatch.setattr(archives, "MOST_BYTES", 1 << 10)
    monkeypatch.setattr(archives, "MOST_FILES", 10)
    member = tarfile.TarInfo("n" * (1 << 20))
    with pytest.raises(SystemExit, match="more than it may"):
        unpack(archive_of(tmp_path / "name.tar.xz", (member, b"")), tmp_path / "inner")


def test_a_torn_archive_is_told_in_words(packages: Path, tmp_path: Path):
    archive = pack(packages, tmp_path / "out")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(SystemExit, match="no whole archive"):
        unpack(archive, tmp_path / "target")


def test_nothing_to_pack_and_nothing_to_install_from(tmp_path: Path):
    with pytest.raises(SystemExit, match="no TensorRT-RTX"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="no folder"):
        install(tmp_path / "nowhere", tmp_path)


def wheel(folder: Path, name: str) -> Path:
    """A wheel of one module."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "VALUE = 3\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_an_environment_is_used_as_it_is_and_what_it_lacks_comes_beside_it(tmp_path: Path):
    """No environment is made; one wheel is installed already, the other is not."""
    assert python_at_hand(), "tests run in an environment"
    wheels = tmp_path / "wheels"
    wheel(wheels, "msgspec")
    wheel(wheels, "small_and_missing")
    assert [path.name.split("-")[0] for path in lacking(sorted(wheels.glob("*")))] == ["small_and_missing"]
    launcher = prepare(tmp_path / "work", wheels, tmp_path / "venv")
    assert not (tmp_path / "venv").exists()
    assert (tmp_path / "work" / "site" / "fastvar").resolve() == ROOT
    assert not (tmp_path / "work" / "site" / "msgspec.py").exists()
    said = subprocess.run(
        [
            str(launcher),
            "-c",
            "import sys, fastvar, small_and_missing as s; print(s.VALUE, sys.executable, fastvar.__file__)",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "/nowhere"},
    ).stdout.split()
    assert said[:2] == ["3", sys.executable]
    assert Path(said[2]).resolve() == ROOT / "__init__.py"
    prepare(tmp_path / "work", wheels, tmp_path / "venv")  # again, over what is there


def test_what_is_needed_and_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installation, "NEEDED", (*NEEDED, "no_such_module"))
    with pytest.raises(SystemExit, match="lacks no_such_module"):
        beside(tmp_path, None)


def test_all_that_is_needed_is_a_requirement_of_ours():
    text = (ROOT / "pyproject.toml").read_text()
    for module in NEEDED:
        assert f'"{ {"PIL": "pillow"}.get(module, module).replace("_", "-") }>=' in text


@pytest.mark.parametrize(
    ("line", "found"), [("cuda: Optional[str] = '13.0'", True), ("cuda: Optional[str] = None", False)]
)
def test_a_python_with_torch_for_cuda_is_used_as_it_is(tmp_path: Path, monkeypatch, line: str, found: bool):
    """Asked of the file, for importing torch takes seconds."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.11.0'\n{line}\nhip: Optional[str] = None\n")
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert has_cuda_torch() is found
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert python_at_hand() is found


def test_any_other_python_gets_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(installation, "python_at_hand", lambda: False)
    monkeypatch.setattr(installation.subprocess, "run", lambda command, **_: commands.append(command) or _Said(""))
    launcher = prepare(tmp_path / "work", None, tmp_path / "venv")
    assert commands[0][1:] == ["-m", "venv", "--system-site-packages", str(tmp_path / "venv")]
    assert commands[1] == [str(tmp_path / "venv" / "bin" / "python"), "-m", "benchmarks.gpu.install", "--install"]
    assert f"exec {tmp_path}/venv/bin/python" in launcher.read_text()


class _Said:
    def __init__(self, stdout: str) -> None:
        self.stdout = stdout


@pytest.mark.skipif(sys.platform == "win32", reason="links to the driver are of Linux")
def test_a_linker_that_finds_no_driver_is_given_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    driver, lib = tmp_path / "driver", tmp_path / "lib"
    driver.mkdir()
    (driver / "libcuda.so.1").touch()
    monkeypatch.setattr(installation, "_linker_finds", lambda name: False)
    given = {"LD_LIBRARY_PATH": str(driver), "LIBRARY_PATH": "/before"}
    assert linker_variables(lib, given) == {"LIBRARY_PATH": f"{lib}:/before"}
    assert (lib / "libcuda.so").resolve() == driver / "libcuda.so.1"
    assert linker_variables(lib, given) == {"LIBRARY_PATH": f"{lib}:/before"}, "again"
    assert linker_variables(tmp_path / "other", {"LIBRARY_PATH": str(lib)}) == {}, "it finds that link"
    monkeypatch.setattr(installation, "_linker_finds", lambda name: True)
    assert linker_variables(tmp_path / "other", given) == {}
