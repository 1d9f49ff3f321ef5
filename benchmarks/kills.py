"""Commands that end at every write: what is left, and what the next run makes of it.

``python -m benchmarks.kills`` runs every command on a tiny model, once for each file that it opens,
renames or removes (as Python's audit events tell), and ends it right before that: by ``kill -9``,
by SIGTERM, or by a disk that is full from there on. A result with its final name must be the whole
old version or the whole new one; the next run must come to the tables of a run that nobody ended,
and leave nothing else behind. One line a command: runs tried, and what they left.
"""

import argparse
import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import load_file

import entangle
from entangle.cli.main import main as entangle_main
from entangle.experts.checkpoint import load_expanded
from entangle.runs.provenance import claimed
from tests.tiny_models import save_tiny

TEXT = ("--calibration", "text.txt", "--n-seq", "4", "--seq-len", "32", "--device", "cpu")
EVALUATED = ("--eval-seq-len", "32", "--eval-windows", "3")
VOLATILE = ("manifest.json", "run.json", "seconds.parquet")
"""Files that tell when and how fast a result was made."""
ENDS = ("kill", "term", "full")
_WRITES = ("os.rename", "os.mkdir", "os.link")
_REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Command:
    """A command line in a folder with ``model``, ``text.txt`` and ``scores``."""

    arguments: tuple[str, ...]
    """That make ``x``."""
    older: tuple[str, ...]
    """More of them, which make another ``x``."""
    again: tuple[str, ...] = ()
    """With which it goes on where it was ended."""
    makes: str = "x"
    """What it makes."""
    more: tuple[str, ...] = ()
    """What it makes beside that, each whole in itself."""


COMMANDS = {
    "score": Command(
        ("score", "model", "--layer", "1", "--proj", "up_proj", *TEXT, "--out", "x"),
        ("--seed", "1"),
    ),
    "ablate": Command(
        ("ablate", "model", "--layer", "1", "--proj", "up_proj", *TEXT, "--evaluation", "text.txt",
         *EVALUATED, "--select", "top", "--fraction", "0.1", "--no-md", "--strength", "0.5",
         "--out", "x"),
        ("--seed", "1"), ("--resume",),
    ),
    "compare": Command(
        ("compare", "model", *TEXT, "--evaluation", "text.txt", *EVALUATED, "--methods",
         "magnitude,expansion", "--sparsity", "0.5", "--experts", "2", "--out", "x"),
        ("--seed", "1"), ("--resume",),
    ),
    "expand": Command(
        ("expand", "model", *TEXT, "--proj", "up_proj", "--experts", "2",
         "--evaluation", "text.txt", *EVALUATED, "--out", "x"),
        ("--seed", "1"), ("--resume",),
    ),
    "decompose": Command(
        ("decompose", "model", "--layer", "1", "--proj", "up_proj", *TEXT, "--experts", "1,2",
         "--neurons", "1,2", "--out", "x"),
        ("--seed", "1"),
    ),
    "evaluate": Command(
        ("evaluate", "model", "--evaluation", "text.txt", "--seq-len", "32", "--n-windows", "4",
         "--device", "cpu", "--out", "x"),
        ("--n-windows", "3"),
    ),
    "allocate": Command(
        ("allocate", "scores", "--device", "cpu", "--sparsity", "0.7", "--out", "x.safetensors",
         "--export", "csv:e.csv", "--plot", "p"),
        ("--sparsity", "0.6"), makes="x.safetensors", more=("e.csv", "p.csv", "p.pdf", "p.png"),
    ),
    "figures": Command(
        ("figures", "scores", "--out", "x", "--column", "single"), ("--column", "double"),
    ),
}  # fmt: skip


LOADERS: dict[str, Callable[[Path], object]] = {
    "scores": entangle.load_scores,
    "ablation": entangle.load_ablation,
    "decomposition": entangle.load_decomposition,
    "comparison": entangle.load_comparison,
    "expansion": load_expanded,
}


