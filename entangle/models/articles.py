"""Plain text of encyclopedia articles from a MediaWiki export.

`clean` renders the parse tree of mwparserfromhell: prose, headings and lists stay; references,
tables, formulas, files, navigation and the sections behind the article proper go.
"""

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell
from mwparserfromhell import nodes

VERSION = 2
"""Raised whenever `clean` gives another text."""

BACK_MATTER = frozenset(
    {
        "bibliography",
        "citations",
        "external links",
        "footnotes",
        "further reading",
        "gallery",
        "notes",
        "notes and references",
        "references",
        "references and notes",
        "see also",
        "sources",
        "works cited",
    }
)
DROPPED_TAGS = frozenset(
    [
        "chem",
        "gallery",
        "hiero",
        "imagemap",
        "math",
        "ref",
        "references",
        "score",
        "source",
        "syntaxhighlight",
        "table",
        "td",
        "th",
        "timeline",
        "tr",
    ]
)
DROPPED_LINKS = re.compile(r"\s*:?(file|image|media|category|portal|template|[a-z]{2,3}):", re.I)
DISAMBIGUATION = re.compile(r"\{\{\s*(disambig|geodis|hndis)", re.I)
INVISIBLE = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^>]*>.*?</ref\s*>|__[A-Z]+__", re.S | re.I
)

FIXED = {"'s": "'s", "mdashb": " — ", "mdash": " — ", "ndash": "–", "spaced ndash": " – "}
FIXED |= {"nbsp": " ", "thinsp": " ", "snd": " – ", "sep": " · ", "'": "'", "' \"": "' \""}
FIRST = frozenset(
    [
        "angbr",
        "blockquote",
        "cquote",
        "ipa",
        "music",
        "nihongo",
        "nobold",
        "nowrap",
        "quote",
        "sc",
        "script/arabic",
        "small",
        "smaller",
        "smallcaps",
        "val",
        "vanchor",
    ]
)
LAST = frozenset({"lang", "rtl-lang", "script", "transl", "transliteration"})
UNITS = {"sqmi": "sq mi", "km2": "km²", "m2": "m²", "m3": "m³", "C": "°C", "F": "°F", "K": "K"}
RANGES = {"to": " to ", "-": "–", "–": "–", "and": " and ", "or": " or ", "x": " × ", "by": " by "}


def read_pages(file: Path) -> Iterator[tuple[str, str]]:
    """Yield title and markup of every article of a bz2-compressed export, in its order.

    Redirects, disambiguation pages and pages outside the article space are left out. Errors of
    `bz2` (OSError, EOFError) and of the XML parser pass through.
    """
    with bz2.open(file) as stream:
        for _, page in ElementTree.iterparse(stream):  # noqa: S314 (checked by its hash)
            if not page.tag.endswith("}page"):
                continue
            text = page.findtext("{*}revision/{*}text") or ""
            article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            if article and not DISAMBIGUATION.search(text):
                yield page.findtext("{*}title") or "", text
            page.clear()


def clean(markup: str) -> str:
    """Return the plain text of one article: paragraphs, headings and list items, one a line."""
    code = mwparserfromhell.parse(INVISIBLE.sub("", markup))
    parts: list[tuple[int, str]] = []  # heading level (0: text) and text
    skipped = 0  # level of the back-matter heading being skipped
    for node in code.nodes:
        if isinstance(node, nodes.Heading):
            title = _tidy(_render(node.title))
            if skipped and node.level > skipped:
                continue
            skipped = node.level if title.lower() in BACK_MATTER else 0
            if not skipped:
                parts.append((node.level, title))
        elif not skipped:
            parts.append((0, _node(node)))
    return "\n\n".join(_without_empty_sections(_joined(parts)))


def _joined(parts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Join neighbouring pieces of text and tidy them; drop those left empty."""
    joined: list[tuple[int, str]] = []
    for level, text in parts:
        if joined and level == 0 and joined[-1][0] == 0:
            joined[-1] = (0, joined[-1][1] + text)
        else:
            joined.append((level, text))
    tidied = ((level, _tidy(text)) for level, text in joined)
    return [(level, text) for level, text in tidied if text]


def _without_empty_sections(parts: list[tuple[int, str]]) -> list[str]:
    """Return the texts without headings that have nothing below them."""
    kept: list[str] = []
    below = 1  # level of the part kept below; the end counts as a heading of the first level
    for level, text in reversed(parts):
        if level == 0 or below == 0 or below > level:
            kept.append(text)
            below = level
    return kept[::-1]


def _render(code: object) -> str:
    return "".join(_node(node) for node in getattr(code, "nodes", ()))


def _node(node: nodes.Node) -> str:
    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.HTMLEntity():
            return str(node.normalize())
        case nodes.Wikilink():
            dropped = DROPPED_LINKS.match(str(node.title))
            return "" if dropped else _render(node.title if node.text is None else node.text)
        case nodes.ExternalLink():
            return _render(node.title)
        case nodes.Tag():
            return _tag(node)
        case nodes.Template():
            return _template(node)
        case _:
            return ""


def _tag(tag: nodes.Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    return "\n" if name == "br" else _render(tag.contents)


def _template(template: nodes.Template) -> str:
    name = str(template.name).strip().lower()
    values = [_render(p.value).strip() for p in template.params if not p.showkey]
    if name in FIXED:
        return FIXED[name]
    if name in ("convert", "cvt"):
        return _quantity(values)
    if not values:
        return ""
    if name in FIRST or name.startswith("lang-"):
        return values[0]
    if name in LAST:
        return values[-1]
    return {"chem": "".join(values), "frac": "/".join(values), "as of": f"As of {values[0]}"}.get(
        name, ""
    )


def _quantity(values: list[str]) -> str:
    """Render ``convert|5|to|10|km|mi`` as ``5 to 10 km``."""
    text = ""
    for value in values:
        if value in RANGES:
            text += RANGES[value]
        elif re.match(r"[\d.,+−/-]+$", value):
            text += value
        else:
            return f"{text} {UNITS.get(value, value)}"
    return text


def _tidy(text: str) -> str:
    text = re.sub(r"^(\{\||\||!).*$", "", text, flags=re.M)  # rows of a table never closed
    text = re.sub(r"\[\[(?:file|image):.*", "", text, flags=re.I)  # links never closed
    text = re.sub(r"\[\[|\]\]|\{\{|\}\}", "", text)
    text = re.sub(r"'{2,}s\b", "'s", text)
    text = re.sub(r"'{2,}", "", text)  # italics never closed
    text = re.sub(r"[ \t\xa0\u2009]+", " ", text)
    text = re.sub(r"([(\[]) ?(?:[;,:/] ?)+", r"\1", text)  # what a removed pronunciation leaves
    text = re.sub(r" ?(?:[;,:] ?)+([)\]])", r"\1", text)
    text = re.sub(r" ?[(\[] ?[)\]]", "", text)
    text = re.sub(r" +([,.;:!?)\]])(?!\d)", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    lines = (line.strip() for line in text.split("\n"))
    text = "\n".join(line if re.search(r"\w", line) else "" for line in lines)
    return re.sub(r"\n{2,}", "\n\n", text).strip()
