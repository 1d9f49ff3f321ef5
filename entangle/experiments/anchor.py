"""An outside anchor of polysemanticity: how many atoms of a dictionary a neuron reads.

Dictionaries of a layer's inputs: of tokens that the ones before cannot be written with (ITDA), or
a sparse autoencoder that the user brings; and two controls of equal size, random tokens and
principal directions. What a neuron reads of them is set against its scores.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from entangle.checks import finite, names, whole
from entangle.errors import InvalidInput, NumericalError
from entangle.experiments.predictors import predictor_table
from entangle.experiments.sae import EncoderDictionary, load_sae
from entangle.memory import check_memory, memory_for
from entangle.models.blocks import evaluates
from entangle.models.layers import (
    DEFAULT_PROJ,
    Layer,
    LayerSpec,
    Projections,
    find_layers,
    refuse_experts,
)
from entangle.models.loading import AnyModel, LanguageModel, as_language_model
from entangle.precision import full_precision
from entangle.recording.groups import Group, record_groups
from entangle.results.anchor import KIND, Anchor, typed
from entangle.runs.progress import ProgressBar
from entangle.runs.provenance import RunClock, make_manifest
from entangle.scoring.score import score
from entangle.seeding import check_seed, torch_rng
from entangle.stats.dictionary import (
    Chosen,
    Dictionary,
    PursuitDictionary,
    entropy,
    fit_itda,
    measure_coding,
    participation,
    principal_atoms,
    random_tokens,
    shares_read,
)
from entangle.stats.gram import require_finite
from entangle.texts.calibration import as_calibration
from entangle.texts.calibration_set import CalibrationSet
from entangle.texts.given import Source
from entangle.texts.words import TokenText

ITDA, SAE, RANDOM, PCA = "itda", "sae", "random tokens", "principal directions"
TOP, READ, WINDOW = 3, 5, 12
"""Neurons of largest WD that are looked at, atoms told of each, tokens around these."""
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is to be done; the fields are explained at `anchor`."""

    brought: EncoderDictionary | None
    atoms: int | None
    active: int
    threshold: float
    seed: int


@dataclass(frozen=True, eq=False)
class _Fitted:
    """One dictionary of one input."""

    dictionary: Dictionary
    tokens: Tensor | None
    """Index of every atom's token, where atoms are tokens."""
    seen: int
    """Tokens that it was fitted to."""


@evaluates
def anchor(
    model: AnyModel = "demo",
    calibration: Source = "demo",
    *,
    layers: LayerSpec,
    proj: Projections = DEFAULT_PROJ,
    dictionary: str | Path | None = None,
    atoms: int | None = None,
    active: int = 40,
    threshold: float = 0.3,
    controls: str | Sequence[str] = ("weight_norm", "variance"),
    n_boot: int = 500,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | None = None,
) -> Anchor:
    """Ask dictionaries of some layers' inputs how many atoms every neuron reads.

    Half of the sequences, drawn at random, are what dictionaries are fitted to; what neurons read,
    and how much the dictionaries miss, is measured on the other half. Scores are of all tokens.

    Parameters
    ----------
    model, calibration, layers, proj
        As for `entangle.score`; layers that run once on every token.
    dictionary
        Folder of a sparse autoencoder of these inputs, as `entangle.experiments.sae.load_sae` reads
        one, instead of ITDA. That it was trained on the inputs of these layers is the caller's to
        know.
    atoms
        Atoms of a dictionary; by default twice the input's features, so that the principal
        directions and their opposites are as many. A brought dictionary has its own number.
    active
        Atoms of an input, at most, of dictionaries coded with by matching pursuit.
    threshold
        Share of its squared length in (0, 1) that a token must lose to become an atom of ITDA.
    controls
        Scores held fixed in the partial correlations.
    n_boot
        Resamples of the neurons.
    seed
        Of halves, orders, random tokens and resamples.
    memory
        Bytes for recorded inputs, which spill beyond it; by default half of what is free. One
        layer's inputs are in memory besides.
    progress
        Show a progress bar on standard error; by default if that is a terminal.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a setting is out of range or does not fit the model, the text or the dictionary.
    NumericalError
        If inputs are not finite; the message names the layers and counts the tokens.

    References
    ----------
    arXiv 2505.17769 (ITDA), 2405.15756 (WD and MD).
    """
    clock = RunClock()
    plan = _Plan(
        None if dictionary is None else load_sae(dictionary),
        None if atoms is None else whole("atoms", atoms, least=2),
        whole("active", active, least=1),
        finite("threshold", threshold, least=0.0),
        check_seed(seed),
    )
    if not 0 < plan.threshold < 1:
        raise InvalidInput(f"`threshold` must lie in (0, 1); got {threshold}.")
    held = names("controls", controls) if controls else []
    n_boot, seed = whole("n_boot", n_boot, least=1), plan.seed
    check_memory(memory)
    dense = as_language_model(model)
    calibration = as_calibration(calibration, dense)
    chosen = find_layers(dense.module, layers, proj)
    refuse_experts(chosen, "an anchor")
    _check_fit(chosen, calibration, plan)
    spec = [one.name for one in chosen]
    budget = memory_for(memory, dense.module)
    scored = score(dense, calibration, layers=spec, seed=seed, memory=memory, progress=progress)
    parts: dict[str, list[pd.DataFrame]] = {"anchor": [], "dictionaries": [], "reads": []}
    with ExitStack() as stack, full_precision(), ProgressBar("anchoring", enabled=progress) as bar:
        bar.start(calibration.n_seq + len(chosen), "sequences and layers")
        groups = record_groups(
            dense.module,
            chosen,
            calibration,
            memory=budget,
            stack=stack,
            report=bar.advance,
            what="an anchor",
        )
        for group in groups:
            for name, rows in _of_group(group, scored.frame, dense, calibration, plan).items():
                parts[name] += rows
            group[1].close()
            bar.advance(len(group[0]))
    tables = {name: _in_order(name, rows, spec) for name, rows in parts.items()}
    correlations = _correlations(tables["anchor"], held, n_boot=n_boot, seed=seed)
    settings = {
        "layers": spec, "dictionary": None if dictionary is None else str(dictionary),
        "sae": None if plan.brought is None else dict(plan.brought.facts), "atoms": plan.atoms,
        "active": plan.active, "threshold": plan.threshold, "controls": held, "n_boot": n_boot,
        "seed": seed,
    }  # fmt: skip
    manifest = make_manifest(
        KIND, model=dense.describe(), calibration=calibration.describe(), settings=settings,
        **clock.read(budget),
    )  # fmt: skip
    return Anchor(
        frame=tables["anchor"], dictionaries=tables["dictionaries"], reads=tables["reads"],
        correlations=correlations, manifest=manifest,
    )  # fmt: skip


