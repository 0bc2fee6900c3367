"""How a server behaves: what it admits, how long it waits, and who may ask."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.arguments import number, whole
from ..core.dtypes import parse_bytes
from ..errors import InputError

KIB, MIB = 1 << 10, 1 << 20
MOST_WAITING = 10_000
MOST_INSTANCES = 64
LONGEST_WAIT = 86_400.0  # seconds
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class ServeOptions:
    """Settings of a server.

    Args:
        queue: requests of a model that may wait while others are drawn; further ones are told to come again.
        api_keys: who may ask for images; empty for everybody.
        aliases: further names of models, by name: clients that ask for "gpt-image-1" get what it stands for.
        max_body: bytes of a request with images, or text as "50MiB".
        drain: seconds that images under way are given when the server is asked to end.
        batch_wait_ms: how long the first request waits for others to share its pass, where passes hold several.
        instances: pipelines of a bundle that draw side by side when several passes wait, each on its share of the
            cores; by default two where engines, cores and memory allow.
        log_prompts: whether prompts are written into the log.

    Raises:
        InputError, PlanError: a value out of range.
    """

    queue: int = 16
    api_keys: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    max_body: int | str = 50 * MIB
    drain: float = 30.0
    batch_wait_ms: float = 5.0
    instances: int | None = None
    log_prompts: bool = False

    # Seconds; here so that tests need not wait.
    heartbeat: float = 10.0  # between comments in a stream that has nothing to tell
    patience: float = 30.0  # for a request to arrive and for an answer to be taken, beside its size

    def __post_init__(self) -> None:
        whole("queue", self.queue, 1, MOST_WAITING)
        if self.instances is not None:
            whole("instances", self.instances, 1, MOST_INSTANCES)
        body = parse_bytes(self.max_body) if isinstance(self.max_body, str) else self.max_body
        object.__setattr__(self, "max_body", whole("max_body", body, KIB, 1 << 40))
        for name, low, high in (("drain", 0, LONGEST_WAIT), ("batch_wait_ms", 0, 10_000)):
            if not low <= number(name, getattr(self, name)) <= high:
                raise InputError(f"{name} {getattr(self, name)} is out of range", expected=f"{low} to {high:g}")

    @property
    def body_limit(self) -> int:
        """Bytes of a request with images."""
        return int(self.max_body)


def read_api_keys(file: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # are left out.

    Raises:
        InputError: it cannot be read, holds no key, or one that no header can carry.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the API keys of {file} cannot be read: {error}", expected="a text file") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{file} holds no API key", expected="a key a line", fix="write one, or leave the option away")
    for key in keys:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError(
                f"{file} holds a key with spaces or other signs", expected="printable ASCII without spaces"
            )
    return keys


def read_aliases(given: Sequence[str]) -> dict[str, str]:
    """Aliases as the command line has them, ALIAS=NAME.

    Raises:
        InputError: one of another form, or said twice.
    """
    found: dict[str, str] = {}
    for text in given:
        alias, equals, name = text.partition("=")
        if not equals or not NAME.fullmatch(alias) or not name:
            raise InputError(
                f"--alias {text!r} not understood",
                expected="ALIAS=NAME, as gpt-image-1=bundle; letters, digits, '.', '_' and '-'",
            )
        if alias in found:
            raise InputError(f"--alias {alias} is given twice", fix="leave one of them away")
        found[alias] = name
    return found
