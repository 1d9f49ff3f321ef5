"""What commands do with damaged files: refuse in one line, or give numbers, but never a traceback.

``python -m benchmarks.damage --cases 1000 --seed 0`` damages one file a case, runs a command on it
in a process of its own, and prints a table of what came of it, and every case that failed.

A `Kind` is a folder of files, how to make it, and the commands that read it; those of inputs are in
`benchmarks.damaged_inputs`. Another kind is added to what `campaign` is given.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 90  # that a case may take
MEMORY = 6 * 2**30  # bytes that a case may take beside what the campaign has

REFUSED, UNCHANGED, CHANGED = "refused", "unchanged", "changed"
WRONG, TRACEBACK, LINES, ENDED = "wrong", "traceback", "several lines", "hung or ended"
FAILURES = (WRONG, TRACEBACK, LINES, ENDED)
"""Outcomes that must not be."""

PLACE = "{place}"
"""In a command: the folder that holds the files."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind and what reads them."""

    name: str
    make: Callable[[Path], object]
    """Writes the intact files into an empty folder."""
    commands: Sequence[Sequence[str]]
    """Arguments of `entangle`, `PLACE` for the folder; each prints JSON."""
    targets: Sequence[str]
    """Patterns of the files in the folder that are damaged, weighed by how often they are named."""
    exact: bool = False
    """Whether other numbers than those of the intact files are wrong: so it is of results."""
    around: Callable[[Path], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """What to hold while a command runs, given the folder."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    kind: str
    damage: str
    command: str
    outcome: str
    said: str


# Damages: each changes one file and tells how; None where it does not apply.

Damage = Callable[[random.Random, Path], str | None]


def flip(rng: random.Random, path: Path) -> str | None:
    """Flip one bit."""
    return _flip(rng, path, len(path.read_bytes()))


def flip_head(rng: random.Random, path: Path) -> str | None:
    """Flip one bit at the beginning, where the formats keep their headers."""
    return _flip(rng, path, min(512, len(path.read_bytes())))


def flip_tail(rng: random.Random, path: Path) -> str | None:
    """Flip one bit at the end, where Parquet and archives keep theirs."""
    size = len(path.read_bytes())
    return _flip(rng, path, min(512, size), offset=max(0, size - 512))


def _flip(rng: random.Random, path: Path, size: int, *, offset: int = 0) -> str | None:
    if not size:
        return None
    content, place, bit = (
        bytearray(path.read_bytes()),
        offset + rng.randrange(size),
        rng.randrange(8),
    )
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def scramble(rng: random.Random, path: Path) -> str | None:
    """Overwrite some bytes at random, or by zeros or ones."""
    content = bytearray(path.read_bytes())
    if not content:
        return None
    place, length = rng.randrange(len(content)), rng.choice((4, 8, 64, 4096))
    fill = rng.choice((b"\0", b"\xff", None))
    size = min(length, len(content) - place)
    content[place : place + size] = rng.randbytes(size) if fill is None else fill * size
    path.write_bytes(content)
    return f"{size} bytes from {place} overwritten"


def number(rng: random.Random, path: Path) -> str | None:
    """Write an absurd number of 32 or 64 bits into the first kilobytes."""
    content = bytearray(path.read_bytes())
    code, value = rng.choice((("<I", 2**32 - 1), ("<Q", 2**63), ("<Q", 2**64 - 1), ("<Q", 2**40)))
    size = struct.calcsize(code)
    if len(content) < size:
        return None
    place = rng.randrange(min(4096, len(content) - size + 1))
    content[place : place + size] = struct.pack(code, value)
    path.write_bytes(content)
    return f"{value} written at byte {place}"


def cut(rng: random.Random, path: Path) -> str | None:
    """Cut the file off."""
    content = path.read_bytes()
    size = rng.choice((0, 1, 7, 8, 9, len(content) // 2, max(0, len(content) - 1)))
    path.write_bytes(content[:size])
    return f"cut to {min(size, len(content))} bytes"


def append(rng: random.Random, path: Path) -> str | None:
    """Append bytes."""
    more = rng.choice((b"\0", b"\n", b"\xff\xfe", b"{", rng.randbytes(100)))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes appended"


def replace(rng: random.Random, path: Path) -> str | None:
    """Put other content in place of the file's."""
    contents = {
        "NUL bytes": b"\0" * 300, "a BOM": b"\xef\xbb\xbf" + path.read_bytes(),
        "UTF-16": path.read_bytes().decode("latin-1").encode("utf-16"),
        "UTF-16 without BOM": path.read_bytes().decode("latin-1").encode("utf-16-le"),
        "Latin-1": "é".encode("latin-1") * 100, "random bytes": rng.randbytes(500),
        "deep nesting": b"[" * 100_000, "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        "a huge number": b"1" * 10_000, "null": b"null", "a list": b"[1]", "a string": b'"x"',
        "NaN": b"NaN", "nothing": b"", "an object": b"{}", "spaces": b" \n" * 100,
    }  # fmt: skip
    name = rng.choice(sorted(contents))
    path.write_bytes(contents[name])
    return f"replaced by {name}"


def become(rng: random.Random, path: Path) -> str | None:
    """Put something that is no file in the place of one, or nothing."""
    what = rng.choice(("folder", "pipe", "device", "dangling link", "loop", "nothing"))
    path.unlink()
    match what:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to("/nowhere/at/all")
        case "loop":
            path.symlink_to(path.name)
    return f"became a {what}"


def swap(rng: random.Random, path: Path) -> str | None:
    """Put another file of the same folder in its place."""
    others = sorted(one for one in path.parent.iterdir() if one.is_file() and one != path)
    if not others:
        return None
    other = rng.choice(others)
    shutil.copyfile(other, path)
    return f"replaced by {other.name}"


VALUES: Sequence[Any] = (
    -1, 0, 1, 3, 7, 2**31, 2**63, 2**64, 10**18, 10**400, -(10**400), 0.5, -0.5, 1e308,
    float("nan"), float("inf"), None, True, False, "", "abc", "\ud800", "\0",
    "../../etc/passwd", "x" * 10_000, [], {}, [[[]]], [None], [1, "a", {}],
    {"a": {"b": []}}, {"__class__": 1},
)  # fmt: skip


def edit_json(rng: random.Random, path: Path) -> str | None:
    """Change, remove or add one value somewhere in JSON, or in a line of it."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        return None
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    place = rng.randrange(len(lines)) if lines else 0
    try:
        content = json.loads(lines[place])
    except (ValueError, IndexError, RecursionError):
        return None
    content, told = edited(rng, content)
    lines[place] = json.dumps(content)
    path.write_text("\n".join(lines), "utf-8")
    return told


def edit_header(rng: random.Random, path: Path) -> str | None:
    """Change one value in the header of a safetensors file, its length set right."""
    if path.suffix != ".safetensors":
        return None
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, told = edited(rng, json.loads(content[8 : 8 + size]))
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])
    return f"header: {told}"


def edited(rng: random.Random, content: Any) -> tuple[Any, str]:
    """Return JSON with one value changed, removed or added, and what was done."""
    places = list(_places(content))
    if not places:
        return rng.choice(VALUES), "all replaced"
    holder, key, name = rng.choice(places)
    action = rng.choice(("set", "set", "set", "remove", "add", "wrap"))
    value = rng.choice(VALUES)
    if action == "remove":
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder["added"] = value
    elif action == "wrap":
        holder[key] = [holder[key]]
    else:
        holder[key] = value
    return content, f"{action} {name} {'' if action in ('remove', 'wrap') else repr(value)[:40]}"


def _places(content: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    items: Sequence[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    for key, value in items:
        yield content, key, f"{name}.{key}"
        yield from _places(value, f"{name}.{key}")


def edit_table(rng: random.Random, path: Path) -> str | None:
    """Change a column of a Parquet or CSV table: its type, its name, its values."""
    import pandas as pd

    if path.suffix not in (".parquet", ".csv"):
        return None
    read = pd.read_parquet if path.suffix == ".parquet" else pd.read_csv
    table = read(path)
    if table.empty:
        return None
    column = rng.choice(list(table.columns))
    action = rng.choice(
        ("drop", "rename", "null", "text", "float", "nested", "bytes", "empty", "one")
    )
    match action:
        case "drop":
            table = table.drop(columns=column)
        case "rename":
            table = table.rename(columns={column: "renamed"})
        case "empty":
            table = table.iloc[:0]
        case "one":
            value = rng.choice((None, "abc", -1, 10**12, float("nan"), float("inf")))
            table[column] = table[column].astype(object)
            table.loc[table.index[0], column] = value
            table[column] = (
                table[column].astype(str) if path.suffix == ".parquet" else table[column]
            )
        case _:
            values: dict[str, Any] = {
                "null": None,
                "text": "abc",
                "float": 0.5,
                "nested": [[1]],
                "bytes": b"\xff",
            }
            table[column] = [values[action]] * len(table)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)
    return f"column {column}: {action}"


GENERAL: Sequence[Damage] = (
    flip, flip, flip_head, flip_head, flip_tail, scramble, number, cut, append, replace, become,
    swap,
)  # fmt: skip
SPECIAL: Mapping[str, Sequence[Damage]] = {
    ".json": (edit_json,) * 36,
    ".jsonl": (edit_json,) * 8,
    ".safetensors": (edit_header,) * 8,
    ".parquet": (edit_table,) * 8,
    ".csv": (edit_table,) * 8,
}
"""Further damages, by a file's ending."""


def damage(rng: random.Random, path: Path) -> str:
    """Damage a file in one way; return what was done."""
    while True:
        kinds = (*GENERAL, *SPECIAL.get(path.suffix, ()))
        told = rng.choice(kinds)(rng, path)
        if told is not None:
            return f"{path.name}: {told}"


# Cases: each in a process of its own, as a library may end it.


def run_command(kind: Kind, command: Sequence[str], place: Path) -> tuple[str, str, str]:
    """Run a command in a child process; return how it ended, its output, and what it said."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        child = os.fork()
        if child == 0:
            _in_child(kind, [part.replace(PLACE, str(place)) for part in command], place, out, err)
        status = _wait(child)
        said = err.read_text("utf-8", "replace") if err.exists() else ""
        return status, out.read_text("utf-8", "replace") if out.exists() else "", said


def _in_child(kind: Kind, argv: Sequence[str], place: Path, out: Path, err: Path) -> None:
    status = 70
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        for target, stream in ((out, 1), (err, 2)):  # also what libraries write past Python
            os.dup2(os.open(target, os.O_WRONLY | os.O_CREAT), stream)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), "utf-8")
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), "utf-8")
        from entangle.cli.main import main
        from entangle.runs.places import cache_folder

        os.environ["ENTANGLE_CACHE"] = str(cache_folder())
        os.environ["ENTANGLE_HOME"] = str(out.parent / "home")  # no result of another run is found
        with kind.around(place):
            status = main(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 99
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(child: int) -> str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            number = os.waitstatus_to_exitcode(status)
            return f"signal {-number}" if number < 0 else f"status {number}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"hung for {SECONDS} s"


def judge(kind: Kind, ended: tuple[str, str, str], intact: str) -> str:
    """Return the outcome of a case; ``intact`` is what the command prints of the intact files."""
    status, out, said = ended
    if status == "status 99" or "Traceback (most recent call last)" in said:
        return TRACEBACK
    if status in ("status 1", "status 2"):
        lines = said.splitlines()
        told = all(line.startswith("entangle: ") for line in lines)
        errors = sum(line.startswith("entangle: error: ") for line in lines)
        return REFUSED if told and errors == 1 and not out else LINES
    if status != "status 0":
        return ENDED
    try:
        found = numbers(out)
    except ValueError:
        return LINES
    if found == intact:
        return UNCHANGED
    return WRONG if kind.exact else CHANGED


def numbers(out: str) -> str:
    """Return what a command printed without what differs from run to run."""
    from entangle.runs.provenance import without_run

    return json.dumps(without_run(json.loads(out)), sort_keys=True) if out else ""


def campaign(
    kinds: Sequence[Kind], *, cases: int, seed: int, folder: Path, seconds: float = float("inf")
) -> Iterator[Outcome]:
    """Damage so many files, the kinds in turn, and yield what came of each.

    Parameters
    ----------
    folder
        An empty folder to work in.
    seconds
        After which no case is begun.
    """
    rng, begin, place = random.Random(seed), time.monotonic(), folder / "case"
    intact: dict[tuple[str, int], str] = {}
    for kind in kinds:
        (folder / kind.name).mkdir(parents=True)
        kind.make(folder / kind.name)
        for index, command in enumerate(kind.commands):
            shutil.copytree(folder / kind.name, place, symlinks=True)
            status, out, said = run_command(kind, command, place)
            shutil.rmtree(place)
            if status != "status 0":
                raise RuntimeError(f"{kind.name}: {command} of the intact files: {status}: {said}")
            intact[kind.name, index] = numbers(out)
    for case in range(cases):
        if time.monotonic() - begin > seconds:
            return
        kind = kinds[case % len(kinds)]
        shutil.copytree(folder / kind.name, place, symlinks=True)
        matches = [sorted(place.glob(pattern)) for pattern in kind.targets]
        told = damage(rng, rng.choice(rng.choice([files for files in matches if files])))
        index = rng.randrange(len(kind.commands))
        command = kind.commands[index]
        ended = run_command(kind, command, place)
        outcome = judge(kind, ended, intact[kind.name, index])
        shutil.rmtree(place)
        said = f"{ended[0]}: {ended[2].strip()}"
        if outcome in FAILURES:
            said += f"\n{ended[1][:1000]}"
        yield Outcome(kind.name, told, " ".join(command), outcome, said)


def table(found: Sequence[Outcome]) -> str:
    """Return how often each outcome came, a row a kind."""
    columns = (REFUSED, UNCHANGED, CHANGED, *FAILURES)
    counts = Counter((one.kind, one.outcome) for one in found)
    rows: list[tuple[str, ...]] = [("kind", "tried", *columns)]
    for kind in (*dict.fromkeys(one.kind for one in found), "all"):
        own = [sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == column)
               for column in columns]  # fmt: skip
        rows.append((kind, str(sum(own)), *map(str, own)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                     for row in rows)  # fmt: skip


def main() -> None:
    """Run a campaign on the inputs, print the failures and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none later")
    parser.add_argument("--kind", action="append", help="only these; may be given several times")
    parser.add_argument("--all", action="store_true", help="print every case, not only failures")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not live on in a child
    import torch

    torch.set_num_threads(1)
    from benchmarks.damaged_inputs import KINDS

    kinds = [KINDS[name] for name in arguments.kind or KINDS]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for one in campaign(
            kinds, cases=arguments.cases, seed=arguments.seed, folder=Path(folder),
            seconds=arguments.seconds,
        ):  # fmt: skip
            found.append(one)
            if len(found) % 100 == 0:
                print(f"{len(found)} cases", file=sys.stderr)
            if arguments.all or one.outcome in FAILURES:
                print(
                    f"{one.outcome}: {one.kind}: {one.damage}: {one.command}\n  {one.said}",
                    flush=True,
                )
    print(table(found))
    if any(one.outcome in FAILURES for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
