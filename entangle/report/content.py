"""What a report holds: numbers of all neurons, and whole pages of those that stand out."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entangle.checks import share, whole
from entangle.errors import InvalidInput, visible
from entangle.plotting.style import KNOWN_NAMES
from entangle.report.histograms import BARS, SPAN, bars, exact_bars
from entangle.report.packing import Packed, pack, pack_table, pack_texts
from entangle.report.runs import Run, Runs
from entangle.results.scores import NeuronScores
from entangle.runs.tables import described
from entangle.stats.edges import SAVED_FOLD, signed_edges

if TYPE_CHECKING:
    from entangle.report.evidence import Evidence

Neurons = float | int | str
"""How many neurons of a layer have a whole page: a share, a number, or ``all``."""

SHARE = 0.03
"""Of the neurons of a layer, by WD, as in arXiv 2405.15756."""

COLUMNS: Mapping[str, tuple[str, str, str]] = {
    "wd": ("WD", "σ", "Wasserstein distance of the standardised outputs from a Gaussian"),
    "wd_se": ("± se", "σ", "standard error of WD"),
    "wd_bound": ("bound", "σ", "largest error of WD through rounding and the histogram's bins"),
    "ks": ("KS", "", "Kolmogorov–Smirnov distance from the Gaussian, 0 to 1"),
    "skewness": ("skew", "", "skewness of the outputs; 0 for a Gaussian"),
    "excess_kurtosis": ("kurt", "", "excess kurtosis of the outputs; 0 for a Gaussian"),
    "md": (
        "MD",
        "",
        "mapping difficulty: how far apart pairs of inputs go out, for their nearness",
    ),
    "mean": ("mean", "", "mean output, in its own units"),
    "std": ("std", "", "standard deviation of the outputs, in their own units"),
    "positive": ("> 0", "share", "share of the tokens with an output above zero, by the histogram"),
    "weight_norm": ("norm", "", "length of the neuron's weight row"),
}
"""Title, unit and meaning of every column, in order; first those that narrow screens keep."""


@dataclass(frozen=True, eq=False)
class Content:
    """What a page shows."""

    title: str
    data: Mapping[str, object] = field(repr=False)
    """JSON for the scripts."""
    shown: Mapping[str, object] = field(repr=False)
    """What the template writes."""
    n_neurons: int
    """In the table."""
    n_pages: int
    """Neurons with a whole page."""
    notes: tuple[str, ...]
    """What it was made from and what it lacks."""


def check_neurons(neurons: Neurons) -> Neurons:
    """Return how many neurons of a layer have a whole page, from what a user may write.

    Parameters
    ----------
    neurons
        A share in (0, 1) or as ``"5%"``, a whole number of neurons (0: none), or ``"all"``.

    Raises
    ------
    InvalidInput
        If it is none of these.
    """
    if isinstance(neurons, str):
        text = neurons.strip()
        if text == "all":
            return text
        try:
            value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            value = math.nan
        neurons = int(text) if text.isdigit() else value
    if isinstance(neurons, float) and not 0 < neurons <= 1:
        raise InvalidInput(
            f"`neurons` must be a share such as 0.03 or 3%, a whole number of neurons a layer, or "
            f"all; got {neurons!r}."
        )
    return share("neurons", neurons) if isinstance(neurons, float) else whole(
        "neurons", neurons, least=0
    )  # fmt: skip


def chosen_rows(runs: Runs, neurons: Neurons) -> NDArray[np.int64]:
    """Return the rows of the scores that get a whole page, ascending.

    The largest WD of every layer, and what a decomposition has looked at closely.
    """
    frame = runs.scores.frame
    rows: list[NDArray[np.int64]] = []
    for start, size in _spans(runs.scores):
        wd = frame["wd"].to_numpy(np.float64, na_value=np.nan)[start : start + size]
        order = np.argsort(-wd, kind="stable")[: np.count_nonzero(~np.isnan(wd))]
        rows.append(
            start + (np.arange(size) if neurons == "all" else order[: _most(neurons, size)])
        )
    starts = dict(
        zip(runs.scores.layers["layer"], (s for s, _ in _spans(runs.scores)), strict=True)
    )
    for one in runs.of_kind("decomposition"):
        looked: Any = one.result
        pairs = looked.modes[["layer", "neuron"]].drop_duplicates()
        known = pairs[pairs["layer"].isin(list(starts))]
        rows.append(known["layer"].map(starts).to_numpy(np.int64) + known["neuron"].to_numpy())
    return np.unique(np.concatenate(rows).astype(np.int64))


def _most(neurons: Neurons, size: int) -> int:
    return math.ceil(neurons * size) if isinstance(neurons, float) else int(neurons)


def _spans(scores: NeuronScores) -> Iterator[tuple[int, int]]:
    """Yield the first row and the number of rows of every layer."""
    start = 0
    for size in scores.layers["n_neurons"].tolist():
        yield start, int(size)
        start += int(size)


def content_of(
    runs: Runs, *, neurons: Neurons = SHARE, rows: NDArray[np.int64] | None = None,
    evidence: "Evidence | None" = None,
) -> Content:  # fmt: skip
    """Gather what a page shows.

    Parameters
    ----------
    runs
        Of one model.
    neurons
        As `check_neurons` returns it.
    rows
        From `chosen_rows`, if they were chosen before.
    evidence
        Of these neurons, from the model itself; None where there is none.
    """
    scores, rows = runs.scores, chosen_rows(runs, neurons) if rows is None else rows
    small, positive = _bars(scores)
    frame = scores.frame.assign(positive=positive)
    places = _Places(scores, rows)
    others = tuple(_other_texts(runs))
    notes = (*runs.notes, *others, *_away(scores), *_told(runs, evidence))
    data = {
        "layers": list(_layers(scores, evidence)),
        "columns": list(_columns(frame)),
        "flags": pack_texts(frame["flag"].tolist()) if (frame["flag"] != "").any() else None,
        "bars": {"n": BARS, "span": SPAN, "levels": pack(small)},
        "pages": pack(rows),
        "exact": _exact(scores, rows),
        "tables": _tables(runs, places, evidence),
        "arms": [arm for run in runs.of_kind("ablation") for arm in _arms(run)],
        "text": None if evidence is None else evidence.packed_text(),
        "missing": _missing(runs, evidence),
        "elsewhere": [*others, *(() if evidence is None else evidence.elsewhere)],
    }
    model = scores.manifest.get("model")
    name = str(model.get("name")) if isinstance(model, Mapping) else "a model"
    if name in KNOWN_NAMES:
        name = f"{KNOWN_NAMES[name]} ({name})"
    elif Path(name).is_absolute():
        name = Path(name).name
    return Content(
        title=f"Neurons of {name}",
        data=data,
        shown=_shown(runs, notes, frame, len(rows)),
        n_neurons=len(frame),
        n_pages=len(rows),
        notes=notes,
    )


def _bars(scores: NeuronScores) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    parts = []
    for (start, size), name in zip(_spans(scores), scores.layers["layer"], strict=True):
        own = scores.frame.iloc[start : start + size]
        mean, std = (own[key].to_numpy(np.float64, na_value=np.nan) for key in ("mean", "std"))
        parts.append(bars(scores.histograms[name], mean, std))
    return np.concatenate([one[0] for one in parts]), np.concatenate([one[1] for one in parts])


def _layers(scores: NeuronScores, evidence: "Evidence | None") -> Iterator[dict[str, object]]:
    labels = layer_labels(scores.layers)
    sent = {} if evidence is None else evidence.sent
    why = {} if evidence is None else evidence.left_out
    text = scores.manifest.get("calibration")
    whole = text.get("n_tokens") if isinstance(text, Mapping) else None
    for row, label in zip(scores.layers.to_dict("records"), labels, strict=True):
        yield {
            "name": visible(str(row["layer"])), "label": label, "n": int(row["n_neurons"]),
            "block": None if pd.isna(row["block"]) else int(row["block"]),
            "projection": visible(str(row["projection"])), "tokens": int(row["n_tokens"]),
            "floor": plain(row["null_floor"]), "floor_high": plain(row["null_floor_high"]),
            "of": plain(whole), "sent": sent.get(str(row["layer"])),
            "why": why.get(str(row["layer"])),
        }  # fmt: skip


def layer_labels(layers: pd.DataFrame) -> list[str]:
    """Return short names of layers: the block and what it is called there, where that is enough."""
    short = [
        visible(str(projection) if pd.isna(block) else f"{int(block)}.{projection}")
        for block, projection in zip(layers["block"], layers["projection"], strict=True)
    ]
    full = [visible(str(name)) for name in layers["layer"]]
    return [
        one if one and short.count(one) == 1 else name
        for one, name in zip(short, full, strict=True)
    ]


def _columns(frame: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Yield the columns that hold something."""
    for name, (title, unit, meaning) in COLUMNS.items():
        values = frame[name].to_numpy(np.float64, na_value=np.nan)
        if name == "wd_bound" and not (values > 0).any():
            continue
        if name not in ("wd", "wd_se") and np.isnan(values).all():
            continue
        yield {"name": name, "title": title, "unit": unit, "help": meaning, "data": pack(values)}


