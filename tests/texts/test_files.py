"""Documents from files: every format, and every way in which a file can be wrong."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entangle.errors import InvalidInput, Unavailable, UnknownName
from entangle.texts import files
from entangle.texts.documents import interpret_escapes, load_texts

DOCUMENTS = ["first\nline", "", "ünïcode ✓"]


def _parquet(path: Path, columns: dict[str, object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def _lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _error(kind: type[Exception], path: Path | str, column: str | None = None) -> str:
    with pytest.raises(kind) as caught:
        list(load_texts(path, column=column))
    message = str(caught.value)
    assert "\n" not in message
    assert Path(path).name in message
    return message


def test_plain_text_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BLOCK", 3)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffaé\r\nb\n\nc".encode())
    assert list(load_texts(path)) == ["aé\nb\n\nc"]
    assert list(load_texts(str(path))) == ["aé\nb\n\nc"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".JSONL"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = _lines(tmp_path / f"a{suffix}", *({"text": text, "n": 1} for text in DOCUMENTS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))
    assert list(load_texts(path)) == DOCUMENTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet(tmp_path: Path, kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ROWS", 2)
    column = pa.array(DOCUMENTS, kind)
    path = _parquet(tmp_path / "a.parquet", {"n": [1, 2, 3], "text": column})
    assert list(load_texts(path)) == DOCUMENTS


def test_parquet_dictionary_column(tmp_path: Path) -> None:
    column = pa.array(DOCUMENTS).dictionary_encode()
    assert list(load_texts(_parquet(tmp_path / "a.parquet", {"text": column}))) == DOCUMENTS


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    _lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": None})
    _parquet(tmp_path / "b.parquet", {"text": pa.array([None, "y"], pa.string())})
    assert list(load_texts(tmp_path)) == ["x", "", "", "y"]


def test_folder_is_sorted_by_name_with_subfolders(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b.txt", "a/2.txt", "a/10.txt", ".hidden/c.txt", "b/.d.txt", "e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(load_texts(tmp_path)) == ["a/10.txt", "a/2.txt", "b.txt", "b/z.txt"]


def test_documents_are_read_lazily(tmp_path: Path) -> None:
    path = _lines(tmp_path / "a.jsonl", {"text": "x"}, {"other": 1})
    assert next(iter(load_texts(path))) == "x"


def test_column_asked_for_or_the_only_one(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": ["t"], "body": ["b"], "n": [1]})
    assert list(load_texts(path)) == ["t"]
    assert list(load_texts(path, column="body")) == ["b"]
    only = _lines(tmp_path / "a.jsonl", {"n": 1, "body": "b"})
    assert list(load_texts(only)) == ["b"]


def test_column_that_is_no_choice(tmp_path: Path) -> None:
    two = _parquet(tmp_path / "two.parquet", {"title": ["t"], "body": ["b"], "n": [1]})
    assert "columns with text: title, body; all columns: title, body, n" in _error(
        InvalidInput, two
    )
    assert "'bodi'" in _error(UnknownName, two, "bodi")
    assert "holds no text" in _error(InvalidInput, two, "n")
    none = _lines(tmp_path / "none.jsonl", {"n": 1})
    assert "columns with text: none" in _error(InvalidInput, none)


TEXT, URL = "The cat sat.", "https://example.org/x"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"url": URL, "text": None}, {"url": URL, "text": TEXT}], ["", TEXT]),
        ([{"url": URL}, {"url": URL, "text": TEXT}], ["", TEXT]),
        ([{"url": URL, "text": TEXT}, {"url": URL}], [TEXT, ""]),
        ([{"text": None}, {"text": TEXT}], ["", TEXT]),
        ([{"url": URL}] * 998 + [{"text": TEXT}], [""] * 998 + [TEXT]),
    ],
)
def test_a_column_text_is_used_whatever_the_first_rows_hold(
    rows: list[dict[str, str | None]], expected: list[str], tmp_path: Path
) -> None:
    path = _lines(tmp_path / "a.jsonl", *rows)
    assert list(load_texts(path)) == list(load_texts(path, column="text")) == expected


@pytest.mark.parametrize("value", [[TEXT], {"a": TEXT}, 3, b"x"])
def test_a_column_text_that_holds_something_else_is_never_replaced(
    value: object, tmp_path: Path
) -> None:
    if not isinstance(value, bytes):
        lines = _lines(
            tmp_path / "a.jsonl", {"id": "doc", "text": value}, {"id": "d", "text": value}
        )
        assert "`column` 'text'" in _error(InvalidInput, lines)
        if value != 3:
            assert "columns with text: id" in _error(InvalidInput, lines)
    table = _parquet(tmp_path / "a.parquet", {"id": ["doc"] * 2, "text": [value] * 2})
    assert "`column` 'text'" in _error(InvalidInput, table)


def test_a_column_beside_text_in_another_form_is_no_choice(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}]
    lines = _lines(tmp_path / "a.jsonl", *[{"id": f"chat {i}", "messages": chat} for i in range(5)])
    assert "columns with text: id" in _error(InvalidInput, lines)
    assert next(iter(load_texts(lines, column="id"))) == "chat 0"
    table = _parquet(tmp_path / "a.parquet", {"id": ["x"], "content": [b"bytes"]})
    assert "columns with text: id" in _error(InvalidInput, table)
    late = _lines(tmp_path / "b.jsonl", *[{"id": "x"}] * 20, {"id": "x", "body": TEXT})
    assert "id, body" in _error(InvalidInput, late)


def test_the_only_column_of_text_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _lines(tmp_path / "a.jsonl", {"n": 1, "ids": [1, 2], "body": None}, {"body": TEXT})
    assert list(load_texts(lines)) == ["", TEXT]
    said = capsys.readouterr().err
    assert ("'body'" in said, said.count("\n")) == (True, 1)
    list(load_texts(lines, column="body"))
    assert capsys.readouterr().err == ""


def test_a_column_of_nulls_is_text_without_any(tmp_path: Path) -> None:
    table = _parquet(tmp_path / "a.parquet", {"id": ["x"], "text": pa.nulls(1)})
    assert "holds no text" in _error(InvalidInput, table)


def test_column_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    assert "`column` 'text'" in _error(InvalidInput, path, "text")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "x"', "not valid JSON"),
        (b'[{"text": "x"}]', "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"text": 3}', "has int"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_json_line_that_is_wrong(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n\n' + line + b"\n")
    message = _error(InvalidInput, path)
    assert problem in message
    assert "line 3 of" in message


@pytest.mark.parametrize("content", [b"abc\xff", b"\xff\xfea\x00", b"a\x00b", b"\x80" * 10])
def test_text_file_that_is_not_text(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    _error(InvalidInput, path)


@pytest.mark.parametrize("damage", ["empty", "short", "text", "middle"])
def test_corrupt_parquet(tmp_path: Path, damage: str) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": [f"document {n} {n**7}" for n in range(4000)]})
    good = path.read_bytes()
    middle = good[:30] + b"\xff" * (len(good) // 2) + good[30 + len(good) // 2 :]
    content = {"empty": b"", "short": good[:-9], "text": b"hello" * 10, "middle": middle}[damage]
    path.write_bytes(content)
    assert "valid Parquet file" in _error(InvalidInput, path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n" * (name == "a.jsonl"))
    assert "holds no text" in _error(InvalidInput, tmp_path / name)


def test_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    assert ".parquet" in _error(InvalidInput, tmp_path)


def test_other_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    assert "must end in .txt" in _error(InvalidInput, tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["no.txt", "./no", "a/b/no", "/no/where", "~/no-such", "no.csv"])
def test_missing_path_never_asks_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("entangle.texts.documents.read_hub", None)
    assert "does not exist" in _error(Unavailable, name)


@pytest.mark.parametrize("name", ["a\0.txt", "x" * 5000 + ".txt", "~no-such-user/a.txt"])
def test_impossible_paths(name: str) -> None:
    with pytest.raises(Unavailable, match="exist"):
        load_texts(name)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InvalidInput, match=r"a\.txt.*folder"):
        list(files.read_file(tmp_path / "a.txt").__next__())


def test_options_without_meaning(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    with pytest.raises(InvalidInput, match=r"`split`.*'train'"):
        load_texts(path, split="train")
    with pytest.raises(InvalidInput, match=r"`column`.*'x'"):
        load_texts("demo", column="x")
    with pytest.raises(InvalidInput, match="`source`"):
        load_texts("  ")


def test_escapes() -> None:
    assert interpret_escapes(r"a\n\t\\n\r b") == "a\n\t\\n\r b"
    assert interpret_escapes("plain\n") == "plain\n"
    for wrong in (r"\x", "\\", "a\\\nb"):
        with pytest.raises(InvalidInput, match="backslash"):
            interpret_escapes(wrong)
