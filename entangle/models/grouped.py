"""Products of rows that lie expert by expert, a block of rows an expert, at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """What all experts of a mixture receive and give in one run: a block of rows an expert."""

    inputs: dict[str, Float[Tensor, "rows in_features"]]
    """By projection; gate and up have the same tensor."""
    outputs: dict[str, Float[Tensor, "rows out_features"]]
    """By projection; rows after the last expert's belong to none."""
    bounds: Int[Tensor, " ends"]
    """Rows ``bounds[e]`` to ``bounds[e + 1]`` are expert e's, (experts + 1,), int32."""
    starts: list[int]
    """The same on the host."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which rows are whose."""

    numbers: Int[Tensor, " rows"]
    """The expert of each row, ascending; those of none come last."""
    bounds: Int[Tensor, " ends"]
    """As in `RoutedRows`."""
    fetch: Callable[[], list[int]]
    """Waits for ``bounds`` on the host, not for later work of the device."""

    @classmethod
    def of(cls, numbers: Int[Tensor, " rows"], n_experts: int) -> "Blocks":
        """Find the blocks of ascending numbers; those from ``n_experts`` on are of no expert."""
        ends = torch.arange(n_experts + 1, device=numbers.device)
        bounds = torch.searchsorted(numbers, ends.to(numbers), out_int32=True)
        return cls(numbers, bounds, _on_host(bounds))

    def linear(
        self,
        x: Float[Tensor, "rows in_features"],
        weight: Float[Tensor, "experts out_features in_features"],
        bias: Float[Tensor, "experts out_features"] | None,
    ) -> Float[Tensor, "rows out_features"]:
        """Multiply every row by the weight of its expert; rows of none are undefined.

        By one kernel where `takes` says so; else expert by expert, to the bit as each alone.
        """
        if takes(x, weight):
            found = nn.functional.grouped_mm(x, weight.mT, offs=self.bounds[1:])
            return found if bias is None else found + bias[self.numbers.clamp_max(len(bias) - 1)]
        found = x.new_empty(x.shape[0], weight.shape[1])
        for number, (start, end) in enumerate(pairwise(self.fetch())):
            if end > start:
                own = None if bias is None else bias[number]
                found[start:end] = nn.functional.linear(x[start:end], weight[number], own)
        return found

    def each(self, function: Callable[..., Tensor], rows: Sequence[Tensor]) -> Tensor:
        """Apply a function of single numbers to rows; those of no expert are undefined.

        On a CPU expert by expert: where a vector of numbers ends there, they are rounded otherwise.
        """
        if rows[0].is_cuda:
            return function(*rows)
        starts = self.fetch()
        parts = [function(*(one[a:b] for one in rows)) for a, b in pairwise(starts)]
        return torch.cat([*parts, function(*(one[starts[-1] :] for one in rows))])


def takes(x: Tensor, weight: Float[Tensor, "experts out_features in_features"]) -> bool:
    """Tell whether `torch.nn.functional.grouped_mm` multiplies these, bfloat16 on a GPU."""
    if not (x.is_cuda and hasattr(nn.functional, "grouped_mm")):
        return False
    if not x.dtype == weight.dtype == torch.bfloat16 or min(weight.stride()[1:]) != 1:
        return False
    steps = (*weight.stride(), *x.stride())
    aligned = all(step == 1 or step % 8 == 0 for step in steps) and not weight.data_ptr() % 16
    return aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _on_host(numbers: Tensor) -> Callable[[], list[int]]:
    """Begin to copy integers to the host; return what waits for them, not for later work."""
    if not numbers.is_cuda:
        return numbers.tolist
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    here.copy_(numbers, non_blocking=True)
    done = torch.cuda.current_stream(numbers.device).record_event()

    def fetch() -> list[int]:
        done.synchronize()
        found: list[int] = here.tolist()
        return found

    return fetch
