"""A golden set: results of every command, made once, and compared after the code was changed.

``python -m benchmarks.golden make DIR`` runs every command that makes results, each in a process of
its own with one thread and explicit options, on two tiny models and a text that it writes to
``DIR/inputs``, and calls functions of the package (`benchmarks.golden_commands`). ``--demo`` adds a
few commands on the demo model. The package is the ``entangle`` that PYTHONPATH names. A command
that fails ends it. Hashes of strings are left unseeded, so that a result that depends on the order
of a set is told.

``python -m benchmarks.golden diff OLD NEW`` compares two such folders: values of tables, column by
column with dtypes and order of rows, and bytes of tensors, all to the bit (a NaN equals a NaN),
JSON but for `IGNORED`, other files byte by byte, of figures only the CSV side files. One line a
difference; status 1 where there is one. Missing and added files are differences.

``--names FILE`` says what was renamed on purpose, as JSON; every part may be left out:

``{"columns": {old: new}, "files": {old: new}, "values": {column: {old: new}},
"manifest": {"old.key": "new.key"}, "options": {"--old": "--new"}}``

``columns`` also holds for records of printed JSON and for tensors, whose names are taken apart at
colons. ``files`` are paths in the folder, or names of files or folders anywhere in it. ``values``
are texts, in a column of a table (by its new name) or under a key of JSON. ``manifest`` has dotted
keys of JSON, with all that is beneath them. ``options`` are whole words of command lines; ``make``
takes the file as well and gives the new ones.
"""

import argparse
import importlib.util
import json
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np
import pandas as pd

from benchmarks.golden_commands import call_functions, commands, write_inputs

Names: TypeAlias = Mapping[str, Mapping[str, Any]]

IGNORED: Mapping[str, str] = {
    "seconds": "how long a run took",
    "peak MiB": "what memory a run took",
    "peak_memory_bytes": "the same",
    "peak_gpu_memory_bytes": "the same",
    "memory_bytes": "half of what was free, where a command has no --memory",
    "command": "how the program was called; commands.json has it",
    "packages.entangle": "the version of the package, among those of others",
    "model.path": "the absolute place of a dense model",
    "digests": "of files and manifests that hold the times above",
    "files": "SHA-256 of files of an expansion, whose tensors are compared themselves",
    "sha256": "of an allocation with its manifest, compared themselves",
}
"""Keys of JSON, columns and names of files that are not compared, with all beneath, and why."""
FIGURES = (".png", ".pdf")
"""Files that only have to be there."""
WORKERS = 2
MOST = 5
"""Values of one column or tensor that are printed; the others are counted."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "COLUMNS": "160",
}  # fmt: skip
LOADED = (
    "torch", "transformers", "transformers.models.auto.modeling_auto", "pyarrow.parquet",
    "scipy.stats", "safetensors.torch", "datasets", "matplotlib.pyplot", "seaborn",
    "sklearn.mixture", "gguf", "rich.table", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)  # fmt: skip
"""What commands import, for a second or more each; loaded once, and not of this package."""

# How it is run: from a process that has loaded the libraries, but nothing of the package.


def fork(work: Callable[[], object], printed: Path, errors: Path) -> int:
    """Run something in a forked process, its output in files; return the process's id."""
    pid = os.fork()
    if pid:
        return pid
    status: object = 1
    try:
        for number, path in ((1, printed), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        status = work() or 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def entangle(arguments: Sequence[str]) -> NoReturn:
    """Be ``python -m entangle`` with these arguments."""
    sys.argv = ["entangle", *arguments]
    runpy.run_module("entangle", run_name="__main__", alter_sys=True)
    raise SystemExit(0)


def run_all(works: Mapping[str, Callable[[], object]], logs: Path) -> None:
    """Run things beside one another; end with the output of one that fails."""
    running: dict[int, tuple[str, Path, Path, float]] = {}
    waiting = list(works.items())
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name, work = waiting.pop(0)
            printed = Path("printed", f"{name}.txt")
            printed.parent.mkdir(parents=True, exist_ok=True)
            errors = logs / name.replace("/", "-")
            running[fork(work, printed, errors)] = name, printed, errors, time.perf_counter()
        pid, status = os.wait()
        name, printed, errors, begin = running.pop(pid)
        if status:
            for other in running:
                os.kill(other, signal.SIGTERM)
            said = printed.read_text() + errors.read_text()
            code = os.waitstatus_to_exitcode(status)
            raise SystemExit(f"{name} ended with status {code}\n{said}")
        if printed.read_text().startswith(("{", "[")):
            printed.rename(printed.with_suffix(".json"))
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


def make(folder: Path, names: Names, *, demo: bool) -> None:
    """Make a golden set in a new folder."""
    begin = time.perf_counter()
    folder.mkdir(parents=True)
    if os.environ.get("PYTHONPATH"):
        sys.path.pop(0)  # the current folder, which `python -m` puts first
    found = importlib.util.find_spec("entangle")
    print(f"made by {found.origin if found else 'nothing'}")
    for name in LOADED:
        importlib.import_module(name)
    os.chdir(folder)
    renamed = names.get("options", {})
    stages = [
        {name: [renamed.get(word, word) for word in line] for name, line in stage.items()}
        for stage in commands(demo=demo)
    ]
    lines = {name: line for stage in stages for name, line in stage.items()}
    Path("commands.json").write_text(json.dumps(lines, indent=1))
    with tempfile.TemporaryDirectory() as logs:
        Path("inputs").mkdir()
        run_all({"inputs": write_inputs}, Path(logs))
        for i, stage in enumerate(stages):
            works: dict[str, Callable[[], object]] = {"python": call_functions} if i == 0 else {}
            for name, line in stage.items():
                works[name] = lambda line=line: entangle(line)  # type: ignore[misc]
            run_all(works, Path(logs))
    n_files = sum(path.is_file() for path in Path().rglob("*"))
    print(f"{len(lines)} commands, {n_files} files, {time.perf_counter() - begin:.0f} s")


# How two are compared.


@dataclass
class Comparison:
    """What is compared, and how often it differed."""

    names: Names
    files: int = 0
    values: int = 0
    different: int = 0
    lines: list[str] = field(default_factory=list)

    def check(self, where: str, old: object, new: object, *, n: int = 1) -> bool:
        """Count ``n`` values, tell of a difference; return whether they are equal."""
        self.values += n
        if repr(old) == repr(new):
            return True
        self.tell(where, old, new)
        return False

    def tell(self, where: str, old: object, new: object) -> None:
        """Note a difference."""
        self.different += 1
        self.lines.append(f"{where}: {str(old)[:200]} -> {str(new)[:200]}")

    def several(self, where: str, old: Sequence[object], new: Sequence[object]) -> None:
        """Compare lists of one length, value by value; a value's text is exact."""
        wrong = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if repr(a) != repr(b)]
        self.wrong(where, old, new, wrong)

    def wrong(
        self, where: str, old: Sequence[object], new: Sequence[object], wrong: Sequence[int]
    ) -> None:
        """Count values of which some differ, and tell of the first."""
        self.values += len(old)
        for i in wrong[:MOST]:
            self.tell(f"{where}[{i}]", old[i], new[i])
        if wrong[MOST:]:
            self.different += len(wrong) - MOST
            self.lines.append(f"{where}: {len(wrong) - MOST} more of {len(old)} values differ")

    def new_file(self, path: str) -> str:
        """Return where a file of the old set is in the new one."""
        files = self.names.get("files", {})
        return str(files.get(path, "/".join(files.get(part, part) for part in path.split("/"))))

    def new_column(self, name: str) -> str:
        """Return what a column is called in the new set."""
        return str(self.names.get("columns", {}).get(name, name))

    def new_value(self, column: str, value: object) -> object:
        """Return what a text in a column is in the new set."""
        values = self.names.get("values", {}).get(column, {})
        return values.get(value, value) if isinstance(value, str) else value


