"""Routed sparse experts of chosen neurons, and what they do to the neurons' outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from entangle.ablation.row_experts import RowExperts
from entangle.checks import several, whole
from entangle.errors import InvalidInput, unknown_name
from entangle.expansion.linear import SharedRouting
from entangle.expansion.packing import Packed, unpack
from entangle.models.layers import LISTING, Layer, find_layers, list_layers
from entangle.models.loading import AnyModel, as_language_model
from entangle.routing import Router

RowIndices = Sequence[int] | np.ndarray | Tensor
"""Indices of neurons of one layer."""


@dataclass(frozen=True, eq=False)
class FittedRows:
    """The solved rows of one layer."""

    rows: Int64[Tensor, " rows"]
    """Their indices, in ascending order."""
    in_features: int
    """Inputs of a neuron."""
    routers: Mapping[int, Router]
    """By number of experts; the very object is shared by the layers that read one input."""
    packed: Mapping[tuple[int, float], Packed] = field(repr=False)
    """Weights (experts, rows, in_features) by number of experts and sparsity."""


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """Routed sparse experts of chosen neurons, at several sparsities and numbers of experts."""

    neurons: pd.DataFrame
    """One row a (layer, neuron, experts, sparsity):

    ``layer``, ``block``, ``projection``, ``neuron``, ``experts``, ``sparsity``
        Which neuron, and how it was solved.
    ``rmse``
        Root mean square of routed sparse minus dense output over all calibration tokens.
    ``ri``
        ``rmse`` at one expert and the same sparsity divided by ``rmse``: 1 at one expert, NaN if
        one expert was not among the numbers asked for, or where both are 0.
    ``output_wd``
        W1 between the sparse and the dense outputs, in dense standard deviations.
    ``wd``, ``md``
        WD and mapping difficulty of the dense outputs over all tokens.
    ``weighted_wd``, ``weighted_md``
        The same inside the clusters, averaged with the clusters' tokens as weights.
    ``wd_skipped``, ``md_skipped``
        Clusters that contribute 0, since there is no distribution or no pair to measure.
    ``realised_sparsity``
        Share of the neuron's weights, over all experts, that the masks remove.
    ``smallest_cluster``, ``shrunk``, ``damping``
        Tokens of the smallest cluster, clusters with fewer tokens than inputs, and the largest
        damping that a cluster needed.

    Without mapping difficulty the three ``md`` columns are missing. Errors are those on the
    calibration tokens, which a cluster with few tokens overfits, and few tokens raise a cluster's
    WD (`entangle.stats.wasserstein.null_floor`): compare both with ``router="random"``.
    """
    layers: Mapping[str, FittedRows] = field(repr=False)
    """The solved rows by the layer's name."""

    @property
    def realised_sparsity(self) -> pd.Series:
        """Mean share of zeros by layer, number of experts and (asked) sparsity."""
        by_arm = self.neurons.groupby(["layer", "experts", "sparsity"], sort=False)
        return by_arm["realised_sparsity"].mean()

    def router(self, layer: str, k: int) -> Router:
        """Return the router with k clusters of a layer's inputs."""
        routers = self._layer(layer).routers
        if k not in routers:
            raise InvalidInput(f"`k` must be one of {list(routers)}, which were fitted; got {k}.")
        return routers[k]

    def weight(
        self, layer: str, rows: RowIndices, k: int, sparsity: float
    ) -> Float[Tensor, "k rows in_features"]:
        """Return the sparse weights of some neurons in k experts, on the CPU.

        Parameters
        ----------
        layer
            Full dotted name.
        rows
            Indices of neurons, in the order wanted.
        k, sparsity
            A number of experts and a sparsity that were asked for.

        Raises
        ------
        InvalidInput, UnknownName
            If something was not fitted.
        """
        fitted, wanted = self._layer(layer), row_indices(layer, rows)
        self.router(layer, k)
        if (k, sparsity) not in fitted.packed:
            known = sorted({share for _, share in fitted.packed})
            raise InvalidInput(
                f"`sparsity` must be one of {known}, which were fitted; got {sparsity}."
            )
        place = {row: i for i, row in enumerate(fitted.rows.tolist())}
        for row in wanted.tolist():
            if row not in place:
                raise InvalidInput(
                    f"`rows` must be among the {len(place)} rows of layer {layer!r} that were "
                    f"fitted; got {row}: fit the union of all selections."
                )
        whole = unpack(fitted.packed[k, sparsity], (k, len(place), fitted.in_features))
        return whole[:, [place[row] for row in wanted.tolist()]]

    def modules(
        self,
        model: AnyModel,
        selection: Mapping[str, RowIndices],
        k: int,
        sparsity: float,
    ) -> dict[str, RowExperts]:
        """Make the modules that take the place of the selected layers.

        Parameters
        ----------
        model
            The dense model that the rows were fitted on.
        selection
            Indices of neurons by the layer's full dotted name; a layer with none is left out.
        k, sparsity
            A number of experts and a sparsity that were asked for.

        Returns
        -------
        dict of RowExperts
            By layer name, for `installed`. Layers that read one input share their routing.
        """
        module = as_language_model(model).module
        routings: dict[int, SharedRouting] = {}
        made = {}
        for name, rows in selection.items():
            chosen = row_indices(name, rows)
            if not chosen.numel():
                continue
            weight, router = self.weight(name, chosen, k, sparsity), self.router(name, k)
            routing = routings.setdefault(id(router), SharedRouting(router))
            layer = find_layers(module, name)[0]
            made[name] = RowExperts(layer, chosen, weight, routing if k > 1 else None)
        return made

    def _layer(self, name: str) -> FittedRows:
        if name not in self.layers:
            raise unknown_name("fitted layer", name, self.layers)
        return self.layers[name]


def row_indices(layer: str, rows: RowIndices) -> Int64[Tensor, " rows"]:
    """Return indices of neurons as a tensor, or raise `InvalidInput` naming the layer."""
    name = f"rows[{layer!r}]"
    values = [whole(name, one, least=0) for one in several(name, rows, empty=True)]
    return torch.tensor(values, dtype=torch.int64)


def chosen_rows(
    module: nn.Module, rows: Mapping[str, RowIndices]
) -> list[tuple[Layer, Int64[Tensor, " chosen"]]]:
    """Return the layers that have rows, in module order, with their indices in ascending order.

    Raises
    ------
    UnknownName, InvalidInput
        If there is no such layer, it lies outside the blocks, an index is outside it, or there is
        no row at all.
    """
    layers = {layer.name: layer for layer in list_layers(module)}
    for name in rows:
        if name not in layers:
            raise unknown_name("layer", name, layers, LISTING)
    chosen = []
    for name, layer in layers.items():
        index = row_indices(name, rows.get(name, ())).unique()
        if not index.numel():
            continue
        if layer.block is None:
            raise InvalidInput(f"layer {name!r} lies outside the blocks; leave it out.")
        if int(index[0]) < 0 or int(index[-1]) >= layer.out_features:
            raise InvalidInput(
                f"`rows` of layer {name!r} must lie in [0, {layer.out_features}); "
                f"got {int(index[0])} to {int(index[-1])}."
            )
        chosen.append((layer, index))
    if not chosen:
        raise InvalidInput("`rows` must name at least one neuron; got none.")
    return chosen
