"""How experts are stored: the format, and how wide their values are.

What is stored is what runs on: where it rounds the solver's weights, later blocks see the rounded.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from entangle.checks import choice
from entangle.errors import InvalidInput
from entangle.experts.codes import codes_of
from entangle.packed.formats import BLOCK, FORMATS, Packed, pack, unpack

FLOATS = ("bfloat16", "float16", "float32")
_WIDEST = 8  # bits of a code


@dataclass(frozen=True)
class Storage:
    """How experts are stored; the fields are explained at `entangle.expand`.

    Raises
    ------
    UnknownName, InvalidInput
        If the format or the values do not exist, or the pattern does not fit the format.
    """

    format: str = "bitmap"
    values: str | None = None
    bits: int | None = None
    pattern: str = "row"
    group_size: int | None = None

    def __post_init__(self) -> None:
        choice("format", self.format, FORMATS)
        if self.values is not None:
            choice("values", self.values, FLOATS)
        group = _group(self.pattern)
        if self.format == "n16" and (not group or BLOCK % group):
            raise InvalidInput(
                "the format 'n16' keeps n of every 16 weights, which needs a `pattern` such as "
                f"5:16 or 2:4; got {self.pattern!r}."
            )

    @property
    def coded(self) -> bool:
        """Whether codes of the solver's quantisation grid are stored."""
        return self.values is None and self.bits is not None and self.bits <= _WIDEST

    def rounds(self, dtype: torch.dtype) -> bool:
        """Tell whether what is stored of weights of this dtype may be other numbers."""
        own = str(dtype).removeprefix("torch.")
        other = self._values(own) != own and (own in FLOATS or self.values is not None)
        return self.coded or other

    def _values(self, own: str) -> str | None:
        return None if self.coded else self.values or (own if own in FLOATS else "float32")

    def pack(
        self,
        dense: Float[Tensor, "rows cols"],
        weight: Float[Tensor, "experts rows cols"],
    ) -> tuple[Packed, Float[Tensor, "experts rows cols"]]:
        """Pack a layer's experts; return them, and the weights that they give back.

        Weights of float64 are packed in float32 and returned as they are, unless ``values`` asks
        for a dtype.

        Parameters
        ----------
        dense
            The layer's weight.
        weight
            Of the experts, with their zeros.

        Raises
        ------
        InvalidInput
            If a value overflows the dtype that it is to be stored in.
        """
        codes = None
        if self.coded and self.bits is not None:
            codes = codes_of(dense.expand_as(weight), self.bits, self.group_size)
        own = str(weight.dtype).removeprefix("torch.")
        layout, tensors = pack(weight, self.format, values=self._values(own), codes=codes)
        if self.rounds(weight.dtype):
            experts = (unpack(tensors, layout, e, dtype=weight.dtype) for e in range(len(weight)))
            weight = torch.stack(list(experts))
        return Packed(tensors, layout), weight


def _group(pattern: object) -> int:
    """Return m of a pattern n:m, 0 of any other; what is wrong with it, the pruner tells."""
    size = pattern.partition(":")[2] if isinstance(pattern, str) else ""
    return int(size) if size.isdecimal() else 0
