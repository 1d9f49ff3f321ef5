"""Calibration sets: fixed blocks of token ids, where they came from, and their digest.

Names are imported on first use: what only looks at paths needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entangle.calibration.calibration_set import CalibrationSet
    from entangle.calibration.given import Source
    from entangle.calibration.loading import as_calibration, load_calibration
    from entangle.calibration.texts import interpret_escapes, load_texts

_HOMES = {
    "CalibrationSet": "calibration_set",
    "Source": "given",
    "as_calibration": "loading",
    "load_calibration": "loading",
    "interpret_escapes": "texts",
    "load_texts": "texts",
}

__all__ = [
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
