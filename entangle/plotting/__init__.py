"""Figures from tables of results: takes frames, draws, and needs no model.

Axes-level ``plot_*`` functions draw one panel and return its axes; figure-level ``figure_*``
functions return a whole figure in the style of a paper; `save_figure` writes PDF, PNG and the CSV
of what is drawn.
"""

from entangle.plotting.ablation import figure_ablation, plot_ablation
from entangle.plotting.axes import (
    plot_output_distribution,
    plot_wd_against_md,
    plot_wd_distribution,
)
from entangle.plotting.comparison import figure_comparison, plot_perplexity
from entangle.plotting.figures import (
    NeuronOutput,
    figure_output_distributions,
    figure_top_and_typical,
    figure_wd_against_md,
    figure_wd_distribution,
    top_and_typical,
)
from entangle.plotting.save import drawn, save_figure
from entangle.plotting.style import COLUMN_INCHES, PALETTE, paper_style

__all__ = [
    "COLUMN_INCHES",
    "PALETTE",
    "NeuronOutput",
    "drawn",
    "figure_ablation",
    "figure_comparison",
    "figure_output_distributions",
    "figure_top_and_typical",
    "figure_wd_against_md",
    "figure_wd_distribution",
    "paper_style",
    "plot_ablation",
    "plot_output_distribution",
    "plot_perplexity",
    "plot_wd_against_md",
    "plot_wd_distribution",
    "save_figure",
    "top_and_typical",
]
