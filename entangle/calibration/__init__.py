"""Calibration sets: fixed blocks of token ids, where they came from, and their digest."""

from entangle.calibration.calibration_set import CalibrationSet
from entangle.calibration.given import Source
from entangle.calibration.loading import as_calibration, load_calibration
from entangle.calibration.texts import interpret_escapes, load_texts

__all__ = [
    "CalibrationSet",
    "Source",
    "as_calibration",
    "interpret_escapes",
    "load_calibration",
    "load_texts",
]
