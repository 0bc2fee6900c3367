"""Names of repositories as they are written, and those that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvar.errors import HubError
from fastvar.hub.reference import HubReference, is_reference, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("hub:org/name", HubReference("org/name")),
        ("hub:org/name@v1.0", HubReference("org/name", "v1.0")),
        (f"hub:org/name@{COMMIT}", HubReference("org/name", COMMIT)),
        ("hub:org/name@refs/pr/3", HubReference("org/name", "refs/pr/3")),
        ("hub:org/name/vae.pth", HubReference("org/name", file="vae.pth")),
        ("hub:org/name@v1/sub/vae.pth", HubReference("org/name", "v1", "sub/vae.pth")),
        ("hub:org/name@refs/convert/parquet/x", HubReference("org/name", "refs/convert/parquet", "x")),
    ],
)
def test_a_name_is_read_and_written_alike(text: str, found: HubReference):
    assert parse_reference(text) == found
    assert str(found) == text
    assert parse_reference(Path(text)) == found


@pytest.mark.parametrize("text", ["hub:", "hub:name", "hub:org/", "hub:org/name@", "hub:org/na me", "hub:a/b@c@d"])
def test_what_names_no_repository(text: str):
    assert is_reference(text)
    with pytest.raises(HubError, match="names no repository of the hub\nexpected: hub:ORG/NAME"):
        parse_reference(text)


def test_paths_are_none():
    assert not any(is_reference(path) for path in ("org/name", Path("hub/org"), None, 7, "./hub:org/name"))


def test_a_revision_beside_the_name():
    assert parse_reference("hub:org/name", "v1").revision == "v1"
    with pytest.raises(HubError, match="name two revisions"):
        parse_reference("hub:org/name@v2", "v1")


def test_a_file_where_the_whole_is_meant():
    with pytest.raises(HubError, match="of a branch with a slash in its name, give the commit"):
        parse_reference("hub:org/name@feature/x").whole()