def _check_fit(layers: Sequence[Layer], calibration: CalibrationSet, plan: _Plan) -> None:
    if calibration.n_seq < 2:
        raise InvalidInput(
            "an anchor needs at least 2 sequences, one to fit dictionaries to and one to measure "
            f"them on; got {calibration.n_seq}: make sequences shorter or take more."
        )
    for layer in layers:
        if layer.offloaded:
            raise InvalidInput(
                f"the weights of layer {layer.name!r} are offloaded, so it cannot be anchored; "
                "choose a device map that keeps it on a device."
            )
        width = layer.in_features
        if plan.brought is not None and plan.brought.atoms.shape[1] != width:
            raise InvalidInput(
                f"the dictionary is of {plan.brought.atoms.shape[1]} features, but layer "
                f"{layer.name!r} has {width}: choose layers that read what it was trained on."
            )


def _of_group(
    group: Group,
    scores: pd.DataFrame,
    model: LanguageModel,
    calibration: CalibrationSet,
    plan: _Plan,
) -> dict[str, list[pd.DataFrame]]:
    """Return the parts of the tables that come from the layers of one input."""
    layers, inputs = group
    fitted_on, measured_on = _halves(calibration, plan.seed)
    device = layers[0].weight.device
    points = inputs.take(fitted_on).to(device, torch.float32)
    others = inputs.take(measured_on).to(device, torch.float32)
    try:
        require_finite(points, others)
    except NumericalError as error:
        raise NumericalError(f"{', '.join(one.name for one in layers)}: {error}") from error
    found: dict[str, list[pd.DataFrame]] = {"anchor": [], "dictionaries": [], "reads": []}
    for name, fitted in _dictionaries(points, plan).items():
        coding = measure_coding(fitted.dictionary, others.split(_BLOCK))
        told = {
            "dictionary": name, "atoms": len(fitted.dictionary.atoms), "used": coding.used,
            "active": coding.active, "unexplained": coding.unexplained,
            "tokens_fitted": fitted.seen, "tokens_measured": len(others),
        }  # fmt: skip
        for layer in layers:
            own = scores[scores["layer"] == layer.name].sort_values("neuron")
            shares = shares_read(layer.weight.to(device), fitted.dictionary, coding)
            found["dictionaries"].append(pd.DataFrame([told | {"layer": layer.name}]))
            read = {
                "participation": participation(shares).cpu().numpy(),
                "entropy": entropy(shares).cpu().numpy(),
            }
            found["anchor"].append(own.assign(dictionary=name, **read))
            if name == ITDA and fitted.tokens is not None:
                places = fitted_on[fitted.tokens]
                found["reads"].append(_reads(own, shares, places, calibration, model))
    return found