def _exact(scores: NeuronScores, rows: NDArray[np.int64]) -> dict[str, object]:
    """Return the whole histograms of some neurons, in σ from the mean."""
    starts = np.array([start for start, _ in _spans(scores)])
    names = scores.layers["layer"].tolist()
    parts: dict[str, list[Any]] = {"first": [], "location": [], "scale": [], "low": [], "high": []}
    counts, lengths = [np.empty(0, dtype=np.int64)], []
    frame = scores.frame
    mean, std = (frame[key].to_numpy(np.float64, na_value=np.nan) for key in ("mean", "std"))
    for row in rows.tolist():
        layer = int(np.searchsorted(starts, row, side="right")) - 1
        histogram = scores.histograms[names[layer]]
        found = exact_bars(histogram, row - int(starts[layer]), mean[row], std[row])
        for key, value in zip(parts, found.told, strict=True):
            parts[key].append(value)
        counts.append(found.counts)
        lengths.append(len(found.counts))
    ends = np.concatenate([[0], np.cumsum(np.array(lengths, dtype=np.int64))])
    told = {key: pack(np.array(values)) for key, values in parts.items()}
    edges = pack(signed_edges(SAVED_FOLD))
    return {"edges": edges, "starts": pack(ends), "counts": pack(np.concatenate(counts)), **told}


