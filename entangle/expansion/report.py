"""What an expansion costs and loses: one row a layer, and sums over the model."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
from torch import nn

from entangle.expansion.build import ExpandedLayer
from entangle.expansion.checkpoint import distinct_routers
from entangle.models.layers import list_layers


def block_rows(expanded: Sequence[ExpandedLayer]) -> list[dict[str, object]]:
    """Return the row of every layer of a block: see `layer_row`."""
    routers = distinct_routers(expanded)
    return [layer_row(one, router=routers.index(one.module.routing)) for one in expanded]


def layer_row(expanded: ExpandedLayer, *, router: int) -> dict[str, object]:
    """Return one layer's row: sparsity, error, damping, clusters, and costs beside the dense ones.

    ``relative_error`` is the squared output error over the calibration tokens divided by that of a
    zero output. ``flops`` are multiplications and additions for a token of average cluster;
    ``router_flops`` those of the router's product with its k directions. ``bytes`` are what the
    checkpoint stores of the experts, bitmaps and non-zeros; ``router_bytes`` what it stores of the
    router: mean, components and centroids, or the keys of the random control. The layers of a block
    with one number ``router`` share it, and its costs are in the row of each of them.

    Parameters
    ----------
    expanded
        A layer that was built, not read.
    router
        Number of its router within the block.
    """
    layer, module, experts = expanded.layer, expanded.module, expanded.experts
    assert experts is not None  # noqa: S101
    k, rows, columns = module.weight.shape
    nonzeros = int(module.weight.count_nonzero())
    fitted = module.routing.router
    statistics = fitted.statistics
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
        "inertia": statistics.inertia,
        "shrunk": experts.shrunk,
        "nonzeros": nonzeros,
        "bytes": nonzeros * width + (k * rows * columns + 7) // 8,
        "flops": 2 * float((kept * share).sum()),
        "router": router,
        "router_flops": 2 * columns * k if fitted.centroids.shape[1] else 0,
        "router_bytes": fitted.stored_bytes,
        "dense_weights": rows * columns,
        "dense_bytes": rows * columns * width,
    }


def model_costs(module: nn.Module, rows: Iterable[Mapping[str, object]]) -> dict[str, float]:
    """Return costs of the whole model as multiples of the dense one's.

    Counted are all linear layers, the head included: ``flops`` for a token, stored ``nonzeros`` of
    the weights, and stored ``bytes`` (bitmaps included). Routers are included in flops and bytes,
    once for layers that share one.

    Parameters
    ----------
    module
        The dense model.
    rows
        From `block_rows`.
    """
    table = pd.DataFrame(list(rows))
    width = next(module.parameters()).element_size()
    dense = sum(math.prod(layer.shape) for layer in list_layers(module))
    if table.empty:
        return {"flops": 1.0, "nonzeros": 1.0, "bytes": 1.0}
    others = dense - int(table["dense_weights"].sum())
    routers = table.drop_duplicates(["block", "router"])[["router_flops", "router_bytes"]].sum()
    flops = float(table["flops"].sum() + routers["router_flops"])
    stored = float(table["bytes"].sum() + routers["router_bytes"])
    return {
        "flops": (2 * others + flops) / (2 * dense),
        "nonzeros": (others + float(table["nonzeros"].sum())) / dense,
        "bytes": (others * width + stored) / (dense * width),
    }
