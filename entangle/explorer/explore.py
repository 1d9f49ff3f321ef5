"""`explore`: look through the neurons of a model, or of scores made before, in a notebook."""

import os
from collections.abc import Iterable

from entangle.ablation import check_scores_fit
from entangle.calibration import Source, as_calibration
from entangle.checks import share, wholes
from entangle.decomposition import Decomposition, load_decomposition
from entangle.errors import InvalidInput
from entangle.explorer.evidence import ExpertFinder, ModeFinder, Subject
from entangle.explorer.explorer import Explorer
from entangle.memory import check_memory
from entangle.models.evaluating import evaluates
from entangle.models.layers import LayerSpec, Projections
from entangle.models.loading import AnyModel, as_language_model
from entangle.provenance import expanded
from entangle.scoring.score import score
from entangle.scoring.scores import NeuronScores, load_scores
from entangle.seeding import check_seed


@evaluates
def explore(
    source: NeuronScores | AnyModel,
    calibration: Source | None = None,
    *,
    model: AnyModel | None = None,
    decomposition: Decomposition | str | os.PathLike[str] | None = None,
    layers: LayerSpec = "all",
    proj: Projections = "mlp",
    by: str = "wd",
    experts: int | Iterable[int] = (1, 4, 16),
    sparsity: float = 0.9,
    widgets: bool | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: bool | None = None,
) -> Explorer:
    """Look through neurons in a notebook: leave the result as the last line of a cell.

    Menus choose a layer; its neurons stand in a table that a click on a title sorts; a click on a
    neuron shows the distribution of its outputs over the fitted Gaussian, what sparse experts make
    of it, what its modes mean, and its place in the layer. Where nothing can be clicked (no
    ipywidgets, no kernel, an exported notebook) a table and a figure are shown.

    Parameters
    ----------
    source
        Scores, the folder of saved ones, or a model, whose neurons are then scored: a name or path
        for `entangle.load_model`, a module or a `LanguageModel`.
    calibration
        Text that a model is scored and looked at on: a calibration set, or whatever else
        `entangle.load_calibration` takes, with its default settings. The demo text by default where
        ``source`` is a model.
    model
        The model of the scores, as in `entangle.score`, so that modes and experts can be found;
        needs ``calibration``.
    decomposition
        A decomposition of the same model, or its folder: its experts and modes are shown at once.
    layers, proj
        Layers of a model that are scored, as in `entangle.models.layers.find_layers`.
    by
        Column that the neurons are sorted by at first.
    experts, sparsity
        Experts that a click fits, as in `entangle.decompose`.
    widgets
        Whether to show widgets; by default where they can be clicked: in a page with a running
        kernel, if ipywidgets is installed.
    seed
        Of the scores, of the contexts that are drawn, and of the experts.
    memory
        Bytes for the recorded inputs of the layer whose modes are looked at; half of what is free
        when they are recorded by default.
    progress
        Show a progress bar of the scoring; by default in a notebook and on a terminal.

    Raises
    ------
    InvalidInput, UnknownName
        If the scores or the decomposition are of another model, there is no neuron, ``model`` comes
        without ``calibration``, or what `entangle.load_scores` and `entangle.score` refuse.
    """
    check_memory(memory)
    experts, sparsity = wholes("experts", experts, least=1), share("sparsity", sparsity)
    seed = check_seed(seed)
    if isinstance(source, str | os.PathLike) and (expanded(source) / "manifest.json").is_file():
        source = load_scores(source)
    if isinstance(decomposition, str | os.PathLike):
        decomposition = load_decomposition(decomposition)
    if isinstance(source, NeuronScores):
        scores, subject = source, _subject(source, model, calibration)
    elif model is None:
        scored = as_language_model(source)
        text = as_calibration("demo" if calibration is None else calibration, scored)
        subject = Subject(scored, text)
        scores = score(scored, text, layers=layers, proj=proj, seed=seed, progress=progress)
    else:
        raise InvalidInput("`model` must be left out where `source` is a model; got both.")
    if decomposition is not None:
        _check_same_model(scores, decomposition)
    return Explorer(
        scores,
        modes=ModeFinder(decomposition, subject, memory=memory, seed=seed),
        experts=ExpertFinder(decomposition, subject, experts=experts, sparsity=sparsity, seed=seed),
        by=by,
        widgets=widgets,
    )


def _subject(
    scores: NeuronScores,
    model: AnyModel | None,
    calibration: Source | None,
) -> Subject | None:
    if model is None:
        if calibration is not None:
            raise InvalidInput("`calibration` must come with `model` where `source` is scores.")
        return None
    if calibration is None:
        raise InvalidInput("`model` must come with `calibration`, the text that it is run on.")
    known = as_language_model(model)
    check_scores_fit(scores, known)
    return Subject(known, as_calibration(calibration, known))


def _check_same_model(scores: NeuronScores, decomposition: Decomposition) -> None:
    ours, theirs = (
        str(model.get("digest")) if isinstance(model, dict) else "unknown"
        for model in (one.manifest.get("model") for one in (scores, decomposition))
    )
    if ours != theirs:
        raise InvalidInput(
            f"`decomposition` must be of the model of the scores (digest {ours[:12]}…); got one of "
            f"a model with digest {theirs[:12]}…; decompose that model."
        )
