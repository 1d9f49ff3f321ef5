"""``entangle completion``: what a shell has to read to complete commands, options and files."""

import argparse
from collections.abc import Sequence

from entangle.cli.columns import scored_columns
from entangle.cli.options import Subparsers
from entangle.cli.tables import write
from entangle.runs.provenance import POLICIES

SHELLS = ("bash", "zsh", "fish")
_HOW = """\
  bash   source <(entangle completion bash)
         or once: entangle completion bash > ~/.local/share/bash-completion/completions/entangle
  zsh    entangle completion zsh > DIR/_entangle     (DIR in $fpath, before compinit)
  fish   entangle completion fish > ~/.config/fish/completions/entangle.fish
"""
_FILES = ("FILE", "SOURCE", "SCORES", "MODEL", "RUN")
_FOLDERS = ("DIR",)
"""What an option's value is called where it is a file, or a folder."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "completion",
        help="print a script that completes commands and options in a shell",
        description="Print a script for a shell, which completes commands, options, their choices, "
        "and names of files.",
        epilog=_HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    from entangle.cli.main import NAMES, SELECTIONS, build_parser

    known: dict[str, Sequence[str]] = {name: one for name, (_, one) in NAMES.items()}
    known |= {"select": SELECTIONS, "by": scored_columns(derived=True), "special_tokens": POLICIES}
    parser = build_parser()
    for one in _parsers(parser):
        for action in one._actions:
            if action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.option_strings and action.nargs != 0 and action.choices is None:
                names = one.get_default("tables") if action.dest == "table" else ()
                action.choices = known.get(action.dest, names) or None
    write(shtab.complete(parser, shell=arguments.shell) + "\n")


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Return a parser, and those of its commands."""
    inner = [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    return [parser, *(one for choices in inner for one in choices.values())]
