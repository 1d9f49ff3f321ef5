"""The outputs that a sketch counts: the module's own, finer ones where their dtype is too coarse.

A bfloat16 number near 128 is a whole number: outputs with a bias of that size and a spread of 1 are
hardly more than their rounding. Such neurons' outputs are computed again from the layer's inputs,
in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.kernels.sketch import RowBlocks
from entangle.models.layers import Layer
from entangle.models.mixtures import Stack
from entangle.precision import accumulator_dtype, row_parts
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
    root_mean_square,
    wd_error,
)

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
        return _either(finer, own, _mask(self.again, len(location)))

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
        return again[distance <= _AGREE]

    def _product(self, inputs: Tensor, neurons: Tensor) -> Tensor:
        """Compute the outputs of some neurons in float32, (rows, neurons)."""
        weight, bias = self._layer.weight[neurons].float(), self._layer.bias
        product = inputs.flatten(0, -2).float() @ weight.T
        return product if bias is None else product.add_(bias[neurons].float())


_OfWeight = tuple[Tensor, Tensor | None, int]
"""How far a weight's sums reach (0 where it gives none), the bias, float64, and the inputs."""


class FinerExperts:
    """As `FinerOutputs`, of one projection of several experts at once.

    Parameters
    ----------
    layers
        The experts' layers.
    stack, numbers
        Where their weights are, and which of its experts they are.
    squares
        As in `FinerOutputs`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        stack: Stack,
        numbers: Sequence[int],
        squares: SharedSquares,
    ) -> None:
        self._stack, self._numbers = stack, list(numbers)
        device = layers[0].device
        self._squares = torch.zeros(
            len(layers), layers[0].in_features, dtype=accumulator_dtype(device), device=device
        )
        self.each = [FinerOutputs(layer, squares) for layer in layers]
        """Of every layer, which may be given rows by itself too."""
        self._kept: tuple[Tensor, Tensor | None] | None = None
        for one, own in zip(self.each, self._squares, strict=True):
            one.joined(own)

    def irregular(
        self,
        inputs: Float[Tensor, "rows in_features"],
        outputs: Float[Tensor, "rows out_features"],
        blocks: RowBlocks,
        squares: Float[Tensor, "experts in_features"],
    ) -> list[int]:
        """Take note of rows, a block an expert, and return whose outputs are computed again."""
        self._squares += squares
        for one, (start, end) in zip(self.each, blocks.ends, strict=True):
            one.note(end - start, outputs.dtype)
        if outputs.element_size() > 2:
            return []
        ends = list(enumerate(blocks.ends))
        new = [i for i, (start, end) in ends if end > start and self.each[i].again is None]
        coarse = self._may_be_coarse(outputs, blocks, new) if new else set()
        for i in new:
            own = slice(*blocks.ends[i])
            self.each[i].decide(inputs[own], outputs[own], none=i not in coarse)
        return [i for i, (start, end) in ends if end > start and self.each[i].computes]

    def _may_be_coarse(self, outputs: Tensor, blocks: RowBlocks, new: Sequence[int]) -> set[int]:
        """Return those of some experts whose rounding may change WD by more than about `FINE`."""
        mean, std = block_moments(outputs, blocks)
        mean, std = (one[list(new)].flatten().cpu() for one in (mean, std))
        bound = self._error(mean, std, mean, outputs.dtype, new).bound
        may = ~(wd_error(bound, std) < _SURELY * FINE) | ~std.isfinite()
        return {i for i, coarse in zip(new, may.unflatten(0, (len(new), -1)), strict=True)
                if bool(coarse.any())}  # fmt: skip

    def error(
        self, shape: ShapeStatistics, location: Float[Tensor, " neurons"], own: Sequence[int]
    ) -> OutputError:
        """As `FinerOutputs.error`, of all neurons of some of the experts."""
        dtype = self.each[own[0]].dtype
        bound = self._error(shape.mean, shape.std, location, dtype, own)
        if not any(self.each[i].computes for i in own):
            return bound
        width = self._stack.shape[0]
        again = torch.cat([_mask(self.each[i].again, width) for i in own])
        finer = self._error(shape.mean, shape.std, location, torch.float32, own, alone=False)
        return _either(finer, bound, again)

    def _error(
        self,
        mean: Tensor,
        std: Tensor,
        location: Tensor,
        dtype: torch.dtype,
        own: Sequence[int],
        *,
        alone: bool = True,
    ) -> OutputError:
        if self._kept is None:
            reached, bias = self._of_weight(own)
        else:
            reached, stored = self._kept
            reached, bias = reached[list(own)], None if stored is None else stored[list(own)]
        bias = None if bias is None else bias.flatten()
        return output_error(
            mean, std, location,
            reach=reached.flatten() + (0 if bias is None or not alone else bias.abs()),
            in_features=self._squares.shape[1], dtype=dtype, bias=bias,
        )  # fmt: skip

    def keep(self) -> None:
        """As `FinerOutputs.keep`."""
        self._kept = self._of_weight(range(len(self.each)))

    def _of_weight(self, own: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return how far the weights' sums reach, of each expert with its own inputs, and biases.

        Both (experts, neurons), float64, on the CPU.
        """
        numbers = [self._numbers[i] for i in own]
        tokens = torch.tensor([max(1, self.each[i].n_tokens) for i in own])
        sizes = root_mean_square(self._squares[list(own)], tokens[:, None].to(self._squares.device))
        weight, stored = self._stack.weight, self._stack.bias
        factors = sizes.float()[..., None].to(weight.device)
        found = [
            torch.bmm(weight[numbers[part]].abs().float(), factors[part])[..., 0]
            for part in row_parts(len(numbers), max(1, 2**26 // weight[0].numel()))
        ]
        bias = None if stored is None else stored[numbers].cpu().double()
        return torch.cat(found).cpu().double(), bias


_SURELY = 0.9
"""Of `FINE`: below it neurons are not looked at closer, moments being summed in another order."""


def _mask(again: Tensor | None, width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.bool) if again is None else again.cpu()


def _either(one: OutputError, other: OutputError, where: Tensor) -> OutputError:
    return OutputError(
        bound=one.bound.where(where, other.bound), typical=one.typical.where(where, other.typical)
    )


def _squares_at_once(rows: Tensor, blocks: RowBlocks) -> Tensor:
    found = torch.zeros(len(blocks.ends), rows.shape[1], dtype=torch.float64, device=rows.device)
    kernels.add_squares(rows, blocks, found)
    return found


@dispatch(_squares_at_once, where=lambda rows, _blocks: kernels.fits(rows, 1))
def block_squares(
    rows: Float[Tensor, "rows features"], blocks: RowBlocks
) -> Float[Tensor, "blocks features"]:
    """Return the sums of squares of every feature over each block of rows."""
    found = [feature_squares(rows[start:end]) for start, end in blocks.ends]
    return torch.stack(found)


def _moments_at_once(rows: Tensor, blocks: RowBlocks) -> tuple[Tensor, Tensor]:
    """By sums of squares: a spread far below the mean is lost, which is nothing to look past."""
    place, ends = torch.arange(rows.shape[0], device=rows.device), blocks.bounds[..., None]
    own = ((place >= ends[0]) & (place < ends[1])).float()
    found = []
    for part in rows.split(512, dim=1):
        x = part.float()
        found.append(torch.stack([own @ x, own @ x.square()]).double())
    mean, square = torch.cat(found, -1) / own.sum(1, keepdim=True)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


@dispatch(_moments_at_once, where=on_gpu)
def block_moments(
    rows: Float[Tensor, "rows features"], blocks: RowBlocks
) -> tuple[Float64[Tensor, "blocks features"], Float64[Tensor, "blocks features"]]:
    """Return mean and population standard deviation of every feature over each block of rows.

    NaN of a block without rows.
    """
    found = [
        torch.std_mean(rows[start:end].float(), 0, correction=0)
        if end > start
        else 2 * (torch.full_like(rows[0], torch.nan, dtype=torch.float32),)
        for start, end in blocks.ends
    ]
    std, mean = (torch.stack(part).double() for part in zip(*found, strict=True))
    return mean, std


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
