"""`fastvar doctor`: what is installed, and what is missing."""

from __future__ import annotations

from ..console.options import AsJson, print_json, print_tables


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what each backend needs, and what this machine offers."""
    from ..console.tables import doctor_tables
    from ..doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
        return
    print_tables(*doctor_tables(facts))
