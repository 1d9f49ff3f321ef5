"""Figures from tables of results: takes frames, draws, and needs no model.

Axes-level ``plot_*`` functions draw one panel and return its axes; figure-level ``figure_*``
functions return a whole figure in the style of a paper; `save_figure` writes PDF, PNG and the CSV
of what is drawn.
"""

from entangle.plotting.ablation import figure_ablation, plot_ablation
from entangle.plotting.allocation import figure_allocation, plot_layer_profile, plot_row_sparsity
from entangle.plotting.axes import (
    plot_output_distribution,
    plot_wd_against_md,
    plot_wd_distribution,
)
from entangle.plotting.changes import (
    figure_disentanglement,
    figure_distances,
    plot_change,
    plot_distances,
)
from entangle.plotting.comparison import figure_comparison, plot_perplexity
from entangle.plotting.components import figure_components, plot_components
from entangle.plotting.expert_outputs import figure_experts, plot_experts
from entangle.plotting.figures import (
    NeuronOutput,
    figure_output_distributions,
    figure_top_and_typical,
    figure_wd_against_md,
    figure_wd_distribution,
    top_and_typical,
)
from entangle.plotting.layers import figure_wd_by_layer, plot_wd_heatmap, plot_wd_ridge
from entangle.plotting.modes import figure_modes, plot_contexts, plot_modes
from entangle.plotting.predictors import figure_predictors, plot_predictor
from entangle.plotting.router_map import figure_router_map, plot_router_map
from entangle.plotting.save import drawn, save_figure, sign
from entangle.plotting.separated import figure_separated_pairs, plot_separated_pairs
from entangle.plotting.sparse_outputs import (
    dense_output,
    figure_recovery,
    figure_sparse_outputs,
    figure_sparsities,
    plot_sparse_output,
)
from entangle.plotting.style import COLUMN_INCHES, PALETTE, paper_style

__all__ = [
    "COLUMN_INCHES",
    "PALETTE",
    "NeuronOutput",
    "dense_output",
    "drawn",
    "figure_ablation",
    "figure_allocation",
    "figure_comparison",
    "figure_components",
    "figure_disentanglement",
    "figure_distances",
    "figure_experts",
    "figure_modes",
    "figure_output_distributions",
    "figure_predictors",
    "figure_recovery",
    "figure_router_map",
    "figure_separated_pairs",
    "figure_sparse_outputs",
    "figure_sparsities",
    "figure_top_and_typical",
    "figure_wd_against_md",
    "figure_wd_by_layer",
    "figure_wd_distribution",
    "paper_style",
    "plot_ablation",
    "plot_change",
    "plot_components",
    "plot_contexts",
    "plot_distances",
    "plot_experts",
    "plot_layer_profile",
    "plot_modes",
    "plot_output_distribution",
    "plot_perplexity",
    "plot_predictor",
    "plot_router_map",
    "plot_row_sparsity",
    "plot_separated_pairs",
    "plot_sparse_output",
    "plot_wd_against_md",
    "plot_wd_distribution",
    "plot_wd_heatmap",
    "plot_wd_ridge",
    "save_figure",
    "sign",
    "top_and_typical",
]
