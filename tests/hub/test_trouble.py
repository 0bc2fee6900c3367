"""Exceptions that no server on loopback can cause, in words: disks, permissions, and what else a library may raise."""

from __future__ import annotations

import errno
import os

import pytest

from fastvar.errors import FastvarError, HubError
from fastvar.hub.reference import HubReference
from fastvar.hub.trouble import cache_root, hub_trouble

WEIGHTS = HubReference("org/model", file="weights.bin")


def told(error: Exception) -> str:
    with pytest.raises(HubError) as caught, hub_trouble(WEIGHTS):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


def test_a_full_disk():
    text = told(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert text.startswith(f"the disk is full: hub:org/model/weights.bin cannot be saved in {cache_root()}\n")
    assert "HF_HOME" in text


def test_a_folder_that_may_not_be_written():
    text = told(PermissionError(errno.EACCES, "Permission denied", "/cache/blobs"))
    assert text.startswith("hub:org/model/weights.bin cannot be saved: /cache/blobs: Permission denied\n")


def test_a_connection_that_ends():
    assert told(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")).startswith("no connection to ")
    assert told(TimeoutError("timed out")).startswith("no connection to ")


def test_fewer_bytes_than_were_announced():
    """The library's own check: an OSError without a number."""
    text = told(OSError("Consistency check failed: file should be of size 10 but has size 5"))
    assert text.startswith("hub:org/model/weights.bin was not downloaded well: Consistency check failed")


def test_the_reason_behind_a_file_that_is_not_in_the_cache():
    from huggingface_hub.errors import LocalEntryNotFoundError

    error = LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    assert told(error).startswith("no connection to ")


def test_what_is_told_already_and_bugs_pass():
    ours = HubError("ours")
    with pytest.raises(HubError) as caught, hub_trouble(WEIGHTS):
        raise ours
    assert caught.value is ours
    with pytest.raises(ZeroDivisionError), hub_trouble(WEIGHTS):
        raise ZeroDivisionError


def test_every_message_says_what_to_do():
    for error in (OSError(errno.ENOSPC, "full"), ValueError("x"), TimeoutError(), OSError("short"), KeyError("sha")):
        with pytest.raises(FastvarError) as caught, hub_trouble(WEIGHTS):
            raise error
        assert caught.value.fix