class Ended:
    """An audit hook that ends the process before the n-th write below a folder."""

    def __init__(self, folder: Path, number: int, end: str) -> None:
        self._folder, self._left, self._end = f"{folder}{os.sep}", number, end
        self._busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an event; Python calls this."""
        if self._busy or not self._counts(event, arguments):
            return
        self._left -= 1
        full = self._end == "full" and self._left <= 0 and event not in _REMOVALS
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._left == 0 and self._end != "full":
            self._busy = True
            os.kill(os.getpid(), signal.SIGKILL if self._end == "kill" else signal.SIGTERM)
            self._busy = False

    def _counts(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode, flags = arguments
            written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            if not (set(mode or "") & set("wxa+") or (mode is None and flags & written)):
                return False
        elif event not in (*_WRITES, *_REMOVALS):
            return False
        else:
            path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        beneath = event in _REMOVALS and len(arguments) > 1 and arguments[-1] not in (-1, None)
        return beneath or os.path.abspath(os.fsdecode(path)).startswith(self._folder)  # noqa: PTH100


def forked(work: Callable[[], int | None]) -> int:
    """Call a function in a forked process, silently; return how that ended, as a shell does."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            nowhere = os.open(os.environ.get("KILLS_LOG", os.devnull), os.O_WRONLY | os.O_APPEND)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            status = work() or 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def ran(arguments: Sequence[str], *, number: int = 0, end: str = "") -> int:
    """Run a command line in a forked process, ended before its ``number``-th write."""

    def work() -> int:
        if end:
            sys.addaudithook(Ended(Path.cwd(), number, end))
        return entangle_main([*arguments])

    return forked(work)


def content(path: Path) -> dict[str, str]:
    """Return a digest of every file of a result that is the same for every run; "" for others.

    Of an allocation, which says when it was made, that of its vectors.
    """
    if path.is_file():
        vectors = sorted(load_file(path).items())
        return {
            path.name: hashlib.sha256(b"".join(one.tobytes() for _, one in vectors)).hexdigest()
        }
    return {
        str(one.relative_to(path.parent)): ""
        if one.name in VOLATILE
        else hashlib.sha256(one.read_bytes()).hexdigest()
        for one in sorted(path.rglob("*"))
        if one.is_file()
    }


def everything() -> set[str]:
    """Return all paths below the current folder but those of the inputs."""
    inputs = ("model", "text.txt", "scores")
    return {str(path) for path in Path().rglob("*") if path.parts[0] not in inputs}


def loads(path: Path) -> bool:
    """Tell whether a result is one, after what a killed process left of it is put back."""

    def work() -> int:
        with claimed(path):
            pass
        if (path / "manifest.json").is_file():
            kind = json.loads((path / "manifest.json").read_text("utf-8"))["kind"]
            if kind in LOADERS:
                LOADERS[kind](path)
        elif path.suffix == ".safetensors" and path.exists():
            entangle.load_allocation(path)
        return 0

    return forked(work) == 0


def preload(arguments: Sequence[str]) -> None:
    """Import what a command line imports, so that forked processes need not."""
    with tempfile.TemporaryDirectory() as place:
        noted = Path(place) / "modules"

        def work() -> int:
            status = entangle_main([*arguments])
            noted.write_text("\n".join(sys.modules))
            return status

        if forked(work) != 0:
            raise SystemExit(f"{' '.join(arguments)} failed")
        for name in noted.read_text().splitlines():
            with suppress(Exception):
                importlib.import_module(name)


