"""Progress of long work: a bar on a terminal or in a notebook, plain lines or nothing elsewhere.

Where Python runs: in a Jupyter kernel or not, and for a page that can be clicked or not.
"""

import html
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from entangle.errors import visible
from entangle.ranks import Ranks, current

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


_PYTHON_CLIENT = re.compile(r"_\d+_\d+$")


def in_kernel() -> bool:
    """Tell whether this process is a Jupyter kernel, without importing IPython."""
    return _kernel() is not None


def in_browser() -> bool:
    """Tell whether the cell that runs was sent by a page that can show widgets.

    Clients written in Python (nbclient, nbconvert, papermill, consoles) show none. They number
    their messages ``session_process_count``; pages give theirs random names.
    """
    kernel = _kernel()
    if kernel is None:
        return False
    header = kernel.get_parent("shell").get("header", {})
    return _PYTHON_CLIENT.search(str(header.get("msg_id", ""))) is None


def _kernel() -> Any:
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None)


_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_UPDATES = 0.2


def tell(line: str) -> None:
    """Say what was chosen, found or is wrong, in one line on standard error.

    What cannot be seen in it is spelled out (`entangle.errors.visible`). Of ranks one speaks.
    """
    if current().leads:
        _write(f"entangle: {line}")


def _write(line: str) -> None:
    """Write a line on standard error; without room for it, or where it is closed, work goes on."""
    if sys.stderr is None:
        return
    try:
        print(visible(line), file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def on_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal; one that was closed is none."""
    return stream is not None and bool(stream.isatty())


class Progress:
    """Progress that nobody watches; the base of those that show it."""

    def start(self, total: int, unit: str) -> None:
        """Begin to count ``total`` pieces of work, called ``unit``."""

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more pieces as done."""


@dataclass
class _Tally:
    """How far the work is."""

    title: str
    unit: str = ""
    total: int = 0
    done: int = 0
    began: float = 0.0
    ended: bool = False

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def __str__(self) -> str:
        return visible(f"{self.title}: {self.done}/{self.total} {self.unit}{self._time()}")

    def _time(self) -> str:
        elapsed = self.elapsed
        if self.ended and self.done < self.total:
            return f", stopped after {elapsed:.0f} s"
        if not self.done:
            return ""
        if self.done >= self.total:
            return f", {elapsed:.0f} s"
        return f", {elapsed:.0f} s, {elapsed / self.done * (self.total - self.done):.0f} s left"


class _View:
    """Shows nothing; the base of the ways to show a tally."""

    def open(self) -> None:
        pass

    def start(self, tally: _Tally) -> None:
        pass

    def advance(self) -> None:
        pass

    def close(self) -> None:
        pass


class ProgressBar(Progress):
    """Show progress on standard error, or in the output of the notebook cell that runs.

    Parameters
    ----------
    title
        What is going on.
    enabled
        None shows a bar on a terminal or in a notebook and nothing otherwise; True shows plain
        lines where there is neither; False shows nothing.
    shared
        The ranks whose work is counted; `entangle.ranks.current` by default.

    Notes
    -----
    Of several ranks (`entangle.ranks`) the first shows what all of them have done.
    """

    _count = 0

    def __init__(
        self, title: str, *, enabled: bool | None = None, shared: Ranks | None = None
    ) -> None:
        self._tally, self._ranks, self._name = _Tally(title), shared or current(), ""
        self._view = _choose_view(enabled if self._ranks.leads else False)

    def __enter__(self) -> "ProgressBar":
        self._view.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ranks.size > 1 and error is None and self._tally.done < self._tally.total:
            self.advance(0)  # what the others have done since
        self._tally.ended = True
        self._view.close()

    def start(self, total: int, unit: str) -> None:
        """Begin to count ``total`` pieces of work, called ``unit``."""
        if self._ranks.size > 1:
            ProgressBar._count += 1
            self._name = str(ProgressBar._count)
        self._tally = _Tally(self._tally.title, unit, total, began=time.monotonic())
        self._view.start(self._tally)

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more pieces as done."""
        self._tally.done = self._ranks.tally(self._name, count, self._tally.done)
        self._view.advance()


def _choose_view(enabled: bool | None) -> _View:
    if enabled is False:
        return _View()
    if in_kernel():
        return _Cell()
    if on_terminal(sys.stderr):
        return _Terminal()
    return _Lines() if enabled else _View()


class _Lines(_View):
    """A line now and then on standard error."""

    def start(self, tally: _Tally) -> None:
        self._tally = tally
        self._say()

    def advance(self) -> None:
        due = time.monotonic() - self._said > _SECONDS_BETWEEN_LINES
        if due or self._tally.done >= self._tally.total:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        _write(str(self._tally))


class _Cell(_View):
    """One output of a notebook's cell, which is replaced as the work goes on."""

    _tally: _Tally | None = None

    def start(self, tally: _Tally) -> None:
        from IPython.display import display

        self._tally, self._said = tally, time.monotonic()
        self._handle: Any = display(_bundle(tally), raw=True, display_id=True)

    def advance(self) -> None:
        due = time.monotonic() - self._said > _SECONDS_BETWEEN_UPDATES
        if self._tally is not None and (due or self._tally.done >= self._tally.total):
            self._update(self._tally)

    def close(self) -> None:
        if self._tally is not None and self._tally.done < self._tally.total:
            self._update(self._tally)

    def _update(self, tally: _Tally) -> None:
        self._said = time.monotonic()
        self._handle.update(_bundle(tally), raw=True)


def _bundle(tally: _Tally) -> dict[str, str]:
    """Return the picture of a tally for front ends with and without HTML."""
    text = str(tally)
    meter = (
        f'<progress value="{tally.done}" max="{max(tally.total, 1)}" '
        'style="width: 16em; vertical-align: middle"></progress>'
    )
    return {"text/plain": text, "text/html": f"<span>{meter} {html.escape(text)}</span>"}


class _Terminal(_View):
    """A bar by rich."""

    def __init__(self) -> None:
        self.bar = _make_bar()

    def open(self) -> None:
        self.bar.start()

    def start(self, tally: _Tally) -> None:
        self._tally = tally
        title, unit = visible(tally.title), visible(tally.unit)
        self._task = self.bar.add_task(title, total=tally.total, unit=unit, rate="")

    def advance(self) -> None:
        done = self._tally.done
        rate = done / max(self._tally.elapsed, 1e-3)
        self.bar.update(self._task, completed=done, rate=f"{rate:.3g}/s")

    def close(self) -> None:
        self.bar.stop()


def _make_bar() -> "RichProgress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )


class SharedReport:
    """Reports sequences as parts of them are done with."""

    def __init__(self, report: Callable[[int], None], n_seq: int, steps: int) -> None:
        self._report, self._n_seq, self._steps = report, n_seq, steps
        self._done = self._told = 0

    def step(self) -> None:
        """Note that one more part is done with."""
        self._done += 1
        due = self._n_seq * self._done // self._steps
        if due > self._told:
            self._report(due - self._told)
            self._told = due
