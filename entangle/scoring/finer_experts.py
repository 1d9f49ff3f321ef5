"""The outputs of experts that a sketch counts, all experts at once.

As `entangle.scoring.finer`, of which neurons of all of a mixture's experts are computed again.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, on_gpu
from entangle.kernels.sketch import RowBlocks
from entangle.models.layers import Layer
from entangle.models.mixtures import Stack
from entangle.precision import accumulator_dtype, row_parts
from entangle.scoring.finer import AGREE, FINE, FinerOutputs, SharedSquares, either, mask
from entangle.stats.wasserstein import (
    OutputError,
    ShapeStatistics,
    feature_squares,
    output_error,
    root_mean_square,
    wd_error,
)

_NARROW = torch.float16, torch.bfloat16


def _wide_on_gpu(inputs: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = torch.mm(inputs, weight.T, out_dtype=torch.float32)
    return found


@dispatch(
    _wide_on_gpu,
    where=lambda inputs, weight: inputs.is_cuda and inputs.dtype == weight.dtype in _NARROW,
)
def wide_product(
    inputs: Float[Tensor, "rows in_features"], weight: Float[Tensor, "neurons in_features"]
) -> Float[Tensor, "rows neurons"]:
    """Multiply in float32, which holds the products of 16-bit numbers."""
    return inputs.float() @ weight.float().T


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
        new = [i for i, (start, end) in ends if end > start and not self.each[i].is_decided]
        if new:
            self._decide(inputs, outputs, blocks, new)
        return [i for i, (start, end) in ends if end > start and self.each[i].computes]

    def finer(
        self,
        inputs: Float[Tensor, "rows in_features"],
        outputs: Float[Tensor, "rows out_features"],
        blocks: RowBlocks,
        numbers: Sequence[int],
    ) -> Float[Tensor, "rows out_features"]:
        """Return rows in float32, those of some experts with neurons computed again."""
        found, stored = outputs.float(), (self._stack.weight, self._stack.bias)
        for i in numbers:
            again, own = self.each[i].chosen, slice(*blocks.ends[i])
            found[own].index_copy_(1, again, self._product(i, inputs[own], again, *stored))
        return found

    def _product(
        self, i: int, inputs: Tensor, again: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Compute outputs of some neurons of an expert in float32, from the weights of all."""
        expert = self._numbers[i]
        found = wide_product(inputs, weight[expert].index_select(0, again))
        return found if bias is None else found + bias[expert].index_select(0, again).float()

    def _decide_at_once(
        self, inputs: Tensor, outputs: Tensor, blocks: RowBlocks, new: Sequence[int]
    ) -> None:
        """Decide as each would, but wait for the device once; a wild one decides for itself."""
        mean, std = (one[list(new)].flatten().cpu() for one in block_moments(outputs, blocks))
        bound = self._error(mean, std, mean, outputs.dtype, new).bound
        coarse = (wd_error(bound, std) > FINE).unflatten(0, (len(new), -1))
        wild = (~std.isfinite()).unflatten(0, (len(new), -1)).any(1).tolist()
        limits, looked = bound.view_as(coarse).to(outputs.device, torch.float32), []
        stored = self._stack.weight, self._stack.bias
        for place, i in enumerate(new):
            own = slice(*blocks.ends[i])
            if wild[place]:
                self.each[i].decide(inputs[own], outputs[own], none=False)
                continue
            again = coarse[place].nonzero()[:, 0].to(outputs.device, non_blocking=True)
            self.each[i].settle(again)
            if again.numel():
                apart = self._product(i, inputs[own], again, *stored)
                apart -= outputs[own][:, again].float()
                apart /= limits[place, again]
                size = (own.stop - own.start) ** 0.5
                looked.append((i, again, torch.linalg.vector_norm(apart, dim=0) / size <= AGREE))
        if not looked:
            return
        agreed = torch.cat([one for *_, one in looked]).cpu()
        parts = agreed.split([again.numel() for _, again, _ in looked])
        for (i, again, _), own_agreed in zip(looked, parts, strict=True):
            if not bool(own_agreed.all()):
                self.each[i].settle(again[own_agreed.to(again.device)])

    @dispatch(_decide_at_once, where=lambda _self, _inputs, outputs, *_: outputs.is_cuda)
    def _decide(
        self, inputs: Tensor, outputs: Tensor, blocks: RowBlocks, new: Sequence[int]
    ) -> None:
        """Decide by the first rows of some experts which neurons are computed again."""
        coarse = self._may_be_coarse(outputs, blocks, new)
        for i in new:
            own = slice(*blocks.ends[i])
            self.each[i].decide(inputs[own], outputs[own], none=i not in coarse)

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
        again = torch.cat([mask(self.each[i].again, width) for i in own])
        finer = self._error(shape.mean, shape.std, location, torch.float32, own, alone=False)
        return either(finer, bound, again)

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
