"""Signed bundles: who wants a signature gets no bundle without the right one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519, rsa

from fastvar import Pipeline
from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle import files as bundle_files
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.folder import SIGNATURE
from fastvar.engines.bundle.signature import sign
from fastvar.engines.bundle.signing import sign_bundle
from fastvar.errors import BackendError, BundleError
from tests.models.small_bundle import make_bundle

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
SUBJECT = serialization.PublicFormat.SubjectPublicKeyInfo


def private_pem(key, password: bytes | None = None) -> bytes:
    plain = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    return key.private_bytes(PEM, PKCS8, plain)


def public_pem(key) -> bytes:
    return key.public_key().public_bytes(PEM, SUBJECT)


KEY, OTHER_KEY = (ed25519.Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2))
PRIVATE, PUBLIC = private_pem(KEY), public_pem(KEY)
RSA = rsa.generate_private_key(65537, 2048)


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "b")
    assert sign_bundle(tmp_path / "b", PRIVATE, "key.pem") == tmp_path / "b" / SIGNATURE
    return tmp_path / "b"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_signed_bundle_opens_with_the_owners_key(signed: Path, tmp_path: Path):
    (tmp_path / "public.pem").write_bytes(PUBLIC)
    for given in (PUBLIC, PUBLIC.decode(), tmp_path / "public.pem", str(tmp_path / "public.pem")):
        assert Bundle.open(signed, require_signature=given).manifest.model == "small"
    assert Bundle.open(signed).manifest.model == "small"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: (b / SIGNATURE).unlink(), "is not signed"),
        (lambda b: (b / SIGNATURE).write_bytes(b""), "is not that of the given key"),
        (lambda b: flip(b / SIGNATURE), "is not that of the given key"),
        (lambda b: (b / SIGNATURE).write_bytes((b / SIGNATURE).read_bytes() + b"x"), "is not that of the given key"),
        (lambda b: sign_bundle(b, private_pem(OTHER_KEY), "other"), "is not that of the given key"),
        (lambda b: (b / "manifest.json").write_bytes((b / "manifest.json").read_bytes() + b" "), "is not that"),
        (lambda b: (b / "manifest.json").write_bytes(b"no JSON at all"), "is not that of the given key"),
    ],
    ids=["none", "empty", "flipped", "longer", "other key", "spaced", "no JSON"],
)
def test_others_are_refused_before_anything_is_parsed(
    signed: Path, monkeypatch, change: Callable[[Path], object], match
):
    change(signed)

    def parsed(*_arguments):
        raise AssertionError("something was parsed")

    monkeypatch.setattr(bundle_module, "parse_manifest", parsed)
    monkeypatch.setattr(bundle_module, "read_checked", parsed)
    with pytest.raises(BundleError, match=match) as caught:
        Bundle.open(signed, require_signature=PUBLIC)
    assert caught.value.fix


@pytest.mark.parametrize("file", ["weights.safetensors", "tokenizer.json", "engines"])
def test_every_file_is_hashed_large_weights_too(signed: Path, monkeypatch, file: str):
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", 16)
    path = signed / file
    flip(next(path.iterdir()) if path.is_dir() else path)
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.open(signed, require_signature=PUBLIC)


def test_with_a_signature_nothing_is_remembered(signed: Path, monkeypatch):
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", 16)
    monkeypatch.setattr(bundle_module, "DigestMemo", lambda: pytest.fail("the memo was asked"))
    hashed = []
    real = bundle_files.digest_of_file
    monkeypatch.setattr(bundle_files, "digest_of_file", lambda handle: hashed.append(handle.name) or real(handle))
    Bundle.open(signed, require_signature=PUBLIC)
    sign_bundle(signed, PRIVATE, "key.pem")
    assert len(hashed) == 2


def test_kernels_of_a_signed_bundle_lie_elsewhere(signed: Path, tmp_path: Path, monkeypatch):
    """What is in its folder beside the manifest's files is not signed."""
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path / "cache"))
    assert Bundle.open(signed, require_signature=PUBLIC).kernel_folder == tmp_path / "cache" / "kernels"


