"""``entangle show``: what is in a result, in unfinished work, or in a folder of results."""

import argparse
import importlib.util
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.cli.options import Subparsers, add_table_options
from entangle.cli.tables import Table, present, records
from entangle.errors import EntangleError, InvalidInput, Unavailable
from entangle.runs.claims import Writer, beside, claim_file
from entangle.runs.provenance import expand_user, special_tokens_of
from entangle.runs.reading import READ_ERRORS, read_object
from entangle.runs.sealing import check_digest
from entangle.runs.unfinished import PLAN

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("head", "files")
UNFINISHED = "unfinished"
DAMAGED = "damaged"
_REMEDY = "name a folder or file that entangle wrote"
_DEPTH, _MOST = 3, 1000  # folders below that results are looked for in, and how many
_PLAIN = {
    "evaluation": "perplexity.parquet", "tasks": "tasks.parquet", "experts": "experts.parquet",
}  # fmt: skip
"""Kinds of folders without a class of results, and their table."""
_MAIN = {
    "ablating": "ablate", "comparing": "compare", "building": "expand or prune",
    "studying": "study", "tracing": "trace",
}  # fmt: skip
"""Command that goes on with unfinished work, by the ending of its folder."""
NEXT: Mapping[str, Sequence[tuple[str, str]]] = {
    "scores": (
        ("report", "entangle report {run} --out page.html"),
        ("figures", "entangle figures {run}"),
        ("allocate", "entangle allocate {run} --sparsity 0.7"),
        ("ablate", "entangle ablate {model} --scores {run}"),
        ("diff", "entangle diff {run} OTHER"),
    ),
    "ablation": (
        ("report", "entangle report {run} --out page.html"),
        ("figures", "entangle figures {run}"),
    ),
    "comparison": (("figures", "entangle figures {run}"),),
    "difference": (("figures", "entangle figures {run}"),),
    "study": (
        ("study", "entangle study {run} OTHER"),
        ("figures", "entangle figures {run}"),
    ),
    "trace": (("figures", "entangle figures {run}"),),
    "decomposition": (
        ("report", "entangle report SCORES {run} --out page.html"),
        ("figures", "entangle figures {run}"),
    ),
    "anchor": (("figures", "entangle figures {run}"),),
    "allocation": (
        ("prune", "entangle prune {model} --allocation {run}"),
        ("expand", "entangle expand {model} --allocation {run}"),
        ("figures", "entangle figures {run}"),
    ),
    "expansion": (
        ("run", "entangle run {run} --prompt TEXT"),
        ("evaluate", "entangle evaluate {run}"),
        ("figures", "entangle figures {run}"),
    ),
    "pruning": (
        ("evaluate", "entangle evaluate {run}"),
        ("score", "entangle score {run}"),
        ("figures", "entangle figures {run}"),
    ),
}  # fmt: skip
"""What can be done with a result, by its kind: the command that must exist, and the line."""


@dataclass(frozen=True)
class Found:
    """A result, finished or not, as its own files describe it."""

    path: Path
    """Of the finished result, whether it is there or not."""
    place: Path
    """Folder or file that was found."""
    kind: str
    """Of its manifest; `DAMAGED` where that cannot be read."""
    state: str
    """``finished``, `UNFINISHED`, or what is wrong."""
    manifest: Mapping[str, Any] = field(repr=False)
    """Or the plan of unfinished work."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "show",
        help="say what is in a result or a folder of results, and what can be done with it",
        description="Say what a folder or file holds that entangle wrote: its kind, model, text, "
        "versions, the head of its table, its files, and what can be done with it next. Works on "
        "unfinished work, and lists the results in a folder of several.",
    )
    parser.add_argument(
        "path", metavar="RUN", help="a result, or a folder of results, such as runs"
    )
    add_table_options(parser, *TABLES)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Show one result, or list several."""
    place = expand_user(arguments.path)
    one = recognise(place) or next(unfinished(place), None)
    below = list(results_below(place)) if place.is_dir() else []
    if one is not None:
        _show(one, [other for other in below if other.place != one.place], arguments)
        return
    if not below:
        there = "there is no such path" if not place.exists() else "it holds no result of entangle"
        raise InvalidInput(f"{arguments.path!r}: {there}; {_REMEDY}.")
    frame = _listed(below, place)
    table = Table(
        "head", frame, f"Results in {arguments.path}", keys=("run", "kind"),
        optional=("size", "text", "made", "model"),
    )  # fmt: skip
    present(arguments, [table], {"path": arguments.path, "results": records(frame)})


