"""The files of a folder that are text, and the split of a data set that each belongs to.

A file belongs to the split that its name tells, by the rules of the `datasets` library for a
repository: a name such as ``data/train-00000-of-00001.parquet``, else a folder called by a split's
keyword, else a keyword in the file's name, between characters that are no letters. Files about the
data are no text: hidden ones, those that begin with ``_``, and those that are known by name.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from entangle.calibration.files import READERS
from entangle.errors import InvalidInput, unknown_name
from entangle.progress import tell
from entangle.reading import decoding, regular_file

EVERY_SPLIT = "all"
"""The split that means all files of a folder."""

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of the splits, by the `datasets` library (``data_files.SPLIT_KEYWORDS``)."""

_SHARD = re.compile(r"(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5}.*")
_WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?=$|[-._ 0-9])", re.IGNORECASE)
    for split, words in KEYWORDS.items()
}
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|copying|authors|contributing|requirements|vocab|"
    r"merges|checksums?|(md5|sha\d*)sums?)([-._][a-z]{2})?\.txt|"
    r"(manifest|metadata|meta|index|dataset_infos?|dataset_dict|state|(\w+_)?config|vocab|"
    r"special_tokens_map|added_tokens|tokenizer|package|croissant|citation|stats|"
    r"[\w.-]+\.index)\.json",
    re.IGNORECASE,
)
_LARGEST = 2**24  # bytes of one JSON object that is looked at
_MOST_NAMED = 5


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder to read."""

    files: list[Path]
    """Sorted by name, with subfolders."""
    split: str | None
    """The split that they are; None where the folder has none."""
    left_out: list[str]
    """Names of files with a readable ending that are about the data."""

    def settings(self) -> dict[str, object]:
        """Return what was read, for the settings of a text."""
        split = {} if self.split is None else {"split": self.split}
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return {"n_files": len(self.files), **split, **left_out}


def split_of(name: PurePosixPath) -> str | None:
    """Return the split that a file's path inside its folder tells of, None where it tells none."""
    shard = _SHARD.fullmatch(name.name)
    if shard is not None and name.parent.name == "data":
        return _keyword(shard["split"], whole=True) or shard["split"]
    for part in (*reversed(name.parts[:-1]), name.name):
        if found := _keyword(part):
            return found
    return None


def _keyword(part: str, *, whole: bool = False) -> str | None:
    for split, words in _WORDS.items():
        if part in KEYWORDS[split] if whole else words.search(part):
            return split
    return None


def folder_files(
    folder: Path, split: str | None, *, column: str | None, splits: Sequence[str]
) -> FolderFiles | None:
    """Choose the files of a folder to read.

    Parameters
    ----------
    folder
        With readable files in or below it.
    split
        The split asked for, `EVERY_SPLIT` for all files; None for the first of ``splits`` that
        there is, or all files of a folder without splits.
    column
        The column asked for: a JSON object that has it is text.
    splits
        Taken without ``split``.

    Returns
    -------
    FolderFiles or None
        None where a split is asked for and no file tells of one: the `datasets` library knows.

    Raises
    ------
    InvalidInput
        If there are no readable files, a file may be text or about the data, only some files tell
        of a split, or files of one split lie in several folders, which are several data sets.
    UnknownName
        If there is no such split.
    """
    found = _readable(folder)
    about = [name for name in found if _is_about(folder, name, column)]
    names = [name for name in found if name not in about]
    if not names and split not in (None, EVERY_SPLIT):
        return None
    if not names:
        raise InvalidInput(
            f"folder '{folder}' holds no {', '.join(READERS)} file of text; to read it as a folder "
            "of the `datasets` library, name its `split`."
        )
    left_out = [str(name) for name in about]
    if left_out:
        tell(f"left out of '{folder}', as files about the data: {_listed(left_out)}")
    told = {name: split_of(name) for name in names}
    present = sorted({one for one in told.values() if one is not None})
    if split == EVERY_SPLIT or not _are_splits(present):
        if split not in (None, EVERY_SPLIT):
            return None
        return FolderFiles([folder / name for name in names], split, left_out)
    chosen = _chosen(folder, told, present, split, splits)
    own = [name for name, one in told.items() if one == chosen]
    _check_one_set(folder, own, chosen)
    return FolderFiles([folder / name for name in own], chosen, left_out)


