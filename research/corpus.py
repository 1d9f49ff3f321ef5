"""Text that a small language model is trained on, made of files that anybody can have.

``python -m research.corpus --out corpus.jsonl.xz --packages FOLDER --texts FILE…`` reads the
train split of the demo articles, plain text files (WikiText-2's validation file; never its test
file, which is for evaluation), and unpacked Debian packages (`PACKAGES`): ``apt-get download``
them and ``dpkg-deb -x`` each into ``FOLDER/NAME``. What is no prose is dropped by one rule.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGES = (
    "anarchism",
    "debian-handbook",
    "debian-reference-en",
    "developers-reference",
    "dict-foldoc",
    "dict-gcide",
    "dict-jargon",
    "dict-wn",
    "git-doc",
    "libreoffice-help-en-us",
    "linux-doc-6.1",
    "perl-doc",
    "python3.11-doc",
    "vim-doc",
)
"""Debian 12 packages of English text."""

ENDINGS = (".html", ".txt", ".rst", ".pod", ".dict", ".dz", ".gz")
FOREIGN = re.compile(
    r"/translations/|/(?!en)[a-z]{2}(-[A-Z]{2})/|copyright|[Cc]hangelog|/_sources/"
)
PER_DOCUMENT = 60
"""Paragraphs of a document, at most; files of more are cut."""
HELD_OUT = 50
"""Every so many-th document is for validation, in each source."""
BREAKS = frozenset({"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "br", "td", "dt", "dd", "tr"})
SILENT = frozenset({"script", "style", "pre", "nav", "head"})


class Prose(html.parser.HTMLParser):
    """The text of a page, a blank line between its blocks, without code and navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        """Begin a block, or silence."""
        self.silent += tag in SILENT
        if tag in BREAKS:
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        """End a block, or silence."""
        self.silent = max(0, self.silent - (tag in SILENT))
        if tag in BREAKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Keep what is read aloud."""
        if not self.silent:
            self.pieces.append(data)


def is_prose(paragraph: str) -> bool:
    """Tell whether a paragraph has 8 words or more and 80 % letters or blanks, 97 % ASCII."""
    if len(paragraph.split()) < 8:
        return False
    plain = sum(one.isalpha() or one == " " for one in paragraph)
    ascii_only = sum(one.isascii() for one in paragraph)
    return plain >= 0.8 * len(paragraph) and ascii_only >= 0.97 * len(paragraph)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of prose, their lines joined."""
    for block in re.split(r"\n\s*\n", text):
        joined = re.sub(r"[{}]|\[1913 Webster\]|\[(?:syn|ant):.*?\]", "", block)
        joined = re.sub(r"\s+", " ", joined).strip()
        if is_prose(joined):
            yield joined


def read_page(file: Path) -> str:
    """Return the text of a file, unpacked, and of a page without its marks."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix in (".gz", ".dz") else file.read_bytes()
    text = raw.decode("utf-8", errors="ignore")
    if ".html" not in file.name:
        return text
    page = Prose()
    page.feed(text)
    return "".join(page.pieces)


def package_documents(folder: Path, seen: set[bytes]) -> Iterator[str]:
    """Yield the documents of one unpacked package, no paragraph twice."""
    for file in sorted(folder.rglob("*")):
        readable = file.is_file() and not file.is_symlink() and file.suffix in ENDINGS
        if not readable or FOREIGN.search(str(file.relative_to(folder))):
            continue
        fresh = []
        for paragraph in paragraphs(read_page(file)):
            digest = hashlib.sha256(paragraph.encode()).digest()[:8]
            if digest not in seen:
                seen.add(digest)
                fresh.append(paragraph)
        yield from cut(fresh)


def cut(paragraphs: Iterable[str]) -> Iterator[str]:
    """Yield documents of `PER_DOCUMENT` paragraphs."""
    kept = list(paragraphs)
    for start in range(0, len(kept), PER_DOCUMENT):
        yield "\n\n".join(kept[start : start + PER_DOCUMENT])


def file_documents(file: Path) -> Iterator[str]:
    """Yield a plain text file's lines as documents of `PER_DOCUMENT` lines."""
    yield from cut(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())


def demo_documents() -> Iterator[str]:
    """Yield the demo articles' train split; scores are usually computed on it."""
    from entangle.texts.documents import load_texts

    for document in load_texts("demo", split="train"):
        yield "".join(document)


def collect(packages: Path | None, texts: Iterable[Path]) -> Iterator[dict[str, str]]:
    """Yield every document with its source and its part: ``train``, or each 50th ``valid``."""
    seen: set[bytes] = set()
    sources: list[tuple[str, Iterable[str]]] = [("demo", demo_documents())]
    sources += [(file.name, file_documents(file)) for file in texts]
    if packages is not None:
        sources += [(name, package_documents(packages / name, seen)) for name in PACKAGES]
    for source, documents in sources:
        for number, text in enumerate(documents):
            part = "valid" if number % HELD_OUT == HELD_OUT - 1 else "train"
            yield {"source": source, "part": part, "text": text}


def write(documents: Iterable[dict[str, str]], out: Path) -> dict[str, int]:
    """Write documents as JSON lines, packed by xz; return the characters of each source."""
    sizes: dict[str, int] = {}
    with lzma.open(out, "wt", encoding="utf-8", preset=6) as lines:
        for one in documents:
            lines.write(json.dumps(one, ensure_ascii=False) + "\n")
            sizes[one["source"]] = sizes.get(one["source"], 0) + len(one["text"])
    return sizes


def main() -> None:
    """Write the corpus that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file to write, *.jsonl.xz")
    parser.add_argument("--packages", type=Path, help="a folder of unpacked Debian packages")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="plain text files")
    given = parser.parse_args()
    if given.packages is not None:
        missing = [name for name in PACKAGES if not (given.packages / name).is_dir()]
        if missing:
            parser.error(f"not in {given.packages}: {', '.join(missing)}; unpack them there")
    for source, size in write(collect(given.packages, given.texts), given.out).items():
        print(f"{source:24} {size / 1e6:8.2f} million characters")
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
