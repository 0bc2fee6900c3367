"""Help texts tell of the families that there are, by what each says of itself."""

from dataclasses import replace

import pytest

from fastvar.console import family_facts
from fastvar.families import FAMILIES


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch):
    """A family besides, that knows what others do not."""
    model = FAMILIES["var"]
    added = replace(
        model,
        name="more",
        presets={**model.presets, "bold": model.presets["dense"]},
        drawings=frozenset({"smooth", "residual"}),
        guidance_off=0.5,
        sampling=replace(model.sampling, top_k=None),
    )
    monkeypatch.setitem(FAMILIES, "more", added)


def test_what_families_are_told_apart_by(one_more):
    assert family_facts.policy_names() == "dense, fastvar, fastvar-strong (infinity), bold (more)"
    assert family_facts.families_with("smooth") == "var, hart, more"
    assert family_facts.families_with("residual") == "hart, more"
    assert family_facts.families_with_setting("top_k") == "var"
    assert family_facts.families_of_classes() == "var, more"
    assert family_facts.guidance_off() == "1 (infinity), 0 (var, hart), 0.5 (more)"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("build", "fastvar-strong (infinity)"),
        ("build", "single ones (var, hart)"),
        ("plan", "fastvar-strong (infinity)"),
        ("sizes", "var_d36s, hart_0.7b"),
        ("generate", "model draws classes (var)"),
        ("generate", "at 1 (infinity), 0 (var, hart)"),
    ],
)
def test_help_tells_them(run, command: str, told: str):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert told in " ".join(word for line in out.splitlines() for word in line.strip("│ ").split())
