"""What `mkdocs build` does beside rendering ``docs/``: pages made from the code, and checked links.

- ``commands.md`` is made from the parser, ``api.md``, ``plotting.md`` and ``rooms.md`` name what
  mkdocstrings reads the docstrings of;
- notebooks become pages, with the gallery's figures below the cells that draw them; figures and the
  files of the root are brought in;
- formulas become MathML, so that nothing is fetched from elsewhere;
- every link, anchor and picture of the built site is checked, and addresses outside are listed.
"""

import argparse
import html
import json
import logging
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
LOG = logging.getLogger("mkdocs.hooks.entangle")

BROUGHT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages that are files of the root."""

SHOWN = {"ablation": "ablation_perplexity_ratio"}
"""Pictures that are not called as the function that draws them."""

ROOMS = (
    "results.base", "results.scores", "results.ablation", "results.comparison",
    "results.decomposition", "results.allocation", "results.expansion", "stats.wasserstein",
    "stats.sketch", "stats.mapping_difficulty", "stats.gram", "stats.intervals",
    "pruning.methods", "pruning.solver", "pruning.masks", "recording.recorder",
    "experiments.selection", "experiments.interventions", "experiments.predictors",
    "experiments.outliers", "experts.router", "experts.clusters", "allocation.rules",
    "allocation.export", "errors",
)  # fmt: skip
"""Files whose public names the page of rooms explains."""


def commands() -> str:
    """Return the page of the command line, made from the parser."""
    from entangle.cli.main import build_parser

    parser = build_parser()
    found = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    lines = [
        "# Command line",
        "Made from the parser: what `entangle COMMAND --help` prints.\n",
        *_options(parser),
    ]
    for name, command in next(found).choices.items():
        lines += [f"\n## entangle {name}\n", _plain(command.description or ""), ""]
        lines += ["```text", _usage(command), "```\n", *_options(command)]
        lines += [_plain(command.epilog)] if command.epilog else []
    return "\n".join(lines) + "\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    return parser.format_usage().removeprefix("usage: ").rstrip()


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for group in parser._action_groups:
        rows = [one for one in group._group_actions if one.help is not argparse.SUPPRESS]
        rows = [one for one in rows if not isinstance(one, argparse._SubParsersAction)]
        if not rows:
            continue
        titled = group.title not in ("options", "positional arguments")
        yield f"**{group.title}**\n\n| | |\n|---|---|" if titled else "\n| | |\n|---|---|"
        for one in rows:
            yield f"| {_spelled(one)} | {_plain(_said(one, parser))} |"
        yield ""


def _spelled(action: argparse.Action) -> str:
    value = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    value = " ".join(value) if isinstance(value, tuple) else value
    if not action.option_strings:
        return f"`{value}`"
    names = ", ".join(action.option_strings)
    return f"`{names} {value}`" if value and action.nargs != 0 else f"`{names}`"


def _said(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    values = {key: one for key, one in vars(action).items() if one is not argparse.SUPPRESS}
    return (action.help or "") % (values | {"prog": parser.prog})


def _plain(text: str) -> str:
    """Return text as one line of Markdown that shows it as it is."""
    escaped = re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;")


def reference() -> dict[str, str]:
    """Return the pages that name what is read from docstrings, by their file."""
    import entangle
    from entangle import plotting

    homes = entangle._HOMES
    entrances = [f"{homes[name]}.{name}" for name in entangle.__all__ if name in homes]
    drawn = [f"entangle.plotting.{plotting._HOME[name]}.{name}" for name in plotting.__all__]
    heads = {
        "api.md": ("Python: entrances", "`import entangle` has these names.", entrances),
        "plotting.md": (
            "Python: figures",
            "`entangle.plotting`: `plot_*` draws one panel on axes, `figure_*` a whole figure.",
            drawn,
        ),
        "rooms.md": (
            "Python: rooms", "What lies behind the [entrances](api.md), by file.",
            [_without(f"entangle.{name}", homes) for name in ROOMS],
        ),
    }  # fmt: skip
    return {
        page: "\n".join([f"# {title}\n", head, "", *(f"::: {name}\n" for name in names)])
        for page, (title, head, names) in heads.items()
    }


def _without(module: str, homes: Mapping[str, str]) -> str:
    """Name a module, and leave out the names that another page explains."""
    known = [name for name, home in homes.items() if home == module]
    filters = json.dumps(["!^_", *(f"!^{name}$" for name in known)])
    return f"{module}\n    options: {{filters: {filters}}}"


def alternatives() -> dict[str, str]:
    """Return what the gallery's pictures show, in words, by the picture's name."""
    text = (ROOT / "docs" / "gallery.md").read_text("utf-8")
    found = re.findall(r"!\[([^\]]+)\]\(\.\./figures/(\w+)\.png\)", text)
    return {name: words for words, name in found}


def notebook(path: Path, words: Mapping[str, str]) -> str:
    """Return a notebook as Markdown, the gallery's picture below each cell that draws one."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        known = [name for name in _drawn(source) if name in words]
        parts += [f"![{words[name]}](../figures/{name}.png)" for name in known]
    note = (
        f"\n\n*Pictures are those of the [gallery](../gallery.md), drawn from more text than the "
        f"cells above take. The notebook itself is `notebooks/{path.name}`.*"
    )
    return "\n\n".join(parts) + note


