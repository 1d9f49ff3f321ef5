"""Sketches of several layers of one shape, such as the experts of a mixture, counted at once.

What a sketch of each holds lies in one memory, so that a GPU counts, and measures, all of them by
one kernel instead of one each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from entangle.kernels import sketch as kernels
from entangle.kernels.dispatch import dispatch, usable
from entangle.kernels.sketch import RowBlocks
from entangle.stats import bins
from entangle.stats.bins import Scratch
from entangle.stats.edges import N_BINS, SAVED_FOLD
from entangle.stats.sketch import OutputSketch, SketchResult, place_bins

_SUMS = ("_powers", "_group_powers")
_BY_LAYER = ("_location", "_scale", "_counts", "_closed_counts", "_low", "_high", "_nan", "_inf")
_MOST_SAMPLED = 512


class _Joint(OutputSketch):
    """The neurons of several layers, one below the other, as those of one."""

    each: int
    """Neurons of a layer."""
    filled: Bool[Tensor, "layers bins"]
    """Which of the bins that are saved hold outputs of a layer, once measured."""

    def _close_group(self) -> None:
        """Leave the groups alone, which `OutputSketches` closes."""

    def _tokens_in(self, groups: Sequence[int]) -> Tensor:
        found = self._group_tokens[list(groups)].sum(0).double()
        return found.to(self._powers.device).repeat_interleave(self.each)

    def _saved(self) -> tuple[int, Tensor]:
        """Leave out the bins beyond all outputs, so that less goes to the host."""
        ends = torch.stack([self._low.min(), self._high.max()])
        low, high = (one // SAVED_FOLD for one in bins.signed_index(ends).tolist())
        used = self._counts[:, low * SAVED_FOLD : (high + 1) * SAVED_FOLD]
        folded = bins.fold_counts(used, SAVED_FOLD)
        self.filled = folded.unflatten(0, (-1, self.each)).amax(1) > 0
        return low, folded


class _Member(OutputSketch):
    """One layer's part of a `_Joint`."""

    def __init__(self, joint: _Joint, number: int, **settings: Any) -> None:
        super().__init__(joint.each, **settings)
        self._joint, self._number = joint, number

    def _place(self, location: Tensor, scale: Tensor) -> None:
        joint, own = self._joint, slice(self._number * self.n_neurons, None)
        own = slice(own.start, own.start + self.n_neurons)
        if not joint._placed:
            blank = location.new_zeros(joint.n_neurons)
            joint._place(blank, torch.ones_like(blank))
            joint._group_tokens = torch.zeros(
                joint.n_groups, joint.n_neurons // joint.each, dtype=torch.int64
            )
        for name in _BY_LAYER:
            setattr(self, name, getattr(joint, name)[own])
        for name in _SUMS:
            setattr(self, name, getattr(joint, name)[..., own])
        self._group_counts = joint._group_counts[:, own]
        self._group_tokens = joint._group_tokens[:, self._number]
        self._location.copy_(location)
        self._scale.copy_(scale)
        self._placed = True


