"""Downloads by the real huggingface_hub from a hub on loopback: what is asked, what is kept, and errors in words."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.core.files import TEMPORARY
from fastvar.engines.cache.contents import LISTING, contents
from tests.fakes.hub import FakeHub, FakeRepository
from tests.hub.conftest import FETCH, Ask

NAME, REFERENCE = "org/model", "hub:org/model"
WEIGHTS = bytes(range(256)) * (48 << 12)  # 48 MiB: some of the library's blocks
FILES = {"config.json": b"{}", "sub/weights.bin": WEIGHTS[: 1 << 20], "README.md": b"read me"}


@pytest.fixture
def repository(hub: FakeHub) -> FakeRepository:
    return hub.add(NAME, FILES)


def requests(hub: FakeHub) -> list[tuple[str, str]]:
    return [(asked.method, asked.path) for asked in hub.asked]


# What is downloaded


def test_what_is_asked_for_lies_under_its_name_at_its_commit(hub, repository, ask: Ask):
    folder = Path(ask(REFERENCE, "config.json", "sub/weights.bin"))
    assert folder.name == repository.commit
    assert (folder / "config.json").read_bytes() == FILES["config.json"]
    assert (folder / "sub/weights.bin").read_bytes() == FILES["sub/weights.bin"]
    assert not (folder / "README.md").exists()
    assert not any("README" in path for _, path in requests(hub))


def test_a_branch_is_asked_for_again_and_its_files_are_not(hub, repository, ask: Ask):
    first = ask(REFERENCE)
    assert ask(REFERENCE) == first
    assert requests(hub) == [("GET", f"/api/models/{NAME}/revision/main")]


def test_a_branch_that_moved_on_is_followed(hub, repository, ask: Ask):
    first = ask(REFERENCE)
    repository.files["config.json"] = b'{"new": 1}'
    second = Path(ask(REFERENCE))
    assert str(second) != first
    assert (second / "config.json").read_bytes() == b'{"new": 1}'
    assert ("GET", f"/{NAME}/resolve/{repository.commit}/sub/weights.bin") not in requests(hub)  # the same blob


def test_a_commit_that_is_here_is_not_asked_for(hub, repository, ask: Ask):
    pinned = f"{REFERENCE}@{repository.commit}"
    first = ask(pinned)
    assert requests(hub) != []
    assert ask(pinned) == first
    assert requests(hub) == []


def test_offline_it_is_what_was_downloaded(hub, repository, ask: Ask):
    first = ask(REFERENCE)
    assert ask(REFERENCE, HF_HUB_OFFLINE="1") == first
    assert requests(hub) == []
    # What another program downloaded is good too: nothing but the library's own cache tells of it.
    assert ask(REFERENCE, "config.json", HF_HUB_OFFLINE="1", FASTVAR_CACHE=first + "/none") == first


def test_offline_a_branch_is_the_commit_it_was_when_last_asked(hub, repository, ask: Ask):
    pinned = ask(f"{REFERENCE}@{repository.commit}")
    assert "was downloaded before" in ask(REFERENCE, HF_HUB_OFFLINE="1")
    assert ask(REFERENCE) == pinned  # all is here: what main is, is noted all the same
    assert ask(REFERENCE, HF_HUB_OFFLINE="1") == pinned


def test_a_cut_connection_is_taken_up_where_it_was_cut(hub, ask: Ask):
    repository = hub.add(NAME, {"weights.bin": WEIGHTS})
    repository.cuts["weights.bin"] = len(WEIGHTS) // 2
    folder = Path(ask(REFERENCE))
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    (first, second) = [asked for asked in hub.asked if asked.method == "GET" and "/resolve/" in asked.path]
    assert first.range is None
    begin = re.fullmatch(r"bytes=(\d+)-", second.range or "")
    assert begin is not None
    assert 0 < int(begin[1]) <= len(WEIGHTS) // 2


def test_the_token_of_the_environment_is_sent(hub, repository, ask: Ask):
    repository.gated = repository.private = True
    assert Path(ask(REFERENCE, HF_TOKEN=hub.token)).name == repository.commit
    assert {asked.authorization for asked in hub.asked} == {f"Bearer {hub.token}"}


@pytest.mark.skipif(os.name == "nt", reason="no terminals of that kind there")
def test_a_terminal_sees_how_far_it_is(hub, repository, tmp_path: Path):
    import fcntl
    import termios

    terminal, own = os.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = hub.environment(tmp_path) | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, REFERENCE], env=environment, stdout=subprocess.PIPE, stderr=own
    )
    os.close(own)
    process.communicate(timeout=300)
    seen = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "weights.bin: 100%" in seen


def test_what_is_kept_of_listings_is_part_of_the_cache(repository, ask: Ask, tmp_path: Path):
    ask(REFERENCE)
    kept = [item for item in contents(tmp_path / "cache") if item.kind == LISTING]
    assert len(kept) == 1
    assert not any(file.name.startswith(TEMPORARY) for item in kept for file in item.files)


# What goes wrong


def test_a_damaged_file_is_found_by_its_digest(repository, ask: Ask):
    repository.damaged |= {"sub/weights.bin"}
    told = ask(REFERENCE)
    assert "sub/weights.bin of hub:org/model is damaged: its digest is" in told
    assert re.search(r"fix: remove \S+/blobs/[0-9a-f]{64} and start again", told)


def test_a_small_damaged_file_is_found_too(repository, ask: Ask):
    repository.damaged |= {"README.md"}
    assert "README.md of hub:org/model is damaged: its digest is" in ask(REFERENCE)


def test_a_repository_that_is_not_there(hub, ask: Ask):
    told = ask("hub:org/modell")
    assert told.startswith("the hub has no repository org/modell, or a private one that you may not read\n")
    assert f"check the spelling on {hub.endpoint}/org/modell" in told


def test_a_gated_repository_names_its_page(hub, repository, ask: Ask):
    repository.gated = True
    told = ask(REFERENCE)
    assert told.startswith("org/model is gated: who downloads it must have accepted its licence\n")
    assert f"accept it on {hub.endpoint}/org/model, then log in with `hf auth login`, or set HF_TOKEN" in told


def test_a_wrong_token(repository, ask: Ask):
    told = ask(REFERENCE, HF_TOKEN="hf_wrong")
    assert told.startswith("the hub does not know the access token that it was sent\n")
    assert "check HF_TOKEN" in told
    assert "hf_wrong" not in told


def test_a_revision_that_is_not_there(repository, ask: Ask):
    told = ask(f"{REFERENCE}@v9")
    assert told.startswith("org/model has no revision 'v9'\n")
    assert "a branch, a tag, or a commit of 40 hexadecimal digits" in told


def test_a_file_that_is_not_there(repository, ask: Ask):
    told = ask(REFERENCE, "weights.bin")
    assert told.startswith("org/model has no file 'weights.bin' at main\n")
    assert "one of README.md, config.json, sub/weights.bin" in told


def test_a_file_that_is_listed_and_not_there(repository, ask: Ask):
    repository.hidden |= {"sub/weights.bin"}
    assert ask(REFERENCE).startswith("org/model has no file 'sub/weights.bin'\n")


def test_a_hub_in_trouble(hub, repository, ask: Ask):
    hub.status = 500
    told = ask(REFERENCE)
    assert told.startswith("the hub is in trouble: it answered 500 when asked for hub:org/model\n")
    assert "try again later; files that are complete are kept" in told


@pytest.mark.parametrize(
    ("status", "words"),
    [(403, "the access token may not read org/model"), (429, "the hub has had too many requests from here")],
)
def test_other_refusals(hub, repository, ask: Ask, status, words):
    hub.status = status
    assert ask(REFERENCE).startswith(words)


def test_offline_without_a_download(hub, repository, ask: Ask):
    told = ask(REFERENCE, HF_HUB_OFFLINE="1")
    assert re.match(r"hub:org/model is not in \S+, and the hub may not be asked\n", told)
    assert "without HF_HUB_OFFLINE" in told
    assert hub.asked == []


def test_offline_with_half_a_download(hub, repository, ask: Ask):
    ask(REFERENCE, "config.json")
    told = ask(REFERENCE, HF_HUB_OFFLINE="1")
    assert told.startswith("of hub:org/model 2 files were not downloaded yet, and the hub may not be asked: ")
    assert "README.md, sub/weights.bin" in told


def test_no_connection(ask: Ask):
    told = ask(REFERENCE, HF_ENDPOINT="http://127.0.0.1:9")
    assert told.startswith("no connection to http://127.0.0.1:9: ")
    assert "--offline" in told


@pytest.mark.slow
def test_a_connection_that_goes_half_way(repository, ask: Ask):
    """The library tries for a while; what the repository holds is known already."""
    ask(f"{REFERENCE}@{repository.commit}", "config.json")
    told = ask(f"{REFERENCE}@{repository.commit}", HF_ENDPOINT="http://127.0.0.1:9")
    assert told.startswith("no connection to http://127.0.0.1:9: ")


def test_a_server_that_is_no_hub(hub, repository, ask: Ask):
    hub.status = 200
    assert ask(REFERENCE).startswith(f"{hub.endpoint} does not answer as a hub does: ")


def test_a_name_that_no_repository_has(repository, ask: Ask):
    told = ask("hub:org/mo--del")
    assert told.startswith("'org/mo--del' is no name of a repository: ")


def test_a_cache_that_cannot_be_written(hub, repository, ask: Ask, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    told = ask(REFERENCE, HF_HOME=str(tmp_path / "file"))
    assert "cannot be saved" in told
    assert "check the permissions, or move the cache with HF_HOME" in told
