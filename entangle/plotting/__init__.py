"""Figures from tables of results: takes frames, draws, and needs no model.

Axes-level ``plot_*`` functions draw one panel and return its axes, as `PlotOptions` want it;
figure-level ``figure_*`` functions call them and return a whole figure in the style of a paper, as
`FigureOptions` want it; `save_figure` writes PDF, PNG, captions and the CSV of what is drawn.
matplotlib is imported with the first name that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entangle.plotting.ablation import figure_ablation, plot_ablation
    from entangle.plotting.allocation import (
        figure_allocation,
        plot_layer_profile,
        plot_row_sparsity,
    )
    from entangle.plotting.anchor import figure_anchor, plot_anchor
    from entangle.plotting.clusters import (
        figure_disentanglement,
        figure_router_map,
        plot_change,
        plot_router_map,
    )
    from entangle.plotting.comparison import (
        figure_comparison,
        figure_density,
        figure_expansion,
        plot_costs,
        plot_perplexity,
    )
    from entangle.plotting.difference import (
        figure_difference,
        plot_change_errors,
        plot_rank_agreement,
        plot_two_runs,
    )
    from entangle.plotting.expert_outputs import figure_experts, plot_experts
    from entangle.plotting.layers import figure_wd_by_layer, plot_wd_heatmap, plot_wd_ridge
    from entangle.plotting.modes import figure_modes, plot_contexts, plot_modes
    from entangle.plotting.options import FigureOptions, PlotOptions, shared_names
    from entangle.plotting.outputs import (
        NeuronOutput,
        figure_output_distributions,
        figure_top_and_typical,
        plot_output_distribution,
        top_and_typical,
    )
    from entangle.plotting.pairs import (
        figure_distances,
        figure_separated_pairs,
        plot_distances,
        plot_pair_contexts,
        plot_separated_pairs,
    )
    from entangle.plotting.predictors import (
        figure_components,
        figure_predictors,
        plot_components,
        plot_predictor,
    )
    from entangle.plotting.routing import figure_routing, plot_routing_drop, plot_wd_inside
    from entangle.plotting.save import caption_of, drawn, save_figure, sign
    from entangle.plotting.scores import (
        figure_wd_against_md,
        figure_wd_distribution,
        plot_wd_against_md,
        plot_wd_distribution,
    )
    from entangle.plotting.sparse_outputs import (
        figure_recovery,
        figure_sparse_outputs,
        figure_sparsities,
        plot_sparse_output,
    )
    from entangle.plotting.study import (
        figure_evidence,
        figure_trace,
        figure_verdicts,
        plot_evidence,
        plot_trace,
        plot_verdicts,
    )
    from entangle.plotting.style import COLUMN_INCHES, PALETTE, paper_style
    from entangle.plotting.summaries import dense_output

_HOMES = {
    "ablation": ("figure_ablation", "plot_ablation"),
    "clusters": ("figure_disentanglement", "figure_router_map", "plot_change", "plot_router_map"),
    "comparison": (
        "figure_comparison", "figure_density", "figure_expansion", "plot_costs", "plot_perplexity",
    ),
    "anchor": ("figure_anchor", "plot_anchor"),
    "difference": (
        "figure_difference", "plot_change_errors", "plot_rank_agreement", "plot_two_runs",
    ),
    "allocation": ("figure_allocation", "plot_layer_profile", "plot_row_sparsity"),
    "expert_outputs": ("figure_experts", "plot_experts"),
    "layers": ("figure_wd_by_layer", "plot_wd_heatmap", "plot_wd_ridge"),
    "modes": ("figure_modes", "plot_contexts", "plot_modes"),
    "outputs": (
        "NeuronOutput", "figure_output_distributions", "figure_top_and_typical",
        "plot_output_distribution", "top_and_typical",
    ),
    "pairs": (
        "figure_distances", "figure_separated_pairs", "plot_distances", "plot_pair_contexts",
        "plot_separated_pairs",
    ),
    "predictors": ("figure_components", "figure_predictors", "plot_components", "plot_predictor"),
    "options": ("FigureOptions", "PlotOptions", "shared_names"),
    "routing": ("figure_routing", "plot_routing_drop", "plot_wd_inside"),
    "save": ("caption_of", "drawn", "save_figure", "sign"),
    "scores": (
        "figure_wd_against_md", "figure_wd_distribution", "plot_wd_against_md",
        "plot_wd_distribution",
    ),
    "summaries": ("dense_output",),
    "sparse_outputs": (
        "figure_recovery", "figure_sparse_outputs", "figure_sparsities", "plot_sparse_output",
    ),
    "study": (
        "figure_evidence", "figure_trace", "figure_verdicts", "plot_evidence", "plot_trace",
        "plot_verdicts",
    ),
    "style": ("COLUMN_INCHES", "PALETTE", "paper_style"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


__all__ = [
    "COLUMN_INCHES",
    "PALETTE",
    "FigureOptions",
    "NeuronOutput",
    "PlotOptions",
    "caption_of",
    "dense_output",
    "drawn",
    "figure_ablation",
    "figure_allocation",
    "figure_anchor",
    "figure_comparison",
    "figure_components",
    "figure_density",
    "figure_difference",
    "figure_disentanglement",
    "figure_distances",
    "figure_evidence",
    "figure_expansion",
    "figure_experts",
    "figure_modes",
    "figure_output_distributions",
    "figure_predictors",
    "figure_recovery",
    "figure_router_map",
    "figure_routing",
    "figure_separated_pairs",
    "figure_sparse_outputs",
    "figure_sparsities",
    "figure_top_and_typical",
    "figure_trace",
    "figure_verdicts",
    "figure_wd_against_md",
    "figure_wd_by_layer",
    "figure_wd_distribution",
    "paper_style",
    "plot_ablation",
    "plot_anchor",
    "plot_change",
    "plot_change_errors",
    "plot_components",
    "plot_contexts",
    "plot_costs",
    "plot_distances",
    "plot_evidence",
    "plot_experts",
    "plot_layer_profile",
    "plot_modes",
    "plot_output_distribution",
    "plot_pair_contexts",
    "plot_perplexity",
    "plot_predictor",
    "plot_rank_agreement",
    "plot_router_map",
    "plot_routing_drop",
    "plot_row_sparsity",
    "plot_separated_pairs",
    "plot_sparse_output",
    "plot_trace",
    "plot_two_runs",
    "plot_verdicts",
    "plot_wd_against_md",
    "plot_wd_distribution",
    "plot_wd_heatmap",
    "plot_wd_inside",
    "plot_wd_ridge",
    "save_figure",
    "shared_names",
    "sign",
    "top_and_typical",
]
