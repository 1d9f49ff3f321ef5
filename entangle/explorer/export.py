"""A neuron to take along: a page that needs nothing else, and a link that saves a file."""

import base64
from collections.abc import Mapping
from importlib.resources import files

from entangle.explorer.evidence import Content, image
from entangle.runs.tables import escaped

_TYPES = {"html": "text/html", "png": "image/png"}


def page(title: str, heading: str, parts: Mapping[str, Content]) -> str:
    """Return what is known of a neuron as a page of its own.

    Parameters
    ----------
    title
        A plain text.
    heading
        HTML.
    parts
        What the views show, by their titles; those without a figure or a text are left out.
    """
    style = files("entangle.explorer").joinpath("style.css").read_text("utf-8")
    shown = "".join(
        f'<section class="entangle-pane"><h2>{escaped(name)}</h2>'
        f"{part.note}{''.join(map(image, part.pictures))}{part.html}</section>"
        for name, part in parts.items()
        if part.pictures or (part.html and "<code>entangle.explore" not in part.html)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escaped(title)}</title>'
        "<style>:root { color-scheme: light dark } body { font: 15px system-ui, sans-serif; "
        f"margin: 0 auto; max-width: 52em; padding: 16px }}{style}</style></head>"
        f'<body class="entangle-explorer">{heading}{shown}</body></html>'
    )


def link(name: str, content: bytes) -> str:
    """Return a link that saves a file of this name, whose ending says what it is."""
    kind = _TYPES[name.rpartition(".")[2]]
    data = base64.b64encode(content).decode("ascii")
    size = f"{max(1, round(len(content) / 1000)):,} kB"
    address = f'download="{escaped(name)}" href="data:{kind};base64,{data}"'
    return f"<a {address}>Save {escaped(name)} ({size})</a>"


_DOT = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def followed(saving: str) -> str:
    """Return a link that is followed as soon as it is shown; where scripts may not run, it waits.

    A picture that has loaded clicks on it.
    """
    click = 'onload="this.previousElementSibling.click()"'
    return f'<span>{saving}<img alt="" hidden {click} src="{_DOT}"></span>'
