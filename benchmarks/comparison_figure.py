"""Draw tables of pruned and of masked models: ``python -m benchmarks.comparison_figure FOLDER``.

``docs/data/comparison_wikitext2.csv`` holds what docs/LOG.md reports (perplexities, their
ratios to dense, intervals). Stored non-zeros and FLOPs follow from the shape of the model:
30 blocks of three 576 x 1536 matrices, 0.592 of its 134,515,008 weights, are pruned, experts
are stored side by side, and a router takes 0.0076 of the dense FLOPs.
``docs/data/rivals_mlp.csv`` is what `benchmarks.rivals` measured on a GPU, columns left out, and
``docs/data/claims.csv`` what `entangle study` found on four models: four claims' main comparisons.
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from entangle.plotting import figure_comparison, figure_density, figure_evidence, save_figure

TABLE = Path(__file__).parent.parent / "docs" / "data" / "comparison_wikitext2.csv"
RIVALS = TABLE.with_name("rivals_mlp.csv")
CLAIMS = TABLE.with_name("claims.csv")
PRUNED, ROUTER = 30 * 3 * 576 * 1536 / 134_515_008, 0.0076


def comparison() -> pd.DataFrame:
    """Return the table as `entangle.compare` would give it."""
    frame = pd.read_csv(TABLE)
    kept = PRUNED * (1.0 - frame["sparsity"])
    return frame.assign(
        nonzeros=1.0 - PRUNED + kept * frame["experts"],
        flops=1.0 - PRUNED + kept + ROUTER * (frame["experts"] > 1),
    )


SAID = {
    "weighted-wd": ("WD falls inside clusters", "share by which the top rows' WD falls"),
    "expansion": ("an expansion at 70 % zeros", "perplexity, SparseGPT / expansion"),
    "pruning": ("what pruning them costs", "perplexity, top / random rows pruned"),
    "clamp": ("what clamping them costs", "perplexity, top / random rows clamped"),
}


def claims() -> Figure:
    """Return the numbers of four claims on four models, said in words."""
    numbers = pd.read_csv(CLAIMS)
    models = list(dict.fromkeys(numbers["model"]))
    figure = figure_evidence(numbers)
    for legend in figure.legends:
        legend.remove()
    for ax, (claim, (title, label)) in zip(figure.axes, SAID.items(), strict=True):
        for words in (ax.title, ax._left_title, *ax.texts):  # type: ignore[attr-defined]
            if words.get_text() == claim:
                words.set_text(title)
        ax.set(xlabel=label, ylabel="")
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        unknown = numbers[(numbers["claim"] == claim) & numbers["value"].isna()]
        for model in unknown["model"]:
            ax.text(
                0.5, models.index(model), "not measured", color="0.45", size="small", ha="center",
                va="center", transform=ax.get_yaxis_transform(),
            )  # fmt: skip
    return figure


if __name__ == "__main__":
    figure = figure_comparison(
        comparison(),
        text="WikiText-2, 152 windows of 2,048 tokens",
        title="SmolLM2-135M-Instruct",
    )
    save_figure(figure, Path(sys.argv[1]) / "comparison", formats="png", force=True)
    figure = figure_density(
        pd.read_csv(RIVALS),
        text="98 Wikipedia articles, 40 windows of 2,048 tokens",
        title="SmolLM2-135M-Instruct",
    )
    save_figure(figure, Path(sys.argv[1]) / "density", formats="png", force=True)
    save_figure(claims(), Path(sys.argv[1]) / "claims", formats="png", force=True)
