import json

from fastvar.core.schedule import parse_size
from fastvar.families.infinity_presets import all_schedules


def test_every_size_is_listed_with_its_tokens(run):
    code, out, _ = run("sizes", "--json")
    assert code == 0
    listed = json.loads(out)["sizes"]
    assert {parse_size(entry["size"]) for entry in listed} == set(all_schedules())
    by_size = {entry["size"]: entry for entry in listed}
    assert by_size["1024x1024"]["tokens"] == 10521
    assert abs(by_size["1024x1024"]["forwarded_share"] - (25 * 2912 + 7 * 4121) / (32 * 10521)) < 1e-9
    assert [name for name, entry in by_size.items() if entry["zero_shot"]] == [
        "960x1920",
        "1008x1344",
        "1344x1344",
        "1536x1536",
        "2048x2048",
        "1344x1008",
        "1920x960",
    ]


def test_the_table_names_what_is_beyond_the_trained_resolution(run):
    code, out, _ = run("sizes")
    assert code == 0
    assert "2048x2048" in out
    assert out.count("zero-shot") == 8  # seven sizes and the caption


def test_an_unknown_model_is_told_with_those_that_are_known(run):
    code, _, err = run("sizes", "--model", "infinity_9b")
    assert code == 2
    assert "infinity_2b" in err