class _Places:
    """The page of a neuron, and how its outputs are written: in σ from the mean."""

    def __init__(self, scores: NeuronScores, rows: NDArray[np.int64]) -> None:
        frame = scores.frame.iloc[rows]
        keys = zip(frame["layer"].tolist(), frame["neuron"].tolist(), strict=True)
        self.page = {key: page for page, key in enumerate(keys)}
        self.frame = frame.reset_index(drop=True)
        self.count = len(rows)

    def of(self, rows: pd.DataFrame) -> tuple[pd.DataFrame, NDArray[np.int64]]:
        """Return the rows of a table that belong to a page, and the page of each."""
        keys = zip(rows["layer"].tolist(), rows["neuron"].tolist(), strict=True)
        page = np.array([self.page.get(key, -1) for key in keys], dtype=np.int64)
        return rows[page >= 0].reset_index(drop=True), page[page >= 0]

    def table(self, rows: pd.DataFrame, columns: Sequence[str]) -> Packed:
        """Pack some columns of the rows that belong to a page."""
        kept, page = self.of(rows)
        return pack_table(kept.reindex(columns=list(columns)), page, self.count)


_MODES = ("mode", "center", "left", "right", "tokens", "share", "top_tokens")
_CONTEXTS = ("mode", "output", "before", "token", "after")
_PAIRS = (
    "before_a", "token_a", "after_a", "before_b", "token_b", "after_b", "output_a", "output_b",
    "input_distance", "cosine", "output_distance",
)  # fmt: skip
_EXPERTS = (
    "run", "experts", "router", "sparsity", "ri", "rmse", "output_wd", "wd", "weighted_wd", "md",
    "weighted_md", "realised_sparsity", "smallest_cluster",
)  # fmt: skip
_OUTPUTS = ("experts", "kind", "left", "right", "count")


def _tables(runs: Runs, places: _Places, evidence: "Evidence | None") -> dict[str, object]:
    """Return the tables of the pages by their names; one without rows is left out."""
    found: dict[str, tuple[pd.DataFrame, Sequence[str]]] = {
        "experts": (_experts(runs), _EXPERTS),
        "ablated": (_ablated(runs), ("run", "selection", "by", "seed")),
    }
    looked = runs.of_kind("decomposition")
    if looked:
        parts = [_decomposed(one) for one in looked[:1]]  # a second one would say the same twice
        names = _DECOMPOSED if evidence is None else ("outputs",)
        found |= {name: (parts[0][name], _DECOMPOSED[name]) for name in names}
    if evidence is not None:
        found |= evidence.tables()
    return {
        name: places.table(rows, columns) for name, (rows, columns) in found.items() if len(rows)
    }


_DECOMPOSED: Mapping[str, Sequence[str]] = {
    "modes": _MODES, "contexts": _CONTEXTS, "pairs": _PAIRS, "outputs": _OUTPUTS,
}  # fmt: skip


