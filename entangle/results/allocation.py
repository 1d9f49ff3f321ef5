"""An allocation as its file holds it: zeros of every neuron, tables, the rule that made it.

The file is one safetensors file: a vector a layer, the rest as JSON in its metadata.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors

from entangle.checks import choice, whole
from entangle.errors import InvalidInput
from entangle.results.base import Named, Result, settings_of
from entangle.runs.provenance import SCHEMA_VERSION, expand_user, output_file
from entangle.runs.reading import READ_ERRORS
from entangle.runs.sealing import DIGESTS, check_digest, manifest_digest
from entangle.runs.tables import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND, ROW = "allocation", "row"
"""Of the file; and the pattern that lets a neuron lose any number of weights."""
SCORED = {
    **dict.fromkeys(("layer", "protect", "linear", "rank", "loss", "depth", "sensitivity"), True),
    **dict.fromkeys(("uniform", "owl", "alphapruning", "trim", "neuroal", "neuroal-blocks"), False),
    **dict.fromkeys(("erk", "magnitude-global"), False),
}
"""Whether a rule reads columns of scores, by its name."""
_METADATA, _SUFFIX = "entangle", ".safetensors"

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AllocationReport(Result):
    """Zeros of every neuron of some layers of one model, without torch.

    `entangle.load_allocation` loads the same file to prune with, as an
    `entangle.allocation.Allocation`: the same with torch's vectors.
    """

    KIND, _TITLE = KIND, "Allocation for"

    zeros: Mapping[str, Any]
    """Zeros per neuron, (rows,), by full layer name in module order, int64."""
    in_features: Mapping[str, int]
    """Weights of one neuron, by layer name."""
    experts: Mapping[str, int] | None
    """Experts by layer name; None leaves their number to the consumer."""
    manifest: Mapping[str, object] = field(repr=False)
    """Rule, settings, budget, model, scores, versions; JSON-serialisable."""
    blocks: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Transformer block by layer name; a layer outside the blocks is absent."""
    pattern: str = ROW
    """Where a row's zeros lie, as in `entangle.pruning.prune`: ``row``, or ``n:m`` with a number
    for m, such as ``n:4``: equally many in each group of m neighbouring weights."""

    def __post_init__(self) -> None:
        names = list(self.zeros)
        if not names or list(self.in_features) != names:
            raise InvalidInput(
                "`zeros` and `in_features` must name the same layers in one order, at least one; "
                f"got {len(names)} and {len(self.in_features)} layer(s)."
            )
        for name, zeros in self._counts():
            _check_zeros(name, zeros, self.in_features[name], self.pattern)
        if self.experts is not None and list(self.experts) != names:
            raise InvalidInput(
                f"`experts` must name the {len(names)} layer(s) of the allocation in their order; "
                f"got {len(self.experts)} layer(s)."
            )
        for name, count in (self.experts or {}).items():
            whole(f"experts[{name!r}]", count, least=1)
        object.__setattr__(self, "manifest", json.loads(json.dumps(dict(self.manifest))))
        for key in ("zeros", "in_features", "manifest", "blocks"):
            object.__setattr__(self, key, MappingProxyType(dict(getattr(self, key))))

    @property
    def frame(self) -> pd.DataFrame:
        """The table ``neurons``."""
        return self.neurons

    def rows(self, layer: str | Named) -> int:
        """Return the number of neurons of a layer, by its full name.

        Raises
        ------
        UnknownName
            If the allocation does not hold the layer.
        """
        remedy = "The allocation holds no other layers."
        name = choice("layer", getattr(layer, "name", layer), self.zeros, remedy=remedy)
        return len(self.zeros[name])

    @property
    def n_zeros(self) -> int:
        """Zeros of all layers together."""
        return sum(int(zeros.sum()) for _, zeros in self._counts())

    @property
    def n_weights(self) -> int:
        """Weights of all layers together."""
        return sum(len(zeros) * self.in_features[name] for name, zeros in self.zeros.items())

    @property
    def overall(self) -> float:
        """Share of zeros of all layers together."""
        return self.n_zeros / self.n_weights

    @property
    def rule(self) -> str:
        """The rule and the columns that it read, if any, for example ``protect wd`` or ``owl``.

        A rule whose strength was searched for is ``search: linear wd``.
        """
        settings = self.manifest.get("settings")
        if not isinstance(settings, Mapping):
            return "given"
        by, rule = settings.get("by"), settings.get("rule", "given")
        columns = "+".join(map(str, by)) if isinstance(by, list) else str(by or "")
        used = [SCORED[str(one)] for one in (rule, settings.get("across")) if str(one) in SCORED]
        if used and not any(used):
            columns = ""
        searched = "search: " if "search" in self.manifest else ""
        return f"{searched}{rule} {columns}".strip()

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row a layer: its sparsity and the range of its rows' sparsities.

        Columns layer, block, projection, rows, in_features, zeros, sparsity, lowest, highest; and
        experts where the allocation gives them.
        """
        rows = []
        for name, zeros in self._counts():
            width = self.in_features[name]
            rows.append(
                {
                    "layer": name,
                    "block": self.blocks.get(name),
                    "projection": name.rpartition(".")[2],
                    "rows": len(zeros),
                    "in_features": width,
                    "zeros": int(zeros.sum()),
                    "sparsity": float(zeros.mean()) / width,
                    "lowest": float(zeros.min()) / width,
                    "highest": float(zeros.max()) / width,
                }
            )
        frame = pd.DataFrame(rows).astype({"block": "Int64"})
        if self.experts is not None:
            frame["experts"] = [self.experts[name] for name in self.zeros]
        return frame

    @property
    def neurons(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, zeros, sparsity."""
        counts = [len(zeros) for zeros in self.zeros.values()]
        zeros = np.concatenate([one for _, one in self._counts()])
        return pd.DataFrame(
            {
                "layer": np.repeat(np.array(list(self.zeros), dtype=object), counts),
                "neuron": np.concatenate([np.arange(count) for count in counts]),
                "zeros": zeros,
                "sparsity": zeros / np.repeat(list(self.in_features.values()), counts),
            }
        ).astype({"layer": "str"})

    def plot(self, **options: Any) -> "Figure":
        """Draw sparsities of rows and layers, and experts if any; see `figure_allocation`."""
        from entangle.plotting import figure_allocation

        title = f"{self.rule}, {100 * self.overall:.4g} % zeros"
        return figure_allocation(self.layers, self.neurons, **{"title": title, **options})

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        extra: Callable[[Path], object] | None = None,
    ) -> Path:
        """Write the allocation to one ``.safetensors`` file, which appears when it is complete.

        One int64 vector of zeros a layer, named after it; the rest is JSON in the file's metadata.
        ``extra`` is called with the file before it takes its name.

        Raises
        ------
        InvalidInput
            If the name has another ending or is a folder, or the file exists without ``force``.
        Unavailable
            If the file cannot be written.
        """
        target = check_file(path, force=force)
        described = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "layers": list(self.zeros),
            "in_features": dict(self.in_features),
            "experts": None if self.experts is None else dict(self.experts),
            "blocks": dict(self.blocks),
            "pattern": self.pattern,
            "manifest": dict(self.manifest),
            "sha256": _digest(dict(self._counts())),
        }
        described |= {DIGESTS: {"manifest": manifest_digest(described)}}
        metadata = {_METADATA: json.dumps(described, allow_nan=False)}  # one key: no order
        vectors = {name: np.ascontiguousarray(part) for name, part in self._counts()}
        with output_file(target) as temporary:
            temporary.write_bytes(to_safetensors(vectors, metadata))
            if extra is not None:
                extra(temporary)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AllocationReport":
        """Load an allocation that `save` wrote.

        Raises
        ------
        InvalidInput
            If the file is missing, truncated, altered, or something else.
        """
        zeros, described = read_zeros(path)
        keys = ("in_features", "experts", "manifest", "blocks")
        fields: dict[str, Any] = {key: described.get(key) for key in keys}
        for key, value in fields.items():
            if not isinstance(value, dict) and not (key == "experts" and value is None):
                raise InvalidInput(f"{str(path)!r} was altered (no {key}); allocate anew.")
        noted = settings_of(fields["manifest"]).get("pattern", ROW)
        try:
            for name, width in fields["in_features"].items():
                whole(f"in_features[{name!r}]", width, least=1)
            for name, block in fields["blocks"].items():
                whole(f"blocks[{name!r}]", block, least=0)
            return cls(zeros=zeros, **fields, pattern=str(described.get("pattern", noted)))
        except InvalidInput as error:
            raise InvalidInput(f"{str(path)!r} was altered ({error}); allocate anew.") from error

    def _counts(self) -> Iterator[tuple[str, Counts]]:
        return ((name, np.asarray(zeros)) for name, zeros in self.zeros.items())

    def _told(self) -> tuple[list[str], pd.DataFrame]:
        lines = [
            f"{100 * self.overall:.4g} % zeros: {self.n_zeros:,} of {self.n_weights:,} weights in "
            f"{len(self.zeros):,} layer(s)",
            f"rule {described(self.manifest, 'settings', 'rule')}, "
            f"by {described(self.manifest, 'settings', 'by')}",
        ]
        return lines, self.layers.drop(columns=["block", "projection"])


