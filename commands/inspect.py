"""`fastvar inspect`: what a bundle does, scale by scale."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console.options import AsJson, BundlePath, RequireSignature, local_bundle, print_json, print_tables


def inspect(
    bundle: BundlePath,
    as_json: AsJson = False,
    engines: Annotated[bool, typer.Option("--engines", help="List every engine as well.")] = False,
    verify: Annotated[
        str, typer.Option(help="auto hashes engines, and weights up to 256 MiB; all hashes everything.")
    ] = "auto",
    require_signature: RequireSignature = None,
) -> None:
    """Show what a bundle does, scale by scale, after checking its files."""
    from ..console.tables import bundle_facts, engine_table, header_table, plan_table
    from ..engines.bundle.bundle import Bundle

    # Nothing of it is run.
    folder = local_bundle(bundle)
    opened = Bundle.open(folder, verify=verify, trust_remote_code=True, require_signature=require_signature)
    facts = bundle_facts(opened)
    if as_json:
        print_json(facts)
        return
    print_tables(header_table(facts), plan_table(facts), *([engine_table(facts)] if engines else []))
