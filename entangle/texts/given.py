"""What a user gives as a text: a name, a path, or one of the objects that hold texts or token ids.

Texts are documents: a list of strings, a column of a table. Token ids are a running text (one
sequence of any length, cut like a text) or rows, each a sequence; rows of different lengths are
padded, with a mask beside them. What may be one or the other is refused.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from entangle.errors import InvalidInput, unknown_name
from entangle.runs.progress import tell
from entangle.runs.reading import decoding, inside, no_pickles, read_object, regular_files
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.documents import TextSource, as_path, existing, refuse
from entangle.texts.files import TEXT, Column, choose_column, text_value
from entangle.texts.hub import feature_columns, look_at
from entangle.texts.token_files import (
    TokenFile,
    checked_mask,
    integer_ids,
    masked_ids,
    pad_rows,
    read_token_file,
)

Source = object
"""Whatever `find` takes."""

IDS, MASK = "input_ids", "attention_mask"
_AGAIN = "save the data set again"
_AHEAD = 10_000  # rows that the `datasets` library may read at a time
KINDS = (
    "a name, a path, a list of strings, a pandas column or table, an object of the `datasets` "
    "library, or token ids (array, lists, a tokenizer's output)"
)
"""What is taken, for messages."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source beside the source."""

    split: str | None
    config: str | None
    column: str | None
    splits: Sequence[str]
    """Taken, the first that there is, without ``split``."""
    n_rows: int | None
    """Rows of ids that are enough; None for all."""

    @property
    def names(self) -> dict[str, str | None]:
        """Split, configuration and column, as `open_texts` takes them."""
        return {"split": self.split, "config": self.config, "column": self.column}


