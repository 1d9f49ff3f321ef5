"""Options that have no meaning beside others: refused, as they would change nothing.

Only what was written on the command line counts, never a default. Told before torch is imported.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entangle.cli.options import names, numbers
from entangle.doors import with_installed
from entangle.errors import InvalidInput

CALIBRATED = ("owl", "trim", "neuroal", "neuroal-blocks", "loss", "sensitivity", "depth")
"""Allocation rules that read a calibration text."""
UNSCORED = (
    "uniform", "owl", "alphapruning", "trim", "neuroal", "neuroal-blocks", "erk",
    "magnitude-global",
)  # fmt: skip
"""Allocation rules that read no column of the scores."""


@dataclass(frozen=True)
class Meaning:
    """When some options have a meaning."""

    options: Sequence[str]
    """Their names in the parsed arguments."""
    of: Callable[[argparse.Namespace], bool]
    """Whether they have."""
    without: str
    """What is lacking, for the message: "has no meaning …"."""


def check_meaning(arguments: argparse.Namespace) -> None:
    """Refuse an option that was given and changes nothing.

    Parameters
    ----------
    arguments
        Parsed; ``given`` are the names of those that were written (`given_options`).

    Raises
    ------
    InvalidInput
        Naming the first of them, and what it lacks.
    """
    given: frozenset[str] = getattr(arguments, "given", frozenset())
    for meaning in (*COMMON, *MEANINGS.get(arguments.command, ())):
        for option in meaning.options:
            if option in given and not meaning.of(arguments):
                raise InvalidInput(
                    f"--{option.replace('_', '-')} has no meaning {meaning.without}; drop it."
                )


def given_options(
    subparser: argparse.ArgumentParser, argv: Sequence[str], arguments: argparse.Namespace
) -> frozenset[str]:
    """Return the names of the options that a command line holds, not those of defaults.

    Parameters
    ----------
    subparser
        Of the command. It loses its defaults, so that it must not be used again.
    argv
        Arguments after the command's name.
    arguments
        What they were parsed to.
    """
    return frozenset(given_values(subparser, argv, vars(arguments)))


def given_values(
    subparser: argparse.ArgumentParser, argv: Sequence[str], names: Iterable[str] = ()
) -> dict[str, object]:
    """Return the options that a command line holds by their names, as `given_options`.

    ``names`` are those of defaults that no option has.
    """
    absent: list[str] = []  # known by its identity; options that gather values begin with it
    known = {one.dest for one in subparser._actions if one.default is not argparse.SUPPRESS}
    subparser.set_defaults(**dict.fromkeys({*names, *known}, absent))
    found, _ = subparser.parse_known_args(list(argv))
    return {name: one for name, one in vars(found).items() if name in known and one is not absent}


def _is_text(option: str) -> Callable[[argparse.Namespace], bool]:
    """Tell whether a source is a text, and not token ids."""

    def of(arguments: argparse.Namespace) -> bool:
        return not str(getattr(arguments, option, "")).lower().endswith(".safetensors")

    return of


def _has(option: str, *wanted: str) -> Callable[[argparse.Namespace], bool]:
    """Tell whether an option's comma-separated list has one of some names."""

    def of(arguments: argparse.Namespace) -> bool:
        return bool(set(wanted) & set(names(str(getattr(arguments, option)))))

    return of


def _selects(*wanted: str) -> Callable[[argparse.Namespace], bool]:
    """Tell whether a rule of `ablate --select`, whose default has all three, is one of some."""

    def of(arguments: argparse.Namespace) -> bool:
        if arguments.allocation is not None:
            return False
        return arguments.select is None or _has("select", *wanted)(arguments)

    return of


def _reads_text(arguments: argparse.Namespace) -> bool:
    """Tell whether something is measured on a text: all but minimal pairs are."""
    return not set(names(arguments.measure)) <= {"blimp"}


def _part_of(option: str, *wanted: str) -> Callable[[argparse.Namespace], bool]:
    """As `_has`, of parts of names too: ``teal:expansion`` has expansion."""

    def of(arguments: argparse.Namespace) -> bool:
        parts = (name.split(":") for name in names(str(getattr(arguments, option))))
        return bool(set(wanted) & {one for several in parts for one in several})

    return of


def _masks(arguments: argparse.Namespace) -> bool:
    """Tell whether a method masks activations: one of ours, or of an installed package."""
    return _part_of("methods", *with_installed("methods", MASKS))(arguments)


def _prunes(arguments: argparse.Namespace) -> bool:
    return any(name.startswith("prune") for name in names(arguments.intervention))


def _edits(arguments: argparse.Namespace) -> bool:
    return any(not name.startswith("prune") for name in names(arguments.intervention))


def _several_experts(arguments: argparse.Namespace) -> bool:
    return any(count > 1 for count in numbers(str(arguments.experts), int))


def _rules(arguments: argparse.Namespace) -> set[Any]:
    """Return the rules that an allocation follows."""
    if arguments.rule == "search":
        return {arguments.tune or "linear", arguments.across}
    return {arguments.rule, arguments.across}


