"""``entangle figures``: the paper's figures from the folders that other commands wrote."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from entangle.cli.drawings import FIGURES, Drawing, Run, drawings_of
from entangle.cli.options import Subparsers
from entangle.cli.tables import say
from entangle.errors import InvalidInput, Unavailable

MAKERS: dict[str, str] = {
    "scores": "entangle score",
    "ablation": "entangle ablate",
    "comparison": "entangle compare",
    "decomposition": "entangle decompose",
    "allocation": "entangle allocate",
}
"""Command that makes a result, by its kind."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "figures",
        help="draw every figure that results hold",
        description="Recognise results of entangle score, ablate, compare, decompose and allocate, "
        "and draw all figures that they hold, each with its CSV of what it shows. No model is "
        "needed.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="result folder, or file of entangle allocate"
    )
    parser.add_argument(
        "--out", default="figures", metavar="DIR", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--format", default="pdf,png", help="comma-separated: pdf, png (default: %(default)s)"
    )
    parser.add_argument(
        "--column", default="double", choices=("single", "double"),
        help="width: one column of a paper (3.3 inches) or two (6.9) (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace existing figures")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Open the results, draw what can be drawn, and say what cannot."""
    from entangle.plotting.save import check_formats

    formats = check_formats(arguments.format.split(","))
    found = [open_run(path) for path in arguments.runs]
    folders = _folders(Path(arguments.out), found)
    drawings = [
        (folders[number] / drawing.name, drawing, one)
        for number, one in enumerate(found)
        for drawing in drawings_of(one, arguments.column)
    ]
    if not arguments.force:
        _check_new([stem for stem, *_ in drawings], (*formats, "csv"))
    skipped = [f"{one.path}: no figures of a result of kind {one.kind!r}" for one in found
               if one.kind not in FIGURES]  # fmt: skip
    failed = list(_draw(drawings, formats, force=arguments.force))
    for line in (*skipped, *failed, *missing_lines({one.kind for one in found})):
        say(f"Skipped: {line}")
    if len(failed) == len(drawings):
        raise InvalidInput(
            f"nothing could be drawn of {', '.join(map(repr, arguments.runs))}; name results of "
            f"{', '.join(MAKERS.values())}."
        )


def _draw(
    drawings: Sequence[tuple[Path, Drawing, Run]], formats: Sequence[str], *, force: bool
) -> Iterator[str]:
    """Draw and save what can be drawn; yield what cannot, and why.

    What is added to the folder of a result is listed in it, apart from what it was made with.
    """
    from entangle.plotting import save_figure
    from entangle.sealing import list_added

    for stem, drawing, one in drawings:
        try:
            figure = drawing.draw()
        except InvalidInput as error:
            yield f"{drawing.name}: {error}"
            continue
        files = save_figure(figure, stem, formats=formats, force=force)
        say(f"Figure: {stem} ({', '.join(path.suffix[1:] for path in files)})")
        if one.path.is_dir() and one.path.resolve() in stem.resolve().parents:
            list_added(one.path.resolve(), [path.resolve() for path in files], one.digest)


def open_run(path: str) -> Run:
    """Recognise a result by its manifest.

    Raises
    ------
    InvalidInput
        If it is none of ours.
    """
    from entangle.provenance import expanded, read_manifest
    from entangle.sealing import manifest_digest

    place = expanded(path)
    if place.is_file():
        from entangle.allocation import load_allocation

        manifest: Mapping[str, object] = load_allocation(place).manifest
        return Run(place, "allocation", manifest_digest(manifest), manifest)
    kind = _kind(place / "manifest.json")
    manifest = read_manifest(path, kind)
    return Run(place, kind, manifest_digest(manifest), manifest)


def _kind(path: Path) -> str:
    """Return what a manifest says; where it says nothing, a kind whose reading fails clearly."""
    from entangle.reading import read_object

    try:
        return str(read_object(path, remedy="make the result anew").get("kind"))
    except (InvalidInput, Unavailable):
        return "scores"


def _folders(out: Path, runs: Sequence[Run]) -> list[Path]:
    """Return a folder a run: ``out``, or one of its own where several runs are of one kind."""
    kinds = [one.kind for one in runs]
    own = [one.path.resolve().name if kinds.count(one.kind) > 1 else "" for one in runs]
    named = [(one.kind, name) for one, name in zip(runs, own, strict=True)]
    for kind, name in named:
        if named.count((kind, name)) > 1:
            raise InvalidInput(
                f"results of one kind must have names of their own; got two {kind} called {name!r}."
            )
    return [out / name for name in own]


def _check_new(stems: Sequence[Path], endings: Sequence[str]) -> None:
    files = [stem.with_name(f"{stem.name}.{ending}") for stem in stems for ending in endings]
    existing = [str(path) for path in files if path.exists()]
    if existing:
        raise InvalidInput(
            f"the figure {existing[0]!r} exists; use --force to replace figures, or another --out."
        )


def missing_lines(kinds: set[str]) -> Iterator[str]:
    """Say which figures need a result that was not given, and what makes it."""
    for kind, names in FIGURES.items():
        if kind not in kinds:
            article = "" if kind == "scores" else "an " if kind[0] == "a" else "a "
            yield f"{', '.join(names)}: name {article}{kind}, which `{MAKERS[kind]}` makes."
