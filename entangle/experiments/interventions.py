"""Changes to some neurons of a model that end, bit for bit, with a ``with`` block.

And what they need to know of the dense model: scores and gram matrices, from one pass.

Rows of a weight are swapped, or outputs edited. The blocks nest, and an ``ExitStack`` takes any
number of them::

    with ExitStack() as stack:
        stack.enter_context(swapped_rows(pruned))
        stack.enter_context(edited_outputs(layers, selection, "clamp-negative"))
        result = perplexity(model, text)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.checks import choice, share
from entangle.errors import InvalidInput, unknown_name
from entangle.experiments.selection import Selection, heard, in_module_order
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.pruning import PruneResult, prune
from entangle.recording.hooks import changed_rows, edit
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.results.scores import NeuronScores
from entangle.runs.progress import ProgressBar
from entangle.scoring.score import score_layers
from entangle.seeding import numpy_rng
from entangle.stats.gram import Gram, GramResult
from entangle.texts.calibration_set import CalibrationSet

OUTPUT_EDITS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "zero": lambda output, _mean: torch.zeros_like(output),
    "mean": lambda output, mean: mean.expand_as(output),
    "clamp-negative": lambda output, _mean: output.clamp(min=0),
    "clamp-positive": lambda output, _mean: output.clamp(max=0),
    "flip-negative": lambda output, _mean: output.abs(),
}
"""Kind of edit → function of the chosen neurons' outputs y, (..., chosen), and their means
(chosen,): 0; the neuron's mean over the calibration text; max(y, 0); min(y, 0); \\|y\\|, that is,
negative outputs change sign (arXiv 2509.24198 for the edits of negative outputs)."""


@dataclass(frozen=True, eq=False)
class RowEdit:
    """New weights for some rows of a layer."""

    layer: Layer
    """The layer to change."""
    rows: Tensor
    """Different indices of rows, int64, of shape (rows,), on any device."""
    weight: Tensor
    """Weights that take their place, (rows, in_features), in the layer's dtype, on any device."""


@contextmanager
def swapped_rows(edits: Sequence[RowEdit]) -> Iterator[None]:
    """Put new weights into rows of layers inside the ``with`` block.

    Parameters
    ----------
    edits
        All are checked before the first is written. Where two name one row, the later one holds.

    Raises
    ------
    InvalidInput
        If rows or weights do not fit a layer, or a layer's weights are offloaded.

    Notes
    -----
    The rows are copied aside and written back however the block ends, also if a write fails half
    way. The model's parameters stay the same objects. A weight that is computed, or that is also
    another module's (a head tied to the embedding), is not written to; see
    `entangle.recording.hooks.changed_rows`. Read `LanguageModel.digest` before the block: it is
    kept from its first use.
    """
    for one in edits:
        _check_row_edit(one)
    with changed_rows([(one.layer, one.rows, one.weight) for one in edits]):
        yield


def pruned_rows(
    layer: Layer,
    gram: Float[Tensor, "in_features in_features"] | None,
    rows: Int64[Tensor, " rows"],
    strength: float | int,
    *,
    pruner: str = "sparsegpt",
    damping: float = 0.01,
    seed: int = 0,
) -> PruneResult:
    """Prune some rows of a dense layer, each to the same number of zeros, all at once.

    Parameters
    ----------
    layer
        The layer, which is not changed: pass the result's ``weight`` to `swapped_rows`.
    gram
        ``XᵀX`` of the layer's inputs, which sparsegpt and wanda need.
    rows
        Different indices of rows.
    strength
        Share of zeros in [0, 1].
    pruner, damping
        As ``method`` and ``damping`` of `entangle.pruning.prune`.
    seed
        For the pruner ``"random"``; every layer has its own stream.

    Returns
    -------
    PruneResult
        Of the chosen rows only, in their order: ``weight`` is (rows, in_features),
        ``realised_sparsity`` and ``loss_per_neuron`` are (rows,).

    Raises
    ------
    UnknownName, InvalidInput, NumericalError
        As `entangle.pruning.prune`, or if rows do not fit the layer.
    """
    _check_present(layer)
    _check_rows(layer, rows)
    weight = layer.weight
    return prune(
        weight[rows.to(weight.device)],
        None if gram is None else gram.to(weight.device),
        method=pruner,
        sparsity=strength,
        pattern="row",
        damping=damping,
        seed=int(numpy_rng(seed, "pruned rows", layer.name).integers(2**63)),
    )


