"""manifest.json: bytes to a checked manifest, and back.

Its checksum covers everything else in it. So a change after the build is found, as it is for the files that it names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from ...errors import BundleError, FastvarError
from .files import REBUILD
from .manifest import Manifest, manifest_from_json, manifest_to_json
from .manifest_checks import check_manifest

CHECKSUM = "checksum"


def print_manifest(manifest: Manifest) -> bytes:
    """The text of manifest.json."""
    data = manifest_to_json(manifest)
    return _text({**data, CHECKSUM: checksum(data)}, indent=1) + b"\n"


def checksum(data: dict[str, Any]) -> str:
    """The sha256 of a manifest's content, however it is spaced or ordered.

    Left out are the checksum itself, and digests and sizes of files: a wrong one of those is found at its file.
    """
    content = {name: _content(value) for name, value in data.items() if name != CHECKSUM}
    return hashlib.sha256(_text(content)).hexdigest()


def _content(value: Any) -> Any:
    if isinstance(value, list):
        return [_content(one) for one in value]
    if not isinstance(value, dict):
        return value
    described = ("sha256", "size_bytes") if "file" in value else ()
    return {name: _content(one) for name, one in value.items() if name not in described}


def _text(data: dict[str, Any], indent: int | None = None) -> bytes:
    return json.dumps(data, indent=indent, sort_keys=True, allow_nan=False).encode()


def parse_manifest(path: Path, text: bytes) -> Manifest:
    """Read and check the text of a manifest; `path` names it in errors. Manifests without a checksum are read too.

    Raises:
        BundleError: not a manifest of this version, inconsistent, or changed since it was written.
    """
    try:
        data: Any = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}", fix=REBUILD) from error
    if not isinstance(data, dict):
        raise BundleError(f"{path} holds a {type(data).__name__}", expected="a JSON object", fix=REBUILD)
    noted = data.pop(CHECKSUM, None)
    try:
        manifest = manifest_from_json(data)
        check_manifest(manifest)
    except BundleError:
        raise
    except FastvarError as error:  # a plan or a model that this version refuses
        raise BundleError(f"{path} not understood: {error}", fix=REBUILD) from error
    if noted is not None and noted != checksum(data):
        raise BundleError(
            f"{path} was changed after it was written: its {CHECKSUM} is another",
            expected="a manifest as `fastvar build` wrote it",
            fix=REBUILD,
        )
    return manifest
