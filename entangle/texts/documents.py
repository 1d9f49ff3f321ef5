"""Documents from any source of text: the demo articles, a file, a folder, a data set.

A string is a path if something exists there, if it begins like one (``/``, ``./``, ``../``,
``~``), has two slashes or a backslash, or ends like a data file; a path is never looked up on the
Hub. The names ``demo``, ``wikitext2`` and ``c4`` always mean the texts of that name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from entangle.errors import InvalidInput, Unavailable
from entangle.runs.progress import tell
from entangle.runs.reading import regular_file
from entangle.texts.files import (
    EVERY_SPLIT,
    READERS,
    Document,
    file_column,
    folder_files,
    has_configurations,
    read_file,
    well_formed,
)
from entangle.texts.hub import (
    SHORT_NAMES,
    HubDocuments,
    HubRequest,
    UnknownSplit,
    hub_request,
    read_hub,
)

_OTHER_FILES: tuple[str, ...] = (
    ".csv",
    ".tsv",
    ".md",
    ".arrow",
    ".gz",
    ".bz2",
    ".xz",
    ".zst",
    ".zip",
    ".npy",
)
_OTHER_FILES += (".npz", ".pt", ".bin", ".pkl", ".safetensors", ".gguf")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


@dataclass(frozen=True, eq=False)
class TextSource:
    """Documents, read as they are asked for, and what was opened."""

    documents: Iterator[Document]
    """Documents in order, each an iterable of consecutive blocks of text."""
    settings: Mapping[str, object]
    """What was opened: data set, configuration, split, column; JSON-serialisable."""


def as_path(source: str | Path) -> Path | None:
    """Return the path that ``source`` means, or None for the name of a text or data set."""
    if isinstance(source, Path):
        return source
    if not source.strip():
        raise InvalidInput(f"`source` must name a text, a data set or a path; got {source!r}.")
    if source == "demo" or source in SHORT_NAMES:
        return None
    path = Path(source)
    begins = source.startswith(("/", "./", "../", "~")) or "\\" in source or source.count("/") > 1
    ends = path.suffix.lower() in (*READERS, *_OTHER_FILES)
    return _expanded(path) if begins or ends or _exists(path) else None


def existing(path: Path) -> Path:
    """Return the path of a file or folder.

    Raises
    ------
    Unavailable
        If nothing is there.
    InvalidInput
        If it is a pipe or a device, whose reading might never end.
    """
    if _exists(path) and not path.is_dir():
        regular_file(path)
    if not _exists(path):
        raise Unavailable(
            f"'{path}' does not exist; give a {', '.join(READERS)} or .safetensors file, a folder, "
            f"a data set's id, demo, {' or '.join(SHORT_NAMES)}."
        )
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no name that the file system could hold, or no right to look
        return False


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no such user's home
        return path


def open_texts(
    source: str | Path,
    *,
    split: str | None,
    config: str | None,
    column: str | None,
    splits: Sequence[str] = (),
) -> TextSource:
    """Find the reader of ``source``; see `load_texts`.

    Where no split was asked for, ``splits`` are tried in this order, ``train`` if there are none.
    """
    path = as_path(source)
    if path is not None and existing(path).is_file():
        refuse(f"'{path}'", split=split, config=config)
        return _from_files([path], column, {"n_files": 1})
    if source == "demo":
        refuse("'demo'", config=config, column=column)
        return TextSource(_demo(split), {"split": split} if split else {})
    wanted = tuple(splits) or (split or "train",)
    asked = None if splits else split
    if path is not None and not _is_for_the_library(path, asked, config):
        found = folder_files(path, asked, column=column, splits=wanted)
        if found is not None:
            return _from_files(found.files, column, found.settings())
    request = hub_request(str(path or source), split=split, config=config, column=column)
    return _from_hub(request, wanted if splits else (request.split,))


def _is_for_the_library(folder: Path, split: str | None, config: str | None) -> bool:
    """Tell whether a folder is read by the `datasets` library.

    So it is with a configuration, with a split that is an expression, such as train[:10%], and
    where its README lays out the files: there, names of files tell nothing.
    """
    if split == EVERY_SPLIT:
        return False
    expression = split is not None and re.search(r"[\[+]", split) is not None
    return config is not None or expression or has_configurations(folder)


def _from_files(
    files: Sequence[Path], column: str | None, settings: Mapping[str, object]
) -> TextSource:
    """Read files one after the other, all of one column."""
    chosen = next((one for file in files if (one := file_column(file, column))), None)

    def documents() -> Iterator[Document]:
        for file in files:
            plain = file.suffix.lower() == ".txt"
            yield from read_file(file, column if plain else chosen, named=column is not None)

    return TextSource(documents(), {**settings, "column": chosen})


def _from_hub(request: HubRequest, splits: Sequence[str]) -> TextSource:
    """Open a data set at the first of some splits that it has."""
    for split in splits:
        asked = replace(request, split=split)
        try:
            found = read_hub(asked)
        except UnknownSplit:
            if split == splits[-1]:
                if len(splits) > 1:
                    read_hub(replace(request, split=splits[0]))
                raise
            continue
        if split != splits[0]:
            tell(f"data set {request.name!r} has no split {splits[0]}; its split {split} is read")
        column = found.column if isinstance(found, HubDocuments) else request.column
        settings = _settings(asdict(replace(asked, column=column)))
        return TextSource(iter(found), {"dataset": request.name, **settings})
    raise ValueError("`splits` must name a split")


def _settings(request: dict[str, object]) -> dict[str, object]:
    return {key: request[key] for key in ("config", "split", "column")}


def refuse(where: str, **options: str | bool | None) -> None:
    """Raise `InvalidInput` for the first option that was given (is not None)."""
    for name, value in options.items():
        if value is not None:
            raise InvalidInput(
                f"`{name}` {value!r} was given, but has no meaning for {where}; leave it out."
            )


def _demo(split: str | None) -> Iterator[Document]:
    """Return the demo's articles: all, or every third one (``test``), or the others (``train``)."""
    if split not in (None, "train", "test"):
        raise InvalidInput(f"`split` of 'demo' must be train or test; got {split!r}.")
    from entangle.models.demo import demo_articles

    return (
        [text]
        for index, (_, text) in enumerate(demo_articles())
        if split is None or (index % 3 == 2) == (split == "test")
    )


