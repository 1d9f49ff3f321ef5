"""Several ranks make what one process makes, say one line when one dies, and know their place."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from entangle import ranks
from entangle.errors import InvalidInput
from entangle.experts import build, spread
from entangle.experts.spread import cluster_shares
from entangle.models import streaming
from entangle.ranks import ALONE, Place, Ranks, _Joined, apart, current, place_of, started
from entangle.results.scores import load_scores
from entangle.texts import calibration_set
from tests import ranked


def free_ports() -> int:
    """Return a port, the next of which is free too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def launched(
    size: int, kinds: str, folder: Path, command: Sequence[str]
) -> list[tuple[int, str, str]]:
    """Run `tests.ranked` on so many ranks, by SLURM's variables; return status, output, errors."""
    step = {"SLURM_NTASKS": str(size), "SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1"}
    place = os.environ | step | {"MASTER_PORT": str(free_ports()), "MASTER_ADDR": "127.0.0.1"}
    start = [sys.executable, "-m", "tests.ranked", kinds, str(folder), *command]
    running = [
        subprocess.Popen(
            start, env=place | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [one.communicate(timeout=600) for one in running]
    return [(one.returncode, *words) for one, words in zip(running, said, strict=True)]


def ours(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("entangle:")]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the settings that `tests.ranked` changes come back."""
    monkeypatch.setattr(calibration_set, "_TOKENS_IN_A_PASS", 32)
    monkeypatch.setattr(spread, "_ROWS", 24)
    monkeypatch.setattr(streaming, "_SMALL", 100)
    monkeypatch.setattr(build, "_GRAM_BYTES", build._GRAM_BYTES)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize(("size", "kinds"), [(2, ranked.FULL), (3, ranked.FEW)])
def test_ranks_make_what_one_process_makes(
    size: int,
    kinds: str,
    tmp_path: Path,
    tiny_folder: Callable[[str], Path],
    text_file: Path,
    threads: Callable[[int], None],
) -> None:
    threads(1)
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    out = tmp_path / "scores"
    command = [
        "score", str(tiny_folder("llama")), "--calibration", str(text_file), "--n-seq", "6",
        "--seq-len", "32", "--batch-size", "1", "--method", "sketch", "--device", "cpu",
        "--quiet", "--out", str(out),
    ]  # fmt: skip
    ends = launched(size, kinds, shared, command)
    expected = ranked.work(kinds, alone)
    for rank in range(size):
        found = json.loads((shared / f"rank-{rank}.json").read_text())
        assert found["part"] == list(range(rank * 7 // size, (rank + 1) * 7 // size))
        assert "calibration" in found["refusal"]
        assert "rank 1 of" in found["refusal"]
        wanted = {name: one for name, one in expected.items() if rank == 0 or "files" not in name}
        assert found["found"] == wanted
        assert found["wrote"]  # files of blocks, each rank in its turn
    lines = [line for _, _, errors in ends for line in ours(errors)]
    if kinds == ranked.FULL:
        assert [status for status, _, _ in ends] == [0] * size, ends
        assert bool(ends[0][1])
        assert [output for _, output, _ in ends[1:]] == [""] * (size - 1)
        assert not lines
        assert load_scores(out).manifest["ranks"] == size
        return
    assert [status for status, _, _ in ends] == [1, 1, -9]  # the last one is killed
    assert len(lines) == 1
    assert "rank 2 of 3" in lines[0]
    assert "--resume" in lines[0]
    assert not out.exists()


def test_a_place_by_torchrun() -> None:
    found = place_of(
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29",
         "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    )  # fmt: skip
    assert found == Place(3, 8, 1, "a", 29, hosted=True, attempt="2")


SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("one", "one"), ("gpu[003-007,12],login1", "gpu003"), ("a-b,c", "a-b"), ("n[7]x", "n7x"),
        ("rack[1-2]n[05,9]", "rack1n05"),
    ],
)  # fmt: skip
def test_slurm_ranks_meet_at_the_first_host(listed: str, first: str) -> None:
    found = place_of(SLURM | {"SLURM_NODELIST": listed})
    assert found is not None
    assert (found.rank, found.size, found.local, found.host) == (1, 4, 0, first)
    assert place_of(SLURM | {"SLURM_NODELIST": listed, "MASTER_ADDR": "b"}).host == "b"  # type: ignore[union-attr]


def test_ports_differ_between_jobs() -> None:
    step = SLURM | {"SLURM_NODELIST": "a", "SLURM_STEP_ID": "0"}
    ports = {place_of(step | {"SLURM_JOB_ID": str(job)}).port for job in range(77, 80)}  # type: ignore[union-attr]
    assert len(ports) == 3


@pytest.mark.parametrize(
    "environment",
    [
        {}, {"RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "1"},
        SLURM | {"SLURM_NTASKS": "1"},
        SLURM | {"SLURM_JOB_ID": "5", "SLURM_NODELIST": "a"},  # the shell of a job, no step of it
    ],
)  # fmt: skip
def test_a_process_that_was_started_alone(environment: dict[str, str]) -> None:
    assert place_of(environment) is None
    with started(None) as ranks:
        assert ranks is ALONE is current()


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        (SLURM, "MASTER_ADDR"),
        (SLURM | {"SLURM_NODELIST": "a", "MASTER_PORT": "70000"}, "MASTER_PORT"),
        (SLURM | {"SLURM_NODELIST": "a", "SLURM_LOCALID": ""}, "SLURM_LOCALID"),
    ],
)
def test_a_place_that_makes_no_sense(environment: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        place_of(environment)


def test_one_process_tells_itself() -> None:
    tensor = torch.arange(3)
    ALONE.broadcast(tensor, by=0)
    ALONE.reduce(tensor, to=0)
    assert ALONE.exchange({"a": [1]}) == [{"a": [1]}]
    assert ALONE.gather(b"x") == [ALONE.told(b"x")] == [b"x"]
    assert (list(ALONE.part(3)), ALONE.tally("x", 2, 5)) == ([0, 1, 2], 7)
    with apart():
        assert (current().size, current().leads) == (1, True)


class Some(Ranks):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 40])
@pytest.mark.parametrize(("k", "layers", "at_once"), [(16, 2, 4), (7, 1, 7), (1, 3, 1), (3, 2, 2)])
def test_every_cluster_is_solved_once(size: int, k: int, layers: int, at_once: int) -> None:
    found = cluster_shares(k, layers, Some(size), at_once=at_once)
    assert len(found) == layers
    for shares in found:
        assert len(shares) == size
        assert [cluster for share in shares for cluster in share] == list(range(k))
        if -(-k // at_once) >= size:  # solved side by side as on one rank
            assert all(share.start % at_once == 0 for share in shares)


class _Told(_Joined):
    """The first of two ranks, the other of which says something else of one part."""

    def __init__(self, other: str) -> None:
        super().__init__(Place(0, 2, 0, "host", 1), None)
        self.names, self.other = ["rank 0", "rank 1"], other

    def exchange(self, value: dict[str, str]) -> list[dict[str, str]]:
        return [value, {**value, self.other: "another"}]


def test_ranks_of_other_versions_or_files_do_not_work_together() -> None:
    parts = {"versions": ranks._versions(), "files": ranks._code()}
    for part in parts:
        with pytest.raises(InvalidInput, match=f"{part}.*rank 1"):
            _Told(part).agree(parts)
    _Told("nothing else").agree(parts)


def test_versions_and_files_tell_builds_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ranks._versions()
    assert {"python", "torch", "transformers"} <= set(before)
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"0 {name}")
    assert ranks._versions() != before
    monkeypatch.setattr(ranks, "__file__", str(tmp_path / "ranks.py"))
    found = []
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.cu", "1"), ("notes.txt", "1")):
        (tmp_path / name).write_text(content)
        found.append(ranks._code())
    assert len(set(found)) == 3
    assert found[2] == found[3]
