"""Make the general (A) and shifted (B) texts and their splits from Debian packages.

`python -m examples.small_moe.texts --cache DIR --out DIR` writes `general_train.jsonl` (the
training text, not shipped) and the six files of `model_runner/small_moe/data`. Same packages,
same files: every draw comes from one seed. `--layout` keeps indentation and inner spaces: the text
of the models of three families (`train --family`); the shipped model's text has none.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterable
from pathlib import Path

from examples.small_moe.cleaning import without_repeats
from examples.small_moe.debian_packages import archive_version
from examples.small_moe.sources import (
    DOCUMENT_CHARS,
    GENERAL_SOURCES,
    Document,
    bible_chapters,
    general_documents,
)

_LOG = logging.getLogger(__name__)

SPLIT_SEED = 20240501
SOURCE_LIMIT_CHARS = 8_000_000
HELD_OUT_CHARS = 800_000
REFERENCE_CHARS = 1_000_000
DEV_CHAPTERS = 80
TEST_CHAPTERS = 160
_MINIMUM_CHUNK_CHARS = 200

Splits = dict[str, list[Document]]


def chunked(document: Document, size_chars: int = DOCUMENT_CHARS) -> list[Document]:
    """Cut `document` between paragraphs into pieces of about `size_chars`: `ID:0`, `ID:1`..."""
    pieces: list[str] = []
    current = ""
    for paragraph in document.text.split("\n\n"):
        current = f"{current}\n\n{paragraph}" if current else paragraph
        if len(current) >= size_chars:
            pieces.append(current)
            current = ""
    pieces.append(current)
    kept = [piece for piece in pieces if len(piece) >= _MINIMUM_CHUNK_CHARS]
    return [Document(f"{document.id}:{number}", piece) for number, piece in enumerate(kept)]


def collected_sources(
    cache: Path, limit_chars: int, layout: bool = False
) -> dict[str, list[Document]]:
    """Return shuffled documents per package, at most `limit_chars` each, no paragraph twice."""
    rng = random.Random(SPLIT_SEED)
    seen: set[str] = set()
    sources = {}
    for source in GENERAL_SOURCES:
        documents = [
            Document(document.id, without_repeats(document.text, seen))
            for document in general_documents(source, cache, layout)
        ]
        rng.shuffle(documents)
        sources[source.package] = _first_chars(documents, limit_chars)
    return sources


def general_splits(sources: dict[str, list[Document]]) -> Splits:
    """Split into train, dev and test chunks; whole documents held out, in proportion to size.

    A document goes to test or dev while it fits what is left of the source's share, so the very
    largest documents are always trained on. `general_reference` is a part of the training text.
    """
    total = sum(_chars(documents) for documents in sources.values())
    splits: Splits = {"general_test": [], "general_dev": [], "general_train": []}
    for documents in sources.values():
        share = HELD_OUT_CHARS * _chars(documents) / total
        rest = documents
        for name in ("general_test", "general_dev"):
            taken, rest = _taken(rest, share)
            splits[name] += taken
        splits["general_train"] += rest
    rng = random.Random(SPLIT_SEED + 1)
    chunks = {name: [c for d in docs for c in chunked(d)] for name, docs in splits.items()}
    for pieces in chunks.values():
        rng.shuffle(pieces)
    chunks["general_reference"] = _first_chars(chunks["general_train"], REFERENCE_CHARS)
    return chunks


def shifted_splits(chapters: list[Document]) -> Splits:
    """Split into reference, dev and test chapters without regard to the book they are in."""
    rng = random.Random(SPLIT_SEED + 2)
    shuffled = rng.sample(chapters, len(chapters))
    dev_end = TEST_CHAPTERS + DEV_CHAPTERS
    return {
        "shifted_test": shuffled[:TEST_CHAPTERS],
        "shifted_dev": shuffled[TEST_CHAPTERS:dev_end],
        "shifted_reference": shuffled[dev_end:],
    }


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """Write one `{"text": ..., "id": ...}` object per line, UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            record = {"text": document.text, "id": document.id}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Document]:
    """Return the documents of a file that `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def main(arguments: list[str] | None = None) -> None:
    """Write all splits below `--out` and log their sizes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Make the general and shifted texts.")
    parser.add_argument("--cache", type=Path, required=True, help="downloaded packages go here")
    parser.add_argument("--out", type=Path, required=True, help="JSONL files go here")
    parser.add_argument("--layout", action="store_true", help="keep indentation and inner spaces")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.cache.resolve()
    sources = collected_sources(cache, SOURCE_LIMIT_CHARS, options.layout)
    for package, documents in sources.items():
        log_size(f"{package} {archive_version(package, cache)}", documents)
    splits = general_splits(sources) | shifted_splits(bible_chapters(cache))
    for name, documents in splits.items():
        write_jsonl(documents, options.out / f"{name}.jsonl")
        log_size(name, documents)


def log_size(name: str, documents: list[Document]) -> None:
    """Log how many documents and characters a split has."""
    _LOG.info("%s: %d documents, %d chars", name, len(documents), _chars(documents))


def _chars(documents: Iterable[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _first_chars(documents: list[Document], limit_chars: int) -> list[Document]:
    kept: list[Document] = []
    total = 0
    for document in documents:
        if total >= limit_chars:
            break
        kept.append(document)
        total += len(document.text)
    return kept


def _taken(documents: list[Document], share_chars: float) -> tuple[list[Document], list[Document]]:
    """Documents that fit a share of `share_chars`, and the others in their order."""
    taken: list[Document] = []
    rest: list[Document] = []
    left = share_chars
    for document in documents:
        if len(document.text) <= left:
            taken.append(document)
            left -= len(document.text)
        else:
            rest.append(document)
    return taken, rest


if __name__ == "__main__":
    main()