def test_a_rebuild_drops_the_signature(signed: Path):
    make_bundle(signed, b"new")
    assert not (signed / SIGNATURE).exists()
    with pytest.raises(BundleError, match="is not signed"):
        Bundle.open(signed, require_signature=PUBLIC)


def test_a_damaged_bundle_is_not_signed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", 16)
    make_bundle(tmp_path / "b")
    flip(tmp_path / "b" / "weights.safetensors")
    with pytest.raises(BundleError, match="is damaged"):
        sign_bundle(tmp_path / "b", PRIVATE, "key.pem")
    assert not (tmp_path / "b" / SIGNATURE).exists()


@pytest.mark.parametrize(
    ("key", "match"),
    [
        (b"", "is no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "is no private key"),
        (PUBLIC, "is a public key"),
        (private_pem(RSA), "of another kind: RSA"),
        (private_pem(ed448.Ed448PrivateKey.generate()), "of another kind: Ed448"),
        (private_pem(KEY, b"secret"), "is encrypted"),
    ],
    ids=["empty", "damaged", "public", "RSA", "Ed448", "encrypted"],
)
def test_keys_that_do_not_sign(tmp_path: Path, key: bytes, match: str):
    make_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match=match) as caught:
        sign_bundle(tmp_path / "b", key, "key.pem")
    assert caught.value.expected


def test_an_encrypted_key_signs_with_its_password(tmp_path: Path):
    key = private_pem(KEY, b"secret")
    assert sign(b"text", key, "key.pem", b"secret") == KEY.sign(b"text")
    with pytest.raises(BundleError, match="cannot be decrypted"):
        sign(b"text", key, "key.pem", b"other")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (PRIVATE, "this is a private key"),
        (public_pem(RSA), "of another kind: RSA"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "cannot be read"),
        ("nowhere.pem", "key file nowhere.pem cannot be read"),
        (b"raw bytes", "a key is given as bytes"),
        (3, "a key is given as int"),
        ("a\0b", "cannot be read"),
    ],
)
def test_keys_that_tell_no_owner(signed: Path, given, match: str):
    with pytest.raises(BundleError, match=match):
        Bundle.open(signed, require_signature=given)


def test_a_file_too_large_for_a_key(signed: Path, tmp_path: Path):
    (tmp_path / "movie.pem").write_bytes(bytes(1 << 17))
    with pytest.raises(BundleError, match="is no key"):
        Bundle.open(signed, require_signature=tmp_path / "movie.pem")


def test_without_the_package(signed: Path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(BackendError, match="cryptography") as caught:
        Bundle.open(signed, require_signature=PUBLIC)
    assert "fastvar-runtime[sign]" in caught.value.fix


def test_from_the_command_line_and_drawing(run, tiny_bundle: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    (tmp_path / "key.pem").write_bytes(PRIVATE)
    (tmp_path / "public.pem").write_bytes(PUBLIC)
    code, _, err = run("inspect", bundle, "--require-signature", "public.pem")
    assert (code, "is not signed" in err) == (2, True)
    code, out, err = run("sign", bundle, "--key", "key.pem")
    assert (code, err) == (0, "")
    assert out.strip() == f"wrote {bundle / SIGNATURE}"
    code, out, _ = run("inspect", bundle, "--require-signature", "public.pem")
    assert code == 0
    assert "of the given key" in out
    assert "there, not checked" in run("inspect", bundle)[1]
    right = Pipeline.load(tiny_bundle)("a red circle", seed=7).images[0].tobytes()
    pipe = Pipeline.load(bundle, require_signature=tmp_path / "public.pem")
    assert pipe("a red circle", seed=7).images[0].tobytes() == right
    flip(bundle / SIGNATURE)
    code, _, err = run("generate", bundle, "a red circle", "--require-signature", "public.pem")
    assert (code, "is not that of the given key" in err) == (2, True)
    code, _, err = run("sign", bundle, "--key", "public.pem")
    assert (code, "is a public key" in err) == (2, True)
    code, _, err = run("sign", tmp_path, "--key", "key.pem")
    assert (code, "is not a bundle" in err) == (2, True)
