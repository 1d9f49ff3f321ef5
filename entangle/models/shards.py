"""The weights of a model as they lie in its safetensors shards, read when they are asked for.

Files are read, not mapped: a shard that is cut off or gone while a model runs from it ends in one
line instead of a signal, and what is held is what was asked for.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from entangle.errors import InvalidInput, Unavailable
from entangle.runs.reading import decoding, regular_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Of safetensors, those that are read here."""

_AGAIN = "copy it again"
_CHUNK = 2**22


@dataclass(frozen=True)
class Slab:
    """Where one tensor lies in a file."""

    file: Path
    start: int
    """First byte."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


class Shards:
    """The safetensors files of a model, whose size and time are held against those at the start.

    Parameters
    ----------
    files
        The files.

    Raises
    ------
    InvalidInput
        If one is damaged or cut off, or stores a dtype that is no plain number.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.slabs: dict[str, Slab] = {}
        """Of every stored tensor, by its stored name."""
        self._known: dict[Path, tuple[int, int]] = {}
        for file in files:
            self._known[file] = _facts(file)
            self.slabs |= _slabs(file, self._known[file][0])

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slab.n_bytes for slab in self.slabs.values())

    def read(self, name: str) -> Tensor:
        """Return a stored tensor, on the CPU.

        Raises
        ------
        InvalidInput
            If its file is gone, cut off, or another one than at the start.
        """
        slab = self.slabs[name]
        found = torch.empty(slab.shape, dtype=slab.dtype)
        with self._opened(slab.file) as opened:
            _fill(opened, slab.start, found, slab.file)
        return found

    def hash(self, name: str) -> str:
        """Return the SHA-256 of a stored tensor's bytes, in hexadecimal, without holding it."""
        slab, digest = self.slabs[name], hashlib.sha256()
        work = torch.empty(min(slab.n_bytes, _CHUNK), dtype=torch.uint8)
        with self._opened(slab.file) as opened:
            for start in range(0, slab.n_bytes, _CHUNK):
                part = work[: slab.n_bytes - start]
                _fill(opened, slab.start + start, part, slab.file)
                digest.update(part.numpy().data)
        return digest.hexdigest()

    def rows(self, name: str, index: Int64[Tensor, " rows"]) -> Tensor:
        """Return some rows of a stored matrix, in the order asked for; nothing else is read."""
        slab = self.slabs[name]
        found = torch.empty((len(index), *slab.shape[1:]), dtype=slab.dtype)
        size = prod(slab.shape[1:]) * slab.dtype.itemsize
        with self._opened(slab.file) as opened:
            for place, row in enumerate(index.tolist()):
                _fill(opened, slab.start + row * size, found[place], slab.file)
        return found

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """Open a file that must be what it was."""
        try:
            if _facts(file) != self._known[file]:
                raise InvalidInput(
                    f"shard {str(file)!r} was written to or cut off while the model was read from "
                    f"it; {_AGAIN} and start anew (--resume keeps what was finished)."
                )
            with file.open("rb", buffering=0) as opened:
                yield opened
        except FileNotFoundError as error:
            raise InvalidInput(
                f"shard {str(file)!r} was taken away while the model was read from it; put it "
                "back and start anew (--resume keeps what was finished)."
            ) from error
        except OSError as error:
            raise Unavailable(
                f"shard {str(file)!r} cannot be read ({error}); check the disk or the network and "
                "start anew (--resume keeps what was finished)."
            ) from error


def _facts(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _slabs(file: Path, size: int) -> dict[str, Slab]:
    """Read the header of a file."""
    with decoding(regular_file(file), remedy=_AGAIN), file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"the header of {file.name} ends behind the file")
        header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, one in header.items():
            first, last = one["data_offsets"]
            if one["dtype"] not in DTYPES:
                raise InvalidInput(
                    f"{str(file)!r} stores {name!r} as {one['dtype']}, which cannot be streamed; "
                    "leave --stream (stream) out."
                )
            slab = Slab(file, 8 + length + first, tuple(one["shape"]), DTYPES[one["dtype"]])
            if slab.n_bytes != last - first or 8 + length + last > size:
                raise ValueError(f"{name!r} ends behind the file {file.name}, which is cut off")
            found[name] = slab
    return found


def _fill(opened: Any, start: int, target: Tensor, file: Path) -> None:
    """Read bytes from ``start`` on into a contiguous tensor."""
    if not target.numel():
        return
    view = target.reshape(-1).view(torch.uint8).numpy().data
    opened.seek(start)
    done = 0
    while done < len(view):
        count = opened.readinto(view[done:])
        if not count:
            raise InvalidInput(f"shard {str(file)!r} is cut off; {_AGAIN} and start anew.")
        done += count


