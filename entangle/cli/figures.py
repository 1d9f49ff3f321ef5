"""``entangle figures``: the paper's figures from the folders that other commands wrote."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.checks import choices
from entangle.cli.options import Subparsers
from entangle.cli.tables import say
from entangle.errors import InvalidInput
from entangle.results.drawings import FIGURES, Draw, Style, attempts, drawings

if TYPE_CHECKING:
    from entangle.results.base import Result

MAKERS: dict[str, str] = {
    "scores": "entangle score",
    "ablation": "entangle ablate",
    "comparison": "entangle compare",
    "decomposition": "entangle decompose",
    "allocation": "entangle allocate",
    "expansion": "entangle expand",
    "pruning": "entangle prune",
    "difference": "entangle diff",
    "study": "entangle study",
    "trace": "entangle trace",
    "anchor": "entangle anchor",
}
"""Command that makes a result, by its kind."""


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn."""

    name: str
    """Of its files."""
    draw: Draw


@dataclass(frozen=True)
class Run:
    """One result on the disk."""

    path: Path
    kind: str
    digest: str
    """SHA-256 of its manifest."""
    manifest: Mapping[str, object]
    result: "Result" = field(repr=False)


def open_run(path: str) -> Run:
    """Recognise and load a result.

    Raises
    ------
    InvalidInput
        If it is none of ours.
    """
    from entangle.results import kind_of, load_result
    from entangle.runs.provenance import expand_user
    from entangle.runs.sealing import manifest_digest

    kind = kind_of(path)
    result = load_result(path)
    digest = manifest_digest(result.manifest)
    return Run(expand_user(path), kind, digest, result.manifest, result)


def drawings_of(one: Run, style: Style) -> Iterator[Drawing]:
    """Yield the figures of a result, if any, signed with the run's digest and seed."""
    for name, draw in drawings(one.result, style):
        yield Drawing(name, draw)


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "figures",
        help="draw every figure that results hold",
        description="Recognise results of entangle score, ablate, compare, decompose, allocate "
        "and expand, and draw all figures that they hold, each with its CSV of what it shows. No "
        "model is needed.",
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
        "--only", action="append", metavar="FIGURE",
        help="draw this figure, for example wd_by_layer; may come several times",
    )  # fmt: skip
    _add_style(parser)
    parser.add_argument("--force", action="store_true", help="replace existing figures")
    parser.set_defaults(run=run)


def _add_style(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width", default="double",
        help="single (one column of a paper, 3.3 inches), double (6.9), or inches "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--height", type=float, help="inches (default: as the figure needs)")
    parser.add_argument("--title", help="title of every figure, instead of its own")
    parser.add_argument(
        "--no-caption", action="store_true", help="write no caption beside the figures"
    )
    parser.add_argument(
        "--palette", action="append", metavar="NAME=COLOUR",
        help="colour of a part or meaning, for example top=#cc0000; several times, or a list of "
        "colours such as Dark2",
    )  # fmt: skip
    parser.add_argument(
        "--label", action="append", metavar="OLD=NEW",
        help="other words for those in the figures; may come several times",
    )  # fmt: skip
    for option, verb in (("--subset", "draw only"), ("--order", "put first")):
        parser.add_argument(
            option, action="append", metavar="NAME",
            help=f"{verb} the layer, panel or series of this name; may come several times",
        )  # fmt: skip


def style_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of figures that a command line asks for."""
    style: dict[str, Any] = {
        name: value
        for name in ("height", "title", "subset", "order")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.width in ("single", "double"):
        style["column"] = arguments.width
    else:
        style["width"] = _inches(arguments.width)
    if arguments.no_caption:
        style["caption"] = False
    if arguments.palette is not None:
        one = arguments.palette[0]
        alone = len(arguments.palette) == 1 and "=" not in one
        style["palette"] = one if alone else _by_name("--palette", arguments.palette)
    if arguments.label is not None:
        style["labels"] = _by_name("--label", arguments.label)
    return style


def _inches(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidInput(
            f"`--width` must be single, double, or a number of inches; got {text!r}."
        ) from None


def _by_name(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Return what stands behind the last ``=`` by what stands before it."""
    found = {}
    for pair in pairs:
        name, sign, value = pair.rpartition("=")
        if not (name and sign):
            raise InvalidInput(f"`{option}` must be NAME=VALUE; got {pair!r}.")
        found[name] = value
    return found


def run(arguments: argparse.Namespace) -> None:
    """Open the results, draw what can be drawn, and say what cannot."""
    from entangle.plotting.options import Wishes
    from entangle.plotting.save import check_formats

    formats, style = check_formats(arguments.format.split(",")), style_of(arguments)
    Wishes({**style}, panel=False)  # type: ignore[typeddict-item]
    found = [open_run(path) for path in arguments.runs]
    folders = _folders(Path(arguments.out), found)
    wanted = [
        (folders[number] / drawing.name, drawing, one)
        for number, one in enumerate(found)
        for drawing in drawings_of(one, style)
    ]
    if arguments.only is not None:
        wanted = _only(arguments.only, wanted)
    if not arguments.force:
        _check_new([stem for stem, *_ in wanted], (*formats, "tex", "txt", "csv"))
    failed = list(_draw(wanted, style, formats, force=arguments.force))
    missing = missing_lines({one.kind for one in found}) if arguments.only is None else ()
    for line in (*failed, *missing):
        say(f"Skipped: {line}")
    if len(failed) == len(wanted):
        raise InvalidInput(
            f"nothing could be drawn of {', '.join(map(repr, arguments.runs))}; name results of "
            f"{', '.join(MAKERS.values())}."
        )


Wanted = tuple[Path, Drawing, Run]


def _only(names: Sequence[str], wanted: Sequence[Wanted]) -> list[Wanted]:
    """Return the figures of these names, also those of each layer, which have longer ones."""
    known = {name for *_, one in wanted for name in FIGURES[one.kind]}
    kept = choices("--only", names, sorted(known), kind="figure")
    return [
        one
        for one in wanted
        if one[1].name in kept
        or any(one[1].name not in known and one[1].name.startswith(f"{k}_") for k in kept)
    ]


def _draw(
    wanted: Sequence[Wanted], style: Style, formats: Sequence[str], *, force: bool
) -> Iterator[str]:
    """Draw and save what can be drawn; yield what cannot, and why.

    What is added to the folder of a result is listed in it, apart from what it was made with.
    """
    from entangle.plotting import save_figure
    from entangle.runs.sealing import list_added

    made = attempts([(drawing.name, drawing.draw) for _, drawing, _ in wanted], style)
    for (stem, drawing, one), (_, figure) in zip(wanted, made, strict=True):
        if isinstance(figure, InvalidInput):
            yield f"{drawing.name}: {figure}"
            continue
        files = save_figure(figure, stem, formats=formats, force=force)
        say(f"Figure: {stem} ({', '.join(path.suffix[1:] for path in files)})")
        if one.path.is_dir() and one.path.resolve() in stem.resolve().parents:
            list_added(one.path.resolve(), [path.resolve() for path in files], one.digest)


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
    drawn = {name for kind in kinds for name in FIGURES[kind]}
    for kind, names in FIGURES.items():
        if not drawn.issuperset(names):
            article = "" if kind == "scores" else "an " if kind[0] in "ae" else "a "
            yield f"{', '.join(names)}: name {article}{kind}, which `{MAKERS[kind]}` makes."
