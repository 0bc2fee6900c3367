"""The description that programs read: it names what is there, and the server answers as it says, whatever is sent."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from fastvar.serving.wire.fields import COMMON, EDITS
from fastvar.serving.wire.openapi import openapi
from tests.serving.asking import EDITS as EDITS_PATH
from tests.serving.asking import GENERATIONS
from tests.serving.processes import Served, serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
LEAST_CASES = 2000


def properties(description: dict[str, Any], path: str) -> dict[str, Any]:
    (content,) = description["paths"][path]["post"]["requestBody"]["content"].values()
    return content["schema"]["properties"]


def test_it_names_every_address_and_field(client):
    found = client.get("/openapi.json").json()
    routes = {route.path for route in client.app.routes}
    assert set(found["paths"]) == routes - {"/", "/metrics", "/openapi.json"}
    others = {"class_label", "top_k"}  # of models that this server has not
    assert set(properties(found, GENERATIONS)) == set(COMMON) - others
    assert set(properties(found, EDITS_PATH)) == {*EDITS, "image", "mask"} - others


def test_it_names_models_and_sizes_of_this_server(client):
    found = properties(client.get("/openapi.json").json(), EDITS_PATH)
    assert found["model"]["enum"] == ["texts", "gpt-image-1"]
    assert found["size"]["enum"] == ["auto", "256x256"]


def test_models_of_which_only_names_are_known_refuse_nothing():
    """They are being loaded, or are replicas' on a cluster."""
    found = properties(openapi([{"id": "loading"}], has_keys=False), EDITS_PATH)
    assert found["model"]["enum"] == ["loading"]
    assert {"prompt", "class_label", "tau", "top_k"} <= set(found)


def test_it_tells_of_keys(make_client, client):
    from fastvar.serving.options import ServeOptions

    with make_client(ServeOptions(api_keys=("k",))) as guarded:
        found = guarded.get("/openapi.json").json()
    assert found["paths"][GENERATIONS]["post"]["security"] == [{"key": []}]
    assert "401" in found["paths"]["/v1/models"]["get"]["responses"]
    assert "security" not in client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]


@pytest.mark.slow
def test_whatever_is_sent_the_answer_is_one_that_is_described(batched_bundle: Path, tmp_path: Path):
    """No 500 and nothing undocumented, over thousands of requests that schemathesis makes of the description."""
    with serving(batched_bundle, "--queue", "64") as served:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json"]
        options = ["--checks", CHECKS, "--max-examples", "200", "--seed", "1", "--continue-on-failure", "--no-color"]
        fuzzed = subprocess.run(
            [*command, *options, "--generation-database", "none"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=500,
        )
        assert fuzzed.returncode == 0, fuzzed.stdout[-4000:]
        cases = re.search(r"([\d,]+) generated, ([\d,]+) passed", fuzzed.stdout)
        assert cases, fuzzed.stdout[-2000:]
        generated, passed = (int(text.replace(",", "")) for text in cases.groups())
        assert generated == passed >= LEAST_CASES
        assert drawn(served) > 20, "many of them were drawn"


def drawn(served: Served) -> float:
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("fastvar_requests_total") and "images" in line and 'status="200"' in line
    )