def compare(old: Path, new: Path, names: Names) -> Comparison:
    """Compare two folders of results."""
    found = Comparison(names)
    olds, news = (
        {str(path.relative_to(one)): path for path in sorted(one.rglob("*")) if path.is_file()}
        for one in (old, new)
    )
    renamed = {found.new_file(name): path for name, path in olds.items()}
    for name in sorted(renamed.keys() | news.keys()):
        if name in renamed and name in news:
            found.files += 1
            if Path(name).stem not in IGNORED:
                kind = KINDS.get(Path(name).suffix, compare_bytes)
                kind(found, name, renamed[name], news[name])
        else:
            found.tell(name, *("file" if name in one else "missing" for one in (renamed, news)))
    return found


def compare_tables(found: Comparison, where: str, old: Path, new: Path) -> None:
    """Compare Parquet, or CSV as the texts that it holds."""
    if old.suffix == ".csv":
        a, b = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in (old, new))
    else:
        a, b = (pd.read_parquet(path) for path in (old, new))
    a = a.rename(columns={name: found.new_column(str(name)) for name in a.columns})
    a, b = (one.drop(columns=[name for name in one if name in IGNORED]) for one in (a, b))
    found.check(f"{where} columns", a.columns.tolist(), b.columns.tolist())
    if not found.check(f"{where} rows", len(a), len(b)):
        return
    found.several(f"{where} index", a.index.tolist(), b.index.tolist())
    for name in [name for name in a.columns if name in b.columns]:
        found.check(f"{where} {name} dtype", str(a[name].dtype), str(b[name].dtype))
        olds = [found.new_value(str(name), value) for value in _plain(a[name])]
        found.several(f"{where} {name}", olds, _plain(b[name]))


def _plain(column: "pd.Series[Any]") -> list[object]:
    values: list[object] = column.tolist()
    if column.dtype == np.float32:  # exact as float64, shorter as itself
        values = [float(value) for value in column.to_numpy(np.float64)]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in values]