def _decomposed(run: Run) -> dict[str, pd.DataFrame]:
    """Return a decomposition's tables of the neurons it looked at, outputs in σ from their mean."""
    found: Any = run.result
    unit = found.neurons.drop_duplicates(["layer", "neuron"])[["layer", "neuron", "mean", "std"]]

    def scaled(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
        """Write outputs in σ; where there is no σ, they are left out."""
        known = rows.merge(unit, on=["layer", "neuron"], how="left")
        std = known["std"].where(known["std"] > 0)
        changed = {name: (known[name] - known["mean"]) / std for name in columns}
        return known.assign(**changed)

    modes = scaled(found.modes, "center", "left", "right")
    pairs = scaled(found.separated, "output_a", "output_b")
    for side in "ab":
        context, start, end = (pairs[f"{part}_{side}"] for part in ("context", "start", "end"))
        cut = list(zip(context.astype(str), start, end, strict=True))
        pairs[f"before_{side}"] = [text[:a] for text, a, _ in cut]
        pairs[f"token_{side}"] = [text[a:b] for text, a, b in cut]
        pairs[f"after_{side}"] = [text[b:] for text, _, b in cut]
    outputs = found.outputs[found.outputs["cluster"] == -1]
    return {
        "modes": modes.assign(top_tokens=[seen_tokens(one) for one in modes["top_tokens"]]),
        "contexts": scaled(found.contexts, "output"),
        "pairs": pairs,
        "outputs": scaled(outputs, "left", "right"),
    }


def seen_tokens(text: str) -> str:
    """Return the JSON of a mode's tokens, with what cannot be seen spelled out."""
    rows = [[visible(str(token)), count, part] for token, count, part in json.loads(text)]
    return json.dumps(rows, ensure_ascii=False)


def _experts(runs: Runs) -> pd.DataFrame:
    """Return what experts make of the neurons, of every run that fitted some."""
    parts = []
    for one in (*runs.of_kind("decomposition"), *runs.of_kind("ablation")):
        result: Any = one.result
        if len(result.neurons):
            parts.append(result.neurons.assign(run=one.name))
    joined = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if "router" in joined:
        return joined.assign(router=joined["router"].fillna(""))
    return joined.assign(router="")


def _ablated(runs: Runs) -> pd.DataFrame:
    """Return in which selections of which ablation a neuron was changed."""
    parts = []
    for one in runs.of_kind("ablation"):
        result: Any = one.result
        chosen = result.selections
        seeds = chosen["seed"].astype("Float64").to_numpy(np.float64, na_value=-1)
        parts.append(chosen.assign(run=one.name, seed=seeds.astype(np.int64)))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _arms(run: Run) -> Iterator[dict[str, object]]:
    """Yield what a model lost in every arm, beside the dense model."""
    result: Any = run.result
    frame = result.frame
    dense = frame[frame["selection"] == "dense"].set_index("measure")["value"]
    for row in frame[frame["selection"] != "dense"].to_dict("records"):
        told = {
            name: plain(row[name])
            for name in ("strength", "experts", "value", "low", "high", "n_rows")
        }
        texts = {
            name: visible(str(row.get(name) or ""))
            for name in ("selection", "by", "intervention", "router", "measure")
        }
        yield {
            "run": visible(run.name), **texts, **told,
            "seed": -1 if pd.isna(row["seed"]) else int(row["seed"]),
            "dense": plain(dense.get(row["measure"], math.nan)),
        }  # fmt: skip


def _missing(runs: Runs, evidence: "Evidence | None") -> dict[str, str]:
    """Return what a page lacks and what would fill it, by its section."""
    read = (
        "`entangle report RUN --model MODEL` reads them from the model and a text; "
        "`entangle decompose` keeps them of the neurons it looks at"
    )
    return {
        "modes": f"No run given here kept modes of this neuron. {read}.",
        "contexts": f"No run given here kept contexts of this neuron. {read}.",
        "pairs": f"No run given here kept near-in, far-out pairs of this neuron. {read}.",
        "tokens": "" if evidence is None else "None of its tokens comes often enough to be listed.",
        "experts": (
            "No run given here fitted experts to this neuron: give a run of `entangle decompose` "
            "of its layer."
        ),
        "ablation": (
            "This neuron was changed in no ablation given here."
            if runs.of_kind("ablation")
            else "No ablation was given: `entangle ablate` changes neurons and measures the model."
        ),
        "page": (
            "It is not among the neurons with a whole page, so its exact histogram, modes, "
            "contexts, pairs and experts are left out: `entangle report --neurons` keeps more."
        ),
    }


def plain(value: Any) -> float | int | None:
    """Return a number as JSON has it, None where it is missing or not finite."""
    if value is None or pd.isna(value) or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(value)


def _shown(
    runs: Runs, notes: Sequence[str], frame: pd.DataFrame, n_pages: int
) -> dict[str, object]:
    lines, _ = runs.scores._told()
    layers = list(_overview(runs.scores, frame))
    return {
        "lines": lines,
        "notes": notes,
        "layers": layers,
        "flagged": any(one["flagged"] for one in layers),
        "runs": [_described(one) for one in runs.runs],
        "n_neurons": len(frame),
        "n_pages": n_pages,
    }


def _told(runs: Runs, evidence: "Evidence | None") -> Sequence[str]:
    if evidence is not None:
        return evidence.notes
    looked = runs.of_kind("decomposition")
    held = f"those that {looked[0].name} holds" if looked else "not on this page"
    return (
        f"Scores keep histograms and no text: modes, contexts and pairs are {held}. `entangle "
        "report RUN --model MODEL` reads them for every neuron with a whole page.",
    )


def _other_texts(runs: Runs) -> Iterator[str]:
    """Say so where modes and experts were found on another text than the scores."""
    own = runs.scores.manifest.get("calibration")
    for one in runs.of_kind("decomposition"):
        theirs = one.result.manifest.get("calibration")
        if not isinstance(own, Mapping) or not isinstance(theirs, Mapping):
            continue
        if own.get("digest") != theirs.get("digest"):
            size = described(one.result.manifest, "calibration", "n_tokens")
            text = f"{size} tokens of {at_home(str(theirs.get('source')))}"
            yield (
                f"What {one.name} holds was found on another text than the scores: {text}; its "
                "outputs are in σ from their own mean."
            )


def _away(scores: NeuronScores) -> Iterator[str]:
    """Say so where the model is no longer where it was."""
    model = scores.manifest.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    if isinstance(source, str) and Path(source).is_absolute() and not Path(source).exists():
        yield f"The model is no longer where it was scored ({at_home(source)})."


def _overview(scores: NeuronScores, frame: pd.DataFrame) -> Iterator[dict[str, object]]:
    """Yield what the template writes of every layer: quantiles of WD in percent of the largest."""
    largest = float(np.nanmax(frame["wd"])) if frame["wd"].notna().any() else 0.0
    labels = layer_labels(scores.layers)
    rows = zip(_spans(scores), scores.layers.to_dict("records"), labels, strict=True)
    for (start, size), row, label in rows:
        own = frame.iloc[start : start + size]
        wd = own["wd"].dropna().to_numpy(np.float64)
        points = np.quantile(wd, [0, 0.03, 0.25, 0.5, 0.75, 0.97, 1]) if len(wd) else [math.nan] * 7
        quantiles = [float(one) for one in points]
        at = [round(100 * one / largest, 2) if largest > 0 and len(wd) else 0 for one in quantiles]
        floor = float(row["null_floor"])
        known: dict[str, object] = {str(key): value for key, value in row.items()}
        yield known | {
            "name": visible(str(row["layer"])), "label": label, "quantiles": quantiles,
            "at": at, "known": len(wd) > 0, "largest": largest,
            "floor_at": round(100 * floor / largest, 2) if largest > 0 and floor == floor else None,
            "flagged": int((own["flag"] != "").sum()),
        }  # fmt: skip


def _described(run: Run) -> dict[str, object]:
    lines, table = run.told
    head = table.head(_ROWS)
    manifest = at_home(json.dumps(run.result.manifest, indent=2, ensure_ascii=False, default=dict))
    return {
        "name": run.name, "kind": run.kind, "digest": run.digest, "lines": lines,
        "columns": [(str(name), pd.api.types.is_numeric_dtype(head[name])) for name in head],
        "rows": [list(row) for row in head.itertuples(index=False, name=None)],
        "more": len(table) - len(head),
        "manifest": "\n".join(visible(line) for line in manifest.split("\n")),
    }  # fmt: skip


_ROWS = 30
"""Of a run's table."""


def at_home(text: str) -> str:
    """Return a text without the name of the user's home folder: a page is made to be sent."""
    home = str(Path.home())
    return text if len(home) < 4 else text.replace(home, "~")