def _is_calibrated(arguments: argparse.Namespace) -> bool:
    return arguments.rule == "search" or bool(_rules(arguments) & set(CALIBRATED))


def _is_scored(arguments: argparse.Namespace) -> bool:
    ranked = _rules(arguments) - {None, "model", *UNSCORED}
    return bool(ranked) or arguments.experts is not None


COMMON: Sequence[Meaning] = (
    Meaning(("table",), lambda given: not given.json, "with --json, which holds all tables"),
    Meaning(
        ("wide",), lambda given: not (given.json or given.csv or given.latex),
        "with --json, --csv or --latex, which hold all columns",
    ),
)  # fmt: skip

_DRAWN = ("top", "bottom", "random")
_MATCHED = ("random-norm", "random-variance")
_EVALUATION = (
    "evaluation", "evaluation_config", "evaluation_split", "evaluation_column", "eval_seq_len",
    "eval_windows",
)  # fmt: skip
_TOKENS = "for token ids, which are in sequences already"
_OF_CALIBRATION = Meaning(("join",), _is_text("calibration"), _TOKENS)
_CALIBRATION = (
    "calibration", "calibration_config", "split", "column", "n_seq", "seq_len", "sampling", "join",
    "special_tokens", "seed",
)  # fmt: skip

_PRUNING = (
    Meaning(
        ("damping",), lambda given: given.pruner == "sparsegpt", "without the pruner sparsegpt"
    ),
    Meaning(("group_size",), lambda given: given.bits is not None, "without --bits"),
)

MASKS = (
    "teal", "teal-greedy", "column-norm", "wina", "wina-greedy", "cats", "chess", "chess+",
    "rsparse", "larosa", "griffin", "coreinfer", "cett",
)  # fmt: skip
"""Our methods that mask activations."""
MIXTURES = (
    "frequency", "ean", "reap", "man", "msan", "easy-ep", "mone", "m-smoe", "stun", "stun-experts",
    "heapr",
)  # fmt: skip
"""Our methods that prune the experts of a mixture."""
MEANINGS: Mapping[str, Sequence[Meaning]] = {
    "score": (_OF_CALIBRATION,),
    "anchor": (
        _OF_CALIBRATION,
        Meaning(
            ("atoms", "threshold"), lambda given: given.dictionary is None, "with a --dictionary"
        ),
    ),
    "decompose": (
        _OF_CALIBRATION,
        Meaning(("router",), _several_experts, "with one expert"),
    ),
    "evaluate": (Meaning(("join",), _is_text("evaluation"), _TOKENS),),
    "ablate": (
        _OF_CALIBRATION,
        Meaning(
            ("fraction", "count", "scope"), _selects(*_DRAWN, *_MATCHED),
            "with these neurons, which nothing is drawn from",
        ),
        Meaning(
            ("by",), _selects("top", "bottom", *_MATCHED), "without the selection top or bottom"
        ),
        Meaning(("seeds",), _selects("random", *_MATCHED), "without a random selection"),
        Meaning(("strength", "experts", "router"), _prunes, "without an intervention that prunes"),
        Meaning(("router",), _several_experts, "with one expert"),
        Meaning(("damping",), _has("intervention", "prune"), "without the intervention prune"),
        Meaning(("edit_strength",), _edits, "without an edit of outputs, such as zero"),
        Meaning(
            _EVALUATION, _reads_text, "without the measure perplexity or divergence",
        ),
        Meaning(
            ("pairs", "pairs_per_paradigm"), _has("measure", "blimp"), "without the measure blimp"
        ),
    ),
    "compare": (
        _OF_CALIBRATION,
        Meaning(
            ("experts",), _part_of("methods", "expansion", "expansion-random"),
            "without the method expansion",
        ),
        Meaning(("router",), _part_of("methods", "expansion"), "without the method expansion"),
        Meaning(
            ("form", "dense_prefix"), _masks, "without a method that masks",
        ),
    ),
    "expand": (
        _OF_CALIBRATION,
        Meaning(
            ("router",), lambda given: given.allocation is not None or _several_experts(given),
            "with one expert",
        ),
        *_PRUNING,
        Meaning(
            ("no_baseline",), lambda given: given.evaluation is not None, "without --evaluation"
        ),
    ),
    "prune": (
        _OF_CALIBRATION, *_PRUNING,
        Meaning(
            ("pattern", "pruner", "bits", "group_size", "damping", "allocation", "packed", "layer",
             "proj", "resume"),
            lambda given: given.method is None, "with --method, which prunes experts",
        ),
    ),
    "report": (
        Meaning(
            ("revision", "dtype", "device", "device_map", "dry_run", *_CALIBRATION),
            lambda given: given.model is not None, "without --model, which reads a text",
        ),
        _OF_CALIBRATION,
    ),
    "allocate": (
        _OF_CALIBRATION,
        Meaning(("by",), _is_scored, "with a rule that reads no column of the scores"),
        Meaning(("combine",), lambda given: "+" in given.by, "with one column (--by)"),
        Meaning(
            _CALIBRATION, _is_calibrated, "with a rule that measures nothing on a text"
        ),
    ),
}  # fmt: skip
"""By command; what a file has to be read for is told later."""
