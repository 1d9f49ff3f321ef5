from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from entangle.experts.expand import expand, model_costs
from entangle.models.layers import list_layers
from entangle.models.loading import LanguageModel
from entangle.texts.calibration_set import CalibrationSet

Tiny = Callable[[str], LanguageModel]


def stored(folder: Path, *, router: bool) -> int:
    """Return the bytes of a checkpoint's tensors as they run: routers, or experts."""
    total = 0
    for path in folder.glob("block-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ("_router." in name) == router:
                    tensor: torch.Tensor = file.get_tensor(name)
                    total += tensor.numel() * tensor.element_size()
    return total


@pytest.mark.parametrize("router", ["kmeans", "random"])
def test_bytes_are_those_of_the_checkpoint(
    router: str, tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    model = tiny("llama")
    found = expand(
        model, calibration, experts=3, restarts=1, router=router, out=tmp_path / "x",
        progress=False,
    )  # fmt: skip
    table = found.layers
    routers = table.drop_duplicates(["block", "router"])
    assert len(routers) == 6  # one of gate and up, one of down, in 3 blocks
    assert routers["router_bytes"].sum() == stored(tmp_path / "x", router=True) > 0
    assert table["bytes"].sum() == stored(tmp_path / "x", router=False)
    linears = sum(layer.weight.numel() for layer in list_layers(model.module))
    others = linears - int(table["dense_weights"].sum())
    stored_bytes = 4 * others + stored(tmp_path / "x", router=True)
    stored_bytes += stored(tmp_path / "x", router=False)
    assert found.costs["bytes"] == pytest.approx(stored_bytes / (4 * linears), rel=1e-12)


def test_one_expert_needs_no_router(tiny: Tiny, calibration: CalibrationSet) -> None:
    table = expand(tiny("llama"), calibration, experts=1, progress=False).layers
    assert table[["router_bytes", "router_flops"]].eq(0).all(axis=None)
    assert table["inertia"].isna().all()


def test_routers_that_differ_are_counted_each_and_shared_ones_once(tiny: Tiny) -> None:
    row: dict[str, Any] = {
        "layer": "0", "block": 0, "router": 0, "router_flops": 8.0, "router_bytes": 100,
        "flops": 20.0, "nonzeros": 10, "bytes": 50, "dense_weights": 20, "dense_bytes": 80,
    }  # fmt: skip
    module = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Linear(5, 8))  # 80 weights

    def costs(*changes: dict[str, Any]) -> dict[str, float]:
        return model_costs(module, [row | change for change in changes])

    shared = costs({}, {})
    assert shared["flops"] == pytest.approx((2 * 40 + 2 * 20 + 8) / 160)
    assert shared["bytes"] == pytest.approx((4 * 40 + 2 * 50 + 100) / 320)
    assert shared["nonzeros"] == pytest.approx((40 + 2 * 10) / 80)
    for other in ({"router": 1.0}, {"block": 1.0}):
        found = costs({}, other)
        assert found["flops"] == pytest.approx((2 * 40 + 2 * 20 + 16) / 160)
        assert found["bytes"] == pytest.approx((4 * 40 + 2 * 50 + 200) / 320)


def test_the_layer_table_reports_the_clusters(tiny: Tiny, calibration: CalibrationSet) -> None:
    table = expand(tiny("llama"), calibration, experts=3, restarts=1, progress=False).layers
    tokens = calibration.ids.numel()
    assert table["smallest_cluster"].between(1, tokens // 3).all()
    assert table["largest_cluster"].between(tokens // 3, tokens).all()
    assert table["effective_clusters"].between(1, 3).all()
    assert table["explained_variance"].between(0, 1).all()
    assert (table["inertia"] > 0).all()
    assert pd.api.types.is_float_dtype(table["damping"])
