"""What a container grants: control groups of both versions, as files in a temporary tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvar.core import platform as machine
from fastvar.engines.device import HostDevice

GIB = 1 << 30


class Container:
    """A /proc/self and a mounted hierarchy to write limits into."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mount, self.proc = folder / "cgroup", folder / "proc"
        self.proc.mkdir(parents=True)
        monkeypatch.setattr(machine, "_PROC", self.proc)
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def is_in(self, groups: str, mounts: str) -> None:
        """`mounts` names the folder of the hierarchies as MOUNT."""
        (self.proc / "cgroup").write_text(groups)
        (self.proc / "mountinfo").write_text(mounts.replace("MOUNT", str(self.mount)))

    def write(self, file: str, text: str) -> None:
        path = self.mount / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Container:
    return Container(tmp_path, monkeypatch)


V2 = "30 25 0:26 / MOUNT rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "33 31 0:30 / MOUNT/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / MOUNT/memory rw - cgroup cgroup rw,memory\n"
    "41 31 0:38 / MOUNT/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("50000 100000", 1), ("100000 100000", 1), ("250000 100000", 2), ("400000 100000", 4), ("max 100000", 8), ("", 8)],
)
def test_quota_of_version_2_sets_cores(container: Container, quota: str, cores: int):
    container.is_in("0::/app\n", V2)
    container.write("app/cpu.max", quota)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(
    ("quota", "period", "cores"), [("50000", "100000", 1), ("300000", "100000", 3), ("-1", "100000", 8)]
)
def test_quota_of_version_1_sets_cores(container: Container, quota: str, period: str, cores: int):
    container.is_in("2:cpu,cpuacct:/docker/abc\n1:memory:/\n0::/\n", V1)
    container.write("cpu,cpuacct/docker/abc/cpu.cfs_quota_us", quota)
    container.write("cpu,cpuacct/docker/abc/cpu.cfs_period_us", period)
    assert machine.usable_cores() == cores


def test_the_least_limit_of_all_parents_holds(container: Container):
    container.is_in("0::/pod/app\n", V2)
    container.write("pod/app/cpu.max", "400000 100000")
    container.write("pod/cpu.max", "200000 100000")
    container.write("pod/app/memory.max", str(8 * GIB))
    container.write("pod/memory.max", str(3 * GIB))
    assert machine.usable_cores() == 2
    assert machine.memory_limit_bytes() == 3 * GIB


def test_affinity_holds_below_a_larger_quota(container: Container, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    container.is_in("0::/\n", V2)
    container.write("cpu.max", "600000 100000")
    assert machine.usable_cores() == 2


def test_the_mount_of_a_container_is_its_own_group(container: Container):
    """A host's path of the group, and only that group mounted: the path is not found below the mount."""
    container.is_in("0::/system.slice/docker-abc.scope\n", V2.replace(" / ", " /system.slice/docker-abc.scope "))
    container.write("cpu.max", "300000 100000")
    container.write("memory.max", str(2 * GIB))
    assert machine.usable_cores() == 3
    assert machine.memory_limit_bytes() == 2 * GIB


@pytest.mark.parametrize("groups", ["0::/../other\n", "", "nonsense\n0:\n", "0::/gone\n"])
def test_odd_groups_limit_nothing(container: Container, groups: str):
    container.is_in(groups, V2 + "broken line\n1 2 3 - cgroup2\n")
    assert machine.usable_cores() == 8
    assert machine.memory_limit_bytes() is None


def test_a_memory_limit_is_the_memory_of_the_machine(container: Container):
    container.is_in("4:memory:/docker/abc\n", V1)
    container.write("memory/docker/abc/memory.limit_in_bytes", str(GIB))
    assert machine.memory_bytes() == GIB
    assert HostDevice().free_bytes() == GIB


def test_no_limit_is_a_huge_number_in_version_1(container: Container):
    container.is_in("4:memory:/docker/abc\n", V1)
    container.write("memory/docker/abc/memory.limit_in_bytes", "9223372036854771712")
    assert machine.memory_limit_bytes() is None
    assert machine.memory_bytes() == machine.physical_memory_bytes()


def test_a_bundle_larger_than_the_container_is_refused(container: Container, tiny_bundle: Path):
    from fastvar import Pipeline
    from fastvar.errors import DeviceMemoryError

    container.is_in("0::/\n", V2)
    container.write("memory.max", str(1 << 20))
    with pytest.raises(DeviceMemoryError, match=r"1\.0 MiB are all there is"):
        Pipeline.load(tiny_bundle)


def test_plan_and_doctor_tell_the_limit(container: Container, tiny_bundle: Path, run):
    container.is_in("0::/\n", V2)
    container.write("memory.max", str(5 << 20))
    container.write("cpu.max", "150000 100000")
    assert "does not fit into this machine's memory, 5.0 MiB" in run("plan", tiny_bundle)[1]
    told = run("doctor")[1]
    assert "a container's quota of 1.5" in told
    assert "a container's limit of 5.0 MiB" in told
