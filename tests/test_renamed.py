"""Import paths of the version before."""

import importlib

import pytest

from entangle._renamed import MOVED

NAMES = {
    "ablation": ["ablate", "load_ablation", "AblationResult", "select", "pruned_rows"],
    "analysis": ["predictor_table", "gmm_components", "partial_spearman"],
    "calibration": ["load_calibration", "CalibrationSet", "as_calibration"],
    "decomposition": ["decompose", "load_decomposition", "Decomposition"],
    "expansion": ["expand", "load_expanded", "ExpandedLinear"],
    "expansion.compare": ["compare", "arms", "load_comparison", "Comparison"],
    "plotting.allocation": ["figure_allocation", "plot_row_sparsity"],
    "plotting.axes": ["plot_wd_distribution", "plot_output_distribution", "output_limits"],
    "plotting.changes": ["figure_disentanglement", "figure_distances", "plot_change"],
    "plotting.components": ["figure_components", "plot_components"],
    "plotting.expert_outputs": ["figure_experts", "plot_experts"],
    "plotting.figures": ["NeuronOutput", "figure_top_and_typical", "figure_wd_distribution"],
    "plotting.router_map": ["figure_router_map", "plot_router_map"],
    "plotting.separated": ["figure_separated_pairs", "plot_separated_pairs"],
    "routing": ["Router", "fit_router"],
    "scoring.scores": ["NeuronScores", "load_scores"],
}


@pytest.mark.parametrize("old", MOVED)
def test_what_moved_is_found_with_a_note(old: str) -> None:
    module = importlib.import_module(f"entangle.{old}")
    for name in NAMES[old]:
        with pytest.warns(
            DeprecationWarning, match=rf"entangle\.{old}\.{name} is now in entangle\."
        ):
            found = getattr(module, name)
        assert found.__name__ == name


def test_what_never_was_is_not_found() -> None:
    module = importlib.import_module("entangle.ablation")
    with pytest.raises(AttributeError, match="never_was"):
        _ = module.never_was
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("entangle.never_was")