def recognise(place: Path) -> Found | None:
    """Return what a folder or file is by its own manifest, None where it has none."""
    if place.is_dir():
        if not (place / "manifest.json").is_file():
            return None
        return _of_manifest(place)
    if place.is_file() and place.suffix == ".safetensors":
        from entangle.results.allocation import AllocationReport

        with suppress(EntangleError):
            found = AllocationReport.load(place)
            return Found(place, place, found.KIND, "finished", found.manifest)
    return None


def _of_manifest(folder: Path) -> Found:
    try:
        manifest = read_object(folder / "manifest.json", remedy=_REMEDY)
    except (InvalidInput, Unavailable) as error:
        return Found(folder, folder, DAMAGED, str(error), {})
    state = "finished"
    try:
        check_digest(folder, manifest)
    except InvalidInput as error:
        state = str(error)
    return Found(folder, folder, str(manifest.get("kind", DAMAGED)), state, manifest)


def unfinished(target: Path) -> Iterator[Found]:
    """Yield the unfinished work on a result of this name."""
    start = beside(target, "").name
    if target.name and target.parent.is_dir():
        for plan in sorted(target.parent.glob(f".*/{PLAN}")):
            if plan.parent.name.startswith(start):
                yield _of_plan(plan)


def _of_plan(plan: Path) -> Found:
    name, _, ending = plan.parent.name[1:].rpartition(".")
    try:
        manifest = read_object(plan, remedy=_REMEDY)
    except (InvalidInput, Unavailable):
        manifest = {}
    return Found(plan.parent.with_name(name), plan.parent, ending, UNFINISHED, manifest)


def results_below(folder: Path) -> Iterator[Found]:
    """Yield the results in a folder, finished or not, also in folders below it."""
    paths = sorted(folder.iterdir()) if _readable(folder) else []
    seen, queue = 0, [(one, 1) for one in paths]
    while queue and seen < _MOST:
        place, depth = queue.pop(0)
        seen += 1
        if (place / PLAN).is_file() and place.name.startswith("."):
            yield _of_plan(place / PLAN)
            continue
        found = recognise(place)
        if found is not None:
            yield found
        elif place.is_dir() and not place.is_symlink() and depth < _DEPTH and _readable(place):
            queue += [(one, depth + 1) for one in sorted(place.iterdir())]


def _readable(folder: Path) -> bool:
    try:
        next(folder.iterdir(), None)
    except OSError:
        return False
    return True


def _listed(found: Sequence[Found], folder: Path) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame(
        {
            "run": one.path.relative_to(folder).as_posix(),
            "kind": _stated(one),
            "model": _named(one.manifest, "model"),
            "text": text_of(one.manifest),
            "made": _when(one.place),
            "size": _size(sum(size for _, size in _files(one.place))),
        }
        for one in found
    )


def _stated(one: Found) -> str:
    """Return a result's kind, and in brackets what is the matter with it."""
    if one.state == "finished" or one.kind == DAMAGED:
        return one.kind
    return f"{one.kind} ({UNFINISHED if one.state == UNFINISHED else DAMAGED})"


def _show(one: Found, others: Sequence[Found], arguments: argparse.Namespace) -> None:
    """Print one result: facts, the head of its table, its files, and what comes next."""
    import pandas as pd

    facts, head = list(_facts(one)), None
    if one.state == "finished":
        lines, head = _overview(one)
        facts += [("found", line) for line in lines]
    files = pd.DataFrame(_files(one.place), columns=["file", "bytes"])
    shown = files.assign(size=[_size(size) for size in files["bytes"]]).drop(columns="bytes")
    facts += [("also in it", f"{o.path.relative_to(one.place)} ({o.kind})") for o in others]
    next_lines = list(_next(one))
    content = {
        "path": str(one.path), "kind": one.kind, "state": one.state,
        "facts": [list(fact) for fact in facts], "manifest": dict(one.manifest),
        "files": records(files), "head": [] if head is None else records(head), "next": next_lines,
    }  # fmt: skip
    tables = [] if head is None else [_head(head)]
    tables.append(Table("files", files, "Files", keys=("file",), shown=shown))
    if arguments.json or arguments.csv or arguments.latex or arguments.table:
        present(arguments, tables, content)
        return
    from entangle.cli.tables import say

    say(f"{one.path}: {one.kind}", *(f"  {name:<11}  {value}" for name, value in facts), "")
    present(arguments, tables, content, said=[f"Next: {line}" for line in next_lines])


def _head(head: "pd.DataFrame") -> Table:
    """Return the head of a result's table, numbers with four digits."""
    formats = dict.fromkeys(map(str, head.select_dtypes("float").columns), ".4g")
    return Table("head", head, "First rows", formats)


