"""`fastvar doctor`: what is installed, what is missing, and whether a bundle would run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console.options import AsJson, RequireSignature, local_bundle, print_json, print_tables
from ..errors import BackendError, InputError


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="A bundle: would it run here, and how many images fit into a pass?", show_default=False),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="With BUNDLE: memory it may take, 15GiB say. [dim]default: the machine's, of CPU engines[/dim]",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Time this CPU's products again, by which builds with --precision auto choose."),
    ] = False,
    as_json: AsJson = False,
    require_signature: RequireSignature = None,
) -> None:
    """Say what is installed, what each backend needs, and what this machine offers.

    Where torch is installed, products are timed, once a CPU: what --precision auto chooses by.
    """
    from ..console.tables import doctor_bundle_facts, doctor_tables
    from ..core.dtypes import parse_bytes
    from ..doctor import examine

    budget = parse_bytes(memory) if memory is not None else None
    if bundle is None and (memory is not None or require_signature is not None):
        raise InputError("--memory and --require-signature go with a bundle", fix="give BUNDLE, or leave them away")
    facts = examine() | {"products": product_facts(anew=measure)}
    if bundle is not None:
        from ..engines.bundle.bundle import Bundle

        # Nothing of it is run.
        opened = Bundle.open(local_bundle(bundle), trust_remote_code=True, require_signature=require_signature)
        facts["bundle"] = doctor_bundle_facts(opened, budget, facts["uses"])
    if as_json:
        print_json(facts)
        return
    print_tables(*doctor_tables(facts))


def product_facts(*, anew: bool) -> dict[str, Any]:
    """How fast this CPU multiplies, as it is kept or measured now, in seconds; and what a build chooses by it.

    `problem` says why nothing is known: torch, with which engines for this CPU are made, is not there, say.
    """
    from ..core.precision import Precision, told_of
    from ..engines.cache.engine_cache import default_folder
    from ..engines.registry import get_backend

    try:
        compute, choice = get_backend("aotinductor").auto_precision(default_folder(), anew=anew)
    except BackendError as error:
        return {"problem": error.problem}
    precision = Precision(compute)
    return {
        "problem": "",
        "cpu": choice.cpu,
        "library": choice.library,
        "gflops_per_thread": choice.gflops,
        "precision": precision.label,
        "told": told_of(precision, choice),
    }
