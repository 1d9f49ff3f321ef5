"""Whether a layer does what its weight and bias say."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from entangle.models.layers import Layer
from entangle.precision import accumulator_dtype, full_precision

_TOKENS = 64
_TF32 = 2.0**-10
_SUMS = 32  # roundings of float32, at most, in a sum of products
_SIGMAS = 8.0  # a sum with random signs is further off once in 10^13 tokens
_CHUNK = 4096


def is_affine(
    layer: Layer,
    inputs: Float[Tensor, "tokens in_features"],
    outputs: Float[Tensor, "tokens out_features"],
) -> bool:
    """Tell whether a layer's outputs are its weight times its inputs, plus its bias.

    Compared on 64 tokens, spread evenly, for every neuron: the root mean square of the difference
    may be what rounding makes of outputs and products in their dtype.

    Parameters
    ----------
    layer
        The layer; weights that are offloaded cannot be read, and give False.
    inputs, outputs
        What it received and gave.
    """
    if layer.offloaded:
        return False
    weight, bias = layer.weight.to(outputs.device), layer.bias
    if weight.shape != (outputs.shape[1], inputs.shape[1]):
        return False
    place = torch.linspace(0, len(inputs) - 1, min(_TOKENS, len(inputs)), device=inputs.device)
    x, y = inputs[place.long()].float(), outputs[place.long()].float()
    w = weight.float()
    b = torch.zeros(len(w), device=w.device) if bias is None else bias.to(w.device).float()
    with full_precision(), torch.no_grad():
        expected = x @ w.T + b
        products = _lengths(x, w, b)
    bound = torch.finfo(outputs.dtype).max * 0.9
    both = (expected.abs() < bound) | y.isfinite()  # 16-bit outputs overflow where these do not
    both &= ~(expected.isnan() & y.isnan())
    off = (y - expected).masked_fill(~both, 0.0)
    allowed = _eps(outputs) * _rms(expected, both) + 2 * _product_eps(outputs) * _rms(
        products, both
    )
    return bool((_rms(off, both) <= allowed + torch.finfo(torch.float32).tiny).all())


class TokenCheck:
    """Compares a layer's outputs with its weight on every token, at the cost of two columns.

    The differences of a token's outputs are added up with random signs (Freivalds, 1977): the sum
    is ``y·r - x·(Wᵀr) - b·r``, and within 8 standard deviations of what rounding can make of it
    where every output is right. One output that is further off by as much is seen on any token,
    with float32 by 6·10⁻⁵ of the length of all the token's outputs, with bfloat16 by 0.2.

    Parameters
    ----------
    layer
        The layer, whose weight is read once, now.
    """

    def __init__(self, layer: Layer) -> None:
        with full_precision(), torch.no_grad():
            weight = layer.weight.float()
            signs = torch.randint(2, weight.shape[:1], generator=torch.Generator().manual_seed(0))
            self._signs = (2.0 * signs - 1.0).to(weight.device)
            self._summed = self._signs @ weight
            double = accumulator_dtype(weight.device)  # in which no square underflows
            bias = torch.zeros_like(self._signs) if layer.bias is None else layer.bias.float()
            self._shift = bias.to(weight.device) @ self._signs
            self._columns = torch.linalg.vector_norm(weight, dim=0, dtype=double).float()
            self._offset = torch.linalg.vector_norm(bias, dtype=double).float().to(weight.device)

    def departs(
        self,
        inputs: Float[Tensor, "tokens in_features"],
        outputs: Float[Tensor, "tokens out_features"],
    ) -> Bool[Tensor, ""]:
        """Tell whether some token's outputs are not weight times input plus bias, on the device.

        Tokens with an output that is not finite are not compared.
        """
        found = torch.zeros((), dtype=torch.bool, device=outputs.device)
        rounding, products = _eps(outputs), 2 * _product_eps(outputs)  # TF32 as it is set here
        signs, summed, columns, shift, offset = (
            one.to(outputs.device)
            for one in (self._signs, self._summed, self._columns, self._shift, self._offset)
        )
        with full_precision(), torch.no_grad():
            for x16, y16 in zip(inputs.split(_CHUNK), outputs.split(_CHUNK), strict=True):
                x, y = x16.float(), y16.float()
                off = (y @ signs - x @ summed - shift).abs()
                lengths = _lengths(x, columns[None], offset[None])[:, 0]
                unit = lengths.amax().clamp_min(torch.finfo(torch.float32).tiny)
                size = torch.linalg.vector_norm(y / unit, dim=1) * unit
                bound = rounding * size + products * lengths
                found |= (off > _SIGMAS * bound + torch.finfo(torch.float32).tiny).any()
        return found


def _lengths(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return about √(Σ (w x)² + b²), scaled so that no square overflows; NaN and infinity as 0."""
    x, w, b = (one.nan_to_num(0.0, 0.0, 0.0) for one in (x, w, b))
    wide, tall = (one.abs().amax().clamp_min(torch.finfo(one.dtype).tiny) for one in (x, w))
    return ((x / wide).square() @ (w / tall).square().T).sqrt() * wide * tall + b.abs()


def _eps(outputs: Tensor) -> float:
    return max(torch.finfo(outputs.dtype).eps, torch.finfo(torch.float32).eps)


def _product_eps(outputs: Tensor) -> float:
    """Return the relative rounding error of a sum of products, of typical size."""
    if outputs.element_size() == 2:
        return _eps(outputs)
    fast = outputs.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return _TF32 if fast else _SUMS * _eps(outputs)


def _rms(values: Tensor, counted: Tensor) -> Tensor:
    """Return each neuron's root mean square over the tokens that are counted."""
    values = values.masked_fill(~counted, 0.0).to(accumulator_dtype(values.device))
    return (values.square().sum(0) / counted.sum(0).clamp_min(1)).sqrt()