def load_texts(
    source: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    column: str | None = None,
) -> Iterable[str]:
    """Return the documents of a text source, in order, read as they are asked for.

    Parameters
    ----------
    source
        ``demo`` (the demo's encyclopedia articles); ``wikitext2`` or ``c4``; a ``.txt`` file (one
        document), a ``.jsonl`` or ``.json`` file with one object a line, a ``.parquet`` file (one
        document a row); a folder of such files, read sorted by name with its subfolders; a data
        set's id on the Hugging Face Hub. Data sets are streamed; ``wikitext2`` is downloaded once.
        Of a folder whose files are named by splits (``train-00000-of-00001.parquet``,
        ``test.jsonl``) one split is read. Hidden files, those that begin with ``_`` and known ones
        about the data (``dataset_info.json``, ``README.txt``) are left out, which is said. A
        folder is read by the `datasets` library if its README lays out its files (``configs:``),
        if ``config`` is given, or a ``split`` that no file tells of.
    split, config
        Split (``train`` if not given) and configuration of a data set; ``all`` reads every file of
        a folder. ``demo`` has all articles without a split, every third one as ``test`` and the
        others as ``train``.
    column
        Column of text; if not given ``text``, else the only column that holds text in any form,
        which is said. A column ``text`` that holds something else is refused. JSON lines are
        looked at up to the 1,000th for this; all files of a folder have one column.

    Returns
    -------
    Iterable of str
        The documents. Null values give empty documents, lone surrogates U+FFFD.

    Raises
    ------
    Unavailable
        If a path does not exist or cannot be read, or the Hub cannot be reached.
    UnknownName
        If the data set, configuration, split or column does not exist.
    InvalidInput
        If the content is corrupt or holds no text. Errors inside a file are raised when the
        reading gets there.
    """
    opened = open_texts(source, split=split, config=config, column=column)
    return _not_empty(opened.documents, str(source))


def _not_empty(documents: Iterator[Document], source: str) -> Iterator[str]:
    empty = True
    for document in documents:
        text = "".join(document)
        empty = empty and not text
        yield well_formed(text)
    if empty:
        raise InvalidInput(f"{source!r} holds no text.")


def interpret_escapes(text: str) -> str:
    r"""Replace ``\n``, ``\t``, ``\r`` and ``\\`` by the characters they stand for.

    For values typed in a shell, where ``--join "\n\n"`` arrives as four characters; functions of
    this package take their text as it is.

    Raises
    ------
    InvalidInput
        If a backslash is followed by anything else.
    """

    def replace(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise InvalidInput(
                rf"a backslash must be followed by n, t, r or another backslash; got {text!r}."
            )
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.?)", replace, text, flags=re.DOTALL)
