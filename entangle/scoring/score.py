"""Score the neurons of a model's layers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from entangle.checks import choice, choices, whole
from entangle.doors import brought
from entangle.errors import InvalidInput, MemoryLimit
from entangle.memory import check_memory, memory_for, ran_out, refuse_beyond
from entangle.models.blocks import evaluates
from entangle.models.layers import (
    DEFAULT_PROJ,
    Layer,
    LayerSpec,
    Projections,
    asked_by_name,
    find_layers,
    layer_specs,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.models.streaming import comes_by_blocks
from entangle.ranks import ALONE, Ranks, current
from entangle.recording.recorder import Batch, Recorded, Recorder
from entangle.results.scores import KIND, NeuronScores
from entangle.runs.progress import Progress, ProgressBar
from entangle.runs.provenance import RunClock, agree_on, make_manifest
from entangle.scoring.columns import COLUMNS, is_own, with_columns
from entangle.scoring.exact import score_exact
from entangle.scoring.layer_scores import (
    MIN_TOKENS,
    LayerSummary,
    layer_table,
    neuron_table,
    without_few,
)
from entangle.scoring.routing import routing_distances
from entangle.scoring.sketched import score_sketched
from entangle.scoring.spread import share_summaries
from entangle.seeding import check_seed
from entangle.stats.bins import bytes_a_neuron
from entangle.stats.mapping_difficulty import MAX_PAIRS, PAIR_BYTES
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source

Method = Literal["auto", "exact", "sketch"]
SCORING_METHODS: tuple[Method, ...] = ("auto", "exact", "sketch")

AUTO_EXACT_BYTES = 2**30
"""Recorded inputs up to which ``auto`` is exact where no memory was asked for."""

EXACT_GROUPS, SKETCH_GROUPS = 16, 8


@evaluates
def score(
    model: AnyModel = "demo",
    calibration: Source = "demo",
    *,
    layers: LayerSpec = "all",
    proj: Projections = DEFAULT_PROJ,
    method: Method = "auto",
    md: bool = True,
    seed: int = 0,
    memory: int | None = None,
    batch_size: int | None = None,
    min_tokens: int = MIN_TOKENS,
    routing: bool = False,
    progress: bool | None = None,
    watch: Callable[[Recorded], None] | None = None,
    columns: str | Iterable[str] = (),
) -> NeuronScores:
    """Score every neuron of some layers: distance from a Gaussian, moments, mapping difficulty.

    Parameters
    ----------
    model
        A name or path for `entangle.load_model`, a module that takes token ids, or a
        `LanguageModel`.
    calibration
        A calibration set, or whatever else `entangle.load_calibration` takes, with its default
        settings: a name, a path, strings, token ids.
    layers, proj
        Layers to score, as in `entangle.models.layers.find_layers`. Those that see no token in a
        forward pass are left out, and named in the manifest, unless they were asked for by name.
    method
        ``exact`` records the layers' inputs and sorts every neuron's outputs; ``sketch`` measures
        all layers in one forward pass, in memory that does not grow with the tokens; ``auto`` is
        exact where the recorded inputs take at most 1 GiB, whatever the machine has, or half of
        ``memory`` if that is given. The manifest says which it was.
    md
        Whether to compute the mapping difficulty.
    seed
        Seed of the pairs of tokens.
    memory
        Bytes for recorded inputs and work space of the exact method (the model not counted); by
        default half of what is free on the model's device.
    batch_size
        Sequences in one forward pass; by default as many as make 4,096 tokens.
    min_tokens
        Tokens that an expert of a mixture must see: below, its neurons have no scores, and the flag
        ``few_tokens``. Layers that see all of the text's tokens are not held to it.
    routing
        Measure the neurons of a mixture's experts on as many tokens from all of the text as well,
        twice (`entangle.scoring.routing`): columns ``wd_inside``, ``wd_outside``, ``wd_control``,
        and the table `NeuronScores.routing`. The text runs once more.
    progress
        Show a progress bar on standard error; by default if that is a terminal.
    columns
        Of `entangle.scoring.columns.COLUMNS`, not ours, which are always there: computed from the
        first 8,192 tokens in one more pass.
    watch
        Called with an `entangle.recording.recorder.Recorded` of every layer and pass, so that other
        statistics of the same tokens need no forward pass of their own. It must not change it.

    Returns
    -------
    NeuronScores
        One row a neuron. ``wd_se`` is a jackknife over groups of whole sequences: 16 (exact) or 8
        (sketch), fewer if there are fewer sequences.

    Raises
    ------
    InvalidInput, UnknownName
        If the layers, the settings or the calibration set do not fit the model.
    MemoryLimit
        If memory runs out.

    References
    ----------
    arXiv 2405.15756, eq. 1 (WD) and eq. 2 (MD).
    """
    check_memory(memory)
    seed, layers = check_seed(seed), layer_specs(layers)
    language_model = as_language_model(model)
    chosen = find_layers(language_model.module, layers, proj)
    return score_layers(
        language_model, calibration, chosen, may_be_silent=not asked_by_name(layers, chosen),
        method=method, md=md, seed=seed, memory=memory, batch_size=batch_size,
        min_tokens=min_tokens, routing=routing, progress=progress, watch=watch,
        columns=choices("columns", columns, COLUMNS, kind="`columns` entry") if columns else (),
    )  # fmt: skip


def score_layers(
    language_model: LanguageModel,
    calibration: Source,
    chosen: Sequence[Layer],
    *,
    may_be_silent: bool,
    method: Method = "auto",
    md: bool = True,
    seed: int = 0,
    memory: int | None = None,
    batch_size: int | None = None,
    min_tokens: int = MIN_TOKENS,
    routing: bool = False,
    progress: bool | None = None,
    watch: Callable[[Recorded], None] | None = None,
    columns: Sequence[str] = (),
) -> NeuronScores:
    """Score layers that were found; arguments as in `score`.

    ``may_be_silent`` leaves out layers that see no token, and names them in the manifest.
    """
    clock = RunClock()
    check_seed(seed)
    least = whole("min_tokens", min_tokens, least=1)
    _check_readable(chosen)
    calibration = as_calibration(calibration, language_model)
    resolved = _resolve_method(method, language_model, chosen, calibration, memory)
    budget = memory_for(memory, language_model.module)
    groups = _n_groups(resolved, calibration.n_seq)
    if resolved == "sketch":
        _check_sketches(language_model, chosen, n_groups=groups, md=md)
    per_pass = _batch_size(batch_size, calibration)
    asked = {"layers": [layer.name for layer in chosen], "method": resolved, "md": md, "seed": seed}
    text = calibration.describe()
    if current().size > 1:  # alone, blocks that come in turn are described while they are here
        agree_on(
            model=language_model.describe(), calibration=text,
            settings=asked | {"batch_size": per_pass},
        )  # fmt: skip
    with ProgressBar(f"scoring ({resolved})", enabled=progress) as bar:
        try:
            measured, recorder = _measuring(
                resolved, language_model, chosen, calibration,
                n_groups=groups, per_pass=per_pass, md=md, seed=seed, memory=budget, bar=bar,
                watch=watch, may_be_silent=may_be_silent,
            )()  # fmt: skip
            frame, table = without_few(
                neuron_table(measured, language_model.name), layer_table(measured),
                n_tokens=calibration.n_tokens, least=least,
            )  # fmt: skip
            few = any(one.layer.is_expert for one in measured)
            few |= bool((frame["flag"] == "few_tokens").any())
            own = [name for name in columns if is_own(name)]
            frame = with_columns(frame, language_model, calibration, chosen, own)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise MemoryLimit(
                f"memory ran out while scoring {len(chosen)} layer(s) by the {resolved} method on "
                f"{per_pass} × {calibration.seq_len} tokens at a time; lower --seq-len (seq_len), "
                "--batch-size (batch_size), --memory (memory) or the number of layers."
            ) from error
    if routing:
        others = routing_distances(
            language_model.module, [one.layer for one in measured],
            _batches(calibration, groups, per_pass), n_tokens=calibration.n_tokens, least=least,
            seed=seed, memory=budget,
        )  # fmt: skip
        frame = frame.merge(others, on=["layer", "neuron"], how="left")
    manifest = make_manifest(
        KIND,
        model=language_model.describe(),
        calibration=text,
        settings={
            "layers": [one.layer.name for one in measured],
            "layers_without_tokens": sorted(
                {layer.name for layer in chosen} - {one.layer.name for one in measured}
            ),
            **({"pooled_depths": recorder.depths} if recorder.depths else {}),
            **({"min_tokens": least} if few else {}),
            "method": resolved,
            "n_groups": groups,
            "batch_size": per_pass,
            "md": md,
            **({"routing": True} if routing else {}),
            "seed": seed,
            **({"columns": list(columns), "plugins": brought(COLUMNS, columns)} if own else {}),
        },
        **clock.read(budget),
    )
    return NeuronScores(
        frame=frame,
        layers=table,
        histograms={one.layer.name: one.histograms for one in measured},
        manifest=manifest,
    )


def _check_sketches(
    model: LanguageModel, layers: Sequence[Layer], *, n_groups: int, md: bool
) -> None:
    """Refuse sketches of more neurons than memory holds: a block's where blocks come in turn."""
    by_place = defaultdict[int | None, int](int)
    for layer in layers:
        by_place[layer.block if comes_by_blocks(model.module) else None] += layer.out_features
    own = bytes_a_neuron(n_groups) + (PAIR_BYTES if md else 0)
    at_once = min(2, len(by_place))  # one block is measured while the next is counted
    refuse_beyond(
        own * at_once * max(by_place.values(), default=0), model.device,
        what=f"a sketch of {sum(by_place.values()):,} neurons",
        remedy="score part after part with --layer (layers), or with --method exact",
    )  # fmt: skip


