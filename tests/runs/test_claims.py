"""One process at a time writes a result, whatever became of the others."""

import errno
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from entangle.errors import Unavailable
from entangle.runs import claims
from entangle.runs.claims import Writer, check_claimed, claim, claim_file
from entangle.runs.provenance import claimed, output_folder
from tests.claiming import claimer, said


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "result"


@pytest.fixture
def dead(target: Path) -> Iterator[Writer]:
    """Who claimed the target and was killed, not yet noticed by the process that began it."""
    process = claimer(target)
    assert said(process) == "claimed"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie, until it is waited for
    found = Writer.read(claim_file(target))
    assert found is not None
    yield found
    process.communicate()


def note(target: Path, writer: Writer, **changes: object) -> None:
    claim_file(target).write_text(json.dumps(vars(writer) | changes))


def test_a_claim_comes_and_goes(target: Path) -> None:
    with claim(target):
        found = Writer.read(claim_file(target))
        assert found is not None
        assert found.pid == os.getpid()
        assert [path.name for path in target.parent.iterdir()] == [".result.lock"]
        with claim(target):
            check_claimed(target)
        assert claim_file(target).exists()
    assert list(target.parent.iterdir()) == []
    check_claimed(target)  # not claimed at all


def test_folders_that_were_made_for_a_claim_go_with_it(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b" / "x"):
        assert claim_file(tmp_path / "a" / "b" / "x").exists()
    assert list(tmp_path.iterdir()) == []
    with claim(tmp_path / "a" / "x"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_another_process_is_named(target: Path) -> None:
    process = claimer(target)
    assert said(process) == "claimed"
    for enter in (lambda: claimed(target), lambda: output_folder(target)):
        with pytest.raises(Unavailable, match=rf"result'.*{process.pid}"), enter():
            pass
    process.kill()
    process.communicate()
    with output_folder(target) as folder:
        (folder / "a").touch()
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_of_processes_that_start_together_one_begins(target: Path) -> None:
    processes = [claimer(target, seconds=4.0) for _ in range(4)]
    lines = [process.communicate()[0].strip() for process in processes]
    assert sorted(lines).count("claimed") == 1
    winner = processes[lines.index("claimed")].pid
    others = [line for line in lines if line != "claimed"]
    assert all(f"process {winner} on " in line for line in others)
    assert list(target.parent.iterdir()) == []


def test_a_process_that_was_killed_is_followed(target: Path, dead: Writer) -> None:
    assert dead.is_known_dead  # though it is still in the table of processes
    with claim(target):
        found = Writer.read(claim_file(target))
        assert found is not None
        assert found.token != dead.token
    assert list(target.parent.iterdir()) == []


def test_of_many_that_follow_a_killed_process_one_begins(tmp_path: Path, dead: Writer) -> None:
    """Of eight threads, over and over, with a switch of threads wherever Python allows one."""
    begun, together, before = [0], threading.Barrier(8), sys.getswitchinterval()

    def follow(target: Path) -> None:
        together.wait()
        with suppress(FileExistsError, Unavailable):
            claims._claim(target)
            begun.append(1)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for number in range(200):
                target = tmp_path / str(number)
                claim_file(target).write_text(json.dumps(vars(dead)))
                begun.clear()
                list(pool.map(follow, [target] * 8))
                assert begun == [1]
    finally:
        sys.setswitchinterval(before)


def test_one_follows_a_killed_process_where_there_are_no_locks(
    target: Path, dead: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(claims, "fcntl")
    claim_file(target).write_text(json.dumps(vars(dead)))
    with claim(target):
        found = Writer.read(claim_file(target))
        assert found is not None
        assert (found.pid, found.token != dead.token) == (os.getpid(), True)
    assert list(target.parent.iterdir()) == []


def test_files_of_processes_that_died_while_they_claimed_are_removed(
    target: Path, dead: Writer
) -> None:
    beside = claim_file(target)
    for name, content in (("0", ""), ("1", json.dumps(vars(dead)))):
        beside.with_name(f"{beside.name}.{name}").write_text(content)
    living = beside.with_name(f"{beside.name}.2")
    living.write_text(json.dumps(vars(Writer.this())))
    with claim(target):
        assert sorted(target.parent.iterdir()) == [beside, living]


def test_a_full_disk_leaves_no_claim(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for stage in (["dump"], ["link", "dump"]):
        with monkeypatch.context() as patch:
            patch.setattr(json if stage[0] == "dump" else os, stage[0], full)
            if len(stage) > 1:
                patch.setattr(claims, "_make", full)
            with pytest.raises(OSError, match="space"), claim(target):
                pass
        assert list(target.parent.iterdir()) == []


def test_another_process_of_the_same_number_is_no_writer(target: Path) -> None:
    own = Writer.this()
    note(target, own, started="1")  # as after the numbers began anew
    with claim(target):
        pass
    note(target, own)
    with pytest.raises(Unavailable, match=rf"process.*{own.pid}"), claim(target):
        pass


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"host": "another"},
        {"place": "/another-start pid:[1]"},
        {"place": claims._place().replace("[", "[9")},
        {"started": ""},
    ],
)
def test_who_cannot_be_seen_from_here_is_respected(
    target: Path, elsewhere: dict[str, object]
) -> None:
    """On another machine, in another container; the line tells which file to remove."""
    note(target, Writer.this(), **elsewhere)
    with pytest.raises(Unavailable, match=r"'.*\.result\.lock'"), claim(target):
        pass
    claim_file(target).unlink()
    with claim(target):
        pass


def test_a_machine_that_was_started_anew_has_no_writers(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(target, Writer.this(), place="machine/first pid:[1]")
    monkeypatch.setattr(claims, "_place", lambda: "machine/second pid:[1]")
    with claim(target):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}', "null", "\x00"])
def test_a_file_without_a_writer_is_replaced(
    target: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_PATIENCE", 0.05)
    claim_file(target).write_text(content)
    with claim(target):
        pass
    assert list(target.parent.iterdir()) == []


def test_a_claim_that_was_lost_is_noticed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_PATIENCE", 0.05)
    with claim(target):
        claim_file(target).unlink()
        with pytest.raises(Unavailable, match=r"result\.lock"):
            check_claimed(target)
        note(target, Writer.this(), pid=77)
        with pytest.raises(Unavailable, match=r"\b77\b"):
            check_claimed(target)
    assert claim_file(target).exists()  # the other's is left alone


def test_a_file_system_without_links(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(_source: object, _target: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    with claim(target):
        assert [path.name for path in target.parent.iterdir()] == [".result.lock"]
        check_claimed(target)
        note(target, Writer.this())
        with pytest.raises(Unavailable), ThreadPoolExecutor(1) as pool:
            pool.submit(claims._claim, target).result()


def test_another_thread_is_another_writer(target: Path) -> None:
    def enter() -> None:
        with claim(target):
            pass

    with claim(target), ThreadPoolExecutor(1) as pool:
        with pytest.raises(Unavailable, match="thread"):
            pool.submit(enter).result()
        check_claimed(target)


def test_long_names(tmp_path: Path) -> None:
    for name in ("n" * 255, "ß" * 120):
        with claim(tmp_path / name):
            assert len(list(tmp_path.iterdir())) == 1


def test_a_result_that_appeared_meanwhile_is_kept(target: Path) -> None:
    def write() -> None:
        with output_folder(target) as folder:
            (folder / "manifest.json").write_text("{}")
            target.mkdir()
            (target / "manifest.json").write_text("[]")  # of a program that makes no claims

    with pytest.raises(ValueError, match="result'"):
        write()
    assert (target / "manifest.json").read_text() == "[]"