class OutputSketches:
    """Sketches of the outputs of several layers of as many neurons.

    Parameters
    ----------
    n_layers, n_neurons
        Layers, and neurons of each.
    n_groups, scratch
        As in `entangle.stats.sketch.OutputSketch`.
    """

    def __init__(
        self, n_layers: int, n_neurons: int, *, n_groups: int = 8, scratch: Scratch | None = None
    ) -> None:
        self._joint = _Joint(n_layers * n_neurons, n_groups=n_groups, scratch=scratch)
        self._joint.each = n_neurons
        settings = {"n_groups": n_groups, "scratch": self._joint._scratch}
        self.each: list[OutputSketch] = [
            _Member(self._joint, number, **settings) for number in range(n_layers)
        ]
        """The sketch of every layer, which may be updated by itself too."""

    def update(self, rows: Float[Tensor, "rows neurons"], blocks: RowBlocks, *, group: int) -> None:
        """Add outputs, all from sequences of one group.

        Parameters
        ----------
        rows
            Outputs of all layers, a row a token.
        blocks
            Which of them are each layer's.
        group
            Of the sequences.
        """
        self._place_new(rows, blocks)
        if any(end > start for start, end in blocks.ends):
            self._add(rows, blocks, group)

    def _place_new(self, rows: Tensor, blocks: RowBlocks) -> None:
        """Place the bins of layers that see their first tokens, as each alone would."""
        new: dict[int, list[tuple[OutputSketch, range]]] = {}
        for sketch, (start, end) in zip(self.each, blocks.ends, strict=True):
            if end > start and not sketch._placed:
                step = max(1, (end - start) // _MOST_SAMPLED)
                sample = range(start, end, step)[:_MOST_SAMPLED]
                new.setdefault(len(sample), []).append((sketch, sample))
        for size, own in new.items():
            index = torch.tensor([list(sample) for _, sample in own]).T.flatten()
            sample = rows[index.to(rows.device)].unflatten(0, (size, -1)).flatten(1)
            places = (part.chunk(len(own)) for part in place_bins(sample))
            for (sketch, _), location, scale in zip(own, *places, strict=True):
                sketch._place(location, scale)

    def _add_at_once(self, rows: Tensor, blocks: RowBlocks, group: int) -> None:
        joint = self._joint
        self._close(group)
        kernels.add_outputs(
            rows, joint._location, joint._scale,
            counts=joint._counts, powers=joint._powers, group_powers=joint._group_powers[group],
            low=joint._low, high=joint._high, nan=joint._nan, inf=joint._inf,
            blocks=blocks,
        )  # fmt: skip
        for sketch, (start, end) in zip(self.each, blocks.ends, strict=True):
            sketch.n_tokens += end - start
        sizes = torch.tensor([end - start for start, end in blocks.ends])
        joint._group_tokens[group] += sizes

    @dispatch(_add_at_once, where=lambda _self, rows, _blocks, _group: kernels.fits(rows, N_BINS))
    def _add(self, rows: Tensor, blocks: RowBlocks, group: int) -> None:
        """Add outputs, a layer after the other."""
        for sketch, (start, end) in zip(self.each, blocks.ends, strict=True):
            sketch.update(rows[start:end], group=group)

    def _close(self, group: int | None) -> None:
        """Credit what was counted to the open group, if another one (or none) comes now."""
        seen = [one for one in self.each if one.n_tokens]
        open_groups = {one._open_group for one in seen}
        if len(open_groups) == 1 and seen[0]._open_group != group:
            joint, (own,) = self._joint, open_groups
            if usable(joint._counts):
                kernels.close_group(
                    joint._counts, closed=joint._closed_counts, group=joint._group_counts[own],
                    low=joint._low, high=joint._high,
                )  # fmt: skip
                seen = []
        for one in seen:
            if one._open_group != group:
                one._close_group()
        if group is not None:
            for one in self.each:
                one._open_group = group

    def result(self) -> list[tuple[list[int], SketchResult, list[slice]]]:
        """Measure all layers that saw a token, together those that the same groups reached.

        Returns
        -------
        list of tuple
            Numbers of layers, what is known of their neurons, one layer's after the other's, and
            which columns of its ``counts`` hold outputs of each layer; ``n_tokens`` is that of all
            of them.
        """
        self._close(None)
        tokens, sets = self._joint._group_tokens, dict[tuple[bool, ...], list[int]]()
        for number, sketch in enumerate(self.each):
            if sketch.n_tokens:
                sets.setdefault(tuple((tokens[:, number] > 0).tolist()), []).append(number)
        found = []
        for own in sets.values():
            part = self._part(own)
            measured = part.result()
            filled = part.filled.cpu().numpy()
            places = (np.flatnonzero(row).tolist() or [0] for row in filled)
            ends = [(bins_of[0], bins_of[-1]) for bins_of in places]
            found.append((own, measured, [slice(first, last + 1) for first, last in ends]))
        return found

    def _part(self, numbers: list[int]) -> _Joint:
        """Return some of the layers as one; a copy, unless it is all of them."""
        joint, n = self._joint, self._joint.each
        joint.n_tokens = int(joint._group_tokens.sum())
        if len(numbers) == len(self.each):
            return joint
        part = _Joint(len(numbers) * n, n_groups=joint.n_groups, scratch=joint._scratch)
        part.each, part._placed = n, True
        chosen: Int64[Tensor, " neurons"] = (
            torch.tensor(numbers)[:, None] * n + torch.arange(n)
        ).flatten().to(joint._counts.device)  # fmt: skip
        for name in _BY_LAYER:
            setattr(part, name, getattr(joint, name)[chosen])
        for name in _SUMS:
            setattr(part, name, getattr(joint, name)[..., chosen])
        part._group_counts = joint._group_counts[:, chosen]
        part._group_tokens = joint._group_tokens[:, numbers]
        part.n_tokens = int(part._group_tokens.sum())
        return part