def _halves(calibration: CalibrationSet, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the tokens to fit to, and of those to measure on."""
    order = torch.randperm(calibration.n_seq, generator=torch_rng(seed, "anchor halves"))
    half = calibration.n_seq // 2
    tokens = torch.arange(calibration.n_tokens).split(list(calibration.rows.lengths))
    first, second = order[: calibration.n_seq - half].sort().values, order[-half:].sort().values
    own = [[tokens[index] for index in some.tolist()] for some in (first, second)]
    return torch.cat(own[0]), torch.cat(own[1])


def _dictionaries(points: Tensor, plan: _Plan) -> Mapping[str, _Fitted]:
    """Fit all dictionaries to the inputs of some tokens."""
    centre, wanted = points.mean(0), plan.atoms or 2 * points.shape[1]
    moved, found = points - centre, dict[str, _Fitted]()
    if plan.brought is not None:
        brought = plan.brought.to(points.device)
        found[SAE] = _Fitted(brought, None, 0)
        wanted = len(brought.atoms)
    else:
        chosen = fit_itda(
            moved, atoms=wanted, active=plan.active, threshold=plan.threshold, seed=plan.seed
        )
        found[ITDA] = _of_tokens(chosen, moved, centre, plan.active)
        wanted = len(chosen.rows)
    drawn = random_tokens(moved, atoms=wanted, seed=plan.seed)
    found[RANDOM] = _of_tokens(drawn, moved, centre, plan.active)
    directions = principal_atoms(moved, atoms=wanted)
    found[PCA] = _Fitted(PursuitDictionary(directions, centre, plan.active), None, len(points))
    return found


def _of_tokens(chosen: Chosen, moved: Tensor, centre: Tensor, active: int) -> _Fitted:
    own = moved[chosen.rows.to(moved.device)]
    unit = own / own.norm(dim=1, keepdim=True)
    return _Fitted(PursuitDictionary(unit, centre, active), chosen.rows, chosen.seen)


def _reads(
    scores: pd.DataFrame,
    shares: Tensor,
    places: Tensor,
    calibration: CalibrationSet,
    model: LanguageModel,
) -> pd.DataFrame:
    """Return what the neurons of largest WD and the median one read most."""
    if scores["wd"].isna().all():
        return pd.DataFrame()
    text = TokenText(model.tokenizer)
    wd, rows = scores.set_index("neuron")["wd"], list[dict[str, object]]()
    for neuron in _looked_at(wd):
        values, atoms = shares[neuron].nan_to_num().topk(min(READ, shares.shape[1]))
        for rank, (share, atom) in enumerate(zip(values.tolist(), atoms.tolist(), strict=True)):
            position = int(places[atom])
            index, place = calibration.place(position)
            sequence = calibration.rows.sequence(index).tolist()
            before, token, after = text.context(sequence, place, WINDOW)
            rows.append(
                {
                    "layer": scores["layer"].iloc[0], "neuron": neuron, "wd": wd[neuron],
                    "rank": rank, "atom": atom, "share": share, "position": position,
                    "token": token, "before": before, "after": after,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _looked_at(wd: "pd.Series[float]") -> list[int]:
    """Return the neurons of largest WD, and the median one."""
    ordered = wd.dropna().sort_values(ascending=False, kind="stable").index.tolist()
    return list(dict.fromkeys([*ordered[:TOP], ordered[len(ordered) // 2]]))


def _in_order(name: str, parts: Sequence[pd.DataFrame], layers: Sequence[str]) -> pd.DataFrame:
    filled = [part for part in parts if len(part)]
    if not filled:
        return typed(name, pd.DataFrame())
    whole_table = pd.concat(filled, ignore_index=True)
    place = {layer: i for i, layer in enumerate(layers)}
    order = whole_table["layer"].map(place).argsort(kind="stable")
    return typed(name, whole_table.iloc[order])


def _correlations(
    frame: pd.DataFrame, given: Sequence[str], *, n_boot: int, seed: int
) -> pd.DataFrame:
    """Correlate scores with participation, by dictionary."""
    parts = [
        predictor_table(own, "participation", given=given, n_boot=n_boot, seed=seed).assign(
            dictionary=name
        )
        for name, own in frame.groupby("dictionary", sort=False)
    ]
    return typed("correlations", pd.concat(parts, ignore_index=True))
