"""What docs name is there: files, directories, and links to other pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Paths under these directories are named from the root; others are examples, or relative to a room.
_PATH = re.compile(
    r"`((?:router_service|model_runner|protos|tests|benchmarks|examples|docker|docs)/[\w./-]*)`"
)
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    named = [ROOT / path for path in _PATH.findall(text)]
    linked = [page.parent / link for link in _LINK.findall(text)]
    assert [str(path) for path in named + linked if not path.exists()] == []


def test_the_rooms_of_the_architecture_are_those_of_the_service() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "router_service").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in text} == set()
