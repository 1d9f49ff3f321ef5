from pathlib import Path

import pytest

from entangle.errors import InvalidInput
from entangle.runs.reading import inside

ESCAPES = [
    "../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "\\\\host\\share", "C:x", "C:\\x",
    "a/../x", "./x", "x/", "x\0", "x\n", "\ud800", "x" * 256, "ä" * 128, None, 3, ["x"],
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_what_is_no_plain_name_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^the list .*plain names") as caught:
        inside(tmp_path, name, what="the list")
    assert repr(name)[:20] in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["x", "x y.safetensors", "..x", ".x", "ä", "~", "*", "x" * 255])
def test_plain_names_are_paths_in_the_folder(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, what="the list") == tmp_path / name


def test_links_must_stay_in_the_folder(tmp_path: Path) -> None:
    home, other = tmp_path / "home", tmp_path / "homes"
    for folder in (home, other):
        folder.mkdir()
        (folder / "x").touch()
    (home / "near").symlink_to("x")
    (home / "far").symlink_to(other / "x")
    (home / "further").symlink_to("far")
    (home / "nowhere").symlink_to(tmp_path / "missing")
    assert inside(home, "near", what="the list") == home / "near"
    for name in ("far", "further", "nowhere"):
        with pytest.raises(InvalidInput, match=rf"the list.*'{name}'.*link.*{tmp_path}"):
            inside(home, name, what="the list")
    (tmp_path / "link").symlink_to(home)  # of the folder itself
    assert inside(tmp_path / "link", "x", what="the list") == tmp_path / "link" / "x"


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("models--a--b/blobs/1f", True),
        (f"blobs/0a/{'0a' * 32}", True),  # the store that repositories share
        ("models--c--d/blobs/1f", False),
        ("models--a--b/blobs/below/1f", False),
        ("blobs/0a/secret", False),
        ("models--a--b/refs/main", False),
        ("secret", False),
    ],
)
@pytest.mark.parametrize("through", [False, True])
def test_snapshots_of_the_hub_are_links_to_blobs(
    target: str, allowed: bool, through: bool, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    file = tmp_path / target
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    if through:  # as the blob of a repository is a link into the shared store
        (blob := snapshot.parent.parent / "blobs" / "2e").parent.mkdir(exist_ok=True)
        blob.symlink_to(file)
        file = blob
    (snapshot / "x").symlink_to(file)
    if allowed:
        assert inside(snapshot, "x", what="the index") == snapshot / "x"
    else:
        with pytest.raises(InvalidInput, match=r"'x'.*link"):
            inside(snapshot, "x", what="the index")


def test_only_the_hub_has_snapshots(tmp_path: Path) -> None:
    for snapshot in (tmp_path / "runs" / "snapshots" / "1", tmp_path / "models--a--b" / "x" / "1"):
        snapshot.mkdir(parents=True)
        blob = snapshot.parent.parent / "blobs" / "1f"
        blob.parent.mkdir()
        blob.touch()
        (snapshot / "x").symlink_to(blob)
        with pytest.raises(InvalidInput, match=r"'x'.*link"):
            inside(snapshot, "x", what="the index")
