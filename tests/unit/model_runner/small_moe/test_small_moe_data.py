"""The shipped splits: disjoint, well-formed, small enough, and covered by the notice."""

import json
from itertools import combinations

import numpy as np
import pytest

from examples.small_moe.figures import repeated_ngrams
from examples.small_moe.sources import GENERAL_SOURCES
from examples.small_moe.texts import DEV_CHAPTERS, TEST_CHAPTERS, read_jsonl
from model_runner import small_moe
from model_runner.small_moe import DATA_DIR, data_file

DOMAINS = ("general", "shifted")
SPLITS = ("reference", "dev", "test")
EVERY_SPLIT = [(domain, split) for domain in DOMAINS for split in SPLITS]


def test_public_names_exist():
    assert sorted(small_moe.__all__) == ["DATA_DIR", "MODEL_DIR", "data_file"]
    assert all(hasattr(small_moe, name) for name in small_moe.__all__)


@pytest.mark.parametrize(("domain", "split"), EVERY_SPLIT)
def test_each_line_is_a_document_with_its_own_id(domain, split):
    with data_file(domain, split).open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert all(record.keys() == {"text", "id"} for record in records)
    assert all(record["text"].strip() == record["text"] != "" for record in records)
    assert len({record["id"] for record in records}) == len(records) > 0


@pytest.mark.parametrize("domain", DOMAINS)
def test_splits_of_a_domain_share_no_document(domain):
    texts = {split: {d.text for d in read_jsonl(data_file(domain, split))} for split in SPLITS}
    for first, second in combinations(SPLITS, 2):
        assert not texts[first] & texts[second]


def test_held_out_general_pages_are_held_out_whole():
    pages = {
        split: {d.id.rsplit(":", 1)[0] for d in read_jsonl(data_file("general", split))}
        for split in SPLITS
    }
    for first, second in combinations(SPLITS, 2):
        assert not pages[first] & pages[second]


def test_general_splits_share_no_long_paragraph():
    paragraphs = {
        split: {
            paragraph
            for document in read_jsonl(data_file("general", split))
            for paragraph in document.text.split("\n\n")
            if len(paragraph) >= 40
        }
        for split in SPLITS
    }
    for first, second in combinations(SPLITS, 2):
        assert not paragraphs[first] & paragraphs[second]


def test_shifted_splits_are_the_chapters_of_the_bible():
    chapters = {split: read_jsonl(data_file("shifted", split)) for split in SPLITS}
    assert len(chapters["dev"]) == DEV_CHAPTERS
    assert len(chapters["test"]) == TEST_CHAPTERS
    assert sum(len(split) for split in chapters.values()) == 1189
    opening = "In the beginning God created the heaven and the earth."
    everything = [document for split in chapters.values() for document in split]
    assert sum(document.text.startswith(opening) for document in everything) == 1


@pytest.mark.parametrize("split", ["dev", "test"])
def test_held_out_general_text_mixes_every_source(split):
    documents = read_jsonl(data_file("general", split))
    total = sum(len(document.text) for document in documents)
    assert 600_000 < total < 1_000_000
    for source in GENERAL_SOURCES:
        share = sum(len(d.text) for d in documents if d.id.startswith(f"{source.package}/")) / total
        assert 0 < share < 0.3


def test_every_source_is_in_the_notice():
    notice = (DATA_DIR / "NOTICE").read_text(encoding="utf-8")
    assert all(f"({source.package}" in notice for source in GENERAL_SOURCES)
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice


def test_data_stays_small():
    assert sum(file.stat().st_size for file in DATA_DIR.iterdir()) < 8 * 2**20


def test_repeated_ngrams_counts_eight_tokens_in_a_row():
    stream = np.arange(20, dtype=np.uint16)
    assert repeated_ngrams(stream, stream) == 1.0
    assert repeated_ngrams(stream, np.arange(12, dtype=np.uint16)) == pytest.approx(5 / 13)
    assert repeated_ngrams(stream, stream[::-1].copy()) == 0.0