def _are_splits(present: Sequence[str]) -> bool:
    """Tell whether names are of splits; one alone without a keyword is the name of the data."""
    return len(present) > 1 or any(name in KEYWORDS for name in present)


def _chosen(
    folder: Path,
    told: dict[PurePosixPath, str | None],
    present: Sequence[str],
    split: str | None,
    splits: Sequence[str],
) -> str:
    if split is not None:
        if split not in present:
            raise unknown_name(f"split of folder '{folder}'", split, [*present, EVERY_SPLIT])
        return split
    others = [str(name) for name, one in told.items() if one is None]
    if others:
        some = next(str(name) for name, one in told.items() if one is not None)
        raise InvalidInput(
            f"folder '{folder}' holds files of splits ({', '.join(present)}; such as '{some}') "
            f"beside others ({_listed(others)}); name the `split` to read, or `{EVERY_SPLIT}` for "
            "every file."
        )
    chosen = next((one for one in splits if one in present), None)
    if chosen is None:
        raise unknown_name(
            f"split of folder '{folder}'", splits[0], present,
            f"Name its `split`, or `{EVERY_SPLIT}` for every file.",
        )  # fmt: skip
    if chosen != splits[0]:
        tell(f"'{folder}' has no split {splits[0]}; its split {chosen} is read")
    return chosen


def _check_one_set(folder: Path, files: Sequence[PurePosixPath], split: str) -> None:
    """Refuse files of one split that lie side by side in several folders: configurations."""
    above = {tuple(_above(name)) for name in files}
    if len(above) > 1:
        places = sorted("/".join(parts) or "." for parts in above)
        raise InvalidInput(
            f"split {split!r} of folder '{folder}' lies in several folders ({_listed(places)}), "
            "which are data sets of their own: give one of them."
        )


def _above(name: PurePosixPath) -> Iterator[str]:
    """Yield the folders above the one that is called by a split, ``data`` left out."""
    for part in name.parts[:-1]:
        if _keyword(part):
            return
        if part != "data":
            yield part


def _readable(folder: Path) -> list[PurePosixPath]:
    """Return the names of files with a readable ending, hidden ones left out, sorted."""
    with decoding(folder, remedy="give a folder that can be listed"):
        found = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in found}
    return [
        PurePosixPath(name)
        for name in sorted(names)
        if PurePosixPath(name).suffix.lower() in READERS and "/." not in f"/{name}"
    ]


def _is_about(folder: Path, name: PurePosixPath, column: str | None) -> bool:
    """Tell whether a file is about the data; refuse one that may be either."""
    if any(part.startswith("_") for part in name.parts) or _ABOUT.fullmatch(name.name):
        return True
    if name.suffix.lower() != ".json":
        return False
    alone = _single_object(folder / name)
    if alone is None or (column or "text") in alone:
        return False
    raise InvalidInput(
        f"'{folder / name}' is one JSON object without `{column or 'text'}`, which may be about "
        "the data or be text itself: move it, or begin its name with _ to leave it out; give the "
        "file, or its `column`, to read it."
    )


def _single_object(path: Path) -> dict[str, object] | None:
    """Return the JSON object that is all that a file holds; None for lines of objects."""
    with decoding(regular_file(path), remedy="give UTF-8 text"):
        if path.stat().st_size > _LARGEST:
            return None
        content = path.read_bytes()
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)})" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def has_configurations(folder: Path) -> bool:
    """Tell whether a folder's README lays out its files, as in a repository of the Hub."""
    path = folder / "README.md"
    if not path.is_file():
        return False
    with decoding(path, remedy="give UTF-8 text"):
        text = path.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    return head is not None and re.search(r"^configs:", head[1], flags=re.MULTILINE) is not None
