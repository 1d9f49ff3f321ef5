"""Arrays and tables as a page holds them: few bytes, deflated, in base64; JavaScript unpacks them.

A page of a hundred thousand neurons has to stay small enough to be sent by mail. Whole numbers take
the narrowest type that holds them; reals 24 of 32 bits, which is a relative error of at most
2⁻¹⁶ (four digits are shown), or all 64 where one is too large or too small for that. Bytes of equal
weight stand together, as they compress better so.
"""

import base64
import json
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from entangle.errors import visible

Packed = dict[str, object]
"""JSON: ``t`` (type), ``n`` (numbers), ``d`` (base64 of deflated planes of bytes)."""

_WIDTHS = (("u1", np.uint8), ("u2", np.uint16), ("u4", np.uint32))
_LARGEST, _SMALLEST = 3e38, 1e-37
_LEVEL = 6


def pack(values: np.ndarray) -> Packed:
    """Return numbers as a page holds them.

    Parameters
    ----------
    values
        Booleans, whole numbers in [−128, 2³²), or reals, of any shape (row by row). Reals keep 16
        significant bits.
    """
    flat = np.asarray(values).reshape(-1)
    if flat.dtype.kind == "f":
        return _packed(*_reals(flat))
    if flat.dtype.kind == "b":
        flat = flat.astype(np.uint8)
    if flat.size and flat.min() < 0:
        if flat.min() < -128 or flat.max() > 127:
            raise ValueError("whole numbers below zero must fit into one byte")
        return _packed("i1", flat.astype(np.int8))
    most = int(flat.max()) if flat.size else 0
    kind, dtype = next(one for one in _WIDTHS if most <= np.iinfo(one[1]).max)
    return _packed(kind, flat.astype(dtype))


def _reals(flat: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the type, and the numbers or, of three bytes, (numbers, 3) of them."""
    size = np.abs(flat[np.isfinite(flat) & (flat != 0)])
    if size.size and (size.max() > _LARGEST or size.min() < _SMALLEST):
        return "f8", flat.astype("<f8")
    bits = flat.astype("<f4").view(np.uint32)
    wide = bits.astype(np.uint64) + np.uint64(0x7F) + ((bits >> 8) & 1)  # half to even
    kept = np.where(np.isnan(flat), 0x7FC000, wide >> np.uint64(8)).astype("<u4")
    return "f3", kept.view(np.uint8).reshape(-1, 4)[:, :3]


def _packed(kind: str, values: np.ndarray) -> Packed:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    width = little.dtype.itemsize * (little.shape[1] if little.ndim > 1 else 1)
    rows = np.frombuffer(np.ascontiguousarray(little).tobytes(), np.uint8).reshape(-1, width)
    planes = np.ascontiguousarray(rows.T).tobytes()
    text = base64.b64encode(zlib.compress(planes, _LEVEL)).decode("ascii")
    return {"t": kind, "n": len(values), "d": text}


def pack_texts(values: Sequence[object]) -> Packed:
    """Return texts as a page holds them: the different ones, and a number for each.

    What cannot be seen in them is spelled out (`entangle.errors.visible`).
    """
    codes, different = pd.factorize(np.array([visible(str(one)) for one in values], dtype=object))
    return {"texts": [str(one) for one in different], "codes": pack(codes)}


def pack_table(frame: pd.DataFrame, page: np.ndarray, n_pages: int) -> Packed:
    """Return rows that belong to the pages of neurons.

    Parameters
    ----------
    frame
        One row each: numbers, booleans and texts.
    page
        The page of every row, from 0; a page's rows keep their order.
    n_pages
        Number of pages.

    Returns
    -------
    dict
        ``starts``: where the rows of every page begin, and where the last ends; ``columns``.
    """
    order = np.argsort(page, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(page, minlength=n_pages))])
    columns = {str(name): _column(frame[name].iloc[order]) for name in frame.columns}
    return {"starts": pack(starts), "columns": columns}


def _column(values: pd.Series) -> Packed:
    if pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.is_bool_dtype(values.dtype):
        missing = bool(values.isna().any())
        return pack(values.to_numpy(np.float64, na_value=np.nan) if missing else values.to_numpy())
    return pack_texts(values.tolist())


def as_script(content: object) -> str:
    """Return JSON that may stand in a ``<script>`` element: no ``<`` ends it, no ``&`` is read."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
