"""How much memory a run takes, on machines that are played."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from entangle import memory
from entangle.errors import InvalidInput
from entangle.memory import (
    SpareRam,
    check_memory,
    free_ram,
    give_back,
    keep_little,
    memory_for,
    work_bytes,
)

GIB = 2**30


def available(n_bytes: int) -> Any:
    return lambda: SimpleNamespace(available=n_bytes)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100 GiB available, and the folder of its cgroups."""
    monkeypatch.setattr(psutil, "virtual_memory", available(100 * GIB))
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUP", tmp_path / "own")
    return tmp_path


def group(folder: Path, limit: object, used: int, names: str = "max current", **stat: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    most, use = names.split()
    (folder / f"memory.{most}").write_text(f"{limit}\n")
    (folder / f"memory.{use}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        (None, None),
        (2**20, 2**20),
        (np.int64(2**31), 2**31),
        (2e9, 2_000_000_000),
        (float("inf"), 2**62),
    ],
)
def test_what_is_asked_for(asked: object, known: int | None) -> None:
    assert check_memory(asked) == known
    if known is not None:
        assert memory_for(asked, nn.Linear(2, 2)) == known


@pytest.mark.parametrize("wrong", [0, -1, 2**20 - 1, 8, True, "2G", float("nan"), [2**30], 1j])
def test_what_is_no_memory(wrong: object) -> None:
    with pytest.raises(InvalidInput, match="`memory`") as caught:
        check_memory(wrong)
    assert repr(wrong) in str(caught.value)


def test_half_of_the_ram_that_is_free(machine: Path) -> None:
    assert free_ram() == 100 * GIB
    assert memory_for(None, nn.Linear(2, 2)) == 50 * GIB


def test_a_machine_that_is_full_still_gives_the_least(machine: Path) -> None:
    group(machine / "cgroup", 5, 5)
    assert free_ram() == 0
    assert memory_for(None, nn.Linear(2, 2)) == 2**20


def test_the_limit_of_a_container(machine: Path) -> None:
    group(machine / "cgroup", 16 * GIB, 6 * GIB, inactive_file=2 * GIB, file=3 * GIB)
    assert free_ram() == 12 * GIB  # a page cache that is not in use gives way
    group(machine / "cgroup", "max", 6 * GIB)
    assert free_ram() == 100 * GIB
    group(machine / "cgroup", 2**63, 0)
    assert free_ram() == 100 * GIB


def test_the_limit_of_a_job_within_its_user(machine: Path) -> None:
    (machine / "own").write_text("0::/user/job/step\n")
    group(machine / "cgroup" / "user" / "job" / "step", "max", 0)
    group(machine / "cgroup" / "user" / "job", 8 * GIB, 1 * GIB)
    group(machine / "cgroup" / "user", 30 * GIB, 25 * GIB)
    assert free_ram() == 5 * GIB


@pytest.mark.parametrize("path", ["/docker/x", "/../x", "/"])
def test_the_limits_of_version_1(machine: Path, path: str) -> None:
    (machine / "own").write_text(f"5:cpu,cpuacct:/a\n4:memory:{path}\nnonsense\n")
    names = "limit_in_bytes usage_in_bytes"
    group(machine / "cgroup" / "memory", 4 * GIB, GIB, names, total_inactive_file=5)
    assert free_ram() == 3 * GIB + 5


def test_on_this_machine_it_is_less_than_all() -> None:
    assert 0 < free_ram() <= psutil.virtual_memory().total


def test_the_gpu_with_least_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free are what the driver says and what PyTorch's allocator holds without use."""
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    numbers = {devices[0]: (40, 30, 20), devices[1]: (25, 60, 59)}
    for place, name in enumerate(("mem_get_info", "memory_reserved", "memory_allocated")):
        found = {one: own[place] * GIB for one, own in numbers.items()}
        answer = (lambda d, f=found: (f[d], 0)) if place == 0 else (lambda d, f=found: f[d])
        monkeypatch.setattr(torch.cuda, name, answer)

    class Spread(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return (SimpleNamespace(device=one) for one in devices)

    assert memory_for(None, Spread()) == 13 * GIB
    assert memory_for(3 * GIB, Spread()) == 3 * GIB


def test_work_has_a_fixed_size_on_machines_that_have_room() -> None:
    sizes = [work_bytes(n) for n in (2**20, 2**31 - 2, 2**31, 2**40)]
    assert sizes == [2**19, 2**30 - 1, 2**30, 2**30]
    assert work_bytes(2**40, 2**33) == 2**33


def test_spare_ram_is_half_of_what_would_be_free_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spare, free = SpareRam(), 100
    monkeypatch.setattr(memory, "free_ram", lambda: free)
    assert not spare.take(51)
    assert spare.take(30)
    free = 70
    assert spare.take(20)
    free = 50
    assert not spare.take(1)
    free = 10  # of another process, meanwhile
    assert not spare.take(1)
    spare.give(50)
    assert spare.held == 0


@pytest.mark.parametrize(
    ("budget", "limit"), [(2**20, 2**17), (32 * 2**20, 2**19), (8 * GIB, 2**25)]
)
def test_free_blocks_are_kept_up_to_a_share_of_the_budget(
    budget: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda option, value: asked.append((option, value)))
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    keep_little(budget)
    assert asked == [(-3, limit)]  # M_MMAP_THRESHOLD


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    keep_little(GIB)
    give_back()
