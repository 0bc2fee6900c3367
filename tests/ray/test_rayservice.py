"""What is deployed on KubeRay says what Ray's own schema and our application understand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray", reason="ray is not installed; `make test-ray` installs it")
pytestmark = pytest.mark.ray
SERVICE = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "ray" / "rayservice.yaml").read_text("utf-8"))
CLUSTER = SERVICE["spec"]["rayClusterConfig"]


@pytest.fixture(scope="module")
def application() -> Any:
    from ray.serve.schema import ServeDeploySchema

    found = ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))
    (only,) = found.applications
    return only


def test_its_application_is_ours_and_its_arguments_are_understood(application, tmp_path: Path):
    from fastvar.ray_serve import app

    module, _, name = application.import_path.partition(":")
    assert (module, name) == (app.__module__, app.__name__)
    (tmp_path / "keys").write_text("key\n")
    assert app({**application.args, "api_key_file": str(tmp_path / "keys")})


def test_there_are_machines_for_the_replicas(application):
    (group,) = CLUSTER["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    asked = container["resources"]["requests"]
    assert int(asked["nvidia.com/gpu"]) == application.args["gpus"]
    assert int(asked["cpu"]) >= application.args["cpus"]
    assert group["maxReplicas"] >= application.args["replicas"]
    assert group["minReplicas"] >= application.args["least"]


def test_every_machine_sees_bundles_and_keys_and_tells_nobody(application):
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    for group in groups:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in container["env"]
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        folders = [part.partition("=")[2] for part in application.args["bundles"].split(",")]
        assert all(os.path.dirname(folder) in mounted for folder in (*folders, application.args["api_key_file"]))
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_it_is_for_the_ray_that_was_tried():
    import ray

    assert CLUSTER["rayVersion"] == ray.__version__
