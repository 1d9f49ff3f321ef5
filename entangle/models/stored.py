"""In which dtype a folder's weights are stored, read from the headers of its safetensors files."""

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from entangle.errors import InvalidInput
from entangle.models.sources import indexed_files
from entangle.progress import tell
from entangle.reading import decoding, regular_file

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
_AGAIN = "copy it again"


def stored_sizes(folder: Path) -> list[tuple[str, int]]:
    """Return dtype and number of values of every tensor that transformers would load.

    Raises
    ------
    InvalidInput
        If a file of weights, or their index, is damaged.
    """
    return [found for file in _weight_files(folder) for found in _tensors(file)]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the floating dtype that a folder's weights are stored in, None if they have none.

    transformers' own ``"auto"`` takes the dtype that ``config.json`` names, and casts the weights
    to it without a word where they are stored in another one. Of several dtypes the one that most
    values have is returned, as a model runs in one; what that rounds is told on standard error.

    Raises
    ------
    InvalidInput
        If weights are stored in 8 bits or less, whose values are nothing without their scales; and
        as `stored_sizes`.
    """
    counts: Counter[str] = Counter()
    for kind, n_values in stored_sizes(folder):
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


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    files = indexed_files(index)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InvalidInput(
            f"model folder {str(folder)!r} must hold {missing[0]!r}, which its index names; "
            f"{_AGAIN}."
        )
    return files


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    with decoding(regular_file(file), remedy=_AGAIN), safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            stored = opened.get_slice(name)
            yield stored.get_dtype(), prod(stored.get_shape())
