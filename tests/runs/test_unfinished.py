import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from entangle.errors import InvalidInput, Unavailable
from entangle.runs import claims
from entangle.runs.provenance import claimed
from entangle.runs.sealing import file_digest
from entangle.runs.unfinished import DIGESTS, PLAN, Unfinished, is_made

MANIFEST = {"model": "m", "calibration": "c", "evaluation": None, "settings": {"k": 2}}


def begin(final: Path, *, resume: bool = False, **changes: object) -> Unfinished:
    return Unfinished(
        final, MANIFEST | changes, what="job", ending="working", resume=resume, force=False
    )


def piece(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def test_a_digest_by_hand(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_pieces_are_found_by_a_later_run(tmp_path: Path) -> None:
    work = begin(tmp_path / "x")
    assert work.find("a.bin") is None
    assert not work.path.exists()  # it appears with the first piece
    work.keep("a.bin", piece(b"first"))
    work.keep("b.bin", piece(b"second"))
    work.keep("a.bin", piece(b"other"))
    names = sorted(path.name for path in work.path.iterdir())
    assert names == ["a.bin", "b.bin", DIGESTS, PLAN]
    later = begin(tmp_path / "x", resume=True)
    found = later.find("a.bin")
    assert found == tmp_path / ".x.working" / "a.bin"
    assert found.read_bytes() == b"first"
    assert later.digests() == {name: file_digest(work.path / name) for name in ("a.bin", "b.bin")}
    later.remove()
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_a_finished_result_are_removed(tmp_path: Path) -> None:
    """As after a kill between its name and their removal; those of another plan stay."""
    begin(tmp_path / "x").keep("a.bin", piece(b"first"))
    (tmp_path / "x").mkdir()
    made = MANIFEST | {"schema_version": 1, "kind": "job"}
    (tmp_path / "x" / "manifest.json").write_text(json.dumps(made))
    other = MANIFEST | {"settings": {"k": 3}}
    assert not is_made(tmp_path / "x", "job", other, ending="working")
    assert (tmp_path / ".x.working").exists()
    (tmp_path / ".x.working" / PLAN).write_text(json.dumps(other))
    assert is_made(tmp_path / "x", "job", MANIFEST, ending="working")
    assert (tmp_path / ".x.working").exists()
    (tmp_path / ".x.working" / PLAN).write_text(json.dumps(MANIFEST))
    assert is_made(tmp_path / "x", "job", MANIFEST, ending="working")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_work_with_other_settings_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "x").begin()
    with pytest.raises(InvalidInput, match=r"x'.*settings.*--force.*force=True.*--resume"):
        begin(tmp_path / "x", resume=True, settings={"k": 3})
    with pytest.raises(InvalidInput, match=r"x'.*calibration.*--force.*force=True.*--resume"):
        begin(tmp_path / "x", resume=True, calibration="d")


@pytest.mark.parametrize("content", [b"", b"firs", b"firsT", b"first "])
def test_a_piece_that_was_changed_is_refused(tmp_path: Path, content: bytes) -> None:
    work = begin(tmp_path / "x")
    work.keep("a.bin", piece(b"first"))
    (work.path / "a.bin").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"a\.bin.*truncated"):
        begin(tmp_path / "x", resume=True).find("a.bin")


def test_a_piece_without_its_digest_is_refused(tmp_path: Path) -> None:
    work = begin(tmp_path / "x")
    work.keep("a.bin", piece(b"first"))
    (work.path / DIGESTS).unlink()
    with pytest.raises(InvalidInput, match=r"a\.bin'.*truncated"):
        work.find("a.bin")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "3", "[" * 10**6])
@pytest.mark.parametrize("name", [DIGESTS, PLAN])
def test_files_that_are_unreadable_are_named(tmp_path: Path, name: str, content: str) -> None:
    work = begin(tmp_path / "x")
    work.keep("a.bin", piece(b"first"))
    (work.path / name).write_text(content)
    with pytest.raises(InvalidInput, match=rf"{name}.*--force"):
        begin(tmp_path / "x", resume=True).find("a.bin")


