"""Dictionaries of a layer's inputs: fitted, coded with, and what a neuron reads of them.

An input is written as a sum of few atoms, x ≈ centre + Σ c_a d_a with c_a ≥ 0. A neuron of weight
w then sees Σ c_a (w · d_a): it reads the atom a with energy q_a = E[c_a²] (w · d_a)². Products of
two atoms are left out of that account.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from entangle.checks import finite, whole
from entangle.errors import InvalidInput
from entangle.precision import accumulator_dtype
from entangle.seeding import torch_rng

Points = Float[Tensor, "tokens features"]
_BATCH = 64


@runtime_checkable
class Dictionary(Protocol):
    """What writes inputs as sums of atoms."""

    @property
    def atoms(self) -> Float[Tensor, "atoms features"]:
        """The atoms."""

    def codes(self, points: Points) -> Float[Tensor, "tokens atoms"]:
        """Return how much of every atom is in every input."""

    def rebuilt(self, codes: Float[Tensor, "tokens atoms"]) -> Points:
        """Return the inputs that codes stand for."""


@dataclass(frozen=True, eq=False)
class PursuitDictionary:
    """Unit atoms, coded with by matching pursuit."""

    atoms: Float[Tensor, "atoms features"]
    """Unit vectors."""
    centre: Float[Tensor, " features"]
    """Taken from every input before."""
    active: int
    """Steps of the pursuit: the largest number of atoms of an input."""

    def codes(self, points: Points) -> Float[Tensor, "tokens atoms"]:
        """Return how much of every atom is in every input; see `pursue`."""
        return pursue(points - self.centre, self.atoms, self.active)

    def rebuilt(self, codes: Float[Tensor, "tokens atoms"]) -> Points:
        """Return the inputs that codes stand for."""
        return codes @ self.atoms + self.centre


def pursue(
    points: Points,
    atoms: Float[Tensor, "atoms features"],
    active: int,
    *,
    gram: Float[Tensor, "atoms atoms"] | None = None,
) -> Float[Tensor, "tokens atoms"]:
    """Code points by matching pursuit.

    Each step takes the unit atom that points most along what is left (never against it), as much
    of it as is there, and goes on with the rest; it ends where no atom points along the rest.

    Parameters
    ----------
    points
        What to code.
    atoms
        Unit vectors.
    active
        Steps.
    gram
        Products of the atoms, where they are known.

    Returns
    -------
    torch.Tensor
        Non-negative codes; an atom that is taken twice has the sum.

    References
    ----------
    Mallat and Zhang, Matching pursuits with time-frequency dictionaries, 1993; with the largest
    product instead of the largest magnitude, as in arXiv 2506.03093.
    """
    along = points @ atoms.mT
    codes = torch.zeros_like(along)
    if not atoms.shape[0]:
        return codes
    products = atoms @ atoms.mT if gram is None else gram
    for _ in range(active):
        amount, place = along.max(dim=1, keepdim=True)
        amount = amount.clamp_min(0)
        if not amount.any():
            break
        codes.scatter_add_(1, place, amount)
        along -= amount * products[place[:, 0]]
    return codes


@dataclass(frozen=True, eq=False)
class Chosen:
    """Tokens whose inputs are the atoms of a dictionary."""

    rows: Int64[Tensor, " atoms"]
    """Their indices, as they were taken."""
    seen: int
    """Tokens looked at until the dictionary was full, or all."""


def fit_itda(points: Points, *, atoms: int, active: int, threshold: float, seed: int = 0) -> Chosen:
    """Choose tokens for a dictionary: those that the tokens before cannot be written with.

    Tokens come in a random order. Each is coded with what is chosen so far; if the squared error is
    more than ``threshold`` of its squared length, it becomes an atom. Of tokens that are looked at
    together (64), one that an earlier one of them alone would explain does not.

    Parameters
    ----------
    points
        Centred inputs.
    atoms
        Most atoms.
    active
        Steps of the pursuit, `pursue`.
    threshold
        Share in (0, 1).
    seed
        Of the order.

    Raises
    ------
    InvalidInput
        If a setting is out of range, or no point has a length.

    References
    ----------
    arXiv 2505.17769 (inference-time decomposition of activations).
    """
    atoms, active = whole("atoms", atoms, least=1), whole("active", active, least=1)
    threshold = finite("threshold", threshold, least=0.0)
    if not 0 < threshold < 1:
        raise InvalidInput(f"`threshold` must lie in (0, 1); got {threshold}.")
    lengths = points.norm(dim=1)
    order = torch.randperm(len(points), generator=torch_rng(seed, "itda")).to(points.device)
    order = order[lengths[order] > 0]
    kept = points.new_empty(atoms, points.shape[1])
    gram, rows, seen = points.new_zeros(atoms, atoms), list[int](), 0
    for some in order.split(_BATCH):
        count, unit = len(rows), points[some] / lengths[some, None]
        own = kept[:count]
        codes = pursue(unit, own, active, gram=gram[:count, :count])
        strange = (unit - codes @ own).square().sum(1) > threshold
        fresh = _apart(unit[strange], threshold)[: atoms - count]
        end = count + len(fresh)
        kept[count:end] = unit[strange][fresh]
        gram[:end, count:end] = kept[:end] @ kept[count:end].mT
        gram[count:end, :count] = gram[:count, count:end].mT
        rows += some[strange][fresh].tolist()
        seen += len(some)
        if len(rows) == atoms:
            break
    if not rows:
        raise InvalidInput("no input differs from the mean of all, so that there is nothing to fit")
    return Chosen(torch.tensor(rows, dtype=torch.int64), seen)


def _apart(unit: Points, threshold: float) -> Int64[Tensor, " kept"]:
    """Return which of some unit vectors no earlier one that is kept explains by itself."""
    cosines = (unit @ unit.mT).clamp_min(0).square().cpu()
    kept: list[int] = []
    for row in range(len(unit)):
        if not kept or float(cosines[row, kept].max()) < 1 - threshold:
            kept.append(row)
    return torch.tensor(kept, dtype=torch.int64, device=unit.device)


def random_tokens(points: Points, *, atoms: int, seed: int = 0) -> Chosen:
    """Choose tokens at random, of those whose centred input has a length; the control of ITDA."""
    able = points.norm(dim=1).nonzero()[:, 0].cpu()
    drawn = torch.randperm(len(able), generator=torch_rng(seed, "random dictionary"))[:atoms]
    return Chosen(able[drawn], len(able))


def principal_atoms(points: Points, *, atoms: int) -> Float[Tensor, "atoms features"]:
    """Return the leading principal directions of centred inputs and their opposites.

    Two atoms a direction, since codes are not negative: ``atoms`` of them, at most twice the
    features.
    """
    wide = points.to(accumulator_dtype(points.device))
    _, directions = torch.linalg.eigh(wide.mT @ wide)
    leading = directions.mT.flip(0)[: (atoms + 1) // 2].to(points.dtype)
    return torch.stack([leading, -leading], dim=1).flatten(0, 1)[:atoms]


@dataclass(frozen=True, eq=False)
class Coding:
    """How a dictionary writes some inputs."""

    energy: Float[Tensor, " atoms"]
    """E[c_a²] over the inputs."""
    unexplained: float
    """Squared error over the squared distances of the inputs from their mean."""
    active: float
    """Mean number of atoms of an input."""
    used: int
    """Atoms that any input has."""


def measure_coding(dictionary: Dictionary, blocks: Iterable[Points]) -> Coding:
    """Code inputs block by block.

    Raises
    ------
    InvalidInput
        If there are fewer than 2 inputs.
    """
    wide = accumulator_dtype(dictionary.atoms.device)
    energy = torch.zeros(len(dictionary.atoms), dtype=wide, device=dictionary.atoms.device)
    total, squares = torch.zeros_like(dictionary.atoms[0], dtype=wide), 0.0
    lost, active, count = 0.0, 0, 0
    first: Tensor | None = None
    for points in blocks:
        codes = dictionary.codes(points)
        energy += codes.to(wide).square().sum(0)
        lost += float((points - dictionary.rebuilt(codes)).to(wide).square().sum())
        active += int((codes != 0).sum())
        first = points[0] if first is None else first
        moved = (points - first).to(wide)  # about a point of the cloud: no cancellation
        total += moved.sum(0)
        squares += float(moved.square().sum())
        count += len(points)
    if count < 2:
        raise InvalidInput(f"a dictionary is measured on at least 2 inputs; got {count}.")
    spread = squares - float(total.square().sum()) / count
    return Coding(
        energy=energy / count,
        unexplained=lost / spread if spread > 0 else float("nan"),
        active=active / count,
        used=int((energy > 0).sum()),
    )


def shares_read(
    weight: Float[Tensor, "neurons features"], dictionary: Dictionary, coding: Coding
) -> Float[Tensor, "neurons atoms"]:
    """Return which share of a neuron's energy comes from every atom; NaN where it reads none."""
    wide = coding.energy.dtype
    read = weight.to(coding.energy) @ dictionary.atoms.to(wide).mT
    energy = coding.energy * read.square()
    return energy / energy.sum(1, keepdim=True)


def participation(shares: Float[Tensor, "neurons atoms"]) -> Float[Tensor, " neurons"]:
    """Return how many atoms a neuron reads: (Σ q)² / Σ q², from 1 to their number."""
    return 1 / shares.square().sum(1)


def entropy(shares: Float[Tensor, "neurons atoms"]) -> Float[Tensor, " neurons"]:
    """Return the entropy in nats of what a neuron reads, from 0 to log of the atoms' number."""
    found: Tensor = torch.special.entr(shares).sum(1)
    return found
