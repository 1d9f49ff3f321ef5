"""The only place where random-number generators are made.

One integer seed gives any number of independent, named streams; no global generator is ever read
or changed. Two runs with one seed draw the same numbers.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from entangle.checks import seed_of

if TYPE_CHECKING:
    import torch


def check_seed(seed: int) -> int:
    """Return ``seed`` as an int if it is an integer in [0, 2**63), else raise `InvalidInput`."""
    return seed_of(seed)


def _sequence(seed: int, names: tuple[str | int, ...]) -> np.random.SeedSequence:
    key = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    words = np.frombuffer(key, dtype=np.uint32).tolist()
    if type(seed) is not int or not 0 <= seed < 2**63:  # one that is right is not looked at again
        seed = check_seed(seed)
    return np.random.SeedSequence(seed, spawn_key=tuple(words))


def numpy_rng(seed: int, *names: str | int) -> np.random.Generator:
    """Return the NumPy generator of the stream ``names`` under ``seed``."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, names)))


def torch_rng(seed: int, *names: str | int) -> "torch.Generator":
    """Return the CPU torch generator of the stream ``names`` under ``seed``.

    Draw on the CPU and move the result, so that one seed means the same numbers on every device.
    """
    import torch

    state = int(_sequence(seed, names).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state >> 1)