class Case:
    """One command, from nothing or over an older result, ended in one way."""

    def __init__(self, base: Path, command: Command, *, replacing: bool, end: str) -> None:
        self._base, self._command, self._replacing, self._end = base, command, replacing, end
        self._force = ("--force",) if replacing else ()
        self._fresh()
        preload(command.arguments)
        self._old = self._made((*command.arguments, *command.older)) if replacing else {}
        self._new = self._made(command.arguments)
        self._wanted = everything()

    def _made(self, arguments: Sequence[str]) -> dict[str, str]:
        self._fresh()
        status = ran(arguments)
        if status != 0:
            raise SystemExit(f"{' '.join(arguments)} ended with status {status}")
        return content(Path(self._command.makes))

    def _clear(self) -> None:
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _fresh(self) -> None:
        self._clear()
        for path in self._base.iterdir():
            (Path.cwd() / path.name).symlink_to(path)

    def _prepare(self) -> None:
        self._fresh()
        if self._replacing and ran((*self._command.arguments, *self._command.older)) != 0:
            raise SystemExit("the older result could not be made")

    def run(self, numbers: Iterator[int]) -> "Counter[str]":
        """End the command at these writes, until one number is beyond its last write."""
        counts: Counter[str] = Counter()
        older = Path(tempfile.mkdtemp())
        self._prepare()
        shutil.copytree(Path.cwd(), older, symlinks=True, dirs_exist_ok=True)
        for number in numbers:
            self._clear()
            shutil.copytree(older, Path.cwd(), symlinks=True, dirs_exist_ok=True)
            status = ran((*self._command.arguments, *self._force), number=number, end=self._end)
            if status == 0:
                break
            counts["tried"] += 1
            wrong = self._wrong(status, counts)
            if wrong:
                counts["wrong"] += 1
                print(f"  write {number}: {wrong}", flush=True)
        shutil.rmtree(older)
        return counts

    def _wrong(self, status: int, counts: "Counter[str]") -> str:
        """Return what is wrong after a run was ended, "" if nothing is."""
        if status != {"kill": 137, "term": 143, "full": 2}[self._end]:
            return f"status {status}"
        path = Path(self._command.makes)
        kept = content(path)
        if path.exists() and not self._whole(kept):
            return f"half a result: {sorted(kept)}"
        if self._end != "kill" and (hidden := self._hidden()):
            return f"left behind: {hidden}"
        if not loads(path):
            return "what is there does not load"
        if self._replacing and not self._whole(content(path)):
            return "the old version is gone"
        counts["absent" if not kept else "old" if kept == self._old else "new"] += 1
        counts["put back"] += bool(not kept and content(path))
        again = (*self._command.again, *self._force) or ("--force",)
        finished = self._command.again and content(path) == self._new
        again = self._command.again if finished else again
        if self._command.arguments[0] in ("allocate", "figures"):
            again = ("--force",)
        status = ran((*self._command.arguments, *again))
        if status != 0:
            return f"the next run ends with status {status}"
        if content(path) != self._new:
            return "the next run comes to other tables"
        if everything() != self._wanted:
            return f"left behind after the next run: {sorted(everything() ^ self._wanted)}"
        counts["made again"] += 1
        return ""

    def _whole(self, kept: dict[str, str]) -> bool:
        """Tell whether a result is the old one or the new one; of figures, each with its table."""
        if self._command.arguments[0] != "figures":
            return kept in (self._old, self._new)
        tables = [name for name in kept if name.endswith(".csv") and "/." not in name]
        stems = [name.removesuffix(".csv") for name in tables]
        figures = [{f"{stem}.{e}" for e in ("csv", "pdf", "png")} for stem in stems]
        return all(
            any({name: kept.get(name) for name in names} == {name: one.get(name) for name in names}
                for one in (self._old, self._new))
            for names in figures
        )  # fmt: skip

    def _hidden(self) -> list[str]:
        """Return what a run leaves that could clean up, but for what the next one takes.

        That is pieces, and an old version that could not be put back, for the disk is full.
        """
        endings: tuple[str, ...] = (".building", ".ablating", ".comparing")
        if not Path(self._command.makes).exists():
            endings += (".replaced",)
        found = (one for one in everything() if "/." in f"/{one}")
        return [one for one in found if not Path(one).parts[0].endswith(endings)]


def prepare(base: Path) -> None:
    """Make what the commands read."""
    save_tiny("llama", base / "model")
    words = " ".join(f"{i * i % 97} word{i % 13}" for i in range(400))
    (base / "text.txt").write_text(words)
    os.chdir(base)
    scored = ("score", "model", "--proj", "up_proj", "--no-md", *TEXT, "--out", "scores")
    if ran(scored) != 0:
        raise SystemExit("the tiny model could not be scored")


def main() -> None:
    """Run the campaign and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--ends", default="kill", help=f"comma-separated: {', '.join(ENDS)}")
    parser.add_argument("--every", type=int, default=1, help="take every so many writes only")
    parser.add_argument("--first", type=int, default=1, help="begin at this write")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as base, tempfile.TemporaryDirectory() as place:
        prepare(Path(base))
        os.chdir(place)
        for name in chosen.commands.split(","):
            for end in chosen.ends.split(","):
                for replacing in (False, True):
                    begin = time.perf_counter()
                    case = Case(Path(base), COMMANDS[name], replacing=replacing, end=end)
                    numbers = range(chosen.first, 10**6, chosen.every)
                    counts = case.run(iter(numbers))
                    said = {"command": name, "end": end, "over": "old" if replacing else "none"}
                    rows.append({**said, **counts, "seconds": time.perf_counter() - begin})
                    print(rows[-1], flush=True)
        os.chdir("/")
    print(pd.DataFrame(rows).fillna(0).to_string(index=False))
    if sum(int(row.get("wrong", 0)) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