def label_of(source: Source) -> str:
    """Return what a manifest calls a source: the name or path itself, or the kind of object."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    kind = type(source).__name__
    if isinstance(source, CalibrationSet):
        return source.source
    if isinstance(shape := getattr(source, "shape", None), tuple):
        return f"{kind} of shape {tuple(shape)}"
    sized = hasattr(source, "__len__") and not isinstance(source, Mapping)
    return f"{kind} of {len(source)}" if sized else kind  # type: ignore[arg-type]


def find(source: Source, wanted: Wanted) -> TokenFile | TextSource | str | Path:
    """Return the token ids or documents that a source holds, or the name or path of a text.

    Raises
    ------
    InvalidInput
        If it is nothing that holds texts or token ids, or what it means is not clear; if ids are no
        integers, or an option has no meaning for them.
    Unavailable, UnknownName
        If a file cannot be read, or a split or column does not exist.
    """
    if isinstance(source, str | os.PathLike):
        return _named(str(source) if isinstance(source, str) else Path(source), wanted)
    label = label_of(source)
    if not _is_of("datasets", source):
        refuse(label, split=wanted.split, config=wanted.config)
    found = _from_object(source, label, wanted)
    if isinstance(found, TextSource) and "column" not in found.settings:
        refuse(label, column=wanted.column)
    return found


def _is_of(library: str, source: object) -> bool:
    return type(source).__module__.partition(".")[0] == library


def _named(source: str | Path, wanted: Wanted) -> TokenFile | TextSource | str | Path:
    path = as_path(source)
    if path is None:
        return source
    if path.suffix.lower() == ".safetensors":
        refuse(str(source), **wanted.names)
        return read_token_file(existing(path))
    if _is_saved(path):
        refuse(str(source), config=wanted.config)
        return _from_saved(path, wanted)
    return source


def _is_saved(path: Path) -> bool:
    """Tell whether a folder was written by ``save_to_disk`` of the `datasets` library."""
    both = all((path / name).is_file() for name in ("dataset_info.json", "state.json"))
    return both or ((path / "dataset_dict.json").is_file() and any(path.glob("*/state.json")))


def _from_saved(path: Path, wanted: Wanted) -> TokenFile | TextSource:
    import datasets

    for folder in (path, *(one for one in path.iterdir() if one.is_dir())):
        regular_files(folder)
    with decoding(path, remedy=_AGAIN), no_pickles(f"'{path}'"):
        _check_listed(path)
        saved = datasets.load_from_disk(str(path))
    return _from_dataset(saved, f"'{path}'", wanted)


def _check_listed(folder: Path) -> None:
    """Check that what a saved data set lists, its splits and their files, lies in its folder."""
    places, splits = [folder], folder / "dataset_dict.json"
    if splits.is_file():
        listed = read_object(splits, remedy=_AGAIN).get("splits") or ()
        places += [inside(folder, name, what=f"the list '{splits}'") for name in listed]
    for state in (place / "state.json" for place in places):
        files = read_object(state, remedy=_AGAIN).get("_data_files") if state.is_file() else None
        for file in files or ():
            name = file.get("filename") if isinstance(file, dict) else file
            inside(state.parent, name, what=f"the list '{state}'")


def _from_object(source: Any, label: str, wanted: Wanted) -> TokenFile | TextSource:
    if _is_of("datasets", source):
        return _from_dataset(source, label, wanted)
    if _is_of("pandas", source):
        return _from_pandas(source, label, wanted)
    if isinstance(source, Mapping):
        return _from_mapping(source, label, wanted)
    strings = isinstance(source, np.ndarray) and source.dtype.kind in "UOT"
    if strings or _is_list(source):
        return _from_list(list(source), label, wanted)
    refuse(label, column=wanted.column)
    if isinstance(source, CalibrationSet):
        return TokenFile(source.ids, source.describe(), source.mask)
    if isinstance(windows := getattr(source, "windows", None), Tensor):  # an EvaluationText
        return TokenFile(windows, source.describe(), source.mask)
    if isinstance(source, Tensor | np.ndarray):
        return TokenFile(integer_ids(source, name=label), None)
    if hasattr(source, IDS):
        return _from_parts(getattr(source, IDS), getattr(source, MASK, None), label)
    shown = " ".join(repr(source).split())[:60]
    raise InvalidInput(f"a text must be {KINDS}; got {shown} ({type(source).__name__}).")


def _is_list(source: object) -> bool:
    """Tell whether to take an object for a list: of what has an order, and is no array."""
    other = (Tensor, np.ndarray, CalibrationSet, bytes, bytearray, AbstractSet)
    return (
        isinstance(source, Iterable) and not isinstance(source, other) and not hasattr(source, IDS)
    )


def _from_mapping(source: Mapping[str, Any], label: str, wanted: Wanted) -> TokenFile | TextSource:
    """Read a tokenizer's output, or a table as a dictionary of columns."""
    if IDS in source and wanted.column is None and TEXT not in source:
        return _from_parts(source[IDS], source.get(MASK), label)
    texts = {name for name, values in source.items() if _are_strings(values)}
    columns = {str(n): Column(type(v).__name__, n in texts, n in texts) for n, v in source.items()}
    if not texts and wanted.column is None and TEXT not in source:
        raise InvalidInput(
            f"{label} must have `{IDS}`, or a column of strings; it has "
            f"{', '.join(map(str, source)) or 'nothing'}."
        )
    chosen = choose_column(columns, wanted.column, where=label)
    return _documents(source[chosen], {"column": chosen}, label)


def _are_strings(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, str | None) for v in values)


def _from_parts(ids: Any, mask: Any, label: str) -> TokenFile:
    """Read ids and the mask beside them, each an array, a list or a list of lists."""
    found = _as_rows(ids, label)
    masks = None if mask is None else _as_rows(_integers(mask), f"{MASK} of {label}")
    if isinstance(found, list) or isinstance(masks, list):
        return _padded(list(found), None if masks is None else list(masks), label)
    return TokenFile(*masked_ids(found, masks, name=f"{MASK} of {label}"))


def _integers(mask: Any) -> Any:
    """Return a mask of booleans as one of integers."""
    if isinstance(mask, Tensor | np.ndarray):
        return mask * 1
    return [int(one) if isinstance(one, bool | np.bool_) else
            _integers(one) if isinstance(one, Iterable) else one for one in mask]  # fmt: skip


