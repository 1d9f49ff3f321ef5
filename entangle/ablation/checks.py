"""What is refused before an ablation begins, as it would fail after minutes otherwise."""

from collections.abc import Sequence

from entangle.ablation.arms import PRUNERS
from entangle.ablation.measures import Protocol
from entangle.ablation.request import DEFAULT, Request
from entangle.ablation.selection import Selection, check_scores_fit
from entangle.allocation.allocation import Allocation
from entangle.allocation.labels import zeros_digest
from entangle.calibration import CalibrationSet, as_calibration
from entangle.checks import finite
from entangle.errors import InvalidInput, unknown_name
from entangle.evaluation.forward import check_fits
from entangle.models.layers import Layer
from entangle.models.loading import LanguageModel
from entangle.scoring.scores import NeuronScores


def check_fit(
    model: LanguageModel,
    layers: Sequence[Layer],
    calibration: CalibrationSet,
    protocol: Protocol,
    *,
    experts: Sequence[int],
    damping: float,
) -> None:
    """Check that texts and numbers of experts fit the model and one another.

    Raises
    ------
    InvalidInput
        If they do not.
    """
    as_calibration(calibration, model)
    if protocol.text is not None:
        check_fits(model, protocol.text)
    if protocol.pairs is not None and model.tokenizer is None:
        raise InvalidInput("minimal pairs need a tokenizer; load the model with its own.")
    if max(experts) > calibration.n_tokens:
        raise InvalidInput(
            f"`experts` must be at most the number of calibration tokens, {calibration.n_tokens}; "
            f"got {max(experts)}: give more text or fewer experts."
        )
    finite("damping", damping, least=0)
    outside = [layer.name for layer in layers if layer.block is None]
    if "divergence" in protocol.measures and outside:
        raise InvalidInput(
            f"divergence must be measured with layers inside the blocks only; got {outside[0]!r}, "
            "which the dense model's own logits pass too: leave it out, or measure perplexity."
        )
    if max(experts) > 1 and outside:
        raise InvalidInput(
            f"several experts must hold rows of layers inside the blocks; got {outside[0]!r}: "
            "leave it out, or take 1 expert."
        )


def check_match(
    protocol: Protocol, request: Request, interventions: Sequence[str], experts: Sequence[int]
) -> None:
    """Refuse a search for matched controls that would have nothing to match."""
    if not {"perplexity", "divergence"} & set(protocol.measures):
        raise InvalidInput(
            "`match` compares perplexities; give `evaluation`, and measure perplexity."
        )
    first = request.columns[0]
    tops = [one for one in request.wanted if isinstance(one, Selection) and one.rule == "top"]
    if "top" not in request.wanted and first not in [one.by for one in tops]:
        raise InvalidInput(f"`match` needs the selection top {first}; add top to `selections`.")
    if 1 not in experts and set(interventions) <= set(PRUNERS):
        raise InvalidInput(f"`match` needs arms with 1 expert; got `experts` {list(experts)}.")


def check_alone(selections: Sequence[str | Selection], *, match: bool) -> None:
    """Refuse what has no meaning beside an allocation, which says how sparse each row is."""
    if tuple(selections) not in (DEFAULT, ("all",)):
        raise InvalidInput(
            "with `allocation` all rows of its layers are pruned; leave `selections` out."
        )
    if match:
        raise InvalidInput("`match` needs a top selection, which `allocation` has not; drop one.")


def allocated_settings(allocation: Allocation) -> dict[str, object]:
    """Return what a manifest records of an ablation by an allocation."""
    zeros = {"zeros_sha256": zeros_digest(allocation), "overall": allocation.overall}
    return {
        "allocation": dict(allocation.manifest) | zeros,
        "selections": ["all", "allocation"],
        "strengths": [allocation.overall],
    }


def silent_layers(scores: NeuronScores) -> set[str]:
    """Return the layers that scores left out because they saw no token."""
    settings = scores.manifest.get("settings")
    found = settings.get("layers_without_tokens") if isinstance(settings, dict) else None
    return {str(name) for name in found or ()}


def scores_of(scores: NeuronScores, layers: Sequence[Layer], model: LanguageModel) -> NeuronScores:
    """Return the scores of some layers; refuse those of another model, or that lack a layer."""
    check_scores_fit(scores, model)
    names = [layer.name for layer in layers]
    for name in names:
        if name not in scores.histograms:
            raise unknown_name(
                "scored layer", name, scores.histograms,
                "Score it too, or ablate only the layers that were scored.",
            )  # fmt: skip
    return NeuronScores(
        frame=scores.frame[scores.frame["layer"].isin(names)].reset_index(drop=True),
        layers=scores.layers[scores.layers["layer"].isin(names)].reset_index(drop=True),
        histograms={name: scores.histograms[name] for name in names},
        manifest=scores.manifest,
    )
