"""Rebuilds a bundle under one policy after another in a process of its own.

Who times engines wants neither torch nor the threads of a build beside them. Requests and answers are JSON in
frames; this module imports nothing heavy where it is only asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from ..errors import BuildError, FastvarError
from ..lifeline import PATIENCE, clean_up_when_terminated, end_all, read_frame, requests, start, write_frame
from ..packages import needs_extra
from ..plan import PruningPolicy, policy_from_json, policy_to_json


class Rebuilder:
    """Bundles of one model under many policies, made when asked for. A context manager: it ends its process.

    Args:
        bundle: the bundle that is rebuilt.
        folder: where the bundles go, each under its policy's name.
        cache, jobs: as for `rebuild`.
    """

    def __init__(self, bundle: Path, folder: Path, *, cache: Path | bool = True, jobs: int | None = None) -> None:
        self._bundle, self._folder = bundle.resolve(), folder.resolve()
        self._options = {"cache": str(cache) if isinstance(cache, Path) else cache, "jobs": jobs}
        self._process: subprocess.Popen[bytes] | None = None
        self._built: dict[str, Path] = {}

    def __enter__(self) -> Rebuilder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            end_all([self._process], 2 * PATIENCE)  # it has workers to end

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
            command = [sys.executable, "-m", __name__, str(self._bundle), json.dumps(self._options)]
            self._process = start(command)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            write_frame(self._process.stdin, json.dumps(request).encode())
            answer = json.loads(read_frame(self._process.stdout))
        except (OSError, EOFError) as error:
            code = self._process.wait()
            raise BuildError(
                f"the process that builds {request['policy']['name']!r} died with code {code}",
                fix="it may have run out of memory: build with --jobs 1",
            ) from error
        if "problem" in answer:
            raise BuildError(answer["problem"], expected=answer["expected"], fix=answer["fix"])


def serve(bundle: Path, options: dict[str, Any], requests: Iterable[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are none; a bug ends the process with its traceback."""
    from ..engines.bundle import Bundle

    source: Bundle | None = None
    cache = Path(options["cache"]) if isinstance(options["cache"], str) else options["cache"]
    for line in requests:
        request = json.loads(line)
        answer: dict[str, str] = {}
        try:
            with needs_extra("export"):
                from .rebuild import rebuild
            source = source or Bundle.open(bundle, verify="all")
            policy = policy_from_json(request["policy"])
            rebuild(source, request["out"], policy=policy, cache=cache, jobs=options["jobs"])
        except FastvarError as error:
            answer = {"problem": error.problem, "expected": error.expected, "fix": error.fix}
        write_frame(answers, json.dumps(answer).encode())


if __name__ == "__main__":
    clean_up_when_terminated()
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)  # whatever libraries print
        serve(Path(sys.argv[1]), json.loads(sys.argv[2]), requests(), stdout)
