"""Signatures of bundles: Ed25519 over the bytes of the manifest, which names the digest of every other file.

Keys are PEM files, as `openssl genpkey -algorithm ed25519` writes them. A signature is 64 bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.platform import import_extra
from ...errors import BundleError

EXTRA = "sign"
SIGNATURE_BYTES = 64
_LARGEST_KEY_FILE = 1 << 16
_PEM = b"-----BEGIN "
_KINDS = "an Ed25519 key in PEM: openssl genpkey -algorithm ed25519 -out key.pem"
_PUBLIC_OF = "openssl pkey -in key.pem -pubout -out public.pem"


def sign(text: bytes, key: bytes, name: str, password: bytes | None = None) -> bytes:
    """The signature of a text.

    Args:
        key: a private key in PEM; `name` names it in errors.
        password: of an encrypted key.

    Raises:
        BundleError: no private Ed25519 key, or another password.
        BackendError: the package cryptography is not installed.
    """
    serialization = _serialization()
    try:
        private = serialization.load_pem_private_key(key, password)
    except (ValueError, TypeError, _unsupported()) as error:
        raise _bad_private_key(key, name, password) from error
    if not isinstance(private, _ed25519().Ed25519PrivateKey):
        raise BundleError(f"{name} is a key of another kind: {_kind(private)}", expected=_KINDS)
    found: bytes = private.sign(text)
    return found


def is_encrypted(key: bytes) -> bool:
    """Whether a private key in PEM wants a password."""
    return b"ENCRYPTED" in key


def check_signature(text: bytes, signature: bytes, key: bytes, name: str) -> None:
    """Refuse a text that the owner of the key did not sign.

    Args:
        key: a public key in PEM; `name` names the text in errors.

    Raises:
        BundleError: no public Ed25519 key, or not its signature.
        BackendError: the package cryptography is not installed.
    """
    public = _public(key)
    try:
        public.verify(signature, text)
    except import_extra("cryptography.exceptions", EXTRA).InvalidSignature as error:
        raise BundleError(
            f"the signature of {name} is not that of the given key",
            expected="a bundle as the owner of the key signed it",
            fix="do not use it; ask its maker for the right key, or for the bundle again",
        ) from error


def read_public_key(given: str | Path | bytes) -> bytes:
    """A public key in PEM, from its text or its file.

    Raises:
        BundleError: no such file, or no public Ed25519 key.
        BackendError: the package cryptography is not installed.
    """
    text = given.encode() if isinstance(given, str) else given
    key = text if isinstance(text, bytes) and text.lstrip().startswith(_PEM) else read_key_file(given)
    _public(key)
    return key


def read_key_file(given: str | Path | bytes) -> bytes:
    """Raises:
    BundleError: it cannot be read, or is far too large for a key.
    """
    if not isinstance(given, str | Path):
        raise BundleError(f"a key is given as {type(given).__name__}", expected="the path of a PEM file, or its text")
    try:
        with Path(given).open("rb") as handle:
            key = handle.read(_LARGEST_KEY_FILE + 1)
    except (OSError, ValueError) as error:  # a null character in a path
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(f"key file {given} cannot be read: {reason}", fix="check the path") from error
    if len(key) > _LARGEST_KEY_FILE:
        raise BundleError(f"{given} is no key: it has more than {_LARGEST_KEY_FILE} bytes", expected=_KINDS)
    return key


def _public(key: bytes) -> Any:
    if b"PRIVATE KEY" in key:
        raise BundleError(
            "this is a private key, which only its owner should have", expected="its public key", fix=_PUBLIC_OF
        )
    try:
        public = _serialization().load_pem_public_key(key)
    except (ValueError, TypeError, _unsupported()) as error:
        raise BundleError("the public key cannot be read", expected="an Ed25519 key in PEM", fix=_PUBLIC_OF) from error
    if not isinstance(public, _ed25519().Ed25519PublicKey):
        raise BundleError(f"the public key is of another kind: {_kind(public)}", expected="an Ed25519 key in PEM")
    return public


def _bad_private_key(key: bytes, name: str, password: bytes | None) -> BundleError:
    if b"PUBLIC KEY" in key:
        return BundleError(
            f"{name} is a public key", expected="the private key, which signs", fix="give the other file"
        )
    if is_encrypted(key) and password is None:
        return BundleError(
            f"{name} is encrypted",
            expected="its password, or a key without one",
            fix=f"sign at a terminal, which asks for it; or openssl pkey -in {name} -out plain.pem",
        )
    if is_encrypted(key):
        return BundleError(f"{name} cannot be decrypted", expected="its password")
    return BundleError(f"{name} is no private key", expected=_KINDS)


def _kind(key: Any) -> str:
    return type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey").lstrip("_")


def _serialization() -> Any:
    return import_extra("cryptography.hazmat.primitives.serialization", EXTRA)


def _ed25519() -> Any:
    return import_extra("cryptography.hazmat.primitives.asymmetric.ed25519", EXTRA)


def _unsupported() -> type[Exception]:
    found: type[Exception] = import_extra("cryptography.exceptions", EXTRA).UnsupportedAlgorithm
    return found
