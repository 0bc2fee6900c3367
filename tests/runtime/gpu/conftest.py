"""The tiny model for a fake GPU, and for the CPU that it is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.runtime import session as session_module
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import FakeBackend, FakeTensorRT, fake_gpu_bundle
from tests.runtime.gpu.drawing import Load, scratch_of


@pytest.fixture(scope="session")
def gpu_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return fake_gpu_bundle(tiny_bundle, tmp_path_factory.mktemp("bundles") / "gpu", scratch_of)


@pytest.fixture
def copied(gpu_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(gpu_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def cpu(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a bundle as a user does, on a machine with a fake GPU; `library` is where its plans go."""

    def load(
        path: Path, driver: FakeDriver | None = None, library: FakeTensorRT | None = None, **options: object
    ) -> tuple[Pipeline, FakeDriver]:
        driver = driver or FakeDriver()

        def backend(name: str, *, threads: int | None, cache_folder: Path, target: str | None = None) -> FakeBackend:
            assert name == "tensorrt-rtx"
            return FakeBackend(driver, None, library)

        monkeypatch.setattr(session_module, "get_backend", backend)
        return Pipeline.load(path, **options), driver

    return load
