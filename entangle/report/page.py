"""The skeleton of a page that is one file: markup, style, scripts and data, and nothing from a net.

Other pages build on it: give `render` a template that extends ``base.html``, scripts and styles.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
from markupsafe import Markup, escape

from entangle.errors import visible
from entangle.plotting.style import COLORBLIND, NOMINAL
from entangle.report.packing import as_script
from entangle.runs.tables import number

BASE_STYLES, BASE_SCRIPTS = ("base.css",), ("base.js",)
"""Of every page."""


def render(
    template: str,
    *,
    title: str,
    data: object,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    content: Mapping[str, object],
) -> str:
    """Return a page as HTML.

    Whatever the template writes is escaped; the page runs no script but its own, whose digest its
    head names, and loads nothing.

    Parameters
    ----------
    template
        Name of an asset that extends ``base.html``.
    title
        Of the page; plain text.
    data
        JSON that the scripts find as ``DATA``.
    styles, scripts
        Names of assets beside those of every page, in order.
    content
        What the template writes, by name.
    """
    style = palette() + "".join(map(asset, (*BASE_STYLES, *styles)))
    script = "".join(map(asset, (*BASE_SCRIPTS, *scripts)))
    script = f'(() => {{"use strict";\n{script}\n}})();'
    return _environment().get_template(template).render(
        title=visible(title), style=Markup(style), script=Markup(script),  # noqa: S704 - our own
        style_digest=_digest(style), script_digest=_digest(script),
        data=Markup(as_script(data)), **content,  # noqa: S704 - made safe there
    )  # fmt: skip


def palette() -> str:
    """Return the colours of the figures as variables of CSS."""
    named = {f"c{i}": color for i, color in enumerate(COLORBLIND)}
    named |= {f"n{i}": color for i, color in enumerate(NOMINAL)}
    return f":root {{ {' '.join(f'--{name}: {color};' for name, color in named.items())} }}\n"


@cache
def asset(name: str) -> str:
    """Return the text of a file of the folder ``assets``."""
    return (files("entangle.report") / "assets" / name).read_text("utf-8")


class _Assets(BaseLoader):
    def get_source(
        self,
        environment: Environment,  # noqa: ARG002
        template: str,
    ) -> tuple[str, None, None]:
        try:
            return asset(template), None, None
        except OSError as error:
            raise TemplateNotFound(template) from error


@cache
def _environment() -> Environment:
    made = Environment(
        loader=_Assets(), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters["visible"] = lambda text: visible(str(text))
    made.filters["number"] = number
    made.filters["told"] = told
    return made


def told(text: object) -> Markup:
    """Return a sentence as HTML, what stands between backticks as code."""
    parts = [escape(visible(part)) for part in str(text).split("`")]
    pieces = (Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
    return Markup().join(pieces)


def _digest(text: str) -> str:
    return b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
