"""The installed runtime with the oldest packages it admits: BUNDLE is inspected, and drawn from in every format.

`make test-lowest` runs it, with the Python of an environment without torch, outside the checkout.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "fakes"))  # its modules, and nothing else of the checkout

from hub import fake_hub

CONSTRAINTS = Path(__file__).parents[1] / "constraints" / "lowest.txt"


def main(bundle: Path) -> None:
    check_versions()
    check_hub(bundle)
    fastvar = Path(sys.executable).with_name("fastvar")
    with tempfile.TemporaryDirectory() as folder:
        for command in ("--version", "--help", "generate --help", "build --help", "sizes", "doctor"):
            run(folder, fastvar, *command.split())
        run(folder, sys.executable, "-m", "fastvar", "inspect", bundle, "--engines")
        for name in ("a.png", "a.jpg", "a.webp"):
            run(
                folder, fastvar, "generate", bundle, "a red circle", "--seed", 1, "--cfg", 1, "--out", name, "--timings"
            )
            assert (Path(folder) / name).stat().st_size > 1000
        told = run(folder, fastvar, "generate", bundle, "a red circle", "--seed", "x", code=2)
        assert "--seed" in told
        told = run(folder, fastvar, "build", "checkpoint", "--out", "b", code=2)
        assert "fastvar-runtime[export]" in told
    print("the runtime works with", CONSTRAINTS.name)


def check_hub(bundle: Path) -> None:
    """A bundle is loaded from a hub on loopback, and again with nobody to ask."""
    fastvar = Path(sys.executable).with_name("fastvar")
    with tempfile.TemporaryDirectory() as folder, fake_hub() as hub:
        hub.add("org/bundle", bundle)
        online = hub.environment(Path(folder))
        offline = online | {"HF_HUB_OFFLINE": "1"}
        run(folder, fastvar, "inspect", "hub:org/bundle", code=2, environment=offline)
        run(folder, fastvar, "inspect", "hub:org/bundle", environment=online)
        asked = len(hub.asked)
        command = ("generate", "hub:org/bundle", "a red circle", "--seed", 1, "--cfg", 1, "--out", "a.png")
        run(folder, fastvar, *command, environment=offline)
        assert (Path(folder) / "a.png").stat().st_size > 1000
        assert len(hub.asked) == asked
        told = run(folder, fastvar, "inspect", "hub:org/other", code=2, environment=online)
        assert "the hub has no repository org/other" in told


def check_versions() -> None:
    """The environment is what it is meant to be."""
    assert find_spec("torch") is None, "torch is there"
    for line in CONSTRAINTS.read_text().splitlines():
        name, _, wanted = line.partition("#")[0].partition(";")[0].strip().partition("==")
        try:
            found = version(name) if name else wanted
        except PackageNotFoundError:
            assert ";" in line, f"{name} is not installed"  # for other versions of Python
            continue
        assert found == wanted, f"{name} is {found}"


def run(folder: str, *command: object, code: int = 0, environment: dict[str, str] | None = None) -> str:
    """What a command prints; it ends with that code."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
