"""A result folder holds what was written, or is refused by the name of what is not."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entangle.errors import InvalidInput
from entangle.runs.provenance import output_folder, read_manifest, write_json
from entangle.runs.sealing import ADDED, list_added, manifest_digest, sealed, unsealed
from tests.saved import without_digests

MANIFEST = {"schema_version": 1, "kind": "scores", "value": 0.1, "name": "é"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with output_folder(tmp_path / "run") as place:
        (place / "table.parquet").write_bytes(bytes(range(200)))
        (place / "below").mkdir()
        (place / "below" / "vectors.safetensors").write_bytes(b"numbers")
        (place / "figures").mkdir()
        (place / "figures" / "wd.png").write_bytes(b"picture")
        (place / "figures" / "wd.csv").write_bytes(b"a,b\n")
        (place / "manifest.json").write_text(json.dumps(MANIFEST), "utf-8")
    return tmp_path / "run"


def test_every_file_has_its_digest_and_figures_are_apart(folder: Path) -> None:
    digests = json.loads((folder / "manifest.json").read_text("utf-8"))["digests"]
    assert list(digests["files"]) == ["below/vectors.safetensors", "table.parquet"]
    assert list(digests["figures"]) == ["figures/wd.csv", "figures/wd.png"]
    assert digests["files"]["below/vectors.safetensors"] == (hashlib.sha256(b"numbers").hexdigest())
    assert digests["manifest"] == manifest_digest(MANIFEST)
    assert read_manifest(folder, "scores", ["table.parquet"]) == MANIFEST


def test_the_digest_is_that_of_canonical_json() -> None:
    text = '{"a":[1,2.5,null],"b":"é"}'

    wanted = hashlib.sha256(text.encode()).hexdigest()
    assert manifest_digest({"b": "é", "a": [1, 2.5, None], "digests": {}}) == wanted


DAMAGES: dict[str, Callable[[Path], object]] = {
    "table.parquet": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "below/vectors.safetensors": lambda path: path.unlink(),
    "manifest.json": lambda path: path.write_text(path.read_text().replace("0.1", "0.2")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_was_altered_is_named(name: str, folder: Path) -> None:
    DAMAGES[name](folder / name)
    with pytest.raises(InvalidInput, match=f"{name}'"):
        read_manifest(folder, "scores")


def test_figures_may_go_and_others_come(folder: Path) -> None:
    shutil.rmtree(folder / "figures")
    (folder / "notes.txt").write_text("mine")
    assert read_manifest(folder, "scores") == MANIFEST


def test_a_table_that_the_manifest_does_not_list_is_refused(folder: Path) -> None:
    (folder / "other.parquet").write_bytes(b"foreign")
    with pytest.raises(InvalidInput, match=r"other\.parquet'"):
        read_manifest(folder, "scores", ["other.parquet"])


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "below/../../outside"])
def test_no_name_leads_out_of_the_folder(name: str, folder: Path) -> None:
    (folder.parent / "outside").write_text("secret")
    (folder / "link").symlink_to(folder.parent / "outside")
    whole = sealed(folder, MANIFEST)
    files = whole["digests"]["files"]  # type: ignore[index]
    files.clear()
    files[name] = "0" * 64
    with pytest.raises(InvalidInput, match=r"manifest.*run'"):
        unsealed(folder, whole)


def test_folders_of_earlier_versions_load_with_a_note(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_manifest(without_digests(folder), "scores", ["table.parquet"]) == MANIFEST
    assert [one.getMessage().count(repr(str(folder))) for one in caplog.records] == [1]


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_flipped_bit_changes_what_is_read(data: st.DataObject, folder: Path) -> None:
    """Of the manifest and every file with a digest: refused, or what was written."""
    names = ["manifest.json", "table.parquet", "below/vectors.safetensors"]
    path = folder / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1))
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        found = read_manifest(folder, "scores", names[1:2])
    except InvalidInput:
        found = MANIFEST
    finally:
        path.write_bytes(before)
    known = {key: one for key, one in found.items() if key in MANIFEST}
    assert known == MANIFEST  # a flip in the word "digests" makes it another, unknown key


def test_what_is_added_later_has_its_own_list(folder: Path) -> None:
    place = folder / "figures"
    list_added(folder, [place / "wd.png"], "abc")
    (place / "more.png").write_bytes(b"picture")
    list_added(folder, [place / "more.png"], "def")
    listed = json.loads((folder / ADDED).read_text())
    assert {name: one["result"] for name, one in listed.items()} == {
        "figures/more.png": "def", "figures/wd.png": "abc",
    }  # fmt: skip
    assert len({one["sha256"] for one in listed.values()}) == 1
    assert read_manifest(folder, "scores") == MANIFEST


def test_values_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        sealed(tmp_path, {"value": float("nan")})
    write_json(tmp_path / "manifest.json", sealed(tmp_path, MANIFEST | {"name": "a"}))
    assert read_manifest(tmp_path, "scores")["name"] == "a"
