"""Write a long English text, the Debian Administrator's Handbook, to measure language models on.

    python tools/make_prose.py prose.txt                  # fetches the package with apt-get, 35 MB
    python tools/make_prose.py prose.txt --deb FILE.deb
    python tools/make_prose.py tools/prose/handbook.txt --excerpt   # the text of make demo-real

The Debian package debian-handbook (Raphael Hertzog, Roland Mas; GPL-2+ or CC-BY-SA-3.0) holds the
book as HTML. Chapters keep the book's order, each under a line "= Title =", so that the windows of
a chapter form a group. Only paragraphs are kept: no listings, tables, section titles or contents.
The excerpt is the beginning of each of the first 8 chapters that are long enough for two windows of
1536 tokens: whoever runs it need not have Debian's packages.
The text depends on the package alone. It is a test set: tune nothing on it.

Prints one line of JSON: package, version, licence, hashes, size.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from bisect import bisect_left
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path

PACKAGE, LICENCE = "debian-handbook", "GPL-2.0+ or CC-BY-SA-3.0"
FOLDER = "./usr/share/doc/debian-handbook/html/en-US/"
SHORTEST = 60  # characters of a paragraph: what is below is a label or a menu item
EXCERPT_CHAPTERS, EXCERPT_CHARACTERS = 8, 14_600  # 3072 tokens of SmolLM2 are 14,000 to 14,600
BLOCKS = ("div", "p", "ul", "ol", "dl", "li", "dt", "dd", "pre", "table", "h1", "h2", "h3", "h4")
NUMBER = re.compile(r"^(Chapter|Appendix)\s\w+\.\s")


@dataclass
class Page(HTMLParser):
    """One page: its paragraphs, its title, the page after it and the one above it."""

    html: str
    paragraphs: list[str] = field(default_factory=list)
    title: str = ""
    links: dict[str, str] = field(default_factory=dict)
    open: list[tuple[str, str]] = field(default_factory=list)  # blocks: (tag, class)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("next", "up"):
            self.links[given["rel"] or ""] = given["href"] or ""
        if tag in BLOCKS:
            self.end_paragraph()
            self.open.append((tag, given.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.end_paragraph()
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def end_paragraph(self) -> None:
        text = " ".join("".join(self.words).split())
        self.words.clear()
        kinds = [kind for _, kind in self.open]
        listing = any(tag in ("pre", "table") for tag, _ in self.open)
        if "title" in kinds and not self.title:
            self.title = NUMBER.sub("", text)
        elif "para" in kinds and not listing and len(text) >= SHORTEST:
            self.paragraphs.append(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--deb", type=Path, help="the package, if it is there already")
    parser.add_argument("--excerpt", action="store_true", help="of 8 chapters, two windows each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        deb = arguments.deb or fetch(Path(folder))
        chapters = read(pages_of(deb))
        if arguments.excerpt:
            chapters = excerpt(chapters)
        text = "\n\n".join(f"= {title} =\n\n" + "\n\n".join(parts) for title, parts in chapters)
        arguments.destination.write_text(text + "\n", "utf-8")
        found = {
            "package": PACKAGE,
            "version": run("dpkg-deb", "--field", str(deb), "Version").decode().strip(),
            "licence": LICENCE,
            "deb_sha256": hashlib.sha256(deb.read_bytes()).hexdigest(),
            "text_sha256": hashlib.sha256(arguments.destination.read_bytes()).hexdigest(),
            "characters": len(text) + 1,
            "chapters": len(chapters),
        }
    print(json.dumps(found))


def fetch(folder: Path) -> Path:
    run("apt-get", "-q", "download", PACKAGE, cwd=folder)
    (deb,) = folder.glob("*.deb")
    return deb


def pages_of(deb: Path) -> dict[str, str]:
    """HTML by file name."""
    files = io.BytesIO(run("dpkg-deb", "--fsys-tarfile", str(deb)))
    with tarfile.open(fileobj=files) as archive:
        return {
            member.name.removeprefix(FOLDER): archive.extractfile(member).read().decode("utf-8")
            for member in archive
            if member.name.startswith(FOLDER) and member.name.endswith(".html")
        }


def read(pages: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(title, paragraphs) of the chapters that have any, in the order of the book."""
    chapters: list[tuple[str, list[str]]] = []
    name = Page(pages["index.html"]).links["next"]
    while name:
        page = Page(pages[name])
        if page.links["up"] == "index.html":
            chapters.append((page.title, []))
        chapters[-1][1].extend(page.paragraphs)
        name = page.links.get("next", "")
    return [(title, paragraphs) for title, paragraphs in chapters if paragraphs]


def excerpt(chapters: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """The paragraphs at the beginning of the first long chapters, as many as the length takes."""
    found = []
    for title, paragraphs in chapters:
        ends = list(accumulate(len(paragraph) for paragraph in paragraphs))
        if ends[-1] >= EXCERPT_CHARACTERS:
            found.append((title, paragraphs[: bisect_left(ends, EXCERPT_CHARACTERS) + 1]))
    return found[:EXCERPT_CHAPTERS]


def run(*command: str, cwd: Path | None = None) -> bytes:
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    main()