def compare_tensors(found: Comparison, where: str, old: Path, new: Path) -> None:
    """Compare safetensors: names, dtypes, shapes, bytes, and metadata as JSON."""
    (a, told), (b, told_new) = (_tensors(path) for path in (old, new))
    a = {":".join(map(found.new_column, name.split(":"))): one for name, one in a.items()}
    found.check(f"{where} names", sorted(a), sorted(b))
    _compare_json(found, f"{where} metadata", told, told_new)
    for name in sorted(a.keys() & b.keys()):
        (kind, shape, content), (*its, content_new) = a[name], b[name]
        if found.check(f"{where} {name} dtype and shape", (kind, shape), tuple(its)):
            dtype = np.dtype(_DTYPES.get(kind, "u1"))
            one, other = (np.frombuffer(part, dtype) for part in (content, content_new))
            nan = np.isnan(one) & np.isnan(other) if dtype.kind == "f" else np.zeros(len(one), bool)
            bits = [part.view(f"u{dtype.itemsize}") for part in (one, other)]
            wrong = np.flatnonzero((bits[0] != bits[1]) & ~nan)
            found.wrong(f"{where} {name}", one.tolist(), other.tolist(), wrong.tolist())


_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "BF16": "u2"}


def _tensors(path: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], object]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    told = {name: _parsed(text) for name, text in header.pop("__metadata__", {}).items()}
    tensors = {}
    for name, one in header.items():
        begin, end = one["data_offsets"]
        tensors[name] = one["dtype"], one["shape"], content[start + begin : start + end]
    return tensors, told


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def compare_json(found: Comparison, where: str, old: Path, new: Path) -> None:
    """Compare JSON but for `IGNORED`."""
    _compare_json(found, where, *(json.loads(path.read_text("utf-8")) for path in (old, new)))


def _compare_json(found: Comparison, where: str, old: object, new: object) -> None:
    a: dict[str, object] = {}
    stem = Path(where).stem  # a manifest that is no JSON as a whole has a file a key
    for keys, value in _leaves(old, inside=stem):
        records = [found.new_column(key) if before.isdigit() else key
                   for before, key in zip(("", *keys), keys, strict=False)]  # fmt: skip
        key = _moved(".".join(records), found.names.get("manifest", {}))
        if isinstance(value, str) and value.startswith("--"):
            value = found.names.get("options", {}).get(value, value)
        named = [part for part in key.split(".") if not part.isdigit()]
        a[key] = found.new_value(named[-1] if named else "", value)
    b = {".".join(keys): value for keys, value in _leaves(new, inside=stem)}
    for key in [*a, *(key for key in b if key not in a)]:
        found.check(f"{where} {key}", a.get(key, "absent"), b.get(key, "absent"))


def _moved(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


def _leaves(
    content: object, keys: tuple[str, ...] = (), *, inside: str
) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(content, dict | list) and content:
        items = content.items() if isinstance(content, dict) else enumerate(content)
        pairs: Iterable[tuple[Any, Any]] = items
        for key, one in pairs:
            if not {key, f"{inside}.{key}"} & IGNORED.keys():
                yield from _leaves(one, (*keys, str(key)), inside=str(key))
    else:
        yield keys, content


def compare_bytes(found: Comparison, where: str, old: Path, new: Path) -> None:
    """Compare any other file; line by line if it is text."""
    a, b = (path.read_bytes() for path in (old, new))
    try:
        lines = [content.decode().splitlines() for content in (a, b)]
    except UnicodeDecodeError:
        found.check(where, a, b)
        return
    if found.check(f"{where} lines", *map(len, lines)):
        found.several(where, *lines)


KINDS: Mapping[str, Callable[[Comparison, str, Path, Path], None]] = {
    ".parquet": compare_tables, ".csv": compare_tables, ".safetensors": compare_tensors,
    ".json": compare_json, **dict.fromkeys(FIGURES, lambda *_: None),
}  # fmt: skip


def main() -> int:
    """Make or compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="make|diff")
    making = kinds.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--demo", action="store_true", help="also the demo model")
    comparing = kinds.add_parser("diff")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    for one in (making, comparing):
        one.add_argument("--names", type=Path, help="JSON of what was renamed")
    asked = parser.parse_args()
    names = {} if asked.names is None else json.loads(asked.names.read_text("utf-8"))
    if asked.kind == "make":
        if ENVIRONMENT.items() - os.environ.items():  # libraries read it when they are loaded
            again = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, again, {**os.environ, **ENVIRONMENT})
        make(asked.folder, names, demo=asked.demo)
        return 0
    found = compare(asked.old, asked.new, names)
    print(*found.lines, sep="\n")
    print(f"{found.files} files, {found.values} values compared, {found.different} different")
    return int(found.different > 0)


if __name__ == "__main__":
    sys.exit(main())
