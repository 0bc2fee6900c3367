"""Signing a bundle: every digest is checked first, for a signature vouches for them."""

from __future__ import annotations

from pathlib import Path

from ...core.files import write_whole
from ...errors import BundleError
from ..cache.lock import FolderLock
from .bundle import Bundle, Opening
from .folder import SIGNATURE
from .signature import sign


def sign_bundle(path: Path, key: bytes, key_name: str, password: bytes | None = None) -> Path:
    """Write `manifest.sig`, an Ed25519 signature of the manifest.

    Args:
        path: the bundle's folder.
        key: a private key in PEM; `key_name` names it in errors.
        password: of an encrypted key.

    Returns:
        The signature's file.

    Raises:
        BundleError: no bundle, a damaged one, no private Ed25519 key, or the folder cannot be written.
        BackendError: the package cryptography is not installed.
    """
    path = path.resolve()
    lock = FolderLock(path)
    lock.acquire()
    try:
        # Nothing of it is run here; and what is signed is read, not remembered.
        bundle = Bundle.open_with(path, Opening(verify="all", trust_remote_code=True), remember=False)
        signature = sign(bundle.text, key, key_name, password)
        file = bundle.path / SIGNATURE
        try:
            write_whole(file, signature, sync=True)
        except OSError as error:
            raise BundleError(f"cannot write {file}: {error.strerror}", fix="check the permissions") from error
        return file
    finally:
        lock.release()
