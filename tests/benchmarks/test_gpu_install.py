from __future__ import annotations

import lzma
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu_install
from benchmarks.gpu_install import ROOT, install, pack, unpack


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with a small library in place of TensorRT-RTX, and a dictionary in proportion."""
    smaller = [gpu_install.FILTERS[0], {**gpu_install.FILTERS[1], "dict_size": 1 << 20}]
    monkeypatch.setattr(gpu_install, "FILTERS", smaller)
    folder = tmp_path / "site-packages" / "tensorrt_rtx_libs"
    folder.mkdir(parents=True)
    (folder / "libtensorrt.so").write_bytes(bytes(range(256)) * 400)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder.parent / "numpy").mkdir()
    return folder.parent


def test_what_is_packed_is_installed_elsewhere(packages: Path, tmp_path: Path):
    archive = pack(packages, tmp_path / "out")
    target = tmp_path / "other"
    target.mkdir()
    install(archive.parent, target)
    found = sorted(
        str(path.relative_to(target)) for path in target.rglob("*") if not path.is_relative_to(target / "fastvar")
    )
    assert found == ["tensorrt_rtx_libs", "tensorrt_rtx_libs/libtensorrt.so"]
    library = "tensorrt_rtx_libs/libtensorrt.so"
    assert (target / library).read_bytes() == (packages / library).read_bytes()
    assert (target / "fastvar").resolve() == ROOT
    install(archive.parent, target)  # again, over what is there


def test_members_that_lead_outside_are_refused(tmp_path: Path):
    path = tmp_path / "bad.tar.xz"
    with lzma.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"))
    with pytest.raises(SystemExit, match="escaped"):
        unpack(path, tmp_path / "inner")
    assert not (tmp_path / "escaped").exists()


def test_nothing_to_pack_and_nothing_to_install_from(tmp_path: Path):
    with pytest.raises(SystemExit, match="no TensorRT-RTX"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(SystemExit, match="no folder"):
        install(tmp_path / "nowhere", tmp_path)
