"""Which layers share the budget, and whether scores and model belong together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from entangle.allocation.rows import Rows
from entangle.checks import shown, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.models.layers import (
    LISTING,
    Layer,
    LayerSpec,
    Projections,
    find_layers,
    list_layers,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.scoring.scores import NeuronScores


@dataclass(frozen=True, eq=False)
class Subject:
    """The layers to allocate to."""

    rows: Rows
    model: LanguageModel | None
    layers: tuple[Layer, ...]
    """The layers of the model; empty without one."""
    described: Mapping[str, object] | None
    """What the manifest says about the model; None where nothing is known."""


def find_subject(
    scores: NeuronScores | pd.DataFrame,
    *,
    model: AnyModel | None,
    layers: LayerSpec | None,
    proj: Projections,
    in_features: Mapping[str, int] | None,
) -> Subject:
    """Find the layers to allocate to; arguments as in `entangle.allocation.allocate`.

    Raises
    ------
    InvalidInput, UnknownName
        If the scores are of another model, or lack a layer that was asked for.
    """
    frame = scores.frame if isinstance(scores, NeuronScores) else scores
    if "layer" not in frame.columns or not len(frame):
        raise InvalidInput("the scores must have a column 'layer' and at least one row.")
    described = scores.manifest.get("model") if isinstance(scores, NeuronScores) else None
    if not isinstance(described, Mapping):
        described = None
    scored = [str(name) for name in frame["layer"].unique()]
    if model is None:
        if layers is not None or proj is not None:
            raise InvalidInput("`layers` and `proj` choose layers of a model: give `model`.")
        rows = _rows_of_scores(frame, scored, {} if in_features is None else in_features)
        return Subject(rows, None, (), described)
    dense = as_language_model(model)
    if described is not None:
        _check_digest(dense, str(described.get("digest")))
    chosen = _chosen(dense.module, scored, layers, proj)
    return Subject(_rows_of_layers(chosen), dense, chosen, described or dense.describe())


def _check_digest(model: LanguageModel, digest: str) -> None:
    if model.digest != digest:
        raise InvalidInput(
            f"the model {model.name!r} has digest {model.digest[:12]}…, but the scores were made "
            f"from {digest[:12]}…; score this model, or pass the model that was scored."
        )


def _chosen(
    module: nn.Module,
    scored: Sequence[str],
    layers: LayerSpec | None,
    proj: Projections,
) -> tuple[Layer, ...]:
    """Return the layers asked for, or all that were scored."""
    if layers is None and proj is None:
        found = {layer.name: layer for layer in list_layers(module)}
        for name in scored:
            if name not in found:
                raise unknown_name(
                    "layer", name, found, "The scores are of another model than the one given."
                )
        return tuple(layer for name, layer in found.items() if name in set(scored))
    chosen = find_layers(module, "all" if layers is None else layers, proj)
    for layer in chosen:
        if layer.name not in scored:
            raise InvalidInput(
                f"the scores hold no layer {layer.name!r}: score it too, or choose among the "
                f"{len(scored)} layer(s) that were scored. {LISTING}"
            )
    return chosen


def _rows_of_layers(layers: Sequence[Layer]) -> Rows:
    return Rows(
        names=tuple(layer.name for layer in layers),
        blocks=tuple(layer.block for layer in layers),
        counts=np.array([layer.out_features for layer in layers], dtype=np.int64),
        widths=np.array([layer.in_features for layer in layers], dtype=np.int64),
    )


def _rows_of_scores(
    frame: pd.DataFrame, names: Sequence[str], in_features: Mapping[str, int]
) -> Rows:
    for name in names:
        if in_features.get(name) is None:
            raise InvalidInput(
                f"the weights of a neuron of layer {name!r} must be known: give `model`, or their "
                f"number in `in_features`; got none in {shown(dict(in_features))}."
            )
        whole(f"in_features[{name!r}]", in_features[name], least=1)
    first = frame.drop_duplicates("layer")
    found = first["block"] if "block" in frame.columns else pd.Series([None] * len(first))
    counts = frame["layer"].value_counts(sort=False)
    return Rows(
        names=tuple(names),
        blocks=tuple(None if pd.isna(block) else int(block) for block in found),
        counts=np.array([int(counts[name]) for name in names], dtype=np.int64),
        widths=np.array([int(in_features[name]) for name in names], dtype=np.int64),
    )
