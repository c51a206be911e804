"""Make the texts of domains that no model here was trained on, split into reference, dev and test.

`python -m examples.small_moe.domains --cache DIR --out DIR` writes `<domain>_reference.jsonl`,
`<domain>_dev.jsonl` and `<domain>_test.jsonl` for the Bible, drama, manual pages, source code, novels, French, German,
Spanish, quotations, documentation of the kernel and of Perl, and `general_reference.jsonl` of the training text,
`general_dev.jsonl` and `general_test.jsonl` held out of it.
Lines are `{"text": ..., "id": ...}`, one per document; documents are whole in one split. Same packages, same files.
"""

import argparse
import logging
import random
from pathlib import Path

from examples.small_moe.domain_sources import DOMAINS
from examples.small_moe.sources import Document, bible_chapters
from examples.small_moe.texts import (
    SOURCE_LIMIT_CHARS,
    SPLIT_SEED,
    Splits,
    collected_sources,
    general_splits,
    log_size,
    shifted_splits,
    write_jsonl,
)

REFERENCE_CHARS = 1_500_000
TEST_CHARS = 250_000
DEV_CHARS = 120_000


def domain_splits(name: str, documents: list[Document]) -> Splits:
    """Split one domain by work (see `Domain`): test, then dev, then at most `REFERENCE_CHARS` of reference.

    At most a sixth of the works goes to dev, and as many to test; the documents of a split are shuffled.
    """
    works: dict[str, list[Document]] = {}
    for document in documents:
        works.setdefault(document.id.partition("#")[0], []).append(document)
    rng = random.Random(f"{SPLIT_SEED}/{name}")
    left = rng.sample(sorted(works), len(works))
    splits: Splits = {}
    for split, limit in (("test", TEST_CHARS), ("dev", DEV_CHARS), ("reference", REFERENCE_CHARS)):
        most = len(left) if split == "reference" else max(1, len(works) // 6)
        taken: list[Document] = []
        while left and most and sum(len(document.text) for document in taken) < limit:
            taken += works[left.pop()]
            most -= 1
        splits[f"{name}_{split}"] = rng.sample(taken, len(taken))
    return splits


def main(arguments: list[str] | None = None) -> None:
    """Write all splits below `--out` and log their sizes."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Make the texts of unseen domains.")
    parser.add_argument("--cache", type=Path, required=True, help="downloaded packages go here")
    parser.add_argument("--out", type=Path, required=True, help="JSONL files go here")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.cache.resolve()
    for domain in DOMAINS:
        _write(domain_splits(domain.name, domain.documents(cache)), options.out)
    bible = shifted_splits(bible_chapters(cache))
    _write({name.replace("shifted", "bible"): split for name, split in bible.items()}, options.out)
    general = general_splits(collected_sources(cache, SOURCE_LIMIT_CHARS, layout=True))
    _write({name: general[name] for name in general if name != "general_train"}, options.out)


def _write(splits: Splits, out: Path) -> None:
    for name, documents in splits.items():
        write_jsonl(documents, out / f"{name}.jsonl")
        log_size(name, documents)


if __name__ == "__main__":
    main()
