"""The ``entangle`` command."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from entangle import __version__
from entangle.cli import (
    ablate,
    allocate,
    compare,
    decompose,
    demo,
    evaluate,
    expand,
    figures,
    layers,
    options,
    score,
)
from entangle.errors import EntangleError
from entangle.provenance import claimed

CLOSED_PIPE = 128 + 13
"""As a shell reports a program that the signal SIGPIPE (13) has ended."""

COMMANDS = (ablate, allocate, compare, decompose, demo, evaluate, expand, figures, layers, score)


_AGAIN = 0.1  # seconds until a signal that was lost is sent again
STOPPING = ("SIGTERM", "SIGHUP")
"""Signals that end a command as Ctrl-C does: what it was writing is removed, pieces are kept."""


class Stopped(KeyboardInterrupt):
    """A signal asks the command to end; no code that handles errors keeps it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)
        """The signal."""


class _Parser(argparse.ArgumentParser):
    """Ends with one line where an argument is wrong; subcommands inherit it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="entangle",
        description="Neuron-entanglement analysis for language models.",
        epilog="Documentation and source of the method: arXiv 2405.15756.",
    )
    parser.add_argument("--version", action="version", version=f"entangle {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success, 2 for a user's mistake, 1 for a failure of the program, 130 if interrupted,
        141 if the reader of a pipe, such as head, had seen enough, 128 + n if the signal n
        (SIGTERM, SIGHUP) has ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding gets a "?"
            stream.reconfigure(errors="replace")
    try:
        try:
            with _stoppable():
                return _run(argv)
        except Stopped as stopped:
            with suppress(OSError):  # the terminal may be gone
                print(f"entangle: ended by {stopped.signal.name}", file=sys.stderr)
            return 128 + stopped.signal
        finally:
            print(end="", flush=True)  # what is still buffered meets a closed pipe here
    except BrokenPipeError:
        return _leave_pipe()
    except SystemExit as error:  # rich ends so where it meets a closed pipe
        if isinstance(error.__context__, BrokenPipeError):
            return _leave_pipe()
        raise


def _run(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(options.spell_out(given))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from entangle.cli.early import check_arguments

        check_arguments(arguments)
        shared = arguments.command == "figures"  # files that any number of commands may add to
        with claimed(None if shared else getattr(arguments, "out", None)):  # before all else
            arguments.run(arguments)
    except EntangleError as error:
        print(f"entangle: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Stopped:
        raise
    except KeyboardInterrupt:
        print("entangle: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let signals that end a program raise `Stopped` in the block, unless they are ignored.

    Where Python cannot let one through, as while it frees an object, it is sent again.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
        ours = [one for one in numbers if signal.getsignal(one) is signal.SIG_DFL]
    for one in ours:
        signal.signal(one, _stop)
    usual = sys.unraisablehook

    def send_again(lost: "sys.UnraisableHookArgs") -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            usual(lost)
            return
        value = lost.exc_value
        number = value.signal if isinstance(value, Stopped) else signal.SIGINT
        threading.Timer(_AGAIN, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _leave_pipe() -> int:
    """Send what is still to be written to nowhere; return the status of such an end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    return CLOSED_PIPE


if __name__ == "__main__":
    sys.exit(main())
