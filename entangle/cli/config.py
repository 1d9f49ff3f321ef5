"""``--config FILE``: options from a YAML file.

A key is an option's long name, with - or _, or the name of an argument such as ``model``; a value
is what would be written behind it. Scalars are taken as they are written, never as YAML would read
them (``2:4`` is no number of minutes). Options of the command line win over those of the file.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence

import yaml

from entangle.cli.meaning import given_values
from entangle.errors import InvalidInput, unknown_name
from entangle.runs.provenance import expand_user
from entangle.runs.reading import decoding, read_text

OPTION = "--config"
REMEDY = (
    "give a YAML file of options, such as n_seq: 16 (the configuration of a data set is given by "
    "--calibration-config or --evaluation-config)"
)
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOT_IN_FILES = ("help", "config")
_SHORTEST = len("--co")


def with_file(subparser: argparse.ArgumentParser, written: Sequence[str]) -> list[str]:
    """Return a command line with the options of its ``--config`` file in place of that.

    Parameters
    ----------
    subparser
        Of the command. It loses its defaults and what it requires, so that it must not be used
        again.
    written
        The command, and its arguments.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        If the file cannot be read, is no mapping of options to values, or has one twice or one that
        the command does not know.
    """
    command, rest = written[0], list(written[1:])
    for action in subparser._actions:
        action.required = False
    for group in subparser._mutually_exclusive_groups:
        group.required = False
    given = given_values(subparser, rest)
    if "config" not in given:
        return [command, *rest]
    actions = [one for one in subparser._actions if one.dest not in _NOT_IN_FILES]
    read = read_options(str(given["config"]), actions, f"entangle {command}")
    found = {one.dest: tokens for one, tokens in read.items() if one.dest not in given}
    places = [one.dest for one in actions if not one.option_strings]
    first = next((place for place, name in enumerate(places) if name in given), len(places))
    options = [one.dest for one in actions if one.option_strings]
    before, after = (_joined(found, names) for names in (places[:first], places[first:]))
    return [command, *before, *_joined(found, options), *_without(rest), *after]


def read_options(
    path: str, actions: Sequence[argparse.Action], command: str
) -> dict[argparse.Action, list[str]]:
    """Return what a file of options says, as it would be written on a command line.

    Parameters
    ----------
    path
        The YAML file.
    actions
        What the command knows.
    command
        Its name, for messages.

    Raises
    ------
    InvalidInput, UnknownName, Unavailable
        As `with_file`.
    """
    known = {name: one for one in actions for name in _names(one)}
    found: dict[argparse.Action, list[str]] = {}
    for key, node in _entries(path):
        name = key.replace("_", "-")
        if name not in known:
            shown = sorted({_names(one)[0] for one in actions})
            raise unknown_name(f"option of {command} in {path!r}", key, shown)
        action = known[name]
        if action in found:
            raise _refused(path, node, f"the option {key!r} must be there once")
        found[action] = _tokens(action, key, node, path)
    return found


def _names(action: argparse.Action) -> list[str]:
    """Return the names of an option or argument in a file, the first one to be shown."""
    long = [one.removeprefix("--") for one in action.option_strings if one.startswith("--")]
    return long or [action.dest.replace("_", "-")]


def _entries(path: str) -> Iterator[tuple[str, yaml.Node]]:
    """Yield every key of a YAML mapping, with what it maps to, not yet read."""
    file = expand_user(path)
    text = read_text(file, remedy=REMEDY)
    with decoding(file, remedy=REMEDY):
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ValueError(f"it is not valid YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise InvalidInput(f"{path!r} must map options to values: {REMEDY}.")
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused(path, key, "a key must be the name of an option")
        yield key.value, node


def _tokens(action: argparse.Action, key: str, node: yaml.Node, path: str) -> list[str]:
    """Return an option and its values as a command line has them."""
    several = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for one in several:
        if not isinstance(one, yaml.ScalarNode):
            raise _refused(path, one, f"{key!r} must be a value or a list of values")
        if one.value == "" and one.style is None:
            raise _refused(path, one, f"{key!r} must have a value; leave it out for its default")
    values = [str(one.value) for one in several]
    if action.nargs == 0:
        if len(values) != 1 or values[0].lower() not in _SWITCH:
            raise _refused(path, node, f"{key!r} must be true or false; got {', '.join(values)}")
        return [action.option_strings[0]] if _SWITCH[values[0].lower()] else []
    if not action.option_strings:
        return values
    joined = values if isinstance(action, argparse._AppendAction) else [",".join(values)]
    return [f"{action.option_strings[0]}={one}" for one in joined]


def _refused(path: str, node: yaml.Node, rule: str) -> InvalidInput:
    return InvalidInput(f"line {node.start_mark.line + 1} of {path!r}: {rule}.")


def _joined(found: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    return [token for name in names for token in found.get(name, ())]


def _without(rest: Sequence[str]) -> list[str]:
    """Return arguments without ``--config FILE``, however it is abbreviated."""
    kept: list[str] = []
    skipped = False
    for one in rest:
        name, separator, _ = one.partition("=")
        if skipped:
            skipped = False
        elif len(name) >= _SHORTEST and OPTION.startswith(name):
            skipped = not separator
        else:
            kept.append(one)
    return kept
