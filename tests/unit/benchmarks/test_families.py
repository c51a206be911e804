"""The table of families: a row of a real service, and that no family of transformers is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.families import MEMORIES, markdown, rows, text_parts
from tests.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs" / "families.md"


def test_a_row_and_its_line() -> None:
    [row] = rows(["gpt_oss"])
    assert (row.model_class, row.layers, row.experts, row.top_k) == ("GptOssForCausalLM", 4, 8, 2)
    assert row.hooks
    assert row.identity == ["fp32", "bf16"]
    assert row.empty
    assert sorted(row.memories) == sorted(MEMORIES)
    assert all(change < 0 for change in row.memories.values())
    assert row.failures == []
    page = markdown([row])
    assert "1 of 1 hold in everything" in page
    assert "| gpt_oss | GptOssForCausalLM | 4 | 8, 2 | yes | fp32, bf16 | -0." in page


def test_what_has_no_row_wraps_a_family_that_has_one() -> None:
    assert set(text_parts().values()) <= set(FAMILIES)


def test_the_page_has_every_family() -> None:
    found = re.findall(r"(?m)^\| (\w+) \| \w+ \| \d", PAGE.read_text())
    assert found == list(FAMILIES), (
        "run `python -m benchmarks.families --markdown docs/families.md`"
    )
