"""Calibration and evaluation texts: documents, blocks of token ids, special tokens, masks.

Names are imported on first use: what only looks at paths needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entangle.texts.calibration import as_calibration, load_calibration
    from entangle.texts.calibration_set import CalibrationSet
    from entangle.texts.documents import interpret_escapes, load_texts
    from entangle.texts.given import Source


N_SEQ, SEQ_LEN = 32, 1024
"""Sequences, and tokens in each, of a calibration set whose size is not said.

The published runs take 128 of 2,048 tokens."""

_HOMES = {
    "CalibrationSet": "calibration_set",
    "Source": "given",
    "as_calibration": "calibration",
    "load_calibration": "calibration",
    "interpret_escapes": "documents",
    "load_texts": "documents",
}

__all__ = [
    "N_SEQ",
    "SEQ_LEN",
    "CalibrationSet",
    "Source",
    "as_calibration",
    "interpret_escapes",
    "load_calibration",
    "load_texts",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
