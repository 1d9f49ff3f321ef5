"""The whole public interface as one page: functions, their arguments, commands, their options.

``python -m benchmarks.interface`` prints it; ``docs/INTERFACE.md`` keeps it, which a test compares.
"""

import argparse
import inspect
import textwrap
from collections.abc import Callable, Iterator

import entangle
from entangle.cli.main import build_parser

_SHOWN = 60  # characters of a default


def summary(thing: object) -> str:
    """Return the first sentence of a docstring, on one line."""
    first = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return " ".join(first.split()).replace("|", "\\|")


def functions() -> Iterator[str]:
    """Yield a heading and a table of arguments for every public function."""
    for name in entangle.__all__:
        function = getattr(entangle, name)
        if not inspect.isfunction(function):
            continue
        yield f"### `entangle.{name}`\n\n{summary(function)}\n"
        yield from arguments(function)
        yield ""


def arguments(function: Callable[..., object]) -> Iterator[str]:
    """Yield the rows of the table of a function's arguments and defaults."""
    yield "| argument | default |\n|---|---|"
    for parameter in inspect.signature(function).parameters.values():
        given = parameter.default
        shown = "a function" if callable(given) else textwrap.shorten(repr(given), _SHOWN)
        told = "needed" if given is parameter.empty else f"`{shown}`"
        yield f"| `{parameter.name}` | {told} |"


def classes() -> Iterator[str]:
    """Yield a line for every public class."""
    for name in entangle.__all__:
        found = getattr(entangle, name)
        if inspect.isclass(found):
            public = [one for one in sorted(dir(found)) if not one.startswith("_")]
            own = ", ".join(f"`{one}`" for one in public)
            yield f"- **`entangle.{name}`**: {summary(found)} {own}"


def commands() -> Iterator[str]:
    """Yield a heading and a table of options for every command."""
    parsers = next(
        one.choices
        for one in build_parser()._actions
        if isinstance(one, argparse._SubParsersAction)
    )
    for name, parser in parsers.items():
        yield f"### `entangle {name}`\n\n{' '.join((parser.description or '').split())}\n"
        yield "| option | values | what it says |\n|---|---|---|"
        for action in parser._actions:
            if "--help" in action.option_strings:
                continue
            spelled = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            values = ", ".join(map(str, action.choices)) if action.choices else ""
            said = " ".join((action.help or "").split()) % {"default": action.default}
            yield f"| `{spelled}` | {values} | {said.replace('|', chr(92) + '|')} |"
        yield ""


def page() -> str:
    """Return the whole page."""
    lines = [
        "# Public interface\n",
        "Made from the code by `python -m benchmarks.interface > docs/INTERFACE.md`.\n",
        "## Functions\n", *functions(), "## Classes\n", *classes(), "\n## Commands\n", *commands(),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
