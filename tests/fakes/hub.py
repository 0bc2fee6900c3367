"""A hub on loopback for the real huggingface_hub: repositories at commits, digests, ranges, and whatever goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1 << 16  # files from here on go by their sha256, as the hub stores them
API = re.compile(r"/api/models/([^/]+/[^/]+)/revision/(.+)")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeRepository:
    """Files at one commit. `cuts`: bytes after which the connection is cut, once, by file. `damaged`: files whose
    content is another than their digest says.
    """

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    cuts: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)  # listed, and not there
    stalled: set[str] = field(default_factory=set)  # half of them comes, and the rest when the server ends

    @property
    def commit(self) -> str:
        """Another one for other content."""
        text = "".join(f"{name} {blob_name(data)}\n" for name, data in sorted(self.files.items()))
        return hashlib.sha1(text.encode()).hexdigest()


@dataclass(frozen=True)
class Asked:
    """A request as the server saw it."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class FakeHub(ThreadingHTTPServer):
    """`token` is the one that it knows; `status` is what it answers everything with, where that is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, FakeRepository] = {}
        self.asked: list[Asked] = []
        self.token = "hf_right"
        self.status: int | None = None
        self.ended = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: Mapping[str, bytes] | Path) -> FakeRepository:
        """A repository of these files, or of those in a folder."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        self.repositories[name] = FakeRepository(dict(files))
        return self.repositories[name]

    def environment(self, home: Path) -> dict[str, str]:
        """What a process is started with that shall ask this hub and no other, and keep all it keeps in a folder."""
        others = ("HF_", "HUGGING", "FASTVAR_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(others)}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "FASTVAR_CACHE": str(home / "cache"),
        }


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.ended.set()
            hub.shutdown()
            thread.join()


def blob_name(data: bytes) -> str:
    """The name of a file's content: sha256 of a large one, git's of a small one."""
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        token = self.headers.get("authorization")
        hub.asked.append(Asked(self.command, path, self.headers.get("range"), token))
        if hub.status is not None:
            return self._refuse(hub.status, "", "something is wrong")
        found = API.fullmatch(path) or FILE.fullmatch(path)
        repository = hub.repositories.get(found[1]) if found else None
        known = token == f"Bearer {hub.token}"
        if token is not None and not known:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if found is None or repository is None or (repository.private and not known):
            return self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if repository.gated and not known and found.re is FILE:
            return self._refuse(401, "GatedRepo", "Access to this model is restricted")
        if found[2] not in ("main", repository.commit):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {found[2]}")
        if found.re is API:
            return self._describe(found[1], repository)
        if found[3] not in repository.files or found[3] in repository.hidden:
            return self._refuse(404, "EntryNotFound", "Entry not found", repository.commit)
        return self._send_file(repository, found[3])

    def _describe(self, name: str, repository: FakeRepository) -> None:
        siblings = []
        for file, data in repository.files.items():
            lfs = {"sha256": blob_name(data), "size": len(data), "pointerSize": 134}
            entry = {"rfilename": file, "size": len(data), "blobId": blob_name(data)}
            siblings.append(entry | ({"lfs": lfs} if len(data) >= LARGE else {}))
        answer = {"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings, "tags": []}
        body = json.dumps(answer | {"private": repository.private, "downloads": 0, "likes": 0}).encode()
        self._head(200, len(body), {"Content-Type": "application/json"})
        self.wfile.write(body)

    def _send_file(self, repository: FakeRepository, file: str) -> None:
        data = repository.files[file]
        headers = {"ETag": f'"{blob_name(data)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if file in repository.damaged:
            data = bytes(len(data))
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
            start, status = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(status, len(data) - start, headers)
        if self.command == "HEAD":
            return
        if file in repository.stalled:
            self.wfile.write(data[start : len(data) // 2])
            self.server.ended.wait(60)
            self.close_connection = True
            return
        cut = repository.cuts.pop(file, None)
        self.wfile.write(data[start:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, code: str, message: str, commit: str = "") -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._head(status, len(body), {name: value for name, value in headers.items() if value})
        if self.command != "HEAD":
            self.wfile.write(body)
