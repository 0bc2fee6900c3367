"""How a repository of the hub is named: hub:ORG/NAME, with a revision and a file where they are wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike, fspath

from ..errors import HubError

PREFIX = "hub:"
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
# A revision holds no slash, but for those that the hub itself makes.
_REFERENCE = re.compile(
    r"(?P<repository>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@\s]+|[^/@\s]+))?(?:/(?P<file>[^@\s]+))?"
)
_EXPECTED = "hub:ORG/NAME, or hub:ORG/NAME@REVISION; a file in it as hub:ORG/NAME/FILE or hub:ORG/NAME@REVISION/FILE"


@dataclass(frozen=True)
class HubReference:
    """A repository, a branch, tag or commit of it, and a file in it; the file is empty where the whole is meant."""

    repository: str  # ORG/NAME
    revision: str = DEFAULT_REVISION
    file: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{PREFIX}{self.repository}{revision}{'/' if self.file else ''}{self.file}"

    @property
    def name(self) -> str:
        """The repository's name without its owner's."""
        return self.repository.partition("/")[2]

    def whole(self) -> HubReference:
        """Itself.

        Raises:
            HubError: it names a file.
        """
        if self.file:
            raise HubError(
                f"{self} names the file {self.file}",
                expected="a whole repository: hub:ORG/NAME or hub:ORG/NAME@REVISION",
                fix="leave the file away; of a branch with a slash in its name, give the commit",
            )
        return self


def is_reference(path: object) -> bool:
    """Whether a path is none but a name of the hub."""
    return isinstance(path, str | PathLike) and str(fspath(path)).startswith(PREFIX)


def parse_reference(path: str | PathLike[str], revision: str | None = None) -> HubReference:
    """Read a name that begins with `hub:`; `revision` stands beside one that names none.

    Raises:
        HubError: no name of a repository, or two revisions.
    """
    text = fspath(path).replace("\\", "/")  # Windows turns the slashes of a path
    found = _REFERENCE.fullmatch(text.removeprefix(PREFIX))
    if found is None or not text.startswith(PREFIX):
        raise HubError(f"{text!r} names no repository of the hub", expected=_EXPECTED, fix="check the spelling")
    if revision is not None and found["revision"]:
        raise HubError(f"{text} and the revision {revision!r} name two revisions", fix="give one of them")
    return HubReference(found["repository"], found["revision"] or revision or DEFAULT_REVISION, found["file"] or "")
