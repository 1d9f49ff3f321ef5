"""In which dtype a folder's weights are stored, read from the headers of its safetensors files."""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from entangle.errors import InvalidInput
from entangle.models.sources import indexed_files
from entangle.progress import tell

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the floating dtype that a folder's weights are stored in, None if they have none.

    transformers' own ``"auto"`` takes the dtype that ``config.json`` names, and casts the weights
    to it without a word where they are stored in another one. Of several dtypes the one that most
    values have is returned, as a model runs in one; what that rounds is told on standard error.

    Raises
    ------
    InvalidInput
        If weights are stored in 8 bits or less, whose values are nothing without their scales.
    """
    counts: Counter[str] = Counter()
    for kind, n_values in _tensors(folder):
        counts[kind] += n_values
    packed = [kind for kind in counts if kind.startswith("F") and kind not in FLOATS]
    if packed:
        raise InvalidInput(
            f"model {str(folder)!r} must hold plain weights; some are stored as {packed[0]}: use "
            "the unquantised model or a .gguf file."
        )
    floats = Counter({kind: n for kind, n in counts.items() if kind in FLOATS})
    if not floats:
        return None
    chosen = FLOATS[floats.most_common(1)[0][0]]
    finer = [kind for kind in floats if torch.promote_types(FLOATS[kind], chosen) != chosen]
    rounded = sum(floats[kind] for kind in finer)
    if rounded:
        wide = max((FLOATS[kind] for kind in floats), key=lambda one: torch.finfo(one).bits)
        tell(
            f"{str(folder)!r} stores {rounded:,} of {floats.total():,} weights more "
            f"finely than the others: all are loaded as {_name(chosen)}; dtype={_name(wide)} "
            "keeps every one."
        )
    return chosen


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield dtype and number of values of every tensor that transformers would load."""
    for file in _weight_files(folder):
        for name, facts in _header(file).items():
            if name != "__metadata__":
                yield facts["dtype"], prod(facts["shape"])


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    return [path for path in indexed_files(index) if path.is_file()]


def _header(file: Path) -> dict[str, Any]:
    """Return a file's header, empty where it is damaged, which the loading itself will tell."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(size, 1 << 28)))
    except (struct.error, ValueError):
        return {}
    return header if isinstance(header, dict) else {}
