"""Progress of long work: a bar on a terminal, plain lines otherwise, nothing when switched off."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Progress that nobody watches; the base of those that show it."""

    def start(self, total: int, unit: str) -> None:
        """Begin to count ``total`` pieces of work, called ``unit``."""

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more pieces as done."""


class ProgressBar(Progress):
    """Show progress on standard error.

    Parameters
    ----------
    title
        What is going on.
    enabled
        None shows a bar on a terminal and nothing otherwise; True shows plain lines where there
        is no terminal; False shows nothing.
    """

    def __init__(self, title: str, *, enabled: bool | None = None) -> None:
        self._title, self._done, self._total, self._unit = title, 0, 0, ""
        terminal = sys.stderr.isatty()
        self._bar: RichProgress | None = (
            self._make_bar() if terminal and enabled is not False else None
        )
        self._lines = bool(enabled) and not terminal
        self._began = self._said = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, total: int, unit: str) -> None:
        """Begin to count ``total`` pieces of work, called ``unit``."""
        self._total, self._unit, self._done = total, unit, 0
        self._began = self._said = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=total, unit=unit, rate="")
        elif self._lines:
            self._say()

    def advance(self, count: int = 1) -> None:
        """Count ``count`` more pieces as done."""
        self._done += count
        if self._bar is not None:
            rate = self._done / max(time.monotonic() - self._began, 1e-3)
            self._bar.update(self._task, advance=count, rate=f"{rate:.3g}/s")
        elif self._lines and (self._done >= self._total or self._due()):
            self._say()

    def _due(self) -> bool:
        return time.monotonic() - self._said > _SECONDS_BETWEEN_LINES

    def _say(self) -> None:
        self._said = time.monotonic()
        elapsed = self._said - self._began
        left = elapsed / self._done * (self._total - self._done) if self._done else None
        tail = "" if left is None else f", {elapsed:.0f} s, {left:.0f} s left"
        line = f"{self._title}: {self._done}/{self._total} {self._unit}{tail}"
        print(line, file=sys.stderr, flush=True)

    @staticmethod
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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
