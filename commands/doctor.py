"""`fastvar doctor`: what is installed, and what is missing."""

from __future__ import annotations

from rich.console import Console

from .options import AsJson, print_json


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what each backend needs, and what this machine offers."""
    from ..doctor import examine
    from .tables import doctor_tables

    facts = examine()
    if as_json:
        print_json(facts)
        return
    Console().print(*doctor_tables(facts), sep="\n")
