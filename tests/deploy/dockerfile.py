"""A Dockerfile read into its stages, and the files that .dockerignore lets into a build. As much as ours use."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@dataclass
class Stage:
    """`FROM base AS name`, and what follows: instructions and their text, continued lines joined."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [text for instruction, text in self.instructions if instruction == name]

    def only(self, name: str) -> str:
        (found,) = self.all(name)
        return found

    def words(self, name: str) -> list[str]:
        """Of an instruction in exec form."""
        return json.loads(self.only(name))

    def pairs(self, name: str) -> dict[str, str]:
        """Of ARG and ENV."""
        words = [word for text in self.all(name) for word in shlex.split(text)]
        return dict(word.split("=", 1) for word in words)

    @property
    def copies(self) -> list[tuple[str, str, str]]:
        """Stage, source, target of each COPY; no stage for what comes from the context."""
        found = []
        for text in self.all("COPY"):
            origin, source, target = re.fullmatch(r"(?:--from=(\S+) )?(\S+) (\S+)", text).groups()
            found.append((origin or "", source, target))
        return found

    @property
    def health_check(self) -> list[str]:
        return json.loads(self.only("HEALTHCHECK").partition("CMD ")[2])


def stages(file: Path = DEPLOY / "Dockerfile") -> list[Stage]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    found: list[Stage] = []
    outside: dict[str, str] = {}  # arguments before the first stage
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, text = line.split(maxsplit=1)
        if name == "FROM":
            base, _, alias = text.partition(" AS ")
            for argument, value in outside.items():
                base = base.replace(f"${{{argument}}}", value)
            found.append(Stage(base, alias))
        elif found:
            found[-1].instructions.append((name, text))
        else:
            assert name == "ARG"
            argument, _, value = text.partition("=")
            outside[argument] = value
    return found


def stage_named(name: str) -> Stage:
    """One of our Dockerfile's; the last one has no name."""
    (found,) = (stage for stage in stages() if stage.name == name)
    return found


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path, from the root, out of the build: itself, or a folder that it lies in."""
    parts = path.split("/")
    ways = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(pattern.fullmatch(way) for pattern in _ignored() for way in ways)


def _ignored() -> list[re.Pattern[str]]:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert not [pattern for pattern in patterns if pattern[0] in "!/"], "not understood here"
    return [re.compile(_expression(pattern)) for pattern in patterns]


def _expression(pattern: str) -> str:
    whole = re.escape(pattern)
    for written, meant in ((r"\*\*/", "(?:.*/)?"), (r"\*", "[^/]*"), (r"\[", "["), (r"\]", "]")):
        whole = whole.replace(written, meant)
    return whole
