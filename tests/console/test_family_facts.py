"""Help texts tell of the families that there are, by what each says of itself."""

from dataclasses import replace

import pytest

from fastvar.console import family_facts
from fastvar.families import FAMILIES, published_sizes


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch):
    """Two families, of which each knows what the other does not."""
    model = FAMILIES["var"]
    one = replace(
        model,
        name="one",
        presets={**model.presets, "bold": model.presets["dense"]},
        drawings=frozenset({"smooth", "residual"}),
        guidance_off=0.5,
        sampling=replace(model.sampling, top_k=None),
    )
    other = replace(model, name="other", guidance_off=0.0, drawings=frozenset({"smooth"}), draws="prompt")
    monkeypatch.setattr(family_facts, "FAMILIES", {"one": one, "other": other})


def test_what_families_are_told_apart_by(two):
    assert family_facts.policy_names() == "dense, fastvar, bold (one)"
    assert family_facts.families_with("smooth") == "one, other"
    assert family_facts.families_with("residual") == "one"
    assert family_facts.families_with_setting("top_k") == "other"
    assert family_facts.families_of_classes() == "one"
    assert family_facts.guidance_off() == "0.5 (one), 0 (other)"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("build", family_facts.policy_names()),
        ("build", f"single ones ({family_facts.families_with('smooth')})"),
        ("plan", family_facts.policy_names()),
        ("sizes", ", ".join(published_sizes())),
        ("generate", f"model draws classes ({family_facts.families_of_classes()})"),
        ("generate", f"at {family_facts.guidance_off()}"),
    ],
    ids=["policy", "smooth", "policy of a plan", "models", "classes", "guidance"],
)
def test_help_tells_them(run, command: str, told: str):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert told in " ".join(word for line in out.splitlines() for word in line.strip("│ ").split())
