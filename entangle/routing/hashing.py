"""Random clusters that are a function of the token: a keyed hash of its float32 bits.

The control must give each token a cluster that says nothing about where the token lies, and the
same vector the same cluster every time. A random projection or a hyperplane code would keep
neighbours together; a draw per token would not be repeatable. A hash does both: one flipped bit of
one feature gives an unrelated cluster. Clusters are equally likely, so their sizes over distinct
tokens are binomial, n/k with a standard deviation of √(n/k · (1 − 1/k)).

Its weakness: it sees bits, not values. A token computed again in another batch shape, dtype or
machine usually differs in its last bits and then goes to another cluster, so the experts' own
calibration tokens reach them again only where the activations are reproduced exactly. And tokens
that are the same vector (the first token of every sequence) stay together.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.seeding import numpy_rng

_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shift and multiplier of splitmix64's finaliser."""


def hash_key(features: int, *, seed: int) -> Int64[Tensor, " features"]:
    """Draw the odd 64-bit multipliers of the hash, one per feature."""
    rng = numpy_rng(seed, "routing", "hash")
    return torch.from_numpy(rng.integers(-(2**63), 2**63, size=features) | 1)


def hash_clusters(
    x: Float[Tensor, "tokens features"], key: Int64[Tensor, " features"], *, k: int
) -> Int64[Tensor, " tokens"]:
    """Give every token the cluster in [0, k) that its bits hash to.

    The sum over features is exact integer arithmetic modulo 2**64, hence the same in any order;
    splitmix64's finaliser then spreads it over all bits. -0.0 counts as 0.0.
    """
    bits = (x.float() + 0.0).view(torch.int32).to(torch.int64)
    mixed = (bits * key).sum(-1)
    for shift, multiplier in _MIX:
        mixed = (mixed ^ _shift_right(mixed, shift)) * (multiplier - 2**64)
    return (_shift_right(mixed ^ _shift_right(mixed, 31), 33) * k) >> 31


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
