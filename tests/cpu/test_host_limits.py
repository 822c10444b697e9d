"""What control groups leave of the host's memory and cores: in both versions, and however far up the limit is."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from headway.placement import memory
from headway.stages.panels import panels_for

GIB = 1 << 30
CPU = torch.device("cpu")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that takes the host's place; the host has 64 GiB free and 8 cores."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB})())
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def version_2(folder: Path, limit: object, used: int, cached: int, cpu: str = "max 100000") -> None:
    write(folder, memory__max=limit, memory__current=used, cpu__max=cpu)
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def test_without_groups_the_host_counts(groups: Path) -> None:
    assert memory.free_bytes(CPU) == 64 * GIB
    assert memory.num_cores() == 8


@pytest.mark.parametrize("path", ["/", "/system.slice/headway.service"])
def test_the_groups_own_limit(groups: Path, path: str) -> None:
    """What it uses is taken off, but for files that are only cached; a part of a core does not count."""
    (groups / "own").write_text(f"0::{path}\n")
    version_2(groups / "groups" / path.strip("/"), 4 * GIB, 2 * GIB, GIB, "350000 100000")
    assert memory.free_bytes(CPU) == 3 * GIB
    assert memory.num_cores() == 3


def test_the_narrowest_of_all_around_it(groups: Path) -> None:
    """Its own group says nothing, the one around it does; half a core is one."""
    (groups / "own").write_text("0::/a.slice/b.service\n")
    version_2(groups / "groups/a.slice/b.service", "max", 2 * GIB, 0)
    version_2(groups / "groups/a.slice", 10 * GIB, 4 * GIB, 0, "50000 100000")
    version_2(groups / "groups", 100 * GIB, 0, 0)
    assert memory.free_bytes(CPU) == 6 * GIB
    assert memory.num_cores() == 1


def test_a_container_that_is_shown_the_hosts_paths(groups: Path) -> None:
    """The path is not there; what is mounted at the root is the container's own group."""
    (groups / "own").write_text("0::/docker/0123\n")
    version_2(groups / "groups", 4 * GIB, GIB, 0, "200000 100000")
    assert memory.free_bytes(CPU) == 3 * GIB
    assert memory.num_cores() == 2


def test_version_1(groups: Path) -> None:
    """A tree for each kind of limit, in which cores go by a quota that is -1 where there is none."""
    (groups / "own").write_text("4:memory:/jobs/7\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n")
    job = groups / "groups/memory/jobs/7"
    write(job, memory__limit_in_bytes=5 * GIB, memory__usage_in_bytes=2 * GIB)
    (job / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GIB}\n")
    write(groups / "groups/memory", memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=0, memory__stat="")
    write(groups / "groups/cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert memory.free_bytes(CPU) == 4 * GIB
    assert memory.num_cores() == 8
    write(groups / "groups/cpu", cpu__cfs_quota_us=400_000)
    assert memory.num_cores() == 4


@pytest.mark.parametrize("content", ["", "nonsense", "-1", "max"])
def test_files_that_say_nothing_limit_nothing(groups: Path, content: str) -> None:
    (groups / "own").write_text("0::/\n")
    write(groups / "groups", memory__max=content, memory__current=content, memory__stat=content, cpu__max=content)
    assert memory.free_bytes(CPU) == 64 * GIB
    assert memory.num_cores() == 8


def test_freed_memory_can_be_given_back() -> None:
    """Where the C library can do it; elsewhere nothing happens."""
    memory.give_back_freed_memory()


LOADS = """
from pathlib import Path
import psutil
from headway.config import EngineSettings
from headway.placement.engine import build_engine

engine = build_engine(EngineSettings(model="random:smollm2-135m", max_model_len=512))
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(lines["VmHWM"].split()[0]) << 10  # of this program: what the system tells of the process is its parent's too
print(peak - psutil.Process().memory_info().rss, engine.stage.matrices.head.num_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries manage what is freed as they do")
@pytest.mark.skipif(panels_for(torch.bfloat16, CPU) is None, reason="nothing is packed here")
def test_an_engine_never_has_its_weights_twice() -> None:
    told = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True).stdout
    over, head = map(int, told.split())
    assert over < head  # a matrix or two that were being packed, of many