@dataclass(eq=False)
class Recipe:
    """How stored tensors become parameters: one as it is, or several by a conversion."""

    shards: Shards
    sources: Sequence[tuple[str, str]]
    """(stored name, pattern of the conversion that it matched) of each, in their order."""
    dtype: torch.dtype
    """That they are cast to first."""
    first: str
    """Name of the (first) parameter that is made."""
    converter: Any = None
    """A `transformers.core_model_loading.WeightConverter`; None for one tensor as it is."""
    model: nn.Module | None = None
    """For the converter: the model without weights."""

    def make(self, read: Callable[[str], Tensor] | None = None) -> dict[str, Tensor]:
        """Return the parameters by name, on the CPU."""
        read = self.shards.read if read is None else read
        if self.converter is None:
            return {self.first: read(self.sources[0][0]).to(self.dtype)}
        converter: Any = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, read(name).to(self.dtype))
        made = converter.convert(self.first, model=self.model, config=_config(self.model))
        return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

    def shapes(self) -> dict[str, Tensor]:
        """Return what `make` does on the meta device: nothing is read."""

        def empty(name: str) -> Tensor:
            slab = self.shards.slabs[name]
            return torch.empty(slab.shape, dtype=slab.dtype, device="meta")

        return self.make(empty)


def _config(model: nn.Module | None) -> Any:
    return getattr(model, "config", None)


@dataclass(eq=False)
class StoredWeight:
    """A parameter that lies in shards; its module has one on the meta device meanwhile."""

    name: str
    recipe: Recipe
    device: torch.device
    """Where it goes."""
    digest: str | None = None
    """SHA-256 of its bytes, in hexadecimal, once it was read."""
    version: int = 0
    """Raised whenever an overlay comes or goes."""
    stand_in: nn.Parameter | None = None
    """On the meta device; one for all modules that share the weight."""
    overlays: list[Callable[[Tensor], None]] = field(default_factory=list)
    """Written over what was read, in their order."""

    def read(self) -> Tensor:
        """Return the weight as it is in force: read, and overlaid."""
        return self.overlaid(read_weights([self])[self])

    def overlaid(self, weight: Tensor) -> Tensor:
        """Write the overlays over a weight of its own, and return it."""
        with torch.no_grad():
            for write in self.overlays:
                write(weight)
        return weight

    def rows(self, index: Int64[Tensor, " rows"]) -> Tensor | None:
        """Return some rows; None where a conversion makes the weight, or it is overlaid."""
        if self.recipe.converter is not None or self.overlays:
            return None
        found = self.recipe.shards.rows(self.recipe.sources[0][0], index)
        return found.to(self.recipe.dtype).to(self.device)

    @contextmanager
    def overlay(self, write: Callable[[Tensor], None]) -> Iterator[None]:
        """Have ``write`` change the weight whenever it is brought, inside the ``with`` block."""
        self.overlays.append(write)
        self.version += 1
        try:
            yield
        finally:
            self.overlays.remove(write)
            self.version += 1


def read_weights(weights: Iterable[StoredWeight]) -> dict[StoredWeight, Tensor]:
    """Read weights from their shards, each stored tensor once, without overlays."""
    by_recipe: dict[int, list[StoredWeight]] = {}
    for weight in weights:
        by_recipe.setdefault(id(weight.recipe), []).append(weight)
    found = {}
    for members in by_recipe.values():
        made = members[0].recipe.make()
        for weight in members:
            one = made[weight.name].contiguous()
            if weight.digest is None:
                weight.digest = hash_of(one)
            found[weight] = one.to(weight.device)
    return found


def digest_of(weight: StoredWeight) -> str:
    """Return the SHA-256 of a weight's bytes, in hexadecimal; it is read if it was not so far."""
    recipe = weight.recipe
    slab = recipe.shards.slabs[recipe.sources[0][0]]
    if weight.digest is None and recipe.converter is None and slab.dtype == recipe.dtype:
        weight.digest = recipe.shards.hash(recipe.sources[0][0])
    elif weight.digest is None:
        read_weights([weight])
    return str(weight.digest)


def hash_of(weight: Tensor) -> str:
    """Return the SHA-256 of a contiguous CPU tensor's bytes, in hexadecimal."""
    return hashlib.sha256(weight.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def stored_of(tensor: object) -> StoredWeight | None:
    """Return where a parameter lies in shards; None for one that is simply there."""
    found = getattr(tensor, "stored_weight", None)
    return found if isinstance(found, StoredWeight) else None


def present(tensor: Tensor) -> Tensor:
    """Return a parameter's values, read from its shards where they are not there just now."""
    stored = stored_of(tensor)
    return stored.read() if stored is not None and tensor.is_meta else tensor


def place_of(tensor: Tensor) -> torch.device:
    """Return the device that a parameter is, or will be, on."""
    stored = stored_of(tensor)
    return tensor.device if stored is None else stored.device


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's token ids go: the device of its first parameter that has one."""
    places = (place_of(one) for one in module.parameters())
    return next((one for one in places if one.type != "meta"), torch.device("cpu"))


def absent(weight: StoredWeight, like: Tensor) -> nn.Parameter:
    """Return the one parameter on the meta device that stands for a weight in shards."""
    if weight.stand_in is None:
        weight.stand_in = nn.Parameter(torch.empty_like(like, device="meta"), requires_grad=False)
        weight.stand_in.stored_weight = weight  # type: ignore[attr-defined]
    return weight.stand_in


def brought(weight: StoredWeight, values: Tensor) -> nn.Parameter:
    """Return the parameter with its values."""
    made = nn.Parameter(values, requires_grad=False)
    made.stored_weight = weight  # type: ignore[attr-defined]
    return made
