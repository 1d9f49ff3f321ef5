"""Calibration sets: fixed blocks of token ids, where they came from, and their digest."""

from entangle.calibration.calibration_set import CalibrationSet
from entangle.calibration.loading import load_calibration
from entangle.calibration.texts import interpret_escapes, load_texts

__all__ = ["CalibrationSet", "interpret_escapes", "load_calibration", "load_texts"]
