"""What pyproject.toml promises: bounds that are tried, and all that `python -m` and the command need."""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.test_imports import modules

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, PACKED = SETTINGS["project"], SETTINGS["tool"]["setuptools"]


def bounds(requirements: list[str], operator: str) -> dict[str, tuple[int, ...]]:
    found = {}
    for line in requirements:
        requirement = line.partition("#")[0].partition(";")[0].strip()
        if requirement:
            name, version = requirement.split(operator)
            numbers = tuple(map(int, re.findall(r"\d+", version)))
            found[name] = numbers + (0,) * (3 - len(numbers))
    return found


def test_lower_bounds_are_those_that_are_tried():
    tried = bounds((ROOT / "constraints" / "lowest.txt").read_text().splitlines(), "==")
    extras = PROJECT["optional-dependencies"]
    declared = PROJECT["dependencies"] + extras["onnxruntime"] + extras["hub"]
    assert bounds(declared, ">=") == tried


def test_lower_bounds_are_not_below_what_is_known_to_fail():
    declared = bounds(PROJECT["dependencies"], ">=")
    assert declared["pillow"] >= (10, 1, 0)  # has_transparency_data
    assert declared["typer"] >= (0, 15, 4)  # "Type not yet supported", make_metavar: beside newer versions of click


def test_every_folder_of_the_package_is_packed_and_no_other():
    folders = {file.parent.relative_to(ROOT).parts for file in modules(ROOT).values()}
    assert sorted(".".join(("fastvar", *parts)) for parts in folders) == sorted(PACKED["packages"])


def test_every_file_that_is_no_module_is_packed():
    folders = {file.parent for file in modules(ROOT).values()} - {ROOT}
    others = {file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix != ".py"}
    others = {file for file in others if "__pycache__" not in file.parts}
    packed = set()
    for package, patterns in PACKED["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        packed |= {file for pattern in patterns for file in folder.glob(pattern)}
    assert packed - {ROOT / "py.typed"} == others
