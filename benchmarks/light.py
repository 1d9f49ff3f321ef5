"""What it costs to read and to draw results that are saved, each in a process of its own.

``python -m benchmarks.light RUN...`` prints a line for every result: seconds of CPU (user and
system) of importing and loading it and of ``entangle figures``, the limits, how many of the
package's own modules are imported for it, and which heavy libraries. The exit status is 1 where a
limit is missed.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LOADING, DRAWING, A_FIGURE = 1.0, 2.0, 0.5
"""Seconds of CPU that loading, drawing, and each figure drawn may take."""
FILES = 60
"""Modules of the package that may be imported."""
HEAVY = ("torch", "transformers")
TOLD = ("seaborn", "matplotlib", "scipy", "jinja2")
_MODULES = "import sys; print(*sys.modules)"


def measured(code: str, repeats: int = 3) -> tuple[float, set[str], str]:
    """Return the least CPU seconds of some runs of a piece of code, its modules and its output."""
    times, lines = [], [""]
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", f"{code}\n{_MODULES}"], capture_output=True, text=True,
            check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        lines = done.stdout.splitlines()
    return min(times), set(lines[-1].split()), "\n".join(lines[:-1])


def check(run: str) -> bool:
    """Print what one result costs; return whether all limits are kept."""
    load, read, _ = measured(f"import entangle; entangle.load_result({run!r})")
    with tempfile.TemporaryDirectory() as place:
        command = ["figures", run, "--out", place, "--force"]
        draw, drawn, output = measured(f"from entangle.cli.main import main; main({command})")
        figures = output.count("Figure: ")
    limit = DRAWING + A_FIGURE * figures
    own = sum(name.partition(".")[0] == "entangle" for name in drawn)
    heavy = sorted({*HEAVY} & (read | drawn))
    kept = load <= LOADING and draw <= limit and own <= FILES and not heavy
    print(
        f"{Path(run).name:24} load {load:5.2f} s (≤ {LOADING:g})   draw {draw:5.2f} s "
        f"(≤ {limit:g}: {figures} figures)   {own} modules (≤ {FILES})   "
        f"{', '.join((*heavy, *sorted({*TOLD} & drawn)))}   {'kept' if kept else 'MISSED'}"
    )
    return kept


if __name__ == "__main__":
    missed = [run for run in sys.argv[1:] if not check(run)]
    sys.exit(1 if missed else 0)
