"""What an expansion costs and loses: one row a layer, and sums over the model."""

from collections.abc import Iterable, Mapping

import pandas as pd
from torch import nn

from entangle.expansion.build import ExpandedLayer
from entangle.models.layers import list_layers


def layer_row(expanded: ExpandedLayer) -> dict[str, object]:
    """Return one layer's row: sparsity, error, damping, clusters, and costs beside the dense ones.

    ``relative_error`` is the squared output error over the calibration tokens divided by that of a
    zero output; ``flops`` are multiplications and additions for a token of average cluster, the
    router's product with its k directions included (counted with each layer that it serves first).
    """
    layer, module, experts = expanded.layer, expanded.module, expanded.experts
    assert experts is not None  # noqa: S101
    k, rows, columns = module.weight.shape
    nonzeros = int(module.weight.count_nonzero())
    statistics = module.routing.router.statistics
    router_width = module.routing.router.centroids.shape[1]
    width = module.weight.element_size()
    kept = (module.weight != 0).sum((1, 2)).double().cpu()
    share = experts.tokens.double().cpu() / max(1, int(experts.tokens.sum()))
    return {
        "layer": layer.name,
        "block": layer.block,
        "projection": layer.projection,
        "experts": k,
        "sparsity": experts.realised_sparsity,
        "relative_error": float(experts.squared_error.sum()) / max(experts.energy, 1e-300),
        "damping": float(experts.damping.max()),
        "smallest_cluster": int(experts.tokens.min()),
        "largest_cluster": int(experts.tokens.max()),
        "effective_clusters": statistics.effective_clusters,
        "explained_variance": float(statistics.explained_variance.sum()),
        "shrunk": experts.shrunk,
        "nonzeros": nonzeros,
        "bytes": nonzeros * width + (k * rows * columns + 7) // 8,
        "flops": 2 * float((kept * share).sum()),
        "router_flops": 2 * columns * k if router_width else 0,
        "dense_weights": rows * columns,
        "dense_bytes": rows * columns * width,
    }


def model_costs(module: nn.Module, rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Return costs of the whole model as multiples of the dense one's.

    Counted are all linear layers, the head included: ``flops`` for a token (the router's included,
    once for layers that share one), stored ``nonzeros``, and stored ``bytes`` (bitmaps included).

    Parameters
    ----------
    module
        The dense model.
    rows
        From `layer_row`.
    """
    table = pd.DataFrame(list(rows))
    width = next(module.parameters()).element_size()
    dense = sum(layer.weight.numel() for layer in list_layers(module))
    if table.empty:
        return {"flops": 1.0, "nonzeros": 1.0, "bytes": 1.0}
    others = dense - int(table["dense_weights"].sum())
    shared = ["block", "router_flops", "smallest_cluster", "effective_clusters"]
    router = float(table.drop_duplicates(shared)["router_flops"].sum())
    return {
        "flops": (2 * others + float(table["flops"].sum()) + router) / (2 * dense),
        "nonzeros": (others + float(table["nonzeros"].sum())) / dense,
        "bytes": (others * width + float(table["bytes"].sum())) / (dense * width),
    }
