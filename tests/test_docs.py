"""What the documentation says is so: names, paths, links, commands, options, and examples that run."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from PIL import Image

import fastvar
from fastvar import cli, errors
from fastvar.core.plan import SamplingMode
from fastvar.core.precision import Precision, PrecisionChoice
from fastvar.core.schedule import ScaleSchedule
from fastvar.engines.base import Backend
from fastvar.engines.bundle import manifest as nouns
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.renamed import RENAMED
from fastvar.engines.spec import EngineReport, EngineSpec, TensorSpec
from fastvar.export.construction import BuildReport
from fastvar.export.conversion.convert import ConversionReport
from fastvar.export.models.transformer.adapter import ModelAdapter
from fastvar.export.new_weights import replace_weights
from fastvar.export.rebuild import rebuild
from fastvar.families.base import Family, PromptFormat, SamplingDefaults
from fastvar.runtime.output import GeneratedImage, ImageTimings, Output, ScaleEvent
from fastvar.runtime.stream import Stream
from tests.test_imports import ORDER

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
TOP = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"} - {"build", "dist"}
MADE = ("demo/out",)  # by a command, not there before
PUBLIC = (rebuild, replace_weights, BuildReport, ConversionReport, Stream, Output, GeneratedImage, ImageTimings)
PUBLIC += (ScaleEvent, Bundle, Bundle.open)
AUTHORS = (Backend, Family, ModelAdapter)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_words(page: Path) -> Iterator[str]:
    """What stands between backticks in the text of a page, outside its blocks of code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", text)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


# Paths and links


@by_page
def test_every_path_is_there(page: Path):
    missing = []
    for word in code_words(page):
        path = word.split()[0] if word.split() else ""
        if "NAME" in path or path.startswith(MADE) or not re.fullmatch(r"[\w./\-]+", path):
            continue
        if path.endswith(".py") and "/" not in path:
            found = (ROOT / path).exists() or any(ROOT.glob(f"*/**/{path}"))
        elif "/" in path and path.partition("/")[0] in TOP:
            found = (ROOT / path).exists()
        else:
            found = not path.endswith(".py")
        missing += [] if found else [path]
    assert missing == []


@by_page
def test_every_link_leads_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if target and not (page.parent / target).exists()] == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/\-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_the_table_of_folders_is_that_of_the_architecture():
    """In the same order: folders of one line in any."""
    table = (DOCS / "structures.md").read_text(encoding="utf-8").partition("\nBeside the package")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    folders = [word for row in rows for word in re.findall(r"`([^`]+)`", row)]
    listed = [folder.removesuffix(".py").rstrip("/").replace("/", ".") for folder in folders]
    level = {folder: number for number, line in enumerate(ORDER) for folder in line}
    assert sorted(listed) == sorted(level)
    faces = {"cli", "__init__", "__main__"}
    levels = [level[folder] for folder in listed if folder not in faces]
    assert levels == sorted(levels)


# The reference


def documented() -> set[Any]:
    """Every object that a page of the reference shows."""
    found: list[Any] = []
    for page in REFERENCE:
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text("utf-8"), flags=re.MULTILINE):
            found += shown(resolved(name), options)
    return {id(one) for one in found}


