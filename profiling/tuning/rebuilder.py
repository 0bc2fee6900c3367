"""Rebuilds a bundle, for passes of one image, under one policy after another in a process of its own.

Who times engines wants neither torch nor the threads of a build beside them. Requests and answers are JSON in
frames; this module imports nothing heavy where it is only asked.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from ...core.platform import needs_extra
from ...core.policy import PruningPolicy, policy_from_json, policy_to_json
from ...core.processes.lifeline import clean_up_when_terminated, read_frame, requests, write_frame
from ...core.processes.own_process import PATIENCE, OwnProcess
from ...engines.bundle.bundle import Bundle, Opening
from ...errors import BuildError, FastvarError

ONE_IMAGE = (1,)  # a policy keeps the same tokens of an image whatever others are drawn beside it


class Rebuilder:
    """Bundles of one model under many policies, made when asked for. A context manager: it ends its process.

    Args:
        bundle: the bundle that is rebuilt.
        folder: where the bundles go, each under its policy's name.
        cache, jobs: as for `rebuild`.
        opening: how the bundle is opened there; every digest is checked besides.
    """

    def __init__(
        self,
        bundle: Path,
        folder: Path,
        *,
        cache: Path | bool = True,
        jobs: int | None = None,
        opening: Opening | None = None,
    ) -> None:
        opening = opening or Opening()
        self._bundle, self._folder = bundle.resolve(), folder.resolve()
        self._options = {
            "cache": str(cache) if isinstance(cache, Path) else cache,
            "jobs": jobs,
            "trust_remote_code": opening.trust_remote_code,
            "public_key": opening.public_key.decode() if opening.public_key else None,
        }
        self._process: OwnProcess | None = None
        self._built: dict[str, Path] = {}

    def __enter__(self) -> Rebuilder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.end(2 * PATIENCE)  # it has workers to end

    def build(self, policy: PruningPolicy) -> Path:
        """The policy's bundle.

        Raises:
            BuildError: whatever `rebuild` refuses, or the process died.
        """
        key = json.dumps(policy_to_json(policy))
        if key not in self._built:
            out = self._folder / f"{len(self._built)}-{policy.name}"
            self._ask({"policy": policy_to_json(policy), "out": str(out)})
            self._built[key] = out
        return self._built[key]

    def _ask(self, request: dict[str, Any]) -> None:
        if self._process is None:
            statement = f"import {__name__} as rebuilder; rebuilder.main()"
            self._process = OwnProcess(statement, [str(self._bundle), json.dumps(self._options)])
        try:
            write_frame(self._process.stdin, json.dumps(request).encode())
            answer = json.loads(read_frame(self._process.stdout))
        except (OSError, EOFError, ValueError) as error:
            how, fix = self._process.death()
            raise BuildError(f"the process that builds {request['policy']['name']!r} {how}", fix=fix) from error
        if "problem" in answer:
            raise BuildError(**answer)


def serve(bundle: Path, options: dict[str, Any], requests: Iterable[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are none; a bug ends the process with its traceback."""

    source: Bundle | None = None
    key = options["public_key"]
    opening = Opening("all", options["trust_remote_code"], key.encode() if key else None)
    cache = Path(options["cache"]) if isinstance(options["cache"], str) else options["cache"]
    for line in requests:
        request = json.loads(line)
        answer: dict[str, str] = {}
        try:
            with needs_extra("export"):
                from ...export.rebuild import rebuild
            source = source or Bundle.open_with(bundle, opening)
            policy = policy_from_json(request["policy"])
            rebuild(source, request["out"], policy=policy, batch=ONE_IMAGE, cache=cache, jobs=options["jobs"])
        except FastvarError as error:
            answer = error.parts
        write_frame(answers, json.dumps(answer).encode())


def main() -> None:
    """The process: a bundle and options as arguments, requests and answers through pipes."""
    orders = requests()
    clean_up_when_terminated()
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)  # whatever libraries print
        serve(Path(sys.argv[1]), json.loads(sys.argv[2]), orders, stdout)
