"""Turn HTML pages, reStructuredText and dictd files into plain text paragraphs.

Pure functions of strings; files are read in `sources`.
"""

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

_BLOCK_TAGS = "p div pre table ul ol dl h1 h2 h3 h4 h5 h6 section article blockquote hr body"
_LINE_TAGS = "li tr dt dd br"
_VOID_TAGS = "br hr img input link meta col area base embed source track wbr"
_SKIPPED_TAGS = "head script style nav button footer form svg noscript"
_SKIPPED_MARKS = (
    "navheader navfooter headerlink sphinxsidebar related footer page-header path toplang "
    "bottomlang quickview up comments_section nosearch sidebar menu-bar searchbox buttons "
    "fancy_toc nav-wrapper id_link desktoponly mobileonly tagline top"
)
_MINIMUM_UNIQUE_CHARS = 40
_MARKED_SPACES = {ord(" "): "\ue000", ord("\t"): "\ue001"}
_UNMARKED_SPACES = {ord(mark): chr(space) for space, mark in _MARKED_SPACES.items()}


class _TextExtractor(HTMLParser):
    """Collects the visible text of one page; knows nothing about a particular site."""

    def __init__(self, layout: bool) -> None:
        super().__init__(convert_charrefs=True)
        self._layout = layout
        self.parts: list[str] = []
        self._skipped_depth = 0
        self._preformatted_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append(_separator(tag))
        if tag in _VOID_TAGS.split():
            return
        if self._skipped_depth or tag in _SKIPPED_TAGS.split() or _is_furniture(attrs):
            self._skipped_depth += 1
        elif tag == "pre":
            self._preformatted_depth += 1

    def handle_startendtag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append(_separator(tag))

    def handle_endtag(self, tag: str) -> None:
        self.parts.append(_separator(tag))
        if tag in _VOID_TAGS.split():
            return
        if self._skipped_depth:
            self._skipped_depth -= 1
        elif tag == "pre" and self._preformatted_depth:
            self._preformatted_depth -= 1

    def handle_data(self, data: str) -> None:
        if not self._skipped_depth:
            self.parts.append(self._kept(data))

    def _kept(self, data: str) -> str:
        if not self._preformatted_depth:
            return re.sub(r"\s+", " ", data)
        return data.translate(_MARKED_SPACES) if self._layout else data


def html_text(page: str, layout: bool = False) -> str:
    """Return the visible text of a page: blocks between blank lines, menus left out.

    With `layout`, preformatted text keeps its spaces.
    """
    match = re.search(r"(?is)<main\b.*?</main>", page)
    extractor = _TextExtractor(layout)
    extractor.feed(_with_closed_items(match.group(0) if match else page))
    extractor.close()
    text = plain_text("".join(extractor.parts))
    return laid_out_text(text.translate(_UNMARKED_SPACES)) if layout else text


def laid_out_text(text: str) -> str:
    """Return `text` with its indentation and inner spaces, less blanks at line ends and repeated blank lines."""
    text = text.replace("\r", "").replace("\u00a0", " ").replace("\u00b6", "")
    text = re.sub(r"[ \t\f]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n").rstrip()


def plain_text(text: str) -> str:
    """Reduce `text` to single spaces and single blank lines.

    Indentation goes too: at this model size it buys cheap predictions. `laid_out_text` keeps it.
    """
    text = text.replace("\r", "").replace("\u00a0", " ").replace("\u00b6", "")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def dictd_entries(text: str) -> Iterator[str]:
    """Split a dictd file whose headwords start at the margin and whose bodies are indented."""
    for entry in re.split(r"\n(?=\S)", text):
        if entry.strip() and not entry.startswith("00-database"):
            yield entry.strip("\n")


def wordnet_entries(text: str) -> Iterator[str]:
    """Split WordNet's dictd file into entries, every gloss only once.

    The dictd file repeats a synset's gloss under each synonym; repeats would carry training
    text into the held-out documents.
    """
    seen: set[str] = set()
    for entry in dictd_entries(text):
        headword, *body = entry.splitlines()
        kept = []
        for sense in _wordnet_senses(body):
            gloss = re.sub(r"^[a-z]* ?\d*: ?", "", sense).split(" [", 1)[0]
            if gloss not in seen:
                seen.add(gloss)
                kept.append(sense)
        if kept:
            yield "\n".join([headword.strip(), *kept])


def grouped(entries: Iterable[str], size_chars: int) -> Iterator[str]:
    """Join consecutive entries by blank lines into documents of about `size_chars`."""
    group: list[str] = []
    total = 0
    for entry in entries:
        group.append(entry.strip("\n"))
        total += len(entry)
        if total >= size_chars:
            yield "\n\n".join(group)
            group, total = [], 0
    if group:
        yield "\n\n".join(group)


def without_repeats(text: str, seen: set[str]) -> str:
    """Drop the longer paragraphs of `text` that are in `seen`; add the others to `seen`."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= _MINIMUM_UNIQUE_CHARS:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


def _separator(tag: str) -> str:
    if tag in _BLOCK_TAGS.split():
        return "\n\n"
    if tag in _LINE_TAGS.split():
        return "\n"
    return " " if tag in ("td", "th") else ""


def _is_furniture(attrs: list[tuple[str, str | None]]) -> bool:
    marks = " ".join(value or "" for name, value in attrs if name in ("class", "id"))
    return not set(_SKIPPED_MARKS.split()).isdisjoint(marks.split())


def _with_closed_items(page: str) -> str:
    """Drop the end tags HTML lets authors omit, so that nesting depth stays countable."""
    return re.sub(r"(?i)</?(?:p|li|dt|dd|tr|td|th|tbody|thead|option)\b[^>]*>", _as_void, page)


def _as_void(match: re.Match[str]) -> str:
    tag = re.sub(r"[</>]", " ", match.group(0)).split()[0].lower()
    return {"p": "<hr>", "td": " ", "th": " "}.get(tag, "<br>")


def _wordnet_senses(lines: list[str]) -> list[str]:
    """Return the senses of one entry, each unwrapped to one line such as "n 1: a neighborhood"."""
    senses: list[str] = []
    for line in (raw.strip() for raw in lines):
        if re.match(r"(?:n|v|adj|adv)(?: \d+)?: |\d+: |(?:n|v|adj|adv) \d", line) or not senses:
            senses.append(line)
        else:
            senses[-1] += " " + line
    return senses
