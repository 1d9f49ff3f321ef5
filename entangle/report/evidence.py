"""What scores do not hold, from the model itself: modes, contexts, pairs and tokens of neurons.

A page holds the text once; a context is a place in it, and how much each of its tokens puts out.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from entangle.experiments.selection import check_scores_fit
from entangle.memory import memory_for
from entangle.models.blocks import evaluating
from entangle.models.layers import Layer, list_layers
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.mixtures import ExpertLinear
from entangle.modes import TokenText, describe_modes
from entangle.modes.pairs import draw_all, farthest_pairs, near_pairs
from entangle.precision import full_precision
from entangle.recording.recorder import Recorded, Recorder, of_one_group, told
from entangle.recording.stream import ByteBudget, LowestRanks, TokenStore
from entangle.report.content import seen_tokens
from entangle.report.packing import pack, pack_texts
from entangle.results.scores import NeuronScores
from entangle.runs.progress import Progress, ProgressBar
from entangle.seeding import check_seed, numpy_rng
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet, SeenTokens
from entangle.texts.given import Source

WINDOW = 12
"""Tokens of a context on either side."""
GROUPS: Mapping[str, tuple[float, int]] = {
    "largest": (1.0, 8), "99 %": (0.99, 3), "90 %": (0.9, 3), "median": (0.5, 3),
    "10 %": (0.1, 3), "1 %": (0.01, 3), "smallest": (0.0, 8),
}  # fmt: skip
"""Where in the order of outputs contexts are taken, and how many."""
PER_MODE, PAIRS, ENDS = 4, 6, 8
"""Contexts of a mode; near-in, far-out pairs; tokens of least and largest mean output."""
OFTEN = 4
"""Times that a token occurs to have a mean."""
PAIR_TOKENS, NEAR = 4096, 0.01
"""Tokens among which near pairs are looked for; the share of random pairs that are farther."""
SHADES, STEPS = 7, 2.0
"""Shades of an output on either side of the mean: ``asinh(z) · 2``, rounded."""
OUTSIDE, UNSEEN = -8, -9
"""In place of a shade: beyond the sequence; a token that an expert is not sent."""
_BYTES = 8  # of every output that is held
_DRIFT = 0.02

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a model does on a text, of some neurons."""

    modes: pd.DataFrame = field(repr=False)
    """As `entangle.modes.NeuronModes.modes`, outputs in σ from the mean of the scores."""
    windows: pd.DataFrame = field(repr=False)
    """Contexts: layer, neuron, ``group`` (a key of `GROUPS` or ``mode N``), ``output`` (σ),
    ``place`` (in ``ids``), ``before`` and ``after`` (tokens on either side)."""
    shades: NDArray[np.int8] = field(repr=False)
    """(windows, 25): shade of every token of a window, `OUTSIDE` the sequence, or `UNSEEN` where an
    expert is not sent it."""
    near: pd.DataFrame = field(repr=False)
    """Pairs: layer, neuron, outputs (σ), distances, and ``place``, ``before``, ``after`` of both
    sides."""
    tokens: pd.DataFrame = field(repr=False)
    """Tokens of least and largest mean output: layer, neuron, ``end`` (0 or 1), token, mean (σ),
    count."""
    ids: Ids = field(repr=False)
    """The tokens that contexts are made of, as numbers in ``words``."""
    words: Sequence[str] = field(repr=False)
    """Texts of tokens."""
    notes: Sequence[str]
    """What it was read from, and what is left out."""
    elsewhere: Sequence[str] = ()
    """Of the notes those on every page: it was read from another text than the scores."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """By layer of an expert, how many tokens of the text the router sends it: all that was read of
    its neurons is of these."""
    n_tokens: int = 0
    """Of the text."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """By layer why nothing was read of it, or of some of its neurons."""

    def tables(self) -> dict[str, tuple[pd.DataFrame, Sequence[str]]]:
        """Return the tables of the page, and their columns."""
        windows = self.windows.assign(**{f"s{i}": one for i, one in enumerate(self.shades.T)})
        shades = [f"s{i}" for i in range(self.shades.shape[1])]
        sides = [f"{name}_{side}" for side in "ab" for name in ("place", "before", "after")]
        known = ("output_a", "output_b", "input_distance", "cosine", "output_distance")
        modes = ("mode", "center", "left", "right", "tokens", "share", "top_tokens")
        return {
            "modes": (self.modes, modes),
            "windows": (windows, ("group", "output", "place", "before", "after", *shades)),
            "near": (self.near, (*sides, *known)),
            "tokens": (self.tokens, ("end", "token", "mean", "count")),
        }

    def packed_text(self) -> dict[str, object]:
        """Return the text for the scripts."""
        return {
            "ids": pack(self.ids), "words": pack_texts(self.words), "window": WINDOW,
            "unseen": UNSEEN, "tokens": self.n_tokens,
        }  # fmt: skip


def gather(
    scores: NeuronScores,
    rows: NDArray[np.int64],
    model: AnyModel,
    calibration: Source,
    *,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | None = None,
) -> Evidence:
    """Read modes, contexts, pairs and tokens of some neurons from the model, in passes over a text.

    An expert of a mixture puts out nothing on the tokens that the router does not send it: what is
    said of its neurons is of the others. Where a mixture does not tell which these are, nothing is.

    Parameters
    ----------
    scores
        Of the model.
    rows
        Rows of ``scores.frame``, ascending. Neurons without a deviation are left out.
    model, calibration
        As in `entangle.score`.
    seed
        Of the examples of modes and of the tokens that pairs are looked for among.
    memory
        Bytes for outputs; half of what is free by default. More passes are made where it is less.
    progress
        As in `entangle.score`.

    Raises
    ------
    InvalidInput, UnknownName
        If the scores are of another model, or the text does not fit it.
    """
    seed = check_seed(seed)
    known = as_language_model(model)
    check_scores_fit(scores, known)
    text, budget = as_calibration(calibration, known), memory_for(memory, known.module)
    gathering = _Gathering(known, text, _wanted(scores, rows), seed)
    showing = ProgressBar("reading neurons", enabled=progress)
    with showing as bar, full_precision(), evaluating(known.module):
        for part, _ in planned(scores, rows, known, text, budget):
            gathering.read(part, budget, bar)
    return gathering.result(scores)


def _wanted(scores: NeuronScores, rows: NDArray[np.int64]) -> Mapping[str, pd.DataFrame]:
    """Return the rows of the neurons that can be read, by their layer."""
    frame = scores.frame.iloc[rows]
    std = frame["std"].to_numpy(np.float64, na_value=np.nan)
    frame = frame[(std > 0) & np.isfinite(std)]
    return {str(name): own for name, own in frame.groupby("layer", sort=False)}


def planned(
    scores: NeuronScores, rows: NDArray[np.int64], model: LanguageModel, text: CalibrationSet,
    memory: int,
) -> list[tuple[list[Layer], int]]:  # fmt: skip
    """Return the layers of each pass of `gather`, so many that they fit, and the bytes held there.

    Experts are taken to see the share of this text that they see of the text of the scores.
    """
    known = scores.manifest.get("calibration")
    scored = known.get("n_tokens") if isinstance(known, Mapping) else None
    wanted, found = _wanted(scores, rows), list[tuple[list[Layer], int]]()
    for layer in list_layers(model.module):
        if layer.name not in wanted:
            continue
        own, n, most = wanted[layer.name], text.n_tokens, PAIR_TOKENS
        if layer.is_expert:
            share = min(1.0, int(own["n_tokens"].iloc[0]) / int(scored)) if scored else 1.0
            n, most = math.ceil(n * share), 2 * PAIR_TOKENS
        columns = len(own) + 4 * layer.is_expert  # which tokens they are of
        needed = columns * n * _BYTES + min(n, most) * layer.in_features * 4
        if found and found[-1][1] + needed <= memory:
            found[-1] = ([*found[-1][0], layer], found[-1][1] + needed)
        else:
            found.append(([layer], needed))
    return found


@dataclass(eq=False)
class _Given:
    """What some neurons of a layer put out, batch by batch."""

    source: int
    """Number of the layer's input."""
    outputs: list[Tensor] = field(default_factory=list)
    """(neurons, tokens) each."""
    at: list[Ids] | None = None
    """Of an expert which of the text's tokens these are; None for all, or if nobody knows."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """The text's tokens that a layer sees."""

    at: Ids
    """Which they are, ascending."""
    codes: Ids
    """Of each its place among the different tokens of the text."""
    often: Ids
    """Of every different token of the text how often it is among them."""
    sample: Ids
    """Places, in ``at``, of those among which near pairs are looked for, ascending."""


