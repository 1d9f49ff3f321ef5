"""``entangle probe``: a text of one's own, coloured by what one neuron puts out."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from entangle.cli import options
from entangle.cli.tables import Table, present, print_text, records, say
from entangle.errors import InvalidInput
from entangle.runs.progress import on_terminal

if TYPE_CHECKING:
    from entangle.modes.probe import Probe

_LEAST = 0.33  # of the full colour, 1 σ: weaker tokens stay plain


def add_parser(subparsers: options.Subparsers) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "probe",
        help="run a text of your own: the output and mode of one neuron on every token",
        description="Run a text of your own and show what one neuron puts out on every token: in "
        "colours on a terminal, as a table elsewhere and where NO_COLOR is set.",
    )
    parser.add_argument("layer", metavar="LAYER", help="full name, or a glob that one layer fits")
    parser.add_argument("neuron", metavar="NEURON", type=int, help="index of the neuron")
    parser.add_argument(
        "--text", required=True, metavar="TEXT", help="the text; - reads it from standard input"
    )
    parser.add_argument(
        "--scores", metavar="DIR",
        help="saved scores of the model: outputs in σ of their text, and modes from its histogram",
    )  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="demo", metavar="MODEL",
        help="hub id, local folder, local .gguf file, or demo (default: demo)",
    )  # fmt: skip
    options.add_loading_options(group)
    options.add_special_tokens_option(group)
    parser.add_argument("--html", metavar="FILE", help="write the coloured text to this file")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options.add_table_options(parser, "tokens")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the model once, and print."""
    from entangle.checks import whole
    from entangle.runs.provenance import expand_user, output_file

    whole("NEURON", arguments.neuron, least=0)
    page = None if arguments.html is None else expand_user(arguments.html)
    if page is not None and page.exists() and not arguments.force:
        raise InvalidInput(f"{arguments.html!r} exists; name another file or use --force.")
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    if not text:
        raise InvalidInput("--text must hold at least one token; got an empty text.")
    from entangle.modes.probe import probe
    from entangle.results.scores import load_scores

    scores = None if arguments.scores is None else load_scores(arguments.scores)
    found = probe(
        options.load_model(arguments),
        arguments.layer,
        arguments.neuron,
        text,
        scores=scores,
        **options.special_tokens(arguments),
    )
    if page is not None:
        with output_file(page) as temporary:
            temporary.write_text(found.html(), "utf-8")
    print_probe(found, arguments)


def as_json(found: "Probe", *, html: str | None) -> dict[str, object]:
    """Return what ``--json`` prints."""
    return {
        "html": html,
        "layer": found.layer,
        "neuron": found.neuron,
        **found.about,
        "mean": found.mean if found.mean == found.mean else None,
        "std": found.std if found.std == found.std else None,
        "modes": records(found.modes),
        "sent": found.sent,
        "tokens": records(found.frame),
    }


def in_colours() -> bool:
    """Tell whether standard output shows colours that are wanted (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return on_terminal(sys.stdout) and not plain


def print_probe(found: "Probe", arguments: argparse.Namespace) -> None:
    """Print the text in colours, or a row a token where there are none."""
    said = [*found.legend(), *([] if arguments.html is None else [f"Page: {arguments.html}."])]
    if in_colours() and not (arguments.json or arguments.csv or arguments.latex):
        say(found.title)
        print_text(list(_pieces(found)))
        say(*said)
        return
    plain = found.frame.drop(columns=["token_id", "piece", "special"])
    shown = plain.dropna(axis="columns", how="all")
    table = Table(
        "tokens", found.frame, found.title, {"output": ".4g", "σ": "+.2f", "above %": ".3g"},
        keys=("token",),
        optional=["above %", "position", "output"] if "sigma" in shown else ["position"],
        shown=shown.rename(columns={"sigma": "σ", "percentile": "above %"}),
    )  # fmt: skip
    present(arguments, [table], as_json(found, html=arguments.html), said=said)


def _pieces(found: "Probe") -> list[tuple[str, str]]:
    """Return the tokens with their styles; a token of a rarer mode is followed by its number."""
    from entangle.plotting.style import shade

    modes, pieces = found.modes, []
    usual = int(modes["share"].to_numpy().argmax()) if len(modes) else 0
    rows, colors, strength = found.frame.to_dict("records"), found.colors, abs(found.strength)
    for piece, some in found.pieces():
        best = found.strongest(some)
        share, row = float(strength[best]), rows[best]
        style = f"black on {shade(colors[best], 0.25 + 0.5 * share)}" if share >= _LEAST else ""
        pieces.append((piece, f"{style} italic" if row["special"] else style))
        if len(modes) > 1 and row["mode"] == row["mode"] and row["mode"] != usual:
            pieces.append((str(row["mode"]).translate(_SMALL), "dim"))
    return pieces


_SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