def _facts(one: Found) -> Iterator[tuple[str, str]]:
    """Yield what is known of a result, by name."""
    yield "state", one.state
    writer = _writer(one.path)
    if writer is not None:
        yield "written by", f"process {writer.pid} on {writer.host} since {writer.since}"
    manifest = one.manifest
    yield "model", _named(manifest, "model")
    for name in ("calibration", "evaluation"):
        if manifest.get(name) is not None:
            yield (
                name,
                f"{text_of(manifest, name)}, special tokens: " + special_tokens_of(manifest, name),
            )
    yield "made", _when(one.place)
    settings = manifest.get("settings")
    known = {**(settings if isinstance(settings, Mapping) else {}), **manifest}
    for name in ("seconds", "seed", "command"):
        value = known.get(name)
        if value is not None:
            yield name, str(value)
    packages = manifest.get("packages")
    if isinstance(packages, Mapping):
        yield "versions", ", ".join(f"{name} {version}" for name, version in packages.items())
    if one.state == UNFINISHED:
        pieces = [name for name, _ in _files(one.place) if name.startswith(("arm-", "block"))]
        yield "pieces", str(len(pieces))


def _writer(target: Path) -> Writer | None:
    with suppress(OSError):
        found = Writer.read(claim_file(target.absolute()))
        return None if found is None or found.is_known_dead else found
    return None


def _overview(one: Found) -> "tuple[list[str], pd.DataFrame | None]":
    """Return lines about a finished result and the head of its table; say what is damaged."""
    from entangle.results import CLASSES, load_result

    try:
        if one.kind in CLASSES:
            lines, table = load_result(one.place).overview()
            return lines, table.head(ROWS)
        if one.kind in _PLAIN:
            import pandas as pd

            return [], pd.read_parquet(one.place / _PLAIN[one.kind]).head(ROWS)
    except READ_ERRORS as error:  # ours are among them
        return [f"{DAMAGED}: {error}"], None
    return [], None


PLAIN = {"json": False, "csv": False, "latex": False, "wide": False, "table": None}
"""Options of the tables, for those who call `run` without a command line."""
ROWS = 5
"""Rows of a result's table that are shown."""


def _next(one: Found) -> Iterator[str]:
    """Yield commands that take the result."""
    quoted = shlex.quote(str(one.path))
    if one.state == UNFINISHED:
        maker = _MAIN.get(one.kind, "the command")
        yield f"go on: {maker} … --out {quoted} --resume (or the same command without --out)"
        return
    model = _named(one.manifest, "model", name_only=True)
    for needed, line in NEXT.get(one.kind, ()) if one.state == "finished" else ():
        if importlib.util.find_spec(f"entangle.cli.{needed}") is not None:
            yield line.format(run=quoted, model=shlex.quote(model))


def _named(manifest: Mapping[str, Any], key: str, *, name_only: bool = False) -> str:
    """Return a model's name and what tells it from others of that name."""
    found = manifest.get(key)
    if not isinstance(found, Mapping):
        models = manifest.get("models")
        found = next(iter(models.values()), None) if isinstance(models, Mapping) else None
    if not isinstance(found, Mapping):
        return "?"
    if name_only:
        return str(found.get("name", "MODEL"))
    more = [str(found[one]) for one in ("revision", "dtype") if found.get(one)]
    digest = str(found.get("digest") or "")[:12]
    return " ".join([str(found.get("name", "?")), *more, digest]).strip()


def text_of(manifest: Mapping[str, Any], key: str = "calibration") -> str:
    """Return a text's source and size in a few words, as a manifest describes it."""
    found = manifest.get(key) or manifest.get("evaluation")
    if isinstance(found, Mapping) and isinstance(found.get("text"), Mapping):
        found = found["text"]
    if not isinstance(found, Mapping):
        return "–"
    count = found.get("n_seq", found.get("n_windows"))
    size = f", {count} × {found.get('seq_len')} tokens" if count is not None else ""
    return f"{found.get('source', '?')}{size}"


def _files(place: Path) -> list[tuple[str, int]]:
    """Return the names and sizes in bytes of a result's files."""
    if place.is_file():
        return [(place.name, place.stat().st_size)]
    found = []
    for path in sorted(place.rglob("*")):
        with suppress(OSError):
            if path.is_file():
                found.append((path.relative_to(place).as_posix(), path.stat().st_size))
    return found


def _when(place: Path) -> str:
    with suppress(OSError):
        marks = [one for one in (place / "manifest.json", place / PLAN) if one.exists()]
        seconds = (marks[0] if marks else place).stat().st_mtime
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    return "?"


def _size(n_bytes: int) -> str:
    """Return a size for people: 12 B, 3.4 MB."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if n_bytes >= 10**power:
            return f"{n_bytes / 10**power:.1f} {unit}"
    return f"{n_bytes:.0f} B"
