"""One model under study: what is measured once, for all claims, on the same texts and windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from entangle.activation.neurons import feed_forwards
from entangle.allocation.allocate import allocate
from entangle.errors import InvalidInput
from entangle.evaluation import EvaluationText, MinimalPairs
from entangle.experiments.ablate import ablate
from entangle.experiments.compare import Comparing, ComparisonArm, Named, compare
from entangle.experiments.damage import single_neuron_damage
from entangle.experiments.experiment import Evaluation
from entangle.experiments.interventions import layer_statistics
from entangle.experiments.selection import Selection, rows_of, select, union_rows
from entangle.memory import memory_for
from entangle.models.blocks import evaluating
from entangle.models.layers import Layer, find_layers
from entangle.models.loading import LanguageModel
from entangle.models.mixtures import ExpertLinear
from entangle.results.ablation import AblationResult
from entangle.results.comparison import Comparison
from entangle.results.scores import NeuronScores, load_scores
from entangle.runs.progress import tell
from entangle.runs.provenance import RunClock, claimed
from entangle.scoring.score import score
from entangle.stats.intervals import Interval, perplexity_ratio_interval
from entangle.texts.calibration_set import CalibrationSet

RANKED = ("variance", "excess_kurtosis", "abs_mean", "weight_norm")
"""Columns whose top rows are pruned beside those by WD."""
ALIKE = ("random-norm", "random-variance")
PRUNED = ("top", "bottom", "random", *ALIKE)
"""Rules of the rows that are pruned, and whose outputs are clamped; also the top ones by `RANKED`
are pruned."""
ROUTED = ("top", "random")
"""Of those that are pruned inside experts, over `ROUTED_BY`."""
ROUTED_BY = ("kmeans", "random")


@dataclass(frozen=True)
class Size:
    """How much is measured; what is looked at first in every experiment is in every size."""

    n_seq: int
    """Calibration sequences."""
    seq_len: int
    """Tokens of one."""
    windows: int
    """Evaluation windows, at most: those that the text holds."""
    window: int
    """Tokens of one."""
    inside: tuple[int, ...]
    """Numbers of experts that hold pruned rows; the last decides."""
    sparsities: tuple[float, ...]
    """Of whole models."""
    expansion: int
    """Experts of the expansions that decide."""
    sweep: tuple[int, ...]
    """Experts of further expansions, at the middle one of the sparsities."""
    allocated: tuple[float, ...]
    """Sparsities of allocations."""
    pairs: int | None
    """Minimal pairs of a paradigm; None for all."""
    blocks: int
    """Blocks in which single rows are pruned, spread over the depth."""
    rows: int
    """Top rows of such a block; four times as many random ones."""


SIZES: Mapping[str, Size] = {
    "small": Size(
        n_seq=16, seq_len=512, windows=12, window=256, inside=(1, 4), sparsities=(0.5, 0.7),
        expansion=4, sweep=(), allocated=(0.7,), pairs=2, blocks=2, rows=6,
    ),
    "full": Size(
        n_seq=64, seq_len=2048, windows=32, window=1024, inside=(1, 4, 16),
        sparsities=(0.5, 0.6, 0.7, 0.8), expansion=16, sweep=(2, 4, 8, 32),
        allocated=(0.5, 0.7, 0.8), pairs=50, blocks=3, rows=8,
    ),
}  # fmt: skip
"""``small`` is for two CPU cores (about half an hour of a 135M model), ``full`` for a GPU."""
STRENGTHS = (0.9, 0.95, 0.99)
FRACTION, CLAMPED = 0.03, 0.02
"""Shares of the rows of a layer that are pruned (arXiv 2405.15756), and whose negative outputs are
clamped (arXiv 2509.24198)."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its texts, and the experiments on it, each made when it is first asked for.

    All experiments read one calibration set and one evaluation text, and are kept in ``folder``:
    an unfinished one is gone on with, a finished one is read.
    """

    label: str
    """What tables call the model."""
    model: LanguageModel
    calibration: CalibrationSet
    text: EvaluationText
    size: Size
    folder: Path
    seeds: int = 5
    """Draws of random rows."""
    seed: int = 0
    memory: int | None = None
    grammar: MinimalPairs | None = None
    """Such as BLiMP."""
    other: MinimalPairs | None = None
    """Of the same form, about something else."""
    progress: bool | None = None
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Linears of the feed-forward parts that write into their inner side (gate and up).

        Of a mixture, the side that its experts' last projections do not write into.
        """
        every = self.linears
        last = [one for one in every if _is_last(one)]
        if not last:
            return first_layers(every, self.model.module)
        width = last[0].out_features
        lead_back = {_parent(one) for one in every if one.out_features == width}
        return tuple(
            one for one in every
            if one.in_features == width and _parent(one) in lead_back and not _is_last(one)
        )  # fmt: skip

    @cached_property
    def linears(self) -> tuple[Layer, ...]:
        """All linears of the feed-forward parts."""
        return tuple(find_layers(self.model.module, "all", "mlp"))

    @cached_property
    def gates(self) -> list[str]:
        """Names of the layers whose outputs an activation function takes.

        They are found by what a few tokens show; experts that these miss are like those of their
        block that they reach.

        Raises
        ------
        InvalidInput
            If they cannot be told from what the model computes, or share a layer with others.
        """
        parts = feed_forwards(self.model.module, self.calibration.ids.to(self.model.device))
        heads = [one.gate or one.up for one in parts]
        found = [one for one in heads if one is not None]
        fused = [one.layer.name for one in found if one.size != one.layer.out_features]
        if fused:
            raise InvalidInput(
                f"pre-activations must have a layer of their own; {fused[0]!r} holds gate and up."
            )
        if not found:
            raise InvalidInput(
                "pre-activations must be outputs of a linear layer before a known activation; "
                "none of the feed-forward parts computes act(gate(x)) · up(x) or act(up(x))."
            )
        names = {one.layer.name for one in found}
        alike = {
            (one.layer.block, one.layer.projection)
            for one in found if isinstance(one.layer.module, ExpertLinear)
        }  # fmt: skip
        return [
            one.name for one in self.linears
            if one.name in names
            or ((one.block, one.projection) in alike and isinstance(one.module, ExpertLinear))
        ]  # fmt: skip

    @cached_property
    def scores(self) -> NeuronScores:
        """Scores of all linears of the feed-forward parts."""
        place = self.folder / "scores"
        if not (place / "manifest.json").is_file():
            self.say("scores")
            found = score(
                self.model, self.calibration, seed=self.seed, memory=self.memory,
                progress=self.progress,
            )  # fmt: skip
            found.save(place)
        return load_scores(place)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Scores of the rows of `layers`."""
        names = {one.name for one in self.layers}
        return self.scores.frame[self.scores.frame["layer"].isin(names)]

    def say(self, what: str) -> None:
        """Tell what is made next."""
        if self.progress is not False:
            tell(f"{self.label}: {what}")

    def chosen(
        self, *rules: str, by: str = "wd", frame: pd.DataFrame | None = None,
        fraction: float = FRACTION,
    ) -> list[Selection]:  # fmt: skip
        """Return selections by rule, random ones once a seed, of `frame` or another table."""
        table = self.frame if frame is None else frame
        found: list[Selection] = []
        for rule in rules:
            if rule in ("top", "bottom"):
                found.append(select(table, rule, by=by, fraction=fraction))
                continue
            like = select(table, "top", by=by, fraction=fraction) if rule in ALIKE else None
            size: dict[str, Any] = {"fraction": fraction} if like is None else {"like": like}
            draws = range(self.seed, self.seed + self.seeds)
            found += [select(table, rule, seed=draw, **size) for draw in draws]
        return found

    def ablated(self, name: str, selections: list[Selection], **settings: Any) -> AblationResult:
        """Return an ablation on the texts of this subject, kept under a name."""
        if name not in self._made:
            self.say(name)
            self._made[name] = ablate(
                self.model, self.calibration, selections=selections, seeds=self.seeds,
                scores=self.scores, seed=self.seed, memory=self.memory, out=self.folder / name,
                resume=True, progress=self.progress,
                **{"layers": [one.name for one in self.layers], "proj": None,
                   "evaluation": self.text, **settings},
            )  # fmt: skip
        found: AblationResult = self._made[name]
        return found

    @cached_property
    def pruning(self) -> AblationResult:
        """Top rows by WD and every control, pruned."""
        chosen = self.chosen(*PRUNED)
        chosen += [one for by in RANKED for one in self.chosen("top", by=by)]
        return self.ablated("pruning", chosen, strengths=STRENGTHS)

    @cached_property
    def inside(self) -> AblationResult:
        """Top and random rows pruned inside experts, of clusters and of random clusters."""
        return self.ablated(
            "inside", self.chosen(*ROUTED), strengths=(0.95,), experts=self.size.inside,
            router=ROUTED_BY,
        )  # fmt: skip

    @cached_property
    def clamped(self) -> AblationResult:
        """Negative outputs of top rows and of controls clamped, and the search for as much harm."""
        table = self._gate_frame()
        chosen = self.chosen(*PRUNED, frame=table, fraction=CLAMPED)
        return self.ablated(
            "clamped", chosen, layers=self.gates, interventions="clamp-negative", match=True
        )

    @cached_property
    def syntax(self) -> AblationResult:
        """Minimal pairs with top rows clamped, with as many random ones, and with matched ones."""
        pairs = joined_pairs(self.grammar, self.other)
        matched = self.matched
        if not 0 < matched < 1:
            raise InvalidInput(
                "low-WD rows must cost as much perplexity as the top ones to be compared; no share "
                "of them does: all cost less, or as many cost no less."
            )
        table = self._gate_frame()
        chosen = self.chosen("top", "random", frame=table, fraction=CLAMPED)
        chosen += self.chosen("bottom", frame=table, fraction=matched)
        return self.ablated(
            "syntax", chosen, layers=self.gates, interventions="clamp-negative", pairs=pairs,
            evaluation=None,
        )  # fmt: skip

    @property
    def matched(self) -> float:
        """Share of low-WD rows whose clamping costs what the top ones' does, as the search has it.

        The closest of those that were tried; NaN where as many as the top ones cost no less, or all
        cost less.
        """
        steps = self.clamped.matched
        if steps.empty or steps["matched"].isna().any():
            return float("nan")
        best = int((steps["loss"] - steps["target"]).abs().to_numpy().argmin())
        return float(steps["fraction"].iloc[best])

    def _gate_frame(self) -> pd.DataFrame:
        return self.scores.frame[self.scores.frame["layer"].isin(self.gates)]

    @cached_property
    def comparison(self) -> Comparison:
        """Whole models pruned, and expanded into experts."""
        return self._compared("comparison", compared_arms(self.size))

    @cached_property
    def allocated(self) -> Comparison:
        """Whole models with even zeros, and with zeros by WD."""
        named: list[Named] = []
        for sparsity in self.size.allocated:
            for name, rule in ALLOCATED.items():
                made = allocate(
                    self.scores, sparsity=sparsity, rule=rule, by="wd", model=self.model
                )
                named.append((name, made))
        place = self.folder / "allocated"
        self.say("allocated")
        return compare(
            self.model, self.calibration, self.text, "sparsegpt", allocations=named,
            experts=(1,), seed=self.seed, memory=self.memory, out=place, resume=True,
            progress=self.progress,
        )  # fmt: skip

    def _compared(self, name: str, arms: list[ComparisonArm]) -> Comparison:
        self.say(name)
        experiment = Comparing(
            self.model, self.calibration, Evaluation(self.text), arms=arms, seed=self.seed,
            memory=memory_for(self.memory, self.model.module),
        )  # fmt: skip
        experiment.check()
        place = self.folder / name
        with claimed(place), evaluating(self.model.module):
            found: Comparison = experiment.run(
                RunClock(), place, resume=True, progress=self.progress
            )
        return found

    @property
    def damaged_layers(self) -> list[list[Layer]]:
        """The layers, by block, of which single rows are pruned.

        The first of a block; of a block with experts, that projection of all.
        """
        blocks = sorted({one.block for one in self.layers if one.block is not None})
        spread = np.linspace(0, len(blocks) - 1, min(self.size.blocks, len(blocks)) + 2)[1:-1]
        wanted = sorted({blocks[round(float(place))] for place in spread})
        found = []
        for block in wanted:
            own = [one for one in self.layers if one.block == block]
            experts = [one for one in own if one.is_expert]
            found.append([one for one in experts if one.projection == experts[0].projection]
                         or own[:1])  # fmt: skip
        return found

    def _damaged_rows(self, rule: str, count: int, **how: Any) -> pd.DataFrame:
        """Return ``layer`` and ``neuron`` of so many rows of each of `damaged_layers`' blocks."""
        parts = []
        for own in self.damaged_layers:
            table = self.frame[self.frame["layer"].isin([one.name for one in own])]
            scope = "layer" if len(own) == 1 else "model"  # all experts of a block together
            parts.append(select(table, rule, count=count, scope=scope, **how).frame)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def damage(self) -> pd.DataFrame:
        """Rise of the loss for single rows of some blocks: `single_neuron_damage` with ``group``.

        A row that is in several groups is there once a group. Rows are chosen over all experts of a
        block that have a WD.
        """
        place = self.folder / "damage.parquet"
        if place.is_file():
            return pd.read_parquet(place)
        self.say("single rows")
        count = self.size.rows
        groups = {
            "top": self._damaged_rows("top", count, by="wd"),
            "variance": self._damaged_rows("top", count, by="variance"),
            "random": self._damaged_rows("random", 4 * count, seed=self.seed),
        }
        wanted = union_rows(rows_of(one) for one in groups.values())
        layers = [one for own in self.damaged_layers for one in own if one.name in wanted]
        grams = layer_statistics(
            self.model, self.calibration, layers, scores=self.scores,
            progress=self.progress,
        ).grams  # fmt: skip
        found = single_neuron_damage(
            self.model, self.text, wanted, intervention="prune", strength=0.95, grams=grams,
            n_boot=100, seed=self.seed, memory=self.memory, progress=self.progress,
        )  # fmt: skip
        rows = [one.assign(group=name).merge(found) for name, one in groups.items()]
        made = pd.concat(rows, ignore_index=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        made.to_parquet(place.with_suffix(".writing"), index=False)
        place.with_suffix(".writing").replace(place)
        return made

    def ratio(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> Interval:
        """Return the ratio of two perplexities from summed losses of the windows, paired."""
        counts = self.text.window_tokens
        return perplexity_ratio_interval(a, b, counts, int(counts.sum()), seed=self.seed)


def first_layers(layers: Sequence[Layer], module: nn.Module) -> tuple[Layer, ...]:
    """Return the linears of feed-forward parts that read the residual stream: gate and up.

    Those of a block that take the hidden size of the configuration in and give another; where some
    widen, not those that narrow, which are routers or lead through a bottleneck, but an expert's;
    where the size tells nothing, those that do not narrow: all of a block as wide inside as
    outside.
    """
    config: Any = getattr(module, "config", None)
    text = getattr(config, "text_config", None) or config
    width = getattr(text, "hidden_size", None)
    found: list[Layer] = []
    for block in dict.fromkeys(one.block for one in layers):
        own = [one for one in layers if one.block == block]
        inward = [one for one in own if one.in_features == width != one.out_features]
        wide = [one for one in inward if one.is_expert or one.out_features > one.in_features]
        found += wide or inward or [one for one in own if one.out_features >= one.in_features]
    return tuple(found or layers)


def _is_last(layer: Layer) -> bool:
    """Tell whether a layer is the last projection of an expert."""
    module = layer.module
    return isinstance(module, ExpertLinear) and module.stack is [*module.bank.stacks.values()][-1]


def _parent(layer: Layer) -> str:
    return layer.name.rpartition(".")[0]


def compared_arms(size: Size) -> list[ComparisonArm]:
    """Return the whole models that are compared."""
    plain = [
        ComparisonArm(method, sparsity, 1)
        for method in ("magnitude", "wanda", "sparsegpt") for sparsity in size.sparsities
    ]  # fmt: skip
    routed = [
        ComparisonArm(method, sparsity, size.expansion)
        for method in ("expansion", "expansion-random") for sparsity in size.sparsities
    ]  # fmt: skip
    middle = size.sparsities[len(size.sparsities) // 2]
    routed += [ComparisonArm("expansion", middle, k) for k in size.sweep]
    return [*plain, *routed]


ALLOCATED = {"layers by mean WD": "layer", "top 3 % protected": "protect"}
"""Rules of allocation by what they are called."""


def losses(windows: pd.DataFrame, **arm: object) -> NDArray[np.float64]:
    """Return the summed loss of every window of an arm, seeds averaged; NaN where one is NaN.

    Raises
    ------
    InvalidInput
        If there is no such arm.
    """
    rows = windows
    for name, value in arm.items():
        rows = rows[rows[name] == value]
    if rows.empty:
        raise InvalidInput(f"there is no arm {arm}; it was not made, as its reason says.")
    groups = rows.groupby("window", sort=True)["loss"]
    lacking = groups.size() != groups.count()  # of a seed: no mean of the others
    return groups.mean().mask(lacking).to_numpy(np.float64)


GRAMMAR, OTHER = "grammar: ", "other: "


def joined_pairs(grammar: MinimalPairs | None, other: MinimalPairs | None) -> MinimalPairs:
    """Join pairs about grammar with pairs about something else; paradigms say which.

    Raises
    ------
    InvalidInput
        Without pairs about grammar.
    """
    if grammar is None:
        raise InvalidInput("minimal pairs about grammar, such as BLiMP, must be given (--blimp).")
    named = [
        replace(one, paradigms=tuple(f"{kind}{name}" for name in one.paradigms))
        for kind, one in ((GRAMMAR, grammar), (OTHER, other)) if one is not None
    ]  # fmt: skip
    if len(named) == 1:
        return named[0]
    first, second = named
    return MinimalPairs(
        first.good + second.good, first.bad + second.bad, first.paradigms + second.paradigms,
        f"{first.source} and {second.source}",
        {**first.settings, "other": dict(second.settings)},
    )  # fmt: skip
