"""Experts one by one, super experts, and whether neurons of high WD lie in those.

A super expert puts out a few enormous numbers (arXiv 2507.23279), which the attention to the first
token rests upon.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from entangle.checks import share
from entangle.errors import InvalidInput
from entangle.mixtures.methods import MIXTURE_METHODS
from entangle.mixtures.statistics import Mixture, Statistics
from entangle.models.layers import find_blocks, list_layers
from entangle.results.scores import NeuronScores

QUANTILE, PART, DEPTH = 0.995, 0.1, 0.75
"""A super expert's peak is above this quantile of all experts' and above this part of the largest;
it lies in this share of the blocks, from the first one on."""
_SCORED = ("frequency", "ean", "reap", "man", "msan", "easy-ep", "mone")


def expert_table(statistics: Statistics) -> pd.DataFrame:
    """Return what every expert does on the text.

    Parameters
    ----------
    statistics
        From `entangle.mixtures.gather`.

    Returns
    -------
    pandas.DataFrame
        One row an expert: mixture, block, expert, tokens (that it is sent), gate (mean routing
        weight of those; NaN where the mixture does not tell), peak (largest absolute output of its
        ``down_proj``), super (whether it is a super expert), and a column for every method that has
        a number an expert (`entangle.mixtures.MIXTURE_METHODS`), the lowest of which go first; NaN
        where the mixture does not tell what the method needs.

    Raises
    ------
    InvalidInput
        If an expert's outputs are not finite.

    References
    ----------
    arXiv 2507.23279 looks at the first token that an expert is sent; here are all.
    """
    module = statistics.model.module
    blocks = {layer.name.rpartition(".")[0]: layer.block for layer in list_layers(module)}
    parts = [_rows(one, blocks.get(f"{one.name}.0")) for one in statistics.mixtures]
    table = pd.concat(parts, ignore_index=True).astype({"block": "Int64"})
    peaks = table["peak"].to_numpy(np.float64)
    if len(wrong := table[~np.isfinite(peaks)]):
        first = wrong.iloc[0]
        raise InvalidInput(
            f"outputs of expert {first['expert']} of {first['mixture']!r} must be finite, or none "
            "is the largest; mend the model."
        )
    depth = table["block"].fillna(0).to_numpy(np.float64) + 1
    early = depth <= DEPTH * len(find_blocks(module)[1])
    large = (peaks > np.quantile(peaks, QUANTILE)) & (peaks > PART * peaks.max())
    table.insert(5, "super", large & early)
    return table


def _rows(mixture: Mixture, block: int | None) -> pd.DataFrame:
    unknown = torch.full_like(mixture.counts, torch.nan)
    gates = mixture.mean(mixture.gates) if mixture.gates_known else unknown
    columns = {
        "mixture": mixture.name, "block": block, "expert": range(mixture.n_experts),
        "tokens": mixture.counts.long(),
        "gate": torch.where(mixture.counts > 0, gates, torch.nan), "peak": mixture.peak,
    }  # fmt: skip
    for name in _SCORED:
        try:
            columns[name] = MIXTURE_METHODS[name].score(mixture)
        except InvalidInput:  # the mixture does not tell
            columns[name] = unknown
    return pd.DataFrame(columns)


def super_overlap(table: pd.DataFrame, scores: NeuronScores, *, top: float = 0.03) -> pd.DataFrame:
    """Return how many of the neurons of highest WD lie in super experts.

    Parameters
    ----------
    table
        From `expert_table`, of the same model.
    scores
        Of the experts' layers; those without a score do not count.
    top
        Share of the experts' neurons of a projection, over all mixtures, that are the top ones, by
        WD above the Gaussian floor of their own number of tokens.

    Returns
    -------
    pandas.DataFrame
        One row a super expert and projection: mixture, expert, projection, neurons, tops (those
        among the top ones), top_share (tops / neurons), chance (``top``), others (median top_share
        of the other experts of the mixture that have scores), rank (of its top_share among all
        experts with scores of the model, 1 the largest, ties at their best), experts (as many).

    Raises
    ------
    InvalidInput
        If the scores hold no neuron of an expert with a score.
    """
    top, known = share("top", top), scored_neurons(scores, table["mixture"])
    limit = known.groupby("projection")["above"].transform(lambda one: one.quantile(1 - top))
    known = known.assign(is_top=known["above"] > limit, expert=known["expert"].astype(int))
    keys = ["projection", "mixture", "expert"]
    each = known.groupby(keys, sort=False)["is_top"].agg(neurons="size", tops="sum").reset_index()
    each["top_share"] = each["tops"] / each["neurons"]
    rows = []
    chosen = table[table["super"]]
    for mixture, expert in zip(chosen["mixture"], chosen["expert"], strict=True):
        for projection, part in each.groupby("projection", sort=False):
            own = (part["mixture"] == mixture) & (part["expert"] == expert)
            if own.any():
                beside = part[(part["mixture"] == mixture) & ~own]["top_share"]
                mine = part[own].iloc[0]
                rows.append(
                    {
                        "mixture": mixture, "expert": expert, "projection": projection,
                        "neurons": mine["neurons"], "tops": mine["tops"],
                        "top_share": mine["top_share"], "chance": top, "others": beside.median(),
                        "rank": 1 + int((part["top_share"] > mine["top_share"]).sum()),
                        "experts": len(part),
                    }
                )  # fmt: skip
    names = ("mixture", "expert", "projection", "neurons", "tops", "top_share", "chance", "others",
             "rank", "experts")  # fmt: skip
    return pd.DataFrame(rows, columns=list(names))


def scored_neurons(scores: NeuronScores, mixtures: Iterable[str]) -> pd.DataFrame:
    """Return the neurons of mixtures' experts that have a score, with their place and floor.

    Returns
    -------
    pandas.DataFrame
        Rows of the scores with the columns mixture, expert (its number as text), null_floor and
        above (WD above it).

    Raises
    ------
    InvalidInput
        If there is none.
    """
    neurons = scores.frame.merge(scores.layers[["layer", "null_floor"]], on="layer")
    found = neurons["layer"].str.extract(r"^(?P<mixture>.*)\.(?P<expert>\d+)\.\w+$")
    neurons = neurons.assign(**found, above=neurons["wd"] - neurons["null_floor"])
    known = neurons[neurons["mixture"].isin(list(mixtures)) & neurons["above"].notna()]
    if known.empty:
        raise InvalidInput(
            "the scores must hold neurons of the mixtures' experts; these have none with a score: "
            "score them with --proj experts, on text enough."
        )
    return known