def _as_rows(values: Any, label: str) -> Int64[Tensor, "..."] | list[Int64[Tensor, " _"]]:
    """Return ids as one array, or as rows of different lengths."""
    if isinstance(values, Tensor | np.ndarray):
        return integer_ids(values, name=label)
    items = list(values)
    if all(_is_whole(one) for one in items):
        return integer_ids(_array(items, label), name=label)
    rows = [row for i, item in enumerate(items) for row in _rows_of(item, f"row {i} of {label}")]
    return torch.stack(rows) if len({len(row) for row in rows}) == 1 and len(rows[0]) else rows


def _rows_of(item: Any, label: str) -> list[Int64[Tensor, " _"]]:
    """Return the rows that an item of a list holds: one, or those of a table."""
    if not isinstance(item, Tensor | np.ndarray):
        if isinstance(item, str | bytes | Mapping) or not isinstance(item, Iterable):
            raise InvalidInput(
                f"{label} must be token ids, as the others; got {type(item).__name__}."
            )
        item = _array(list(item), label)
    if item.ndim in (1, 2) and 0 in item.shape:
        return [
            torch.zeros(0, dtype=torch.int64) for _ in range(1 if item.ndim == 1 else len(item))
        ]
    ids = integer_ids(item, name=label)
    return [ids] if ids.ndim == 1 else list(ids)


def _array(items: list[Any], label: str) -> np.ndarray:
    try:
        found = np.array([int(one) if _is_whole(one) else one for one in items])
    except (ValueError, TypeError, OverflowError):
        found = np.array(items, dtype=object)
    if found.dtype == object:
        raise InvalidInput(
            f"{label} must be a list of token ids; got {items[0]!r:.40} in it "
            f"({type(items[0]).__name__})."
        )
    return found.astype(np.int64) if not items else found


def _is_whole(value: object) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole or (
        isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point()
    )


def _padded(rows: list[Tensor], masks: list[Tensor] | None, label: str) -> TokenFile:
    """Return rows as a table, padded at their ends; of rows that have a mask, their own tokens."""
    if masks is not None:
        if [len(row) for row in rows] != [len(one) for one in masks]:
            raise InvalidInput(
                f"`{MASK}` of {label} must have as many values in every row as there are ids."
            )
        checked = [checked_mask(one[None], row[None], name=f"{MASK} of {label}")
                   for row, one in zip(rows, masks, strict=True)]  # fmt: skip
        rows = [row if one is None else row[one[0]] for row, one in zip(rows, checked, strict=True)]
    if not any(map(len, rows)):
        raise InvalidInput(f"{label} holds no token; give at least one sequence that has some.")
    ids, mask = pad_rows(rows)
    return TokenFile(ids, None, mask)


def _are_tables(items: Iterable[object]) -> bool:
    return all(isinstance(one, Tensor | np.ndarray) for one in items)


def _from_list(items: list[Any], label: str, wanted: Wanted) -> TokenFile | TextSource:
    if not items:
        raise InvalidInput(f"{label} is empty; give at least one text or sequence.")
    if label.startswith("tuple") and len(items) == 2 and _are_tables(items):
        raise InvalidInput(
            f"{label}: two tensors may be rows, or inputs and targets; give a list of rows, a list "
            "of (input, target) pairs, or the inputs alone."
        )
    if all(one is None or isinstance(one, str) for one in items):
        return _documents(items, {}, label)
    if all(isinstance(one, Mapping) for one in items):
        rows = iter([{str(name): value for name, value in one.items()} for one in items])
        return _from_records(rows, None, label, wanted)
    refuse(label, column=wanted.column)
    if all(
        isinstance(one, list | tuple) and len(one) in (1, 2) and _are_tables(one) for one in items
    ):
        items = [one[0] for one in items]  # as loaders of SparseGPT and Wanda give: input, target
    return _from_parts(items, None, label)


def _documents(
    values: Iterable[object], settings: Mapping[str, object], label: str, column: str = TEXT
) -> TextSource:
    rows = ([text_value(value, column, label)] for value in values)
    return TextSource(rows, settings)


