"""`write_report`: a page about the neurons of a model, as one file to look at, keep and send."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entangle.errors import InvalidInput
from entangle.report.content import SHARE, Neurons, check_neurons, chosen_rows, content_of
from entangle.report.page import render
from entangle.report.runs import Run, Runs, open_runs, together
from entangle.results.scores import NeuronScores
from entangle.runs.provenance import expand_user, output_file

if TYPE_CHECKING:
    from entangle.models.loading import AnyModel
    from entangle.results.base import Result
    from entangle.texts.given import Source

STYLES = ("report.css",)
SCRIPTS = ("data.js", "charts.js", "table.js", "neuron.js", "report.js")


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    path: Path
    """The file, absolute."""
    n_bytes: int
    """Its size."""
    n_neurons: int
    """In its table."""
    n_pages: int
    """Neurons with a whole page."""
    notes: tuple[str, ...] = ()
    """What it was made from and what it lacks, as the page says."""

    @property
    def address(self) -> str:
        """What a browser opens."""
        return self.path.as_uri()

    def _repr_html_(self) -> str:
        from entangle.runs.tables import escaped

        return f'<a href="{escaped(self.address)}">{escaped(self.path)}</a>'


def write_report(
    source: "NeuronScores | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]",
    out: str | os.PathLike[str],
    *,
    runs: "Iterable[Result]" = (),
    neurons: Neurons = SHARE,
    model: "AnyModel | None" = None,
    calibration: "Source | None" = None,
    seed: int = 0,
    force: bool = False,
    progress: bool | None = None,
) -> Report:
    """Write a page about the neurons of a model: one HTML file that loads nothing.

    It holds a table of all neurons, sorted and searched in the browser, an overview of the layers,
    what each run says, and for the neurons of largest WD a page each: the distribution of outputs,
    modes, contexts, near-in and far-out pairs, experts, and arms of ablations that changed it.

    Parameters
    ----------
    source
        Scores; or the folder of a result, several of them, or a folder that holds several, scores
        (or an ablation, which holds its own) among them.
    out
        The file.
    runs
        Further results of the same model, such as a decomposition.
    neurons
        Neurons of each layer that have a whole page, by WD: a share as 0.03 or ``"3%"``, a number,
        or ``"all"``. What a decomposition has looked at closely has one too.
    model, calibration
        The model of the scores, as in `entangle.score`, and a text: modes, contexts and pairs are
        then read for every neuron with a page, in a pass over the text. Where that is not the text
        of the scores, the page says so. Without them no torch is needed.
    seed
        Of the examples that are drawn.
    force
        Replace an existing file.
    progress
        Show a progress bar of the pass; by default in a notebook and on a terminal.

    Returns
    -------
    Report
        Where it is.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If a run is damaged, or of another model or other layers than the scores; if the model is
        not the one that was scored; if the file exists without ``force`` or cannot be written.
    """
    neurons = check_neurons(neurons)
    target = check_new(out, force=force)
    if (model is None) != (calibration is None):
        raise InvalidInput("`model` and `calibration` must come together; got one of them.")
    found = _found(source, runs)
    rows = chosen_rows(found, neurons)
    evidence = None
    if model is not None and calibration is not None:
        from entangle.report.evidence import gather

        evidence = gather(found.scores, rows, model, calibration, seed=seed, progress=progress)
    content = content_of(found, neurons=neurons, rows=rows, evidence=evidence)
    text = render(
        "report.html", title=content.title, data=content.data, styles=STYLES, scripts=SCRIPTS,
        content=content.shown,
    )  # fmt: skip
    written = text.encode("utf-8", errors="backslashreplace")
    with output_file(target) as temporary:
        temporary.write_bytes(written)
    return Report(target.resolve(), len(written), content.n_neurons, content.n_pages, content.notes)


def check_new(out: str | os.PathLike[str], *, force: bool) -> Path:
    """Return the path of a page to be written, or raise `InvalidInput` where there is one."""
    target = expand_user(out)
    if target.is_dir():
        raise InvalidInput(
            f"{str(target)!r} is a folder; name a file such as {target / 'page.html'}."
        )
    if target.exists() and not force:
        raise InvalidInput(
            f"{str(target)!r} exists; use --force (force) to replace it, or name another file."
        )
    return target


def _found(
    source: "NeuronScores | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]",
    runs: "Iterable[Result]",
) -> Runs:
    results = list(runs)
    kinds = [one.KIND for one in results]
    given = [
        Run(one.KIND if kinds.count(one.KIND) == 1 else f"{one.KIND} {n}", one.KIND, one)
        for n, one in enumerate(results, start=1)
    ]
    if isinstance(source, NeuronScores):
        return together(source, given)
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    opened = open_runs(paths)
    if not given:
        return opened
    return together(opened.scores, [*opened.runs[1:], *given], name=opened.runs[0].name)
