import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entangle.errors import EntangleError, InvalidInput, Unavailable
from entangle.runs import provenance
from entangle.runs.claims import beside
from entangle.runs.provenance import (
    RunClock,
    check_output,
    claimed,
    disk_errors,
    make_manifest,
    output_file,
    output_folder,
    package_versions,
    peak_memory_bytes,
    read_manifest,
    scratch,
    without_run,
    write_json,
)
from tests.claiming import claimer, said


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(
    path: Path,
    content: str = "one",
    *,
    force: bool = False,
    error: BaseException | None = None,
) -> None:
    """Write a result; with ``error``, fail in the middle."""
    with output_folder(path, force=force) as folder:
        write_json(folder / "manifest.json", {"is": content})
        if error is not None:
            raise error


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "first"
    with output_folder(target) as folder:
        write_json(folder / "manifest.json", {"is": "one"})
        assert not target.exists()
        assert folder.parent == target.parent
        assert folder.name.startswith(".first.")
    assert (names(tmp_path / "runs"), names(target)) == (["first"], ["manifest.json"])


def test_its_rights_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    save(tmp_path / "first")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InvalidInput])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    save(tmp_path / "old")
    for name in ("new", "old"):
        with pytest.raises(error, match="stop"):
            save(tmp_path / name, "two", force=True, error=error("stop"))
    assert names(tmp_path) == ["old"]
    assert json.loads((tmp_path / "old" / "manifest.json").read_text())["is"] == "one"


def test_an_existing_result_is_replaced_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "result"
    save(target)
    (target / "figures").mkdir()
    with pytest.raises(InvalidInput, match=r"'.*result'.*--force"):
        save(target, "two")
    assert json.loads((target / "manifest.json").read_text())["is"] == "one"
    save(target, "two", force=True)
    assert (names(tmp_path), names(target)) == (["result"], ["manifest.json"])
    assert json.loads((target / "manifest.json").read_text())["is"] == "two"


def test_what_is_no_result_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=r"photos'.*manifest\.json"):
        save(tmp_path / "photos", force=True)
    for path in (tmp_path / "file", str(tmp_path / "file")):
        with pytest.raises(InvalidInput, match="file'"):
            check_output(path, force=True)
    with pytest.raises(Unavailable, match="below'"):
        check_output(tmp_path / "file" / "below")
    assert names(tmp_path / "photos") == ["cat.png"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert names(tmp_path) == ["empty"]


def test_a_result_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    """As after a kill between two renames: the old one away, the new one to its name."""
    save(tmp_path / "x")
    (tmp_path / "x").rename(beside(tmp_path / "x", "replaced"))
    left = scratch(tmp_path / "x")
    left.mkdir()
    write_json(left / "manifest.json", {"is": "two"})
    for others in (".xy.writing-0", ".x.building"):
        (tmp_path / others).mkdir()
    with claimed(tmp_path / "x"):
        assert json.loads((tmp_path / "x" / "manifest.json").read_text())["is"] == "one"
        assert names(tmp_path) == [".x.building", ".x.lock", ".xy.writing-0", "x"]


def test_a_result_that_was_replaced_is_not_put_back(tmp_path: Path) -> None:
    save(tmp_path / "x", "two")
    beside(tmp_path / "x", "replaced").mkdir()
    with claimed(tmp_path / "x"):
        assert names(tmp_path) == [".x.lock", "x"]
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["is"] == "two"


def test_what_another_process_writes_stays(tmp_path: Path) -> None:
    process = claimer(tmp_path / "x")
    assert said(process) == "claimed"
    left = scratch(tmp_path / "x")
    left.mkdir()
    with pytest.raises(Unavailable, match=rf"x'.*{process.pid}"), claimed(tmp_path / "x"):
        pass
    assert left.exists()
    process.kill()
    process.communicate()
    with claimed(tmp_path / "x"):
        assert not left.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("moved", [True, False])
def test_the_old_version_stays_where_the_new_one_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moved: bool
) -> None:
    save(tmp_path / "x")
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        last = target.name == "x" and "writing" in source.name
        if last and not moved:
            raise error
        done = rename(source, target)
        if moved and target.name == ".x.replaced":
            raise error
        return done

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises((Unavailable, KeyboardInterrupt)):
        save(tmp_path / "x", "two", force=True)
    assert names(tmp_path) == ["x"]
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["is"] == "one"


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.bin"

    def write(content: bytes, error: BaseException | None = None) -> None:
        with output_file(path) as temporary:
            temporary.write_bytes(content)
            if error is not None:
                raise error

    for content in (b"one", b"two"):
        write(content)
        assert (names(path.parent), path.read_bytes()) == (["a.bin"], content)
    with pytest.raises(ValueError, match="stop"):
        write(b"three", ValueError("stop"))
    assert (names(path.parent), path.read_bytes()) == (["a.bin"], b"two")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_only_a_file_is_replaced_by_a_file(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "there"
    if kind != "device":
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    before = path.stat().st_mode
    with pytest.raises(InvalidInput, match=re.escape(repr(str(path)))), output_file(path) as file:
        file.write_bytes(b"one")
    assert path.stat().st_mode == before


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    save(tmp_path / "link")
    save(tmp_path / "link", "two", force=True)
    assert names(tmp_path) == ["big", "link"]
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "big" / "manifest.json").read_text())["is"] == "two"