def _from_dataset(source: Any, label: str, wanted: Wanted) -> TokenFile | TextSource:
    """Read a `datasets` Dataset or IterableDataset, or one split of a dictionary of them."""
    refuse(label, config=wanted.config)
    settings: dict[str, object] = {}
    if isinstance(source, dict):
        settings["split"] = chosen = _split(list(map(str, source)), label, wanted)
        source = source[chosen]
    elif (own := getattr(source, "split", None)) is not None:
        settings["split"] = str(own)
    if not hasattr(source, "with_format"):
        raise InvalidInput(f"a text must be {KINDS}; got {type(source).__name__}.")
    known = settings.get("split", "train")  # what has no split of its own is train, as for a hub id
    if wanted.split not in (None, known, str(known).partition("[")[0]):
        raise unknown_name(f"split of {label}", str(wanted.split), [str(known)])
    columns = feature_columns(source.features)
    return _from_records(_checked_rows(source, label), columns, label, wanted, settings)


def _checked_rows(source: Any, label: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set, its Arrow blocks checked before they are read.

    They may be mapped from a file, where a damaged offset would end the process.
    """
    table = getattr(getattr(source, "data", None), "table", None)
    blocks = iter(() if table is None else table.to_batches())
    rows, read, checked = iter(source.with_format(None)), 0, 0
    while True:
        with decoding(label.strip("'"), remedy="save the data set again"):
            while checked < read + _AHEAD and (block := next(blocks, None)) is not None:
                block.validate(full=True)
                checked += len(block)
            row = next(rows, None)
        if row is None:
            return
        read += 1
        yield row


def _split(present: list[str], label: str, wanted: Wanted) -> str:
    asked = [wanted.split] if wanted.split is not None else list(wanted.splits)
    chosen = next((one for one in asked if one in present), None)
    if chosen is None:
        raise unknown_name(f"split of {label}", asked[0], present, "Name its `split`.")
    if chosen != asked[0]:
        tell(f"{label} has no split {asked[0]}; its split {chosen} is read")
    return chosen


def _from_records(
    rows: Iterator[dict[str, Any]],
    columns: dict[str, Column] | None,
    label: str,
    wanted: Wanted,
    settings: Mapping[str, object] | None = None,
) -> TokenFile | TextSource:
    """Read the rows of a table: their text, or their ids where there is no column of text."""
    if columns is None:
        columns, rows = look_at(rows, wanted.column)
    if IDS in columns and (wanted.column == IDS or (wanted.column is None and TEXT not in columns)):
        return _from_id_rows(rows, label, wanted.n_rows)
    chosen = choose_column(columns, wanted.column, where=label)
    values = (row.get(chosen) for row in rows)
    return _documents(values, {**(settings or {}), "column": chosen}, label, chosen)


def _from_id_rows(rows: Iterator[dict[str, Any]], label: str, n_rows: int | None) -> TokenFile:
    ids, masks, filled = list[Tensor](), list[Tensor](), 0
    for number, row in enumerate(rows):
        where = f"row {number} of {label}"
        own = _rows_of(row[IDS], where)
        ids += own
        if row.get(MASK) is not None:
            own = _rows_of(_integers(row[MASK]), f"{MASK} of {where}")
            masks += own
        filled += sum(int(len(one) > 1 and one.count_nonzero() > 0) for one in own)
        if n_rows is not None and filled >= n_rows:
            break
    return _padded(ids, masks or None, label)


def _from_pandas(source: Any, label: str, wanted: Wanted) -> TokenFile | TextSource:
    """Read a column (a Series or Index) or a table."""
    if hasattr(source, "columns"):
        names = list(map(str, source.columns))
        table = source.astype(object).where(source.notna(), None)
        rows = (dict(zip(names, values, strict=True)) for values in table.itertuples(index=False))
        return _from_records(rows, None, label, wanted)
    missing = source.isna()
    values = [None if gone else one for one, gone in zip(source, missing, strict=True)]
    return _from_list(values, label, wanted)