@dataclass(eq=False)
class _Found:
    """What was read of some neurons, a row or an array each."""

    modes: list[pd.DataFrame] = field(default_factory=list)
    windows: list[tuple[object, ...]] = field(default_factory=list)
    shades: list[NDArray[np.int8]] = field(default_factory=list)
    near: list[dict[str, object]] = field(default_factory=list)
    tokens: list[tuple[object, ...]] = field(default_factory=list)
    drift: float = 0.0
    """Largest mean of outputs in σ of the scores."""
    n_neurons: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    """Why nothing is said of some, by the layer."""
    sent: dict[str, int] = field(default_factory=dict)
    """As `Evidence.sent`."""

    def add(self, other: "_Found") -> None:
        """Put what was read of others behind it."""
        for name in ("modes", "windows", "shades", "near", "tokens"):
            getattr(self, name).extend(getattr(other, name))
        self.drift = max(self.drift, other.drift)
        self.n_neurons += other.n_neurons
        self.left_out = other.left_out | self.left_out
        self.sent |= other.sent


class _Gathering:
    """Tables that grow by a part of the layers at a time."""

    def __init__(
        self, model: LanguageModel, text: CalibrationSet, wanted: Mapping[str, pd.DataFrame],
        seed: int,
    ) -> None:  # fmt: skip
        self._model, self._text, self._wanted, self._seed = model, text, wanted, seed
        self._words = TokenText(model.tokenizer)
        self._ids: Ids = text.rows.flat().numpy()
        self._different, self._codes = np.unique(self._ids, return_inverse=True)
        self._often = np.bincount(self._codes)
        rng, n = numpy_rng(seed, "report pairs"), text.n_tokens
        sample = np.sort(rng.choice(n, size=min(n, PAIR_TOKENS), replace=False))
        self._all = _Seen(np.arange(n), self._codes, self._often, sample)
        others = np.setdiff1d(self._all.at, sample, assume_unique=True)
        self._ranks = np.empty(n, dtype=np.int64)  # of all tokens, those of the sample first
        self._ranks[np.concatenate([sample, rng.permutation(others)])] = np.arange(n)
        self._found = _Found()

    def read(self, layers: Sequence[Layer], memory: int, bar: Progress) -> None:
        """Run the model once for some layers, and describe their neurons."""
        with ExitStack() as stack:
            bar.start(self._text.n_seq, "sequences")  # hours or seconds: not counted with neurons
            given, stores, drawn = self._run(layers, memory, stack, bar.advance)
            near: dict[int, NDArray[np.int64]] = {}
            seen: dict[str, _Seen] = {}
            for layer in layers:
                name = layer.name
                found = self._seen(layer, given[name], drawn) if name in given else "it did not run"
                if isinstance(found, str):
                    self._found.left_out.setdefault(name, found)
                    continue
                seen[name], source = found, given[name].source
                if source not in near:
                    pairs = draw_all(stores[source], seed=self._seed)
                    near[source] = near_pairs(stores[source], pairs, near=NEAR, seed=self._seed)

            def describe(name: str) -> _Found:
                own = given.pop(name)
                outputs = torch.cat(own.outputs, dim=1).numpy()
                return self._describe(name, outputs, seen[name], stores[own.source],
                                      near[own.source])  # fmt: skip

            bar.start(sum(len(self._wanted[name]) for name in seen), "neurons")
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                try:
                    for done in pool.map(describe, seen):
                        self._found.add(done)
                        bar.advance(done.n_neurons)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)

    def _seen(self, layer: Layer, given: _Given, drawn: Mapping[int, Ids]) -> "_Seen | str":
        """Return the tokens that a layer saw, or why they are not known."""
        if given.at is None:
            if isinstance(layer.module, ExpertLinear):
                return "its mixture does not tell which tokens an expert sees"
            n = sum(part.shape[1] for part in given.outputs)
            return self._all if n == self._text.n_tokens else "it does not run once on every token"
        at = np.concatenate(given.at)
        if (np.diff(at) <= 0).any():
            return "it runs several times on a token"
        codes = self._codes[at]
        often = np.bincount(codes, minlength=len(self._different))
        return _Seen(at, codes, often, np.searchsorted(at, drawn[given.source]))

    def _run(
        self, layers: Sequence[Layer], memory: int, stack: ExitStack, report: Callable[[int], None]
    ) -> tuple[dict[str, _Given], dict[int, TokenStore], dict[int, Ids]]:
        """Return what neurons put out, by layer; by input, a sample of it, and its tokens."""
        given: dict[str, _Given] = {}
        stores: dict[int, TokenStore] = {}
        lowest: dict[int, LowestRanks] = {}
        seen_rows: dict[int, int] = defaultdict(int)
        budget = ByteBudget(memory // 2)
        weights = {one.name: self._weights(one) for one in layers}
        sample = self._all.sample

        def keep(seen: Recorded) -> None:
            index, weight, bias = weights[seen.layer.name]
            found = (
                nn.functional.linear(seen.inputs.float(), weight, bias)
                if seen.affine else seen.outputs[:, index].float()
            )  # fmt: skip
            own = given.setdefault(seen.layer.name, _Given(seen.source))
            own.outputs.append(found.T.cpu())
            if seen.source not in stores:
                stores[seen.source] = stack.enter_context(TokenStore(budget))
            if seen.at is not None:
                at = seen.at.cpu().numpy()
                own.at = [*(own.at or ()), at]
                if seen.leads:
                    first = LowestRanks(self._ranks, PAIR_TOKENS)
                    lowest.setdefault(seen.source, first).add(at, seen.inputs)
            elif seen.leads:
                start, count = seen_rows[seen.source], len(seen.inputs)
                seen_rows[seen.source] += count
                low, high = np.searchsorted(sample, (start, start + count)).tolist()
                rows = torch.from_numpy(sample[low:high] - start)
                if len(rows):
                    stores[seen.source].append(seen.inputs[rows.to(seen.inputs.device)])

        recorder = Recorder(layers, keep, lenient=True)
        batches = told(of_one_group(self._text), report)
        recorder.run(self._model.module, batches, whole=False)
        silent = {
            one.name: "the router sends it no token of this text"
            for one in layers
            if one.is_expert and not recorder.tokens[one.name]
        }
        refused = dict(recorder.left_out)
        if len(silent) < len(layers):
            recorder.check_all_seen()
        self._found.left_out |= recorder.left_out | silent | refused
        return given, stores, {source: one.put(stores[source]) for source, one in lowest.items()}

    def _weights(self, layer: Layer) -> tuple[list[int], Tensor, Tensor | None]:
        index = [int(one) for one in self._wanted[layer.name]["neuron"]]
        bias = None if layer.bias is None else layer.bias[index].float()
        return index, layer.weight[index].float(), bias

    def _describe(
        self, layer: str, outputs: Floats, seen: _Seen, store: TokenStore,
        pairs: NDArray[np.int64],
    ) -> "_Found":  # fmt: skip
        """Describe a layer's neurons by their outputs on the tokens that it sees."""
        rows, finite = self._wanted[layer], np.isfinite(outputs).all(1)
        neurons, means, stds = (rows[name].tolist() for name in ("neuron", "mean", "std"))
        kept = {neurons[i]: outputs[i] for i in np.flatnonzero(finite)}
        everything = seen is self._all
        text = self._text if everything else SeenTokens(self._text, torch.from_numpy(seen.at))
        modes, examples = describe_modes(
            kept, text, self._words, layer, per_mode=PER_MODE, window=0, seed=self._seed,
        )  # fmt: skip
        units = modes["neuron"].map(dict(zip(neurons, zip(means, stds, strict=True), strict=True)))
        mean, std = (np.array([one[i] for one in units]) for i in (0, 1))
        scaled = {name: (modes[name] - mean) / std for name in ("center", "left", "right")}
        found = _Found([modes.assign(**scaled)], n_neurons=len(rows))
        if not everything:
            found.sent[layer] = len(seen.at)
        if not finite.all():
            count = int((~finite).sum())
            found.left_out[layer] = f"{count} neurons have outputs that are not finite"
        drawn = dict(iter(examples.groupby("neuron", sort=False)))
        for neuron, values in kept.items():
            place = neurons.index(neuron)
            z, ordered = (
                (one.astype(np.float64) - means[place]) / stds[place]
                for one in (values, np.sort(values))
            )
            found.drift = max(found.drift, abs(float(z.mean())))
            own = drawn[neuron]
            named = [f"mode {mode}" for mode in own["mode"]]
            line = self._line(z, seen)
            for group, one in (
                *_ranked(z, ordered, seen.at), *zip(named, own["position"].tolist(), strict=True)
            ):  # fmt: skip
                shades, where = self._window(line, int(seen.at[one]))
                found.shades.append(shades)
                found.windows.append((layer, neuron, group, float(z[one]), *where))
            found.tokens += [(layer, neuron, *one) for one in self._ends(z, seen)]
            found.near += [
                {"layer": layer, "neuron": neuron, **one}
                for one in self._pairs(z, seen, store, pairs)
            ]
        return found

    def _line(self, z: NDArray[np.float64], seen: _Seen) -> NDArray[np.float64]:
        """Return outputs on all tokens of the text, NaN where there is none."""
        if seen is self._all:
            return z
        line = np.full(self._text.n_tokens, np.nan)
        line[seen.at] = z
        return line

    def _window(
        self, line: NDArray[np.float64], position: int
    ) -> tuple[NDArray[np.int8], tuple[int, int, int]]:
        """Return the shades of a context, and where it lies."""
        before, after = self._reach(position)
        shades = np.full(2 * WINDOW + 1, OUTSIDE, dtype=np.int8)
        inside = line[position - before : position + after + 1]
        shade = np.rint(np.arcsinh(inside) * STEPS).clip(-SHADES, SHADES)
        shade[np.isnan(inside)] = UNSEEN
        shades[WINDOW - before : WINDOW + after + 1] = shade
        return shades, (position, before, after)

    def _reach(self, position: int) -> tuple[int, int]:
        """Return how many tokens of the sequence stand before and after one, at most `WINDOW`."""
        sequence, place = self._text.place(position)
        length = self._text.rows.lengths[sequence]
        return min(place, WINDOW), min(length - place - 1, WINDOW)

    def _ends(self, z: NDArray[np.float64], seen: _Seen) -> Iterator[tuple[int, str, float, int]]:
        """Yield the tokens of least and largest mean output: end, token, mean, count."""
        often = np.flatnonzero(seen.often >= OFTEN)
        sums = np.bincount(seen.codes, weights=z, minlength=len(seen.often))
        mean = sums[often] / seen.often[often]
        order = np.argsort(mean, kind="stable")
        half = min(ENDS, len(order) // 2)
        for end, places in ((0, order[:half]), (1, order[::-1][:half])):
            for place in places.tolist():
                code = int(often[place])
                word = self._words.token(int(self._different[code]))
                yield end, word, float(mean[place]), int(seen.often[code])

    def _pairs(
        self, z: NDArray[np.float64], seen: _Seen, store: TokenStore, pairs: NDArray[np.int64]
    ) -> Iterator[dict[str, object]]:
        own = z[seen.sample]
        picked = farthest_pairs(own, pairs, PAIRS)
        inputs = store.take(torch.tensor(picked, dtype=torch.int64).flatten()).double().cpu()
        for (a, b), (x, y) in zip(
            picked, inputs.view(len(picked), 2, inputs.shape[1]), strict=True
        ):
            found: dict[str, object] = {
                "input_distance": float((x - y).norm()),
                "cosine": float(nn.functional.cosine_similarity(x, y, dim=0)),
                "output_distance": float(own[b] - own[a]),
            }
            for side, place in (("a", a), ("b", b)):
                position = int(seen.at[seen.sample[place]])
                before, after = self._reach(position)
                found |= {
                    f"place_{side}": position, f"before_{side}": before, f"after_{side}": after,
                    f"output_{side}": float(own[place]),
                }  # fmt: skip
            yield found

    def result(self, scores: NeuronScores) -> Evidence:
        """Return the tables, with the tokens of the text that they name."""
        columns = ("layer", "neuron", "group", "output", "place", "before", "after")
        windows = pd.DataFrame(self._found.windows, columns=list(columns))
        near = pd.DataFrame(self._found.near)
        used = np.zeros(self._text.n_tokens + 1, dtype=np.int64)
        spans = [windows] + [
            near.rename(columns={f"{name}_{side}": name for name in columns[-3:]})
            for side in ("ab" if len(near) else "")
        ]
        for one in spans:
            place = one["place"].to_numpy(np.int64)
            np.add.at(used, place - one["before"].to_numpy(np.int64), 1)
            np.add.at(used, place + one["after"].to_numpy(np.int64) + 1, -1)
        kept = np.cumsum(used)[:-1] > 0
        moved = np.cumsum(kept) - 1
        windows["place"] = moved[windows["place"].to_numpy(np.int64)]
        for side in "ab" if len(near) else "":
            near[f"place_{side}"] = moved[near[f"place_{side}"].to_numpy(np.int64)]
        modes = (
            pd.concat(self._found.modes, ignore_index=True) if self._found.modes else pd.DataFrame()
        )
        if len(modes):
            modes["top_tokens"] = [seen_tokens(one) for one in modes["top_tokens"]]
        shades = (
            np.stack(self._found.shades)
            if self._found.shades
            else np.empty((0, 2 * WINDOW + 1), np.int8)
        )
        tokens = pd.DataFrame(
            self._found.tokens, columns=["layer", "neuron", "end", "token", "mean", "count"]
        )
        words = [self._words.token(int(one)) for one in self._different]
        notes = tuple(self._notes(scores))
        return Evidence(
            modes, windows, shades, near, tokens, self._codes[kept], words, notes,
            elsewhere=() if self._is_text_of(scores) else notes[:1],
            sent=self._found.sent, n_tokens=self._text.n_tokens, left_out=self._found.left_out,
        )  # fmt: skip

    def _is_text_of(self, scores: NeuronScores) -> bool:
        own = scores.manifest.get("calibration")
        return isinstance(own, Mapping) and own.get("digest") == self._text.digest

    def _notes(self, scores: NeuronScores) -> Iterator[str]:
        text, same = self._text, self._is_text_of(scores)
        size = f"{text.n_seq:,} × {text.seq_len:,} tokens of {text.source}"
        told = "the text of the scores" if same else (
            "NOT the text of the scores: outputs there are written in σ of the scores"
        )  # fmt: skip
        yield (
            f"Modes, contexts, pairs and tokens were read from the model {self._model.name!r} for "
            f"this page, on {size}, {told}."
        )
        if same and self._found.drift > _DRIFT:
            yield (
                f"Outputs that were computed again differ from the scores by up to "
                f"{self._found.drift:.2g} σ in the mean, as in another precision."
            )
        if sent := sorted(self._found.sent.values()):
            low, high = (f"{100 * one / text.n_tokens:.3g}" for one in (sent[0], sent[-1]))
            experts = len({name.rpartition(".")[0] for name in self._found.sent})
            yield (
                f"Neurons of experts ({experts:,}) were read on the tokens that the router sends "
                f"each, {low if low == high else f'{low} to {high}'} % of the text: on the others "
                "they put out nothing."
            )
        by_reason = defaultdict[str, list[str]](list)
        for name, reason in self._found.left_out.items():
            by_reason[reason].append(name)
        for reason, names in by_reason.items():
            some = f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]
            yield f"Nothing was read of {some}: {reason}."


def _ranked(
    z: NDArray[np.float64], ordered: NDArray[np.float64], at: Ids
) -> Iterator[tuple[str, int]]:
    """Yield places of outputs by the order of these, and the group of each.

    At both ends no two are nearer to one another in the text than a context is wide.
    """
    for group, (share, count) in GROUPS.items():
        if share in (0.0, 1.0):
            most = min(32 * count, len(z))
            ends = _places(z, ordered, 0, most) if share == 0.0 else (
                _places(z, ordered, len(z) - most, len(z))[::-1]
            )  # fmt: skip
            found: list[int] = []
            for position in ends.tolist():
                if all(abs(int(at[position] - at[one])) > WINDOW for one in found):
                    found.append(position)
                if len(found) == count:
                    break
        else:
            first = max(round(share * (len(z) - 1)) - count // 2, 0)
            found = _places(z, ordered, first, min(first + count, len(z))).tolist()
        yield from ((group, position) for position in found)


def _places(
    z: NDArray[np.float64], ordered: NDArray[np.float64], first: int, last: int
) -> NDArray[np.int64]:
    """Return ``np.argsort(z, kind="stable")[first:last]`` from the sorted values, in less time."""
    if last <= first:
        return np.empty(0, dtype=np.int64)
    low, high = ordered[first], ordered[last - 1]
    inside = np.flatnonzero((z >= low) & (z <= high))
    before = int(np.searchsorted(ordered, low))
    return inside[np.argsort(z[inside], kind="stable")][first - before : last - before]