@contextmanager
def edited_outputs(
    layers: Sequence[Layer],
    selection: Selection,
    kind: str,
    *,
    strength: float | int = 1.0,
    means: Mapping[str, Float[Tensor, " out_features"]] | None = None,
) -> Iterator[None]:
    """Edit the outputs of the selected neurons inside the ``with`` block.

    Parameters
    ----------
    layers
        Layers of the model, at least those of the selection; the others are left alone.
    selection
        The neurons whose outputs y (before any activation function) change.
    kind
        A key of `OUTPUT_EDITS`.
    strength
        s in [0, 1]: y becomes (1 − s) · y + s · edit(y), in the layer's dtype. An output that the
        edit leaves as it is keeps its bits; 0 changes nothing.
    means
        For ``"mean"``: the neurons' mean outputs by layer name, from `mean_outputs` of the scores.

    Raises
    ------
    UnknownName
        If there is no such kind, or ``layers`` lacks a layer of the selection.
    InvalidInput
        If the strength is outside [0, 1], a row is outside its layer, or a mean is missing.
    """
    kind, strength = (
        choice("kind", kind, OUTPUT_EDITS, kind="edit of outputs"), share("strength", strength)
    )  # fmt: skip
    by_name = {layer.name: layer for layer in layers}
    edits = []
    for name, rows in selection.rows.items():
        if name not in by_name:
            raise unknown_name("layer", name, by_name, "Pass the layers of the selection.")
        chosen = torch.tensor(rows)
        _check_rows(by_name[name], chosen)
        mean = _means(means, by_name[name], chosen) if kind == "mean" else torch.empty(0)
        change = partial(_edited, rows=chosen, kind=kind, strength=strength, mean=mean)
        edits.append((by_name[name], change))
    with edit(edits) if strength else nullcontext():
        yield


