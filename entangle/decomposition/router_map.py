"""Where tokens lie on the first two principal components of a layer's inputs."""

import numpy as np
import pandas as pd
import torch

from entangle.ablation.row_measures import Clusters
from entangle.recording.stream import TokenStore
from entangle.routing.blocks import fixed_blocks
from entangle.routing.pca import fit_pca
from entangle.seeding import numpy_rng

MOST_TOKENS = 5000
"""Tokens on a map."""


class RouterMap:
    """A sample of tokens on two components.

    Parameters
    ----------
    inputs
        A layer's inputs, (tokens, in_features).
    device
        Where the components are computed.
    seed
        Of the sample.
    """

    def __init__(self, inputs: TokenStore, device: torch.device, *, seed: int) -> None:
        rng, n = numpy_rng(seed, "router map"), inputs.n_tokens
        drawn = rng.choice(n, size=min(n, MOST_TOKENS), replace=False)
        self._positions = torch.from_numpy(np.sort(drawn))
        features = inputs.span(0, 1).shape[1]
        pca = fit_pca(fixed_blocks(inputs, device=device), min(2, features))
        tokens = inputs.take(self._positions).to(device, torch.float32)
        places = pca.project(tokens).cpu().double().numpy()
        self._x = places[:, 0]
        self._y = places[:, 1] if features > 1 else np.zeros(len(places))

    def rows(self, clusters: Clusters) -> pd.DataFrame:
        """Return experts, position, x, y, cluster of every token on the map."""
        return pd.DataFrame(
            {
                "experts": len(clusters.sizes),
                "position": self._positions.numpy(),
                "x": self._x,
                "y": self._y,
                "cluster": clusters.labels.cpu()[self._positions].numpy(),
            }
        )
