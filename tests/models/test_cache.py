import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from entangle.errors import Unavailable
from entangle.models import cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("ENTANGLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _make(folder: Path) -> None:
    (folder / "below").mkdir(parents=True)
    (folder / "a").write_bytes(b"abc")
    (folder / "below" / "b").write_bytes(b"")


# Digests


def test_the_digest_of_a_short_file_by_hand(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    inner = bytes.fromhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert cache.digest_of(tmp_path / "x") == hashlib.sha256(inner).hexdigest()  # FIPS 180


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 20, 21])
def test_the_digest_against_a_slow_reference(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PIECE", 7)
    content = bytes(range(size))
    (tmp_path / "x").write_bytes(content)
    pieces = [hashlib.sha256(content[i : i + 7]).digest() for i in range(0, size, 7)]
    assert cache.digest_of(tmp_path / "x") == hashlib.sha256(b"".join(pieces)).hexdigest()


# Sealed folders


def test_a_folder_is_made_once(place: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        _make(folder)

    assert cache.sealed_folder("x", make) == cache.sealed_folder("x", make) == place / "x"
    assert len(made) == 1
    assert _files(place / "x") == ["a", "below", cache.SEAL]


def _linked(file: Path) -> None:
    """Move a file out of its folder and put a link to it there."""
    (outside := file.parent.parent / file.name).write_bytes(file.read_bytes())
    _gone(file).symlink_to(outside)


def _gone(file: Path) -> Path:
    file.unlink()
    return file


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte": lambda folder: (folder / "a").write_bytes(b"abd"),
    "a byte more": lambda folder: (folder / "a").write_bytes(b"abcd"),
    "a file less": lambda folder: (folder / "below" / "b").unlink(),
    "a file more": lambda folder: (folder / "c").write_bytes(b""),
    "no seal": lambda folder: (folder / cache.SEAL).unlink(),
    "a broken seal": lambda folder: (folder / cache.SEAL).write_text("[1"),
    "a deep seal": lambda folder: (folder / cache.SEAL).write_text("[" * 10**6),
    "a deep object": lambda folder: (folder / cache.SEAL).write_text('{"a":' * 10**6),
    "a large number": lambda folder: (folder / cache.SEAL).write_text("9" * 10**6),
    "a seal in no code": lambda folder: (folder / cache.SEAL).write_bytes(b"\xff\xfe"),
    "a seal below": lambda folder: (folder / "below" / cache.SEAL).write_bytes(b""),
    "a link to the same": lambda folder: _linked(folder / "a"),
    "a link as the seal": lambda folder: _linked(folder / cache.SEAL),
    "a link more": lambda folder: (folder / "c").symlink_to("a"),
    "a link to nothing more": lambda folder: (folder / "c").symlink_to("missing"),
    "a link to a folder more": lambda folder: (folder / "c").symlink_to("below"),
    "a pipe more": lambda folder: os.mkfifo(folder / "c"),
    "a pipe as the seal": lambda folder: os.mkfifo(_gone(folder / cache.SEAL)),
    "a folder for a file": lambda folder: _gone(folder / "a").mkdir(),
    "a seal of nothing": lambda folder: (folder / cache.SEAL).write_text("[1]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_makes_it_again(change: str, place: Path) -> None:
    folder = cache.sealed_folder("x", _make)
    assert cache.is_intact(folder)
    CHANGES[change](folder)
    assert not cache.is_intact(folder)
    assert cache.is_intact(cache.sealed_folder("x", _make))
    assert (folder / "a").read_bytes() == b"abc"
    assert _files(folder) == ["a", "below", cache.SEAL]
    assert not any(path.is_symlink() for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", ["file", "link", "link to nothing"])
def test_what_is_in_the_way_is_replaced(kind: str, place: Path) -> None:
    place.mkdir()
    if kind == "file":
        (place / "x").write_text("")
    else:
        (place.parent / "other").mkdir()
        (place / "x").symlink_to(place.parent / ("other" if kind == "link" else "missing"))
    assert cache.is_intact(cache.sealed_folder("x", _make))
    assert not (place / "x").is_symlink()
    assert [one for one in _files(place) if not one.startswith(".x")] == ["x"]
    assert kind != "link" or _files(place.parent / "other") == []


def test_two_that_want_it_at_once_make_it_once(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []

    def make(folder: Path) -> None:
        made.append(1)
        time.sleep(0.2)
        _make(folder)

    threads = [threading.Thread(target=cache.sealed_folder, args=("x", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert "x" in capfd.readouterr().err  # those that waited said for what


def test_what_fails_leaves_nothing(place: Path) -> None:
    def make(folder: Path) -> None:
        _make(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.sealed_folder("x", make)
    assert not (place / "x").exists()
    assert [name for name in _files(place) if name.startswith(".part")] == []


def test_room_is_looked_at_first(place: Path) -> None:
    cache.check_room(1)
    with pytest.raises(Unavailable, match=str(place)):
        cache.check_room(1 << 62)


# Writing


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_a_failed_write_leaves_nothing(error: type[Exception], tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise error("No space left on device")

    with pytest.raises(Unavailable, match="No space left"):
        cache.write_atomically(tmp_path / "x", write)
    assert _files(tmp_path) == []


def test_a_folder_made_by_another_process_is_kept(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "mine").write_text("")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").write_text("")

    cache.write_atomically(tmp_path / "x", write)
    assert _files(tmp_path) == ["x"]
    assert _files(tmp_path / "x") == ["theirs"]