def _check_readable(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.offloaded:
            raise InvalidInput(
                f"the weights of layer {layer.name!r} are offloaded, so it cannot be scored; "
                "choose a device map that keeps it on a device."
            )


def _resolve_method(
    method: str,
    model: LanguageModel,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    memory: int | None,
) -> Literal["exact", "sketch"]:
    method = choice("method", method, SCORING_METHODS)
    recorded = sum(layer.in_features for layer in layers)
    needed = calibration.n_tokens * recorded * model.dtype.itemsize
    most = AUTO_EXACT_BYTES if memory is None else memory // 2
    if method == "exact" or (method == "auto" and needed <= most):
        return "exact"
    return "sketch"


def _n_groups(method: str, n_seq: int) -> int:
    if method == "exact":
        return min(EXACT_GROUPS, n_seq)
    return n_seq if n_seq < SKETCH_GROUPS else min(SKETCH_GROUPS, n_seq // 2)


def _batch_size(asked: int | None, calibration: CalibrationSet) -> int:
    if asked is None:
        return calibration.per_pass
    return whole("batch_size", asked, least=1)


def _batches(calibration: CalibrationSet, n_groups: int, per_pass: int) -> Iterator[Batch]:
    """Yield batches whose sequences all belong to one group; groups are runs of sequences."""
    bounds = [group * calibration.n_seq // n_groups for group in range(n_groups + 1)]
    for group, (start, end) in enumerate(pairwise(bounds)):
        for _, ids in calibration.rows.batches(per_pass, start, end):
            yield group, ids


def _measuring(
    method: str,
    model: LanguageModel,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    *,
    n_groups: int,
    per_pass: int,
    md: bool,
    seed: int,
    memory: int,
    bar: Progress,
    watch: Callable[[Recorded], None] | None,
    may_be_silent: bool,
) -> Callable[[], tuple[list[LayerSummary], Recorder]]:
    """Return the call that measures the layers by a method."""
    batches = _batches(calibration, n_groups, per_pass)
    if method == "exact":
        ranks = current() if watch is None else ALONE
        bar.start(calibration.n_seq * ranks.size + len(layers), "sequences and layers")
        return partial(
            _exact_on_ranks, model.module, layers, batches, ranks,
            n_groups=n_groups, md=md, seed=seed, memory=memory, report=bar.advance, watch=watch,
            may_be_silent=may_be_silent,
        )  # fmt: skip
    bar.start(calibration.n_seq, "sequences")
    paired = min(MAX_PAIRS, calibration.n_tokens // 2) if md else 0
    return partial(
        score_sketched, model.module, layers, batches,
        n_groups=n_groups, pair_share=2 * paired / calibration.n_tokens, seed=seed, memory=memory,
        report=bar.advance, watch=watch, may_be_silent=may_be_silent,
    )  # fmt: skip


def _exact_on_ranks(
    module: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Batch],
    ranks: Ranks,
    *,
    may_be_silent: bool,
    **settings: Any,
) -> tuple[list[LayerSummary], Recorder]:
    """Score each rank's part of the layers, from all tokens."""
    if ranks.size == 1:
        return score_exact(module, layers, batches, may_be_silent=may_be_silent, **settings)
    joined = Recorder(layers, lambda _found: None, lenient=may_be_silent)
    own, found = [layers[i] for i in ranks.part(len(layers))], list[LayerSummary]()
    if own:
        found, recorder = score_exact(
            module, own, batches, may_be_silent=may_be_silent, whole=False, **settings
        )
        joined.take_over(recorder)
    joined.join(ranks)
    return share_summaries(ranks, found, [one.layer.name for one in found], layers), joined
