"""Results that nobody has named: ``runs/COMMAND-DIGEST``, found again by what was asked.

The digest is that of the command, of every option that changes the result, of the files that these
name, and of the versions of entangle and of packages that bring plug-ins. So the same command again
finds what it made before: a finished result is read and printed, no model is loaded; unfinished
work is gone on with.
``--force`` makes it anew. Other options, or other files under the same names, make another result.
A place that ``--out`` names is another matter: what exists there is refused, or replaced if asked.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from entangle import __version__
from entangle.cli import show
from entangle.doors import packages
from entangle.errors import visible
from entangle.runs.claims import beside
from entangle.runs.places import runs_folder
from entangle.runs.progress import tell
from entangle.runs.provenance import expand_user
from entangle.runs.unfinished import PLAN

NEUTRAL = frozenset((
    "command", "config", "csv", "dry_run", "export", "force", "given", "json", "latex", "out",
    "out_ending", "plot", "quiet", "resume", "run", "show", "table", "tables", "top", "unnamed",
    "wide",
))  # fmt: skip
"""What says how a command runs and prints, and not what it finds."""
SOURCES = (
    "model", "base", "dense", "expansion", "calibration", "evaluation", "pairs", "scores",
    "allocation", "select", "runs", "run", "text", "a", "b", "models", "blimp", "other_pairs",
    "dictionary",
)  # fmt: skip
"""Options that may name files, whose content belongs to the question."""
MODELS = ("expand", "prune")
"""Commands whose result is a whole model."""
DIGITS = 12
_READ = 2**26  # bytes up to which a file's content is looked at; then its size and time of change
_MOST = 10_000  # files of a folder that are looked at


def asked(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what a command was asked: its options, and fingerprints of the files they name."""
    given = {name: one for name, one in vars(arguments).items() if name not in NEUTRAL}
    files = {
        part: fingerprint(path)
        for name in SOURCES
        for part, path in _files(given.get(name))
    }  # fmt: skip
    question = {"command": arguments.command, "version": __version__, "options": given}
    brought = packages()
    return question | {"files": files} | ({"plugins": brought} if brought else {})


def name_output(arguments: argparse.Namespace) -> None:
    """Give the result of a command a name, where it makes one and nobody has named it.

    Then ``unnamed`` is set, and ``resume`` unless ``--force`` is.
    """
    arguments.unnamed = hasattr(arguments, "out_ending") and arguments.out is None
    if not arguments.unnamed:
        return
    text = json.dumps(asked(arguments), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    out = runs_folder() / f"{arguments.command}-{digest}{arguments.out_ending}"
    arguments.out = str(out)
    if hasattr(arguments, "resume") and not arguments.force:
        arguments.resume = True
        if any(_pieces(out)):
            tell(f"going on with unfinished work on {arguments.out}; --force starts anew")


def tell_place(arguments: argparse.Namespace) -> None:
    """Say where a whole model is about to be written, if nobody has named the place."""
    if arguments.unnamed and arguments.command in MODELS and not arguments.quiet:
        tell(f"writing the whole model to {arguments.out}; --out names another place")


def is_found(arguments: argparse.Namespace) -> bool:
    """Tell whether the result of an unnamed command is there, finished, and not to be replaced."""
    anew = not arguments.unnamed or arguments.force or getattr(arguments, "dry_run", False)
    return not anew and finished(arguments.out) is not None


def show_found(arguments: argparse.Namespace) -> None:
    """Print a finished result as the command that made it would, after a line that says so.

    Of a command that does not say how (``show`` among its parser's defaults), as ``entangle show``.
    """
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(finished(arguments.out)))
    tell(f"read from {arguments.out}, made {when} by the same command; --force makes it anew")
    if hasattr(arguments, "show"):
        arguments.show(arguments)
    else:
        show.run(argparse.Namespace(**{**show.PLAIN, **vars(arguments), "path": arguments.out}))


def finished(out: str) -> float | None:
    """Return when a result was finished, in seconds since the epoch; None if it is not there."""
    place = expand_user(out)
    with suppress(OSError):
        return (place / "manifest.json" if place.is_dir() else place).stat().st_mtime
    return None


def fingerprint(path: Path) -> object:
    """Return what tells the content of a file or folder: digests, or size and time of large files.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if one.is_file())[:_MOST]
        return {one.relative_to(path).as_posix(): fingerprint(one) for one in found}
    facts = path.stat()
    if facts.st_size > _READ or not path.is_file():
        return [facts.st_size, facts.st_mtime_ns]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(value: object) -> Iterator[tuple[str, Path]]:
    """Yield the parts of an option that name something on the disk, also behind ``NAME=``."""
    values = value if isinstance(value, list | tuple) else [value]
    texts = [one for one in values if isinstance(one, str | os.PathLike)]
    for part in (piece for text in texts for piece in {str(text), *str(text).split(",")}):
        for name in {part, part.partition("=")[2]} - {""}:
            with suppress(OSError, ValueError):
                path = expand_user(name.strip())
                if path.exists():
                    yield visible(os.path.realpath(path)), path


def _pieces(out: Path) -> Iterator[Path]:
    """Yield the folders of unfinished work beside a result."""
    start = beside(out, "").name
    with suppress(OSError):
        yield from (
            one.parent for one in out.parent.glob(f".*/{PLAN}") if one.parent.name.startswith(start)
        )
