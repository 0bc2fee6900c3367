"""What goes wrong between here and the hub, in words: the library's exceptions become a `HubError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..core.platform import import_extra
from ..errors import HubError
from .reference import HubReference

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
OFFLINE_FIX = "go online once, without --offline (local_files_only) and without HF_HUB_OFFLINE"
# Of answers that are none of a hub.
_STRANGE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)


@contextmanager
def hub_trouble(reference: HubReference) -> Iterator[None]:
    """A block that calls the library about a repository, or about the file in it that the reference names.

    Raises:
        HubError: the library raised an exception.
    """
    errors = import_extra("huggingface_hub.errors", "hub")
    try:
        yield
    except HubError:
        raise
    except (OSError, _transport(errors), errors.EntryNotFoundError, *_STRANGE) as error:
        raise _in_words(error, reference, errors) from error


def _transport(errors: Any) -> type[Exception]:
    """The base of what the library's HTTP client raises: which client that is depends on the library's version."""
    others = [kind for kind in errors.HfHubHTTPError.__mro__ if kind.__module__ != "builtins"]
    base: type[Exception] = others[-1]
    return base


def _in_words(error: Exception, reference: HubReference, errors: Any) -> HubError:
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _in_words(error.__cause__, reference, errors)  # why nothing was downloaded
    named = _named(error, reference, errors)
    if named is not None:
        return named
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, reference)
    if isinstance(error, _transport(errors)):
        return _unreachable(error)
    if isinstance(error, OSError):
        return _local(error, reference)
    return _strange(error)


def _named(error: Exception, reference: HubReference, errors: Any) -> HubError | None:
    """What the library has a class for; the more special one first."""
    name, page = reference.repository, f"{_endpoint()}/{reference.repository}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name} is gated: who downloads it must have accepted its licence",
            expected="the token of an account that has",
            fix=f"accept it on {page}, then {LOG_IN}",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"the hub has no repository {name}, or a private one that you may not read",
            expected="a model repository, ORG/NAME",
            fix=f"check the spelling on {page}; for a private one {LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{name} has no revision {reference.revision!r}",
            expected="a branch, a tag, or a commit of 40 hexadecimal digits",
            fix=f"see {page}/commits/main",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"{reference} was not downloaded yet, and the hub may not be asked", fix=OFFLINE_FIX)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(f"{reference} is not in the cache of the hub, and cannot be downloaded", fix="try again")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{name} has no file {reference.file!r}", fix=f"see {page}/tree/{reference.revision}")
    if isinstance(error, errors.HFValidationError):
        return HubError(
            f"{name!r} is no name of a repository: {_first_line(error)}", expected="ORG/NAME", fix="check the spelling"
        )
    return None


def _answered(error: Any, reference: HubReference) -> HubError:
    """A refusal, by its status."""
    status = error.response.status_code
    if status == 401:
        return HubError(
            "the hub does not know the access token that it was sent",
            expected="a valid one, or none",
            fix="renew it: check HF_TOKEN, or log in anew with `hf auth login`",
        )
    if status == 403:
        return HubError(
            f"the access token may not read {reference.repository}",
            expected="a token with read access to it",
            fix="give it the permission in the account's settings, or use another",
        )
    if status == 429:
        return HubError("the hub has had too many requests from here", fix=f"wait some minutes; {LOG_IN} for more")
    if status >= 500:
        return HubError(
            f"the hub is in trouble: it answered {status} when asked for {reference}",
            fix="try again later; files that are complete are kept",
        )
    return HubError(f"the hub refused {reference} with status {status}: {_first_line(error)}", fix="try again")


def _unreachable(error: Exception) -> HubError:
    return HubError(
        f"no connection to {_endpoint()}: {_first_line(error)}",
        expected="a network, and a hub at that address (HF_ENDPOINT)",
        fix="try again, files that are complete are kept; or work from the cache alone: --offline (local_files_only)",
    )


def _local(error: OSError, reference: HubReference) -> HubError:
    """Disks, and connections of older versions of the library."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return HubError(
            f"the disk is full: {reference} cannot be saved in {cache_root()}",
            fix="free some space, or move the cache with HF_HOME",
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return _unreachable(error)
    if error.errno is None:
        return HubError(f"{reference} was not downloaded well: {_first_line(error)}", fix="try again")
    return HubError(
        f"{reference} cannot be saved: {error.filename or cache_root()}: {error.strerror}",
        fix="check the permissions, or move the cache with HF_HOME",
    )


def _strange(error: Exception) -> HubError:
    return HubError(
        f"{_endpoint()} does not answer as a hub does: {type(error).__name__}: {_first_line(error)}",
        expected="the Hugging Face hub, or a mirror of it",
        fix="check HF_ENDPOINT, proxies, and the version of huggingface_hub",
    )


def cache_root() -> str:
    """Where the library keeps what it downloads."""
    return str(import_extra("huggingface_hub.constants", "hub").HF_HUB_CACHE)


def _endpoint() -> str:
    return str(import_extra("huggingface_hub.constants", "hub").ENDPOINT)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
