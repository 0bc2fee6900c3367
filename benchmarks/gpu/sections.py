"""The sections of a GPU's day, the one that tells most of truth in a minute first, and what each depends on.

A section is a module of measured/ with a function `measure(context)`. It runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.builder import ROOT
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal, Measuring
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import InputError

HERE = Path(__file__).parent
BUNDLES, JOURNAL, LOGS = "bundles", "journal.jsonl", "logs"
OUTSIDE = {"benchmarks", "build", "demo", "dist", "docs", "tests"}
BOOKS = {"journal", "sections"}
IMPORTED = re.compile(r"^\s*from benchmarks\.([\w.]+) import", re.MULTILINE)
SOURCES = {".py", ".c", ".h", ".cpp"}


@dataclass(frozen=True)
class Section:
    """Args:
    name: of the section.
    seconds: its time box.
    module: of measured/, whose `measure` it is.
    makes_files: it is run again even if it was done, for its files may be gone.
    """

    name: str
    seconds: float
    module: str
    makes_files: bool = False


SECTIONS = (
    Section("build", 300, "bundles", makes_files=True),
    Section("truth", 90, "truth"),
    Section("speed", 100, "speed"),
    Section("large", 80, "large"),
    Section("eager", 180, "against_eager"),
    Section("batch", 90, "passes"),
    Section("families", 60, "families"),
    Section("attention", 45, "attention"),
    Section("tests", 180, "marked_tests"),
    Section("tensorrt", 180, "tensorrt"),
)


def section_named(name: str) -> Section:
    """The section.

    Raises:
        InputError: there is none.
    """
    for section in SECTIONS:
        if section.name == name:
            return section
    raise InputError(f"no section {name!r}", expected=f"one of {', '.join(s.name for s in SECTIONS)}")


@dataclass
class Context:
    """What a section is given."""

    work: Path
    identity: Identity
    log: Measuring

    def path(self, bundle: str) -> Path:
        return self.work / BUNDLES / bundle

    def bundle(self, name: str) -> Bundle:
        """A bundle that the first section made. Its weights are not hashed again: whoever wrote them did.

        Raises:
            BundleError: it did not.
        """
        return Bundle.open(self.path(name))


def context_of(work: Path, section: Section, identity: Identity) -> Context:
    log = Measuring(Journal(work / JOURNAL), section.name, digest_of(section, identity), [])
    return Context(work, identity, log)


def digest_of(section: Section, identity: Identity) -> str:
    """All that a section's measurements depend on: the package's source, that of what it imports here, the machine.

    The source of another section is left out: to mend one does not measure all others again.
    """
    digest = hashlib.sha256(json.dumps(asdict(identity)).encode())
    for path in (*_package_sources(), *modules_behind(HERE / "measured" / f"{section.module}.py")):
        digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def modules_behind(file: Path) -> list[Path]:
    """A file of the benchmarks, and those that it imports, sorted; not those that only keep the books."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found or path.stem in BOOKS:
            continue
        found.add(path)
        for name in IMPORTED.findall(path.read_text(encoding="utf-8")):
            module = HERE.parent.joinpath(*name.split(".")).with_suffix(".py")
            waiting += [module] if module.is_file() else []
    return sorted(found)


def _package_sources() -> Iterator[Path]:
    for top in sorted(ROOT.iterdir()):
        if top.name in OUTSIDE or top.name.startswith("."):
            continue
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.suffix in SOURCES:
                yield path
