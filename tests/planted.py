"""Pickles that leave a trace when they are unpickled: a folder of a given name."""

import io
import os
import pickle
from pathlib import Path

import torch


class _Planted:
    def __init__(self, trace: Path) -> None:
        self._trace = str(trace)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._trace,)


def planted_pickle(trace: Path) -> bytes:
    """Return a plain pickle that makes the folder ``trace``."""
    return pickle.dumps({"weight": _Planted(trace)})


def planted_weights(trace: Path) -> bytes:
    """Return the same as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2), "other": _Planted(trace)}, buffer)
    return buffer.getvalue()