def step_size(layer: str, width: int, pattern: str) -> int:
    """Return the weights that a neuron can lose at a time: 1, or ``in_features / m``.

    Parameters
    ----------
    layer, width
        Name of the layer, and weights of one of its neurons.
    pattern
        ``row`` or ``n:m``.

    Raises
    ------
    InvalidInput
        For an unknown pattern, or one that does not divide the layer's inputs.
    """
    if pattern == ROW:
        return 1
    match = re.fullmatch(r"n:([1-9]\d*)", pattern)
    if match is None:
        raise InvalidInput(
            f"`pattern` must be row, or n:m with a number for m, such as n:4; got {pattern!r}."
        )
    group = int(match[1])
    if width % group:
        raise InvalidInput(
            f"`pattern` {pattern!r} needs a multiple of {group} inputs; layer {layer!r} has "
            f"{width}: use another m, or pattern 'row'."
        )
    return width // group


def _check_zeros(name: str, zeros: Counts, width: int, pattern: str) -> None:
    """Raise `InvalidInput` unless ``zeros`` counts the zeros of neurons of so many weights."""
    step = step_size(name, width, pattern)
    if zeros.ndim != 1 or zeros.dtype != np.int64 or not len(zeros):
        raise InvalidInput(
            f"`zeros` of {name!r} must be a CPU vector of int64, one a neuron; got "
            f"{zeros.shape} of {zeros.dtype}."
        )
    low, high = int(zeros.min()), int(zeros.max())
    if low < 0 or high > width:
        raise InvalidInput(
            f"`zeros` of {name!r} must be in [0, {width}], the neuron's weights; got values from "
            f"{low} to {high}."
        )
    for count in zeros[zeros % step != 0].tolist()[:1]:
        raise InvalidInput(
            f"`zeros` of {name!r} must be multiples of {step}, equally many in each of {step} "
            f"groups (`pattern` {pattern!r}); got {count}."
        )


