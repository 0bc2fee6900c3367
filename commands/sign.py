"""`fastvar sign`: an Ed25519 signature for a bundle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..console.options import BundlePath


def sign(
    bundle: BundlePath,
    key: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Private Ed25519 key in PEM; openssl genpkey -algorithm ed25519 -out FILE makes one.",
            show_default=False,
        ),
    ],
) -> None:
    """Check every file of a bundle and sign its manifest, for `--require-signature`. A rebuild drops the signature."""
    from ..engines.bundle.signature import is_encrypted, read_key_file
    from ..engines.bundle.signing import sign_bundle

    text, password = read_key_file(key), None
    if is_encrypted(text) and sys.stdin.isatty():
        password = typer.prompt(f"Password of {key}", hide_input=True).encode()
    file = sign_bundle(bundle, text, str(key), password)
    typer.echo(f"wrote {file}")
