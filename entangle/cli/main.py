"""The ``entangle`` command."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
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
        141 if the reader of a pipe, such as head, had seen enough.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding gets a "?"
            stream.reconfigure(errors="replace")
    try:
        try:
            return _run(argv)
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
        _keep_to_memory(getattr(arguments, "memory", options.AUTO))
        shared = arguments.command == "figures"  # files that any number of commands may add to
        with claimed(None if shared else getattr(arguments, "out", None)):  # before all else
            arguments.run(arguments)
    except EntangleError as error:
        print(f"entangle: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("entangle: interrupted", file=sys.stderr)
        return 130
    return 0


def _keep_to_memory(asked: str) -> None:
    """Let the process keep no more than it uses, if a size of memory was asked for."""
    from entangle.memory import keep_little

    memory = options.parse_memory(asked)
    if memory is not None:
        keep_little(memory)


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