def mean_outputs(
    scores: NeuronScores | pd.DataFrame,
) -> dict[str, Float[Tensor, " out_features"]]:
    """Return every neuron's mean output by layer name.

    Parameters
    ----------
    scores
        Scores, or their ``frame`` alone, which has no mean of constant neurons: that is the value
        their histograms lie at.

    Returns
    -------
    dict
        Each tensor is float64, one value a neuron up to the largest index; NaN where the scores
        have none.
    """
    frame = scores.frame if isinstance(scores, NeuronScores) else scores
    found = {}
    for name, part in in_module_order(frame).groupby("layer", sort=False):
        known = part.set_index("neuron")["mean"]
        means = known.reindex(range(int(known.index.max()) + 1)).to_numpy(np.float64, copy=True)
        if isinstance(scores, NeuronScores):
            constant = part.loc[part["flag"] == "constant", "neuron"].to_numpy(np.int64)
            saved = scores.histograms[str(name)]
            means[constant] = (saved.low[constant] + saved.high[constant]) / 2.0
        found[str(name)] = torch.from_numpy(means)
    return found


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Scores of some layers' neurons, and the gram matrix of each layer's inputs."""

    scores: NeuronScores
    """One row a neuron."""
    grams: Mapping[str, GramResult]
    """``XᵀX`` by layer name; layers that read one input share the object; empty if not wanted."""


class GramWatch:
    """Accumulates the grams of watched layers; layers with one input share an accumulator."""

    def __init__(self) -> None:
        self._source: dict[str, int] = {}
        self._grams: dict[int, Gram] = {}
        self._tokens: Counter[str | int] = Counter()

    def __call__(self, seen: Recorded) -> None:
        """Add what one layer received in one pass."""
        seen.check_affine("pruning")
        self._source[seen.layer.name] = seen.source
        self._tokens[seen.layer.name] += len(seen.inputs)
        if not seen.leads:
            return
        self._tokens[seen.source] += len(seen.inputs)
        if seen.source not in self._grams:
            self._grams[seen.source] = Gram(
                seen.layer.in_features, device=seen.inputs.device, dtype=torch.float32
            )
        self._grams[seen.source].update(seen.inputs)

    def result(self) -> dict[str, GramResult]:
        """Return the gram of every layer."""
        for name, source in self._source.items():
            if self._tokens[name] != self._tokens[source]:
                raise InvalidInput(
                    f"layer {name!r} has the input of another layer in some of its runs only; "
                    "take it alone."
                )
        results = {source: gram.result() for source, gram in self._grams.items()}
        return {name: results[source] for name, source in self._source.items()}


def layer_statistics(
    model: LanguageModel,
    calibration: CalibrationSet,
    layers: Sequence[Layer],
    *,
    scores: NeuronScores | None = None,
    grams: bool = True,
    md: bool = True,
    seed: int = 0,
    progress: bool | None = None,
    named: bool = True,
    columns: Sequence[str] = (),
) -> LayerStatistics:
    """Score layers and accumulate their grams in one pass over the calibration set.

    Parameters
    ----------
    model, calibration, layers
        What to run, on what, and which layers to watch.
    scores
        Scores made before; then only the grams are accumulated, and without them nothing runs.
    grams
        Whether pruning needs the grams.
    md, seed, progress, columns
        As in `entangle.score`.
    named
        Whether the layers were asked for by name. If not, those that see no token are left out.
    """
    watch = GramWatch()
    if scores is None:
        scores = score_layers(
            model, calibration, layers, may_be_silent=not named, method="sketch", md=md,
            seed=seed, progress=progress, watch=watch if grams else None, columns=columns,
        )  # fmt: skip
        scores = scores if named else heard(scores)
    elif grams:
        with ProgressBar("calibrating", enabled=progress) as bar:
            bar.start(calibration.n_seq, "sequences")
            Recorder(layers, watch).run(model.module, told(of_one_group(calibration), bar.advance))
    return LayerStatistics(scores, watch.result())


def _edited(output: Tensor, *, rows: Tensor, kind: str, strength: float, mean: Tensor) -> Tensor:
    rows = rows.to(output.device)
    before = output.index_select(-1, rows)
    after = OUTPUT_EDITS[kind](before, mean.to(output.dtype).to(output.device))
    mixed = after if strength == 1 else before.lerp(after, strength)
    return output.index_copy(-1, rows, mixed)


def _means(means: Mapping[str, Tensor] | None, layer: Layer, rows: Tensor) -> Tensor:
    if means is None or layer.name not in means:
        raise InvalidInput(
            f"`means` must hold the mean outputs of layer {layer.name!r} for the edit 'mean'; "
            f"got {None if means is None else list(means)}: pass mean_outputs of the scores."
        )
    found = means[layer.name]
    if found.shape != (layer.out_features,) or not found.cpu()[rows].isfinite().all():
        raise InvalidInput(
            f"`means` of layer {layer.name!r} must hold {layer.out_features} values, finite for "
            f"the selected neurons; got shape {tuple(found.shape)}: pass mean_outputs of scores."
        )
    return found.cpu()[rows]


def _check_present(layer: Layer) -> None:
    if layer.offloaded:
        raise InvalidInput(
            f"the weights of layer {layer.name!r} are offloaded, so its rows cannot be changed; "
            "choose a device map that keeps it on a device."
        )


def _check_rows(layer: Layer, rows: Tensor) -> None:
    fits = rows.dtype == torch.int64 and rows.ndim == 1 and rows.numel() > 0
    if not fits or int(rows.min()) < 0 or int(rows.max()) >= layer.out_features:
        shown = rows.tolist()[:5] if rows.ndim == 1 else tuple(rows.shape)
        raise InvalidInput(
            f"rows of layer {layer.name!r} must be int64 indices in 0..{layer.out_features - 1}; "
            f"got {shown} of {rows.dtype}: select from the scores of this model."
        )
    if len(rows.unique()) < len(rows):
        raise InvalidInput(f"a row of layer {layer.name!r} must be named once; got it again.")


def _check_row_edit(one: RowEdit) -> None:
    _check_present(one.layer)
    _check_rows(one.layer, one.rows)
    dense = one.layer.weight
    shape = (len(one.rows), dense.shape[1])
    if one.weight.shape != shape or one.weight.dtype != dense.dtype:
        raise InvalidInput(
            f"new rows of layer {one.layer.name!r} must be {shape} of {dense.dtype}; got "
            f"{tuple(one.weight.shape)} of {one.weight.dtype}."
        )
