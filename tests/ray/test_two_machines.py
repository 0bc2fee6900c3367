"""A cluster of two machines that are network namespaces of this one, and the link between them, which fails.

Needs Linux, iproute2 and the right to make namespaces. Both share the file system, as machines of a cluster would a
folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.bulk.test_rows import table
from tests.bulk.test_run import check_whole, images
from tests.ray import paced
from tests.ray.test_batch import COMMAND, ROOT, check_all_there, rows

pytest.importorskip("ray", reason="ray is not installed; `make test-ray` installs it")
pytestmark = pytest.mark.ray
HEAD, WORKER = "fastvar-head", "fastvar-worker"
ADDRESSES = {HEAD: "10.77.0.1", WORKER: "10.77.0.2"}
PORT = 6391
# A machine that does not answer is given up after some six seconds; by default Ray takes about a minute.
PATIENCE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}
PATIENCE |= {"RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "1000"}
OUTAGE = pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def pids(space: str) -> list[int]:
    """Processes in a namespace."""
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.fixture
def link() -> Iterator[None]:
    """Two namespaces with a cable between them."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not here")
    try:
        for space in ADDRESSES:
            ip("netns", "add", space)
        ip("link", "add", "fv0", "netns", HEAD, "type", "veth", "peer", "name", "fv1", "netns", WORKER)
        for (space, address), device in zip(ADDRESSES.items(), ("fv0", "fv1"), strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
            for name in ("lo", device):
                ip("-n", space, "link", "set", name, "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield
    remove()


def remove() -> None:
    for space in ADDRESSES:
        for pid in pids(space):
            os.kill(pid, 9)
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def inside(space: str, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
    environment = os.environ | PATIENCE
    return subprocess.Popen(
        ["ip", "netns", "exec", space, *command],
        cwd=ROOT,
        env=environment,
        text=True,
        **options,  # type: ignore[call-overload]  # options of any kind
    )


def node(space: str, log: Path) -> None:
    """A node of Ray, with one CPU; tried twice."""
    own = ["--head", f"--port={PORT}"] if space == HEAD else [f"--address={ADDRESSES[HEAD]}:{PORT}"]
    command = [str(Path(sys.executable).with_name("ray")), "start", *own, f"--node-ip-address={ADDRESSES[space]}"]
    command += ["--num-cpus=1", "--include-dashboard=false"] if space == HEAD else ["--num-cpus=1"]
    for _ in range(2):
        with log.open("a") as out:
            if inside(space, command, stdout=out, stderr=out).wait(120) == 0:
                return
    pytest.fail(log.read_text()[-3000:])


def passes() -> dict[str, int]:
    """Passes that the machines have drawn."""
    drawn = {address: paced.passes(address) for address in ADDRESSES.values()}
    return {address: path.stat().st_size for address, path in drawn.items() if path.exists()}


def wait_for_more(process: subprocess.Popen[str], before: dict[str, int], addresses: Sequence[str]) -> None:
    end = time.monotonic() + 90
    while not all(passes().get(address, 0) > before.get(address, 0) for address in addresses):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, passes()
        time.sleep(0.1)


@OUTAGE
def test_a_link_that_fails_costs_time_and_no_image(link, batched_bundle: Path, tmp_path: Path, seconds: int):
    """For two seconds; and for so long that the machine is given up, and is started anew when the link is there."""
    for address in ADDRESSES.values():
        paced.passes(address).unlink(missing_ok=True)
    node(HEAD, tmp_path / "head.log")
    node(WORKER, tmp_path / "worker.log")
    count = 120 if seconds < 10 else 300
    file = table(tmp_path, ".jsonl", rows(count))
    command = [sys.executable, "-c", COMMAND, "tests.ray.poisoned:Slow", "batch", str(file), "--bundle"]
    command += [str(batched_bundle), "--out", str(tmp_path / "out"), "--workers", "2"]
    command += ["--ray", f"{ADDRESSES[HEAD]}:{PORT}"]
    process = inside(HEAD, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen: dict[str, int] = {}
    wait_for_more(process, {}, list(ADDRESSES.values()))
    ip("-n", WORKER, "link", "set", "fv1", "down")
    down = time.monotonic()
    wait_for_more(process, passes(), [ADDRESSES[HEAD]])
    time.sleep(max(0.0, seconds - (time.monotonic() - down)))
    check_whole(tmp_path, seen)
    assert len(images(tmp_path)) < count, "it fails in the middle"
    ip("-n", WORKER, "link", "set", "fv1", "up")
    if seconds >= 10:
        end = time.monotonic() + 60
        while any("raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text() for pid in pids(WORKER)):
            assert time.monotonic() < end, "it was not given up"
            time.sleep(0.2)
        node(WORKER, tmp_path / "worker.log")
    wait_for_more(process, passes(), list(ADDRESSES.values()))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert f"{count} drawn, 0 were there, 0 failed" in out
    check_all_there(tmp_path, count, seen)