OUTSIDE = ["../a.bin", "/a.bin", "..", "", "b/a.bin"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_list_of_digests_names_pieces_of_its_folder(name: str, tmp_path: Path) -> None:
    work = begin(tmp_path / "x")
    work.keep("a.bin", piece(b"first"))
    entries = json.loads((work.path / DIGESTS).read_text())
    (work.path / DIGESTS).write_text(json.dumps(entries | {name: entries["a.bin"]}))
    later = begin(tmp_path / "x", resume=True)
    asks: list[Callable[[], object]] = [
        later.digests, partial(later.find, "a.bin"), partial(later.keep, "b", piece(b"")),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(InvalidInput, match=rf"{DIGESTS}.*plain names") as caught:
            ask()
        assert repr(name) in str(caught.value)


def test_nothing_is_read_or_written_through_links(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"first")
    work = begin(tmp_path / "x")
    work.keep("a.bin", piece(b"first"))
    (work.path / "a.bin").unlink()
    (work.path / "a.bin").symlink_to(other)  # of the same content
    asks: list[Callable[[], object]] = [
        work.digests, partial(work.find, "a.bin"), partial(work.keep, "a.bin", piece(b"x")),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(InvalidInput, match=rf"a\.bin.*link.*{other}"):
            ask()
    (work.path / "a.bin").unlink()
    for name in ("b.writing", f"{Path(DIGESTS).stem}.writing"):
        (work.path / name).symlink_to(other)
    work.keep("b.bin", piece(b"second"))
    assert other.read_bytes() == b"first"
    assert begin(tmp_path / "x", resume=True).find("b.bin") == work.path / "b.bin"


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_place_of_the_folder_is_refused(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / ".x.working").symlink_to(tmp_path / "kept")
    with pytest.raises(InvalidInput, match=r"\.x\.working'.*link.*kept"):
        begin(tmp_path / "x", resume=resume)
    assert (tmp_path / "kept").is_dir()


def test_a_piece_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    work = begin(tmp_path / "x")
    work.keep("a.bin", piece(b"first"))
    with pytest.raises(KeyboardInterrupt):
        work.keep("b.bin", fail)
    later = begin(tmp_path / "x", resume=True)
    assert later.find("a.bin") is not None
    assert later.find("b.bin") is None
    assert json.loads((work.path / PLAN).read_text()) == MANIFEST


def test_a_piece_of_another_plan_is_refused(tmp_path: Path) -> None:
    """As where two processes wrote one folder, of which one had begun it anew."""
    first = begin(tmp_path / "x")
    first.keep("a.bin", piece(b"first"))
    other = Unfinished(
        tmp_path / "x", MANIFEST | {"settings": {"k": 3}},
        what="job", ending="working", resume=False, force=True,
    )  # fmt: skip
    other.begin()
    first.keep("a.bin", piece(b"first"))
    with pytest.raises(InvalidInput, match=r"a\.bin"):
        other.find("a.bin")
    with pytest.raises(InvalidInput, match=r"a\.bin"):
        other.keep("a.bin", piece(b"other"))
    assert first.find("a.bin") is not None


def test_a_folder_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    """Whose digests did not name the plan, and whose plan told seconds."""
    work = begin(tmp_path / "x", settings={"k": 2, "allocation": {"rule": "r"}})
    work.keep("a.bin", piece(b"first"))
    (work.path / DIGESTS).write_text(json.dumps(work.digests()))
    plan = json.loads((work.path / PLAN).read_text())
    plan["settings"]["allocation"]["seconds"] = 3.5
    (work.path / PLAN).write_text(json.dumps(plan))
    later = begin(tmp_path / "x", resume=True, settings=work._plan["settings"])
    assert later.find("a.bin") is not None
    later.keep("b.bin", piece(b"second"))
    assert later.digests() == {name: file_digest(work.path / name) for name in ("a.bin", "b.bin")}


def test_a_plan_is_of_no_run(tmp_path: Path) -> None:
    """What an allocation took when it was made is no reason to begin anew."""
    made = {"rule": "r", "seconds": 1.0, "peak_memory_bytes": 5, "memory_bytes": 2**31}
    begin(tmp_path / "x", settings={"allocations": [made]}).keep("a.bin", piece(b"first"))
    again = made | {"seconds": 2.0, "memory_bytes": 2**33}
    later = begin(tmp_path / "x", resume=True, settings={"allocations": [again]})
    assert later.find("a.bin") is not None
    with pytest.raises(InvalidInput, match=r"x'.*settings.*--force.*force=True.*--resume"):
        begin(tmp_path / "x", resume=True, settings={"allocations": [again | {"rule": "s"}]})


def test_nothing_is_kept_once_the_claim_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_PATIENCE", 0.05)
    work = begin(tmp_path / "x")
    with claimed(tmp_path / "x"):
        work.keep("a.bin", piece(b"first"))

        def write(path: Path) -> None:
            path.write_bytes(b"second")
            claims.claim_file(tmp_path / "x").unlink()

        for write_piece in (write, piece(b"third")):
            with pytest.raises(Unavailable, match=r"x\.lock"):
                work.keep("b.bin", write_piece)
    assert not (work.path / "b.bin").exists()