def test_check_output_writes_nothing(tmp_path: Path) -> None:
    assert check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path) == []


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert check_output("~/run") == tmp_path / "run"
    assert check_output("~no-such-user/run") == tmp_path / "~no-such-user" / "run"


def test_a_name_of_the_longest_kind(tmp_path: Path) -> None:
    save(tmp_path / ("x" * 250))
    assert names(tmp_path) == ["x" * 250]
    with pytest.raises(Unavailable, match="long"):
        check_output(tmp_path / ("x" * 300))


def test_a_folder_without_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(Unavailable, match=f"'{tmp_path}'"):
        check_output(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space or name another folder"),
        (errno.EDQUOT, "the disk quota is used up; free some space or name another folder"),
        (errno.EROFS, "the disk is read-only; name another folder"),
        (errno.EACCES, "permission is denied; name another folder"),
        (errno.EIO, "Input/output error; name another folder"),
    ],
)
@pytest.mark.parametrize("moment", ["begin", "write", "rename"])
def test_a_disk_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str, moment: str
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    if moment == "begin":
        monkeypatch.setattr(Path, "mkdir", refuse)
    if moment == "rename":
        monkeypatch.setattr(Path, "rename", refuse)
    error = OSError(code, os.strerror(code)) if moment == "write" else None
    with pytest.raises(Unavailable) as caught:
        save(tmp_path / "out", error=error)
    assert str(caught.value) == f"'{tmp_path / 'out'}' cannot be written: {reason}."
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [Unavailable("as it is"), InvalidInput("as it is")])
def test_disk_errors_keep_our_own_errors(error: EntangleError) -> None:
    with pytest.raises(type(error), match=r"^as it is$"), disk_errors(Path("x")):
        raise error


def test_disk_errors_name_a_remedy() -> None:
    with (
        pytest.raises(Unavailable, match=r"'x'.*space"),
        disk_errors(Path("x"), remedy="pray"),
    ):
        raise OSError(errno.ENOSPC, "no space")
    with pytest.raises(Unavailable, match=r"'x'.*odd"), disk_errors(Path("x")):
        raise OSError("odd")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/entangle", "score", "--out", "a b"], "entangle score --out 'a b'"),
        (["pytest", "-q"], None),
    ],
)
def test_the_command_is_recorded_only_if_it_is_ours(
    argv: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", argv)
    assert make_manifest("scores")["command"] == expected


def test_a_manifest_has_versions_and_what_was_given(tmp_path: Path) -> None:
    manifest = make_manifest("scores", model={"name": "größe"}, seconds=1.5)
    assert (manifest["schema_version"], manifest["kind"]) == (1, "scores")
    assert manifest["packages"] == package_versions()
    assert {"python", "entangle", "torch", "transformers"} <= package_versions().keys()
    write_json(tmp_path / "manifest.json", manifest)
    text = (tmp_path / "manifest.json").read_text("utf-8")
    assert text.endswith("}\n")
    assert "größe" in text
    assert read_manifest(tmp_path, "scores") == json.loads(text) == manifest


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package-at-all"))
    assert package_versions().keys() == {"python", "numpy"}


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "manifest.json", {"x": float("nan")})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"result.*manifest\.json"),
        (b"", r"JSON.*result"),
        (b'{"kind": "scores"', r"valid.*JSON"),
        (b"\xff\xfe", r"manifest\.json.*utf-8"),
        (b"[1, 2]", r"'scores'.*'list'"),
        (b"{}", r"'scores'.*\bNone\b"),
        (b'{"kind": "sweep", "schema_version": 1}', r"'scores'.*'sweep'"),
        (b'{"kind": "scores", "schema_version": 2}', r"version.*\b2\b.*\b1\b"),
    ],
)
def test_manifests_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read_manifest(tmp_path, "scores")


def test_places_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file", "~no-such-user/run"):
        with pytest.raises(InvalidInput, match=r"result.*manifest\.json"):
            read_manifest(path, "scores")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(InvalidInput, match=r"manifest\.json'.*folder"):
        read_manifest(tmp_path, "scores")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Times that the clock shows, one a reading."""
    times: list[float] = []
    clock = SimpleNamespace(perf_counter=lambda: times.pop(0))
    monkeypatch.setattr(provenance, "time", clock)
    yield times
    assert times == []


def test_the_clock(ticks: list[float]) -> None:
    ticks.extend([100.0, 101.23456])
    reading = RunClock().read()
    assert reading["seconds"] == 1.235
    assert isinstance(reading["peak_memory_bytes"], int)
    assert reading["threads"] == torch.get_num_threads()
    assert without_run({**reading, "seed": 1}) == {"seed": 1}


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_memory_bytes()
    block = bytearray(2**20)
    assert before >= 2**23
    assert peak_memory_bytes() >= before
    del block
