"""The outputs that a sketch counts: the module's own, finer ones where their dtype is too coarse.

A bfloat16 number near 128 is a whole number: outputs with a bias of that size and a spread of 1 are
hardly more than their rounding. Such neurons' outputs are computed again from the layer's inputs,
in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype
from entangle.ranks import Ranks
from entangle.recording.hooks import SeenTensor
from entangle.stats.bins import ToAdd, to_host
from entangle.stats.wasserstein import (
    FeatureSizes,
    OutputError,
    ShapeStatistics,
    feature_squares,
    output_error,
    reach,
    wd_error,
)

FINE = 0.0125
"""Largest error of a WD by rounding, in σ, of which the module's own outputs are counted."""

AGREE = 2.0
"""Bounds of their error by which outputs may differ from products, to count as these."""


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

    def __init__(self, layer: Layer, squares: SharedSquares, *, split: bool = False) -> None:
        self._layer, self._squares, self._split = layer, squares, split
        self._sizes = FeatureSizes(split=split)
        self._dtype = torch.float32
        self._again: Int64[Tensor, " coarse"] | None = None
        self._kept: _OfWeight | None = None

    def joined(self, squares: Float[Tensor, " in_features"]) -> None:
        """Keep the sums of squared inputs in a part of the memory of several layers'."""
        self._sizes.keep_in(squares)

    def note(self, n_tokens: int, dtype: torch.dtype) -> None:
        """Take note of tokens whose squared inputs have been added to that memory."""
        self._sizes.n_tokens, self._dtype = self._sizes.n_tokens + n_tokens, dtype

    @property
    def n_tokens(self) -> int:
        """Tokens seen."""
        return self._sizes.n_tokens

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's outputs."""
        return self._dtype

    @property
    def is_decided(self) -> bool:
        """Whether it is known which neurons are computed again."""
        return self._again is not None

    @property
    def chosen(self) -> Int64[Tensor, " coarse"]:
        """Numbers of the neurons that are computed again; they must be known."""
        assert self._again is not None  # noqa: S101
        return self._again

    @property
    def computes(self) -> bool:
        """Whether outputs of some neurons are computed again."""
        return self._again is not None and len(self._again) > 0

    def decide(
        self,
        inputs: Float[Tensor, "rows in_features"],
        outputs: Float[Tensor, "rows out_features"],
        *,
        none: bool,
    ) -> None:
        """Decide by a layer's first rows which neurons are computed again, or that ``none`` are."""
        empty = torch.empty(0, dtype=torch.int64, device=outputs.device)
        self._again = empty if none else self._coarse(inputs, outputs)

    def settle(self, again: Int64[Tensor, " coarse"]) -> None:
        """Take which neurons are computed again."""
        self._again = again

    def finer(
        self, inputs: Float[Tensor, "rows in_features"], outputs: Float[Tensor, "rows out_features"]
    ) -> Float[Tensor, "rows out_features"]:
        """Return rows with the outputs of those neurons computed again, float32."""
        assert self._again is not None  # noqa: S101
        found = outputs.float()
        found[:, self._again] = self._product(inputs, self._again)
        return found

    @property
    def again(self) -> Bool[Tensor, " neurons"] | None:
        """Which neurons are computed again; None before the first tokens, or where none may be."""
        if self._again is None:
            return None
        found = torch.zeros(self._layer.out_features, dtype=torch.bool, device=self._again.device)
        found[self._again] = True
        return found

    def decided(self, again: Bool[Tensor, " neurons"] | None) -> "FinerOutputs":
        """Return one that has seen nothing, and computes these neurons again."""
        made = FinerOutputs(self._layer, self._squares, split=self._split)
        if again is not None:
            made._again = again.nonzero()[:, 0]
        return made

    def known(self) -> Sequence[Any]:
        """As `entangle.stats.sketch.OutputSketch.known`."""
        name = str(self._dtype).removeprefix("torch.") if self._sizes.n_tokens else None
        return [name, self._sizes.known()]

    def pool(self, ranks: Ranks, found: Sequence[Sequence[Any]], *, to: int) -> ToAdd:
        """As `entangle.stats.sketch.OutputSketch.pool`."""
        known = next((name for name, _ in found if name is not None), "float32")
        self._dtype = getattr(torch, known)
        device = self._layer.device
        like = torch.zeros(self._layer.in_features, dtype=accumulator_dtype(device), device=device)
        return self._sizes.pool(ranks, [sizes for _, sizes in found], like, to=to)

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
        return self.finer(inputs.flatten(0, -2), rows)

    def keep(self) -> None:
        """Take from the weight what `error` needs of it; no tokens come after this."""
        self._kept = self._of_weight()

    def error(self, shape: ShapeStatistics, location: Float[Tensor, " neurons"]) -> OutputError:
        """Return how far what was counted is rounded.

        Parameters
        ----------
        shape
            Of what was counted, on the CPU.
        location
            About the median of what was counted.
        """
        kept = self._of_weight() if self._kept is None else self._kept
        own = self._error(shape.mean, shape.std, location, self._dtype, kept)
        if self._again is None or not len(self._again):
            return own
        finer = self._error(shape.mean, shape.std, location, torch.float32, kept, own=False)
        return either(finer, own, mask(self.again, len(location)))

    def _error(
        self,
        mean: Tensor,
        std: Tensor,
        location: Tensor,
        dtype: torch.dtype,
        of_weight: "_OfWeight",
        *,
        own: bool = True,
    ) -> OutputError:
        """Return the error of the module's ``own`` outputs, or of `_product`."""
        reached, bias, in_features = of_weight
        return output_error(
            mean, std, location,
            reach=reached if bias is None or not own else reached + bias.abs(),
            in_features=in_features,
            dtype=dtype,
            bias=bias,
        )  # fmt: skip

    def _of_weight(self) -> "_OfWeight":
        weight, bias, sizes = self._layer.weight, self._layer.bias, self._sizes.rms()
        rows = self._layer.out_features
        known = weight.is_floating_point() and weight.shape == (rows, len(sizes))
        reached = reach(weight, sizes) if known else torch.zeros(rows, dtype=torch.float64)
        return reached, None if bias is None else bias.cpu().double(), len(sizes)

    def _has_products(self, inputs: Tensor, rows: Tensor) -> bool:
        weight = self._layer.weight
        return weight.is_floating_point() and weight.shape == (rows.shape[1], inputs.shape[-1])

    def _coarse(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the neurons to compute again, by the first rows of outputs."""
        mean, std = _mean_and_std(rows)
        own = self._error(mean, std, mean, rows.dtype, self._of_weight()).bound
        again = (wd_error(own, std) > FINE).nonzero()[:, 0].to(rows.device)
        if not len(again):
            return again
        limit = own.to(rows.device)[again].float()
        difference = (self._product(inputs, again) - rows[:, again].float()).div_(limit)
        distance = torch.linalg.vector_norm(difference, dim=0) / rows.shape[0] ** 0.5
        return again[distance <= AGREE]

    def _product(self, inputs: Tensor, neurons: Tensor) -> Tensor:
        """Compute the outputs of some neurons in float32, (rows, neurons)."""
        weight, bias = self._layer.weight[neurons].float(), self._layer.bias
        product = inputs.flatten(0, -2).float() @ weight.T
        return product if bias is None else product.add_(bias[neurons].float())


_OfWeight = tuple[Tensor, Tensor | None, int]
"""How far a weight's sums reach (0 where it gives none), the bias, float64, and the inputs."""


def mask(again: Tensor | None, width: int) -> Bool[Tensor, " neurons"]:
    """Return which of so many neurons are computed again, on the CPU; none where it is None."""
    return torch.zeros(width, dtype=torch.bool) if again is None else again.cpu()


def either(one: OutputError, other: OutputError, where: Bool[Tensor, " neurons"]) -> OutputError:
    """Return the rounding that is one's where it says so, and else the other's."""
    return OutputError(
        bound=one.bound.where(where, other.bound), typical=one.typical.where(where, other.typical)
    )


def _mean_and_std(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every column, float64, on the CPU."""
    values = rows.float()
    mean = values.mean(0)
    found = torch.stack([(values - mean).square_().mean(0).sqrt_(), mean])
    std, mean = to_host([found])[0].double()
    large = (~std.isfinite()).nonzero()[:, 0]  # squares may overflow float32
    if len(large):
        wide = rows[:, large.to(rows.device)].cpu().double()
        std[large], mean[large] = torch.std_mean(wide, 0, correction=0)
    return mean, std