def _drawn(source: str) -> Iterator[str]:
    for name in re.findall(r"^(figure_\w+|result\.plot|entangle\.explore)\(", source, re.MULTILINE):
        short = name.rpartition(".")[2].removeprefix("figure_").replace("plot", "ablation")
        yield SHOWN.get(short, short.replace("explore", "explorer"))


def mathml(content: str) -> str:
    """Return HTML in which formulas that arithmatex has marked are MathML."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return str(convert(html.unescape(match[2]), display=display))

    marked = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(marked, formula, content, flags=re.DOTALL)


class _Page(HTMLParser):
    """Gathers a page's anchors, links, pictures, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.unworded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        self.links += [given[key] for key in ("href", "src") if key in given]
        self.loaded += [given["src"]] if "src" in given else []
        self.loaded += [given["href"]] if given.get("rel") in ("stylesheet", "preconnect") else []
        if tag == "img" and not given.get("alt"):
            self.unworded.append(given.get("src", ""))


def broken(site: Path) -> tuple[list[str], list[str]]:
    """Check a built site.

    Parameters
    ----------
    site
        Folder of the HTML pages.

    Returns
    -------
    tuple of list of str
        What is wrong, one line each (links to files or anchors that are not there, pictures without
        words, what a page would fetch from elsewhere); and the addresses outside of the site.
    """
    files = sorted(site.rglob("*.html"))
    pages = {path: _Page(path.read_text("utf-8")) for path in files if path.name != "404.html"}
    wrong, outside = [], set()
    for path, page in pages.items():
        shown = path.relative_to(site)
        wrong += [f"{shown}: picture {one!r} has no words" for one in page.unworded]
        fetched = (one for one in page.loaded if urlsplit(one).netloc)
        wrong += [f"{shown}: {one!r} is fetched from elsewhere" for one in fetched]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside |= {link} if parts.scheme in ("http", "https") else set()
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                wrong.append(f"{shown}: {link!r} leads nowhere")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors | {""}:
                wrong.append(f"{shown}: {link!r} has no such anchor")
    return wrong, sorted(outside)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that are made or brought in."""
    from mkdocs.structure.files import File

    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    words = alternatives()
    for path in sorted((ROOT / "figures").glob("*.png")):
        add(f"figures/{path.name}", path.read_bytes())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        add(f"notebooks/{path.stem}.md", notebook(path, words))
    for name, source in BROUGHT.items():
        add(name, (ROOT / source).read_text("utf-8"))
    for name, content in {"commands.md": commands(), **reference()}.items():
        add(name, content)
    return files


def on_page_markdown(markdown: str, page: Any, **_others: Any) -> str:
    """Lead links that hold in the repository to the same places of the site."""
    if page.file.src_uri.startswith("notebooks/"):
        return markdown
    led = markdown.replace("](../figures/", "](figures/").replace("](docs/", "](")
    for name, source in BROUGHT.items():
        led = re.sub(rf"\]\((?:\.\./)?{re.escape(source)}\)", f"]({name})", led)
    return re.sub(r"\]\(\.\./(notebooks/\w+)\.ipynb\)", r"](\1.md)", led)


def on_page_content(html: str, **_others: Any) -> str:
    """Write formulas as MathML."""
    return mathml(html)


def on_post_build(config: Any) -> None:
    """Warn of what is wrong, which ends a strict build, and list the addresses outside."""
    wrong, outside = broken(Path(config.site_dir).resolve())
    for line in wrong:
        LOG.warning(line)
    Path(config.site_dir, "external_links.txt").write_text("\n".join(outside) + "\n", "utf-8")
    LOG.info("%d addresses outside the site, not fetched: external_links.txt", len(outside))
