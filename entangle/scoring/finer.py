"""The outputs that a sketch counts: the module's own, finer ones where their dtype is too coarse.

A bfloat16 number near 128 is a whole number: outputs with a bias of that size and a spread of 1 are
hardly more than their rounding. Such neurons' outputs are computed again from the layer's inputs,
in float32.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.models.layers import Layer
from entangle.recording.hooks import SeenTensor
from entangle.stats.rounding import (
    FeatureSizes,
    OutputError,
    feature_squares,
    output_error,
    reach,
    wd_error,
)
from entangle.stats.wasserstein import ShapeStatistics

FINE = 0.0125
"""Largest error of a WD by rounding, in σ, of which the module's own outputs are counted."""

_AGREE = 2.0


class SharedSquares:
    """The squares of the last input, which neighbouring layers share."""

    def __init__(self) -> None:
        self._last: SeenTensor | None = None
        self._found = torch.empty(0)

    def of(self, inputs: Float[Tensor, "*tokens in_features"]) -> Float[Tensor, " in_features"]:
        """Return the sum over tokens of every input's square."""
        if self._last is None or not self._last.same_as(inputs):
            self._found = feature_squares(inputs.flatten(0, -2))
            self._last = SeenTensor.of(inputs)
        return self._found

    def forget(self) -> None:
        """Let go of the last input, before its memory is used for another."""
        self._last = None


class FinerOutputs:
    """What is counted of one layer's outputs, and how far it is rounded.

    Parameters
    ----------
    layer
        Whose outputs come.
    squares
        Shared by the layers of a model.

    Notes
    -----
    The first tokens that come decide which neurons are computed again: those whose 16-bit outputs'
    rounding may change WD by more than `FINE`, if the module's outputs are the sums of products of
    its weight up to rounding. Where they are not, its own outputs stay what is measured.
    """

    def __init__(self, layer: Layer, squares: SharedSquares) -> None:
        self._layer, self._squares, self._sizes = layer, squares, FeatureSizes()
        self._dtype = torch.float32
        self._again: Int64[Tensor, " coarse"] | None = None

    def of(
        self,
        inputs: Float[Tensor, "*tokens in_features"],
        outputs: Float[Tensor, "*tokens out_features"],
    ) -> Float[Tensor, "rows out_features"]:
        """Return the rows to count, in the module's dtype or float32."""
        rows = outputs.flatten(0, -2)
        if rows.shape[0] == 0:
            return rows
        self._sizes.add(self._squares.of(inputs), rows.shape[0])
        self._dtype = rows.dtype
        if rows.element_size() > 2 or not self._has_products(inputs, rows):
            return rows
        if self._again is None:
            self._again = self._coarse(inputs, rows)
        if not len(self._again):
            return rows
        finer = rows.float()
        finer[:, self._again] = self._product(inputs, self._again)
        return finer

    def error(self, shape: ShapeStatistics, location: Float[Tensor, " neurons"]) -> OutputError:
        """Return how far what was counted is rounded.

        Parameters
        ----------
        shape
            Of what was counted, on the CPU.
        location
            About the median of what was counted.
        """
        own = self._error(shape.mean, shape.std, location, self._dtype, own=True)
        if self._again is None or not len(self._again):
            return own
        finer = self._error(shape.mean, shape.std, location, torch.float32, own=False)
        again = torch.zeros(len(location), dtype=torch.bool)
        again[self._again.cpu()] = True
        return OutputError(
            bound=finer.bound.where(again, own.bound),
            typical=finer.typical.where(again, own.typical),
        )

    def _error(
        self, mean: Tensor, std: Tensor, location: Tensor, dtype: torch.dtype, *, own: bool
    ) -> OutputError:
        """Return the error of the module's ``own`` outputs, or of `_product`."""
        weight, sizes = self._layer.weight, self._sizes.rms()
        bias = None if self._layer.bias is None else self._layer.bias.cpu().double()
        known = weight.is_floating_point() and weight.shape == (len(mean), len(sizes))
        reached = reach(weight, sizes) if known else torch.zeros_like(mean)
        return output_error(
            mean, std, location,
            reach=reached if bias is None or not own else reached + bias.abs(),
            in_features=len(sizes),
            dtype=dtype,
            bias=bias,
        )  # fmt: skip

    def _has_products(self, inputs: Tensor, rows: Tensor) -> bool:
        weight = self._layer.weight
        return weight.is_floating_point() and weight.shape == (rows.shape[1], inputs.shape[-1])

    def _coarse(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the neurons to compute again, by the first rows of outputs."""
        mean, std = _mean_and_std(rows)
        own = self._error(mean, std, mean, rows.dtype, own=True).bound
        again = (wd_error(own, std) > FINE).nonzero()[:, 0].to(rows.device)
        limit = own.to(rows.device)[again].float()
        difference = (self._product(inputs, again) - rows[:, again].float()).div_(limit)
        distance = torch.linalg.vector_norm(difference, dim=0) / rows.shape[0] ** 0.5
        return again[distance <= _AGREE]

    def _product(self, inputs: Tensor, neurons: Tensor) -> Tensor:
        """Compute the outputs of some neurons in float32, (rows, neurons)."""
        weight, bias = self._layer.weight[neurons].float(), self._layer.bias
        product = inputs.flatten(0, -2).float() @ weight.T
        return product if bias is None else product.add_(bias[neurons].float())


def _mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every column, float64, on the CPU."""
    std, mean = (one.cpu().double() for one in torch.std_mean(rows.float(), 0, correction=0))
    large = (~std.isfinite()).nonzero()[:, 0]  # squares may overflow float32
    if len(large):
        wide = rows[:, large.to(rows.device)].cpu().double()
        std[large], mean[large] = torch.std_mean(wide, 0, correction=0)
    return mean, std
