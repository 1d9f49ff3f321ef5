"""The README and the pages of ``docs/`` as what they let a reader run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LOGS = {"LOG.md", "INTERFACE.md"}
_WRITTEN = (path for path in (ROOT / "docs").glob("*.md") if path.name not in LOGS)
PAGES = [ROOT / "README.md", *sorted(_WRITTEN)]
_FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return language and text of the blocks that a page shows, in order."""
    found = _FENCE.findall(page.read_text("utf-8"))
    return [(language, code) for language, code in found if language in languages]


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a block, lines that a backslash ends joined."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words[: words.index(">")] if ">" in words else words


def with_settings(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables that are set for one command (``NAME=value entangle …``), and it."""
    command = words.index("entangle")
    return dict(word.split("=", 1) for word in words[:command]), words[command:]