def resolved(name: str) -> Any:
    """A module, or what lies in one under a dotted name."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:count]))
        found = getattr(found, part)
    return found


def shown(thing: Any, options: str) -> Iterator[Any]:
    yield thing
    listed = re.search(r"members: \[(.*?)\]", options)
    hidden = re.findall(r'"!\^(\w+)\$"', options)
    names = listed[1].split(", ") if listed else [name for name in getattr(thing, "__dict__", {}) if name[0] != "_"]
    for name in names:
        member = inspect.getattr_static(thing, name)
        own = not isinstance(thing, ModuleType) or getattr(member, "__module__", "") == thing.__name__
        if own and name not in hidden:
            yield getattr(thing, name)
            if isinstance(member, classmethod):
                yield member.__func__


def test_the_reference_shows_every_public_name():
    found = documented()
    names = [name for name in fastvar.__all__ if not name.startswith("__")]
    missing = [name for name in names if id(getattr(fastvar, name)) not in found]
    missing += [name for name, error in vars(errors).items() if inspect.isclass(error) and id(error) not in found]
    further = [thing for thing in (*PUBLIC, *AUTHORS) if id(getattr(thing, "__func__", thing)) not in found]
    assert missing + [thing.__qualname__ for thing in further] == []


def test_every_public_method_of_a_pipeline_is_shown():
    found = documented()
    methods = {name: member for name, member in vars(fastvar.Pipeline).items() if name == "__call__" or name[0] != "_"}
    missing = [name for name, member in methods.items() if id(getattr(member, "__func__", member)) not in found]
    assert missing == []


def test_troubleshooting_knows_every_error_and_warning():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    classes = [name for name, error in vars(errors).items() if inspect.isclass(error)]
    assert [name for name in classes if f"`{name}`" not in text] == []


# The bundle's format


def test_the_format_page_names_every_entry():
    words = {word for entry in code_words(DOCS / "bundle-format.md") for word in re.split(r"[.\[\]]+", entry)}
    kinds = (nouns.Manifest, nouns.EngineSet, nouns.StepEngines, nouns.DecoderTiles, nouns.DecoderStage)
    kinds += (nouns.FileRecord, EngineSpec, EngineReport, TensorSpec, ScaleSchedule, Precision, PromptFormat)
    kinds += (PrecisionChoice,)
    kinds += (SamplingDefaults, SamplingMode, nouns._PlanFile, nouns._PolicyFile)
    assert all(is_dataclass(kind) for kind in kinds)
    entries = {entry.name for kind in kinds for entry in fields(kind)}
    assert entries - words == set()


def test_the_format_page_names_every_old_name():
    table = (DOCS / "bundle-format.md").read_text(encoding="utf-8").partition("## Names of format 4")[2]
    rows = re.findall(r"^\| `.*?\| (`.*?) \| (`.*?) \|", table, flags=re.MULTILINE)
    told = {
        pair for old, new in rows for pair in zip(re.findall(r"`(\w+)`", old), re.findall(r"`(\w+)`", new), strict=True)
    }
    assert told == {pair for names in RENAMED.values() for pair in names.items()}


# Commands


def commands() -> dict[str, set[str]]:
    """The options of every command of `fastvar`."""
    group: Any = typer.main.get_command(cli.app)
    return {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


def of_the_gpu_day() -> set[str]:
    """The options of `make gpu`."""
    from benchmarks.gpu.__main__ import app

    group: Any = typer.main.get_command(app)
    found = [group, *getattr(group, "commands", {}).values()]
    return {option for command in found for parameter in command.params for option in parameter.opts}


@by_page
def test_every_command_line_is_understood(page: Path):
    known, wrong = commands(), []
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += [word for word in code_words(page) if word.startswith("fastvar ")]
    for line in lines:
        words = shlex.split(line.partition("    #")[0].partition("   #")[0], comments=True)
        if words[:1] != ["fastvar"] or len(words) < 2:
            continue
        options = known.get(words[1])
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("-") and word != "-"}
        wrong += [line] if options is None or given - options - {"--help"} else []
    assert wrong == []


@by_page
def test_every_option_is_one(page: Path):
    """Between backticks, where no command is named with it."""
    known = set().union(*commands().values(), of_the_gpu_day()) | {"--help", "--version"}
    said = {word.split()[0] for word in code_words(page) if word.startswith("--")}
    assert said - known == set()


@by_page
def test_every_target_and_module_is_there(page: Path):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+[a-z])", text, flags=re.MULTILINE)) <= targets
    modules = {name.rstrip(".") for name in re.findall(r"python -m ([\w.]+)", text)} - {"pip", "fastvar", "venv"}
    files = [ROOT / name.replace(".", "/") for name in modules]
    assert [file.name for file in files if not file.with_suffix(".py").exists() and not file.is_dir()] == []


# Examples


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")], ids=lambda page: page.name)
def test_examples_of_json_are_json(page: Path):
    for block in blocks(page, "json"):
        assert json.loads(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_examples_run(
    page: Path,
    editing_bundle: Path,
    var_editing_bundle: Path,
    engine_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """In a folder with two bundles, two images, and the demo's checkpoint under its name."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    shutil.copytree(editing_bundle, tmp_path / "bundle")
    shutil.copytree(var_editing_bundle, tmp_path / "class-bundle")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "small.png")
    Image.new("RGB", (256, 256), "red").save(tmp_path / "photo.png")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 192, 192))
    mask.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, f"{page.name}", "exec"), {"__name__": "example"})
