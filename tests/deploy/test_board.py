"""Every metric and label that the Grafana board asks for is one that the server has, in the form that it has it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import yaml

from fastvar.serving.app import create_app
from fastvar.serving.metrics import Metrics, _Gpu
from tests.deploy.dockerfile import DEPLOY, stage_named

BOARD = json.loads((DEPLOY / "grafana" / "boards" / "fastvar.json").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
ADDED = {"job", "instance"}  # by Prometheus, to every series
NAME = re.compile(r"\b(?:fastvar|process)_\w+")


def known() -> dict[str, set[str]]:
    """Series that the server has, with their labels."""
    metrics = Metrics()
    probe = SimpleNamespace(
        sample=lambda _: SimpleNamespace(process_bytes=1, device_used_bytes=2, device_total_bytes=3)
    )
    labels = {
        metric._name: set(metric._labelnames) for metric in vars(metrics).values() if hasattr(metric, "_labelnames")
    }
    found: dict[str, set[str]] = {}
    for family in (*metrics.registry.collect(), *_Gpu(probe).collect()):
        for suffix in SUFFIXES[family.type]:
            own = labels.get(family.name, set())
            found[family.name + suffix] = own | ({"le"} if suffix == "_bucket" else set())
    found |= {name: set() for name in ("process_resident_memory_bytes", "process_cpu_seconds_total")}  # on Linux
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Every query of the board, with the legend of its series."""
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
    for variable in BOARD["templating"]["list"]:
        yield variable["query"]["query"], ""


def faults(expression: str, legend: str) -> list[str]:
    """Names and labels that there are not."""
    series, wrong = known(), []
    names = NAME.findall(expression)
    wrong += [name for name in names if name not in series]
    labels = set().union(*(series.get(name, set()) for name in names)) | ADDED
    grouped = [label for group in re.findall(r"\bby \(([\w, ]+)\)", expression) for label in group.split(", ")]
    matched = re.findall(r"(\w+)=~?\"", expression)
    wrong += sorted({*grouped, *matched, *re.findall(r"label_values\(\w+, (\w+)\)", expression)} - labels)
    wrong += [label for label in re.findall(r"{{(\w+)}}", legend) if label not in {*grouped, *ADDED}]
    if "histogram_quantile" in expression:
        wrong += [] if names[0].endswith("_bucket") and "le" in grouped else ["no buckets"]
    return wrong


@pytest.mark.parametrize(("expression", "legend"), list(expressions()))
def test_the_board_asks_for_what_there_is(expression: str, legend: str):
    assert NAME.search(expression)
    assert faults(expression, legend) == []


@pytest.mark.parametrize(
    ("expression", "legend", "fault"),
    [
        ("rate(fastvar_images[1m])", "", "fastvar_images"),
        ("rate(fastvar_image_seconds_total[1m])", "", "fastvar_image_seconds_total"),
        ("sum by (stage) (fastvar_images_total)", "", "stage"),
        ('fastvar_images_total{scale="1"}', "", "scale"),
        ("sum(fastvar_images_total)", "{{model}}", "model"),
        ("histogram_quantile(0.5, rate(fastvar_image_seconds_sum[1m]))", "", "no buckets"),
    ],
)
def test_a_query_for_what_there_is_not_is_found(expression: str, legend: str, fault: str):
    assert fault in faults(expression, legend)


def test_the_board_shows_every_metric_of_the_server():
    asked = {name for expression, _ in expressions() for name in NAME.findall(expression)}
    stems = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in asked}
    have = {family.name for family in Metrics().registry.collect() if family.name.startswith("fastvar_")}
    assert have - stems - {name.removesuffix("_total") for name in asked} == set()


def test_panels_lie_beside_each_other():
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_the_source_of_the_board_is_the_prometheus_that_is_started():
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    named = {json.dumps(panel["datasource"], sort_keys=True) for panel in BOARD["panels"]}
    assert named == {json.dumps({"type": source["type"], "uid": source["uid"]}, sort_keys=True)}
    assert source["url"].removeprefix("http://").partition(":")[0] in COMPOSE["services"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "boards.yaml").read_text())["providers"]
    mounts = dict(mount.split(":")[:2] for mount in COMPOSE["services"]["grafana"]["volumes"])
    assert mounts["./grafana/boards"] == provider["options"]["path"]
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/fastvar.json"


def test_prometheus_asks_the_server_where_it_listens():
    (job,) = PROMETHEUS["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == [f"server:{stage_named('').only('EXPOSE')}"]
    assert "server" in COMPOSE["services"]
    routes = {route.path for route in create_app({}).routes}
    assert job.get("metrics_path", "/metrics") in routes
    assert f'job="{job["job_name"]}"' in json.dumps(BOARD).replace('\\"', '"')
