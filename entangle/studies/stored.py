"""How weights are stored, and how their source was quantised, as the numbers show it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from entangle.errors import UnknownName
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel

_NEIGHBOURS, _BLOCKS, _ROWS = 32, 4, 64

Form = tuple[str, int]
"""What a weight looks like: one of `_SAID`, and a number that belongs to it."""

BITS, MANTISSA, ZEROS, FLOATS = "bits", "mantissa", "zeros", "floats"
NARROW, AFAR, ABSENT = "narrow", "afar", "absent"
_SAID = {
    BITS: "quantised, about {} bits",
    MANTISSA: "quantised, floats of {} mantissa bits",
    ZEROS: "{} zeros among " + str(_NEIGHBOURS) + " neighbours",
    FLOATS: "no sign of quantisation",
    NARROW: f"not told from quantised ones (rows are shorter than {_NEIGHBOURS})",
    AFAR: "not told from quantised ones (away from zero, rounding leaves even steps)",
    ABSENT: "not looked at (offloaded)",
}


def stored_as(model: LanguageModel) -> str:
    """Say how the weights of some feed-forward parts are stored, over the depth of the model.

    A quantised weight shows also after it was turned into floats, of float32, float16 or bfloat16:
    its neighbours take few values, or values of even distances (whole numbers of up to 8 bits), or
    few mantissas (floats of 8 bits); a codebook of up to 256 values shows in 128 neighbours, a row
    or all of them. Of a pruned one many are zeros. The bits are those that neighbours use, fewer
    than the format's where one scale serves a weight with outliers. What is quantised in vectors,
    turned before or scaled by column looks like floats.

    Returns
    -------
    str
        The dtype, and what the weights look like unless they look like floats; where they differ,
        how many do.
    """
    kind = str(model.dtype).removeprefix("torch.")
    try:
        found = [_form(layer) for layer in _looked_at(model.module)]
    except UnknownName:
        return f"{kind}, not looked at (no feed-forward parts)"
    families = list(dict.fromkeys(family for family, _ in found))
    said = {one: _said(one, [number for own, number in found if own == one]) for one in families}
    if len(said) > 1:
        counts = [f"{sum(own == one for own, _ in found)}: {said[one]}" for one in families]
        return f"{kind}; of {len(found)} weights looked at, {'; '.join(counts)}"
    family = families[0] if families else FLOATS
    if family == FLOATS:
        return kind
    return f"{said[family]}, as {kind}" if family in (BITS, MANTISSA) else f"{kind}, {said[family]}"


def _said(family: str, numbers: Sequence[int]) -> str:
    ends = dict.fromkeys((min(numbers), max(numbers)))
    return _SAID[family].format(" to ".join(map(str, ends)))


def _looked_at(module: nn.Module) -> list[Layer]:
    """Return a layer of every projection, of some blocks over the depth."""
    every = find_layers(module, "all", "mlp")
    blocks = sorted({one.block for one in every if one.block is not None})
    places = torch.linspace(0, len(blocks) - 1, min(_BLOCKS, len(blocks))).round().int().tolist()
    chosen = {
        (one.block, one.projection): one
        for one in reversed(every) if one.block in {blocks[place] for place in places}
    }  # fmt: skip
    return [chosen[key] for key in reversed(chosen)]


def _form(layer: Layer) -> Form:
    """Return what the first rows of a weight look like."""
    if layer.offloaded or layer.in_features < _NEIGHBOURS:
        return ABSENT if layer.offloaded else NARROW, 0
    weight = layer.weight.detach()[:_ROWS].float()
    some = _groups(weight, _NEIGHBOURS)
    if _is_afar(some):
        return AFAR, 0
    zeros, some = int((some == 0).sum(1).median()), some[(some != 0).any(1)]  # not pruned whole
    if not len(some):
        return ZEROS, zeros
    values = int(_distinct(some).median())
    even = _even_bits(weight)
    if even is not None:
        return BITS, even
    if zeros > 1 and values >= 0.9 * (_NEIGHBOURS - zeros):
        return ZEROS, zeros
    if values <= 16:
        return BITS, max(1, (values - 1).bit_length())
    mantissa = _mantissa_bits(some)
    if mantissa is not None:
        return MANTISSA, mantissa
    book = _codebook_bits(weight)
    return (FLOATS, 0) if book is None else (BITS, book)


def _groups(weight: Tensor, size: int) -> Tensor:
    """Return some neighbouring weights in ascending order, (groups, size)."""
    rows = weight[:, : weight.shape[1] // size * size].reshape(-1, size)
    return rows[:: max(1, len(rows) // 512)].sort(dim=1).values


def _distinct(ascending: Tensor) -> Tensor:
    return (ascending.diff(dim=1) > 0).sum(1) + 1


def _is_afar(some: Tensor) -> bool:
    """Tell whether neighbours are 16-bit numbers, and away from zero, all of one sign."""
    short = any(bool((some.to(one).float() == some).all()) for one in (torch.bfloat16, torch.half))
    return short and bool((some[:, 0] * some[:, -1] > 0).double().mean() > 0.5)


def _even_bits(weight: Tensor) -> int | None:
    """Return the bits of weights of which 32 or 16 neighbours are whole multiples of one step.

    Of all neighbours, or of those below a quarter of the largest: rounding to bfloat16 moves the
    largest of 8 bits by half a step, and these by an eighth.
    """
    for size in (_NEIGHBOURS, _NEIGHBOURS // 2):
        bits = _steps(_groups(weight, size), least=12, most=255, apart=0.15)
        if bits is not None:
            return bits
    some = _groups(weight, _NEIGHBOURS)
    inside = some.abs() <= some.abs().amax(1, keepdim=True) / 4
    core = some.masked_fill(~inside, torch.nan).sort(dim=1).values  # NaN comes last
    return _steps(core, least=10, most=96, apart=0.2, whole=some)


def _steps(
    ascending: Tensor, *, least: int, most: int, apart: float, whole: Tensor | None = None
) -> int | None:
    """Return the bits of groups whose values lie within ``apart`` of multiples of one step.

    Parameters
    ----------
    ascending
        Groups of values, NaN last, (groups, size).
    least
        Different ones that a group must have, so that floats are so by a chance of
        ``most`` · (2 ``apart``)^(``least`` − 2): 1e-3, or 6e-2, where 9 of 10 groups must be.
    most
        Steps from a group's smallest value to its largest.
    apart
        In steps.
    whole
        The groups that these are part of, whose width tells the bits.
    """
    whole = ascending if whole is None else whole
    enough = _distinct(ascending) >= least
    some, whole = ascending[enough], whole[enough]
    if len(some) < 8:
        return None
    low, width = some[:, :1], (some.nan_to_num(-torch.inf).amax(1, keepdim=True) - some[:, :1])
    steps = torch.arange(1, most + 1, device=some.device)
    places = ((some - low) / width)[..., None] * steps
    even = (((places - places.round()).abs() < apart) | places.isnan()).all(1)
    known = even.any(1)
    if float(known.double().mean()) <= 0.9:
        return None
    found = steps[even[known].int().argmax(1)]
    wide = (whole[known, -1] - whole[known, 0]) / width[known, 0] * found
    return min(8, int(wide.quantile(0.9).round()).bit_length())


def _mantissa_bits(some: Tensor) -> int | None:
    """Return the mantissa bits of neighbours that share a scale and are floats of 8 bits or fewer.

    A scale turns all mantissas into as many others, and rounding leaves them as many: 8 of E4M3, 4
    of E5M2. Values span more than the 16 that whole numbers with so few mantissas do.
    """
    sizes = some.abs().masked_fill(some == 0, torch.nan)
    span = sizes.nan_to_num(-torch.inf).amax(1) / sizes.nan_to_num(torch.inf).amin(1)
    mantissas = torch.frexp(sizes).mantissa.sort(dim=1).values
    count = int(_distinct(mantissas).median())
    return (count - 1).bit_length() if count <= 8 and float(span.median()) > 16 else None


def _codebook_bits(weight: Tensor) -> int | None:
    """Return the bits of a codebook of up to 256 values, of 128 neighbours, a row or all rows.

    Of n values but zero at most n / 2 are different, and at most 256; of as many bfloat16 numbers
    more are.
    """
    for some in (*((_groups(weight, 128),) if weight.shape[1] >= 128 else ()),
                 weight.sort(dim=1).values, weight.flatten().sort().values[None]):  # fmt: skip
        filled = (some != 0).sum(1)
        values = _distinct(some) - (some == 0).any(1).int()
        few = (filled >= 128) & (2 * values <= filled) & (values <= 256)
        if float(few.double().mean()) > 0.9:
            return int(values.double().quantile(0.9).round() - 1).bit_length()
    return None