def check_file(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Check that an allocation can be written, before any work is done.

    Raises
    ------
    InvalidInput
        If the name has another ending than ``.safetensors``, is a folder, or exists and ``force``
        is off.
    """
    target = expand_user(path)
    if target.suffix != _SUFFIX:
        raise InvalidInput(f"an allocation's file must end in {_SUFFIX}; got {str(path)!r}.")
    if target.is_dir():
        raise InvalidInput(f"the output {str(path)!r} is a folder; name a file.")
    if target.exists() and not force:
        raise InvalidInput(
            f"{str(path)!r} exists; name another file or use --force (force=True) to replace it."
        )
    return target


def read_zeros(path: str | os.PathLike[str]) -> tuple[dict[str, Counts], dict[str, Any]]:
    """Read an allocation's file: the vectors in their order, and what its metadata says.

    Raises
    ------
    InvalidInput
        If the file is missing, truncated, altered, or something else.
    """
    source = expand_user(path)
    if not source.is_file():
        raise InvalidInput(f"{str(path)!r} is no file; name one that `entangle allocate` wrote.")
    try:
        with safe_open(source, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except READ_ERRORS as error:
        raise InvalidInput(f"{str(path)!r} cannot be read ({error}); allocate anew.") from error
    if _METADATA not in metadata:
        raise InvalidInput(
            f"{str(path)!r} is not an allocation; name a file that `entangle allocate` wrote."
        )
    described = _described(metadata[_METADATA], str(path))
    layers = described.get("layers")
    counts = all(one.ndim == 1 and one.dtype == np.int64 for one in tensors.values())
    if not isinstance(layers, list) or set(map(str, layers)) != set(tensors) or not counts:
        raise InvalidInput(f"{str(path)!r} was altered (its layers differ); allocate anew.")
    zeros = {str(name): tensors[str(name)] for name in layers}
    if _digest(zeros) != described.get("sha256"):
        raise InvalidInput(
            f"{str(path)!r} was altered (its numbers do not match its digest); allocate anew."
        )
    return zeros, described


def _described(text: str, path: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path!r} was altered ({error}); allocate anew.") from error
    kind = described.get("kind") if isinstance(described, dict) else None
    if kind != KIND:
        raise InvalidInput(f"{path!r} must hold a result of kind {KIND!r}; got {kind!r}.")
    version = described.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InvalidInput(
            f"{path!r} has schema version {version!r}, this version of entangle reads "
            f"{SCHEMA_VERSION}; allocate anew."
        )
    check_digest(path, described)
    return {key: one for key, one in described.items() if key != DIGESTS}


def _digest(zeros: Mapping[str, Counts]) -> str:
    """Return the SHA-256 of all counts in order, in hexadecimal."""
    everything = np.concatenate(list(zeros.values()))
    names = "\n".join(f"{name}\t{len(part)}" for name, part in zeros.items())
    return hashlib.sha256(names.encode() + everything.astype("<i8").tobytes()).hexdigest()
