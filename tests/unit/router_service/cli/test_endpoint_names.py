"""What a user means by --from and --to."""

from __future__ import annotations

from pathlib import Path

import pytest

from router_service.cli.errors import BadInput
from router_service.cli.migrate_command import endpoint_name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("embedded", "embedded"),
        ("http://qdrant", "http://QDRANT:6334/"),
        ("http://qdrant:6333", "https://qdrant:6334"),
        ("http://a:6334,http://b:6334", "http://b"),
        ("a/b", "a/./c/../b/"),
    ],
)
def test_names_of_the_same_endpoint(one: str, other: str) -> None:
    assert endpoint_name("--from", one).identity & endpoint_name("--to", other).identity


@pytest.mark.parametrize(
    ("one", "other"), [("embedded", "./embedded"), ("http://a", "http://b"), ("a", "b")]
)
def test_names_of_two_endpoints(one: str, other: str) -> None:
    assert not endpoint_name("--from", one).identity & endpoint_name("--to", other).identity


def test_only_a_directory_has_one() -> None:
    assert endpoint_name("--to", "some/where").directory == Path("some/where")
    assert endpoint_name("--to", "embedded").directory is None
    assert endpoint_name("--to", "http://qdrant").directory is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://x",
        "qdrant:6334",
        "127.0.0.1:6333",
        "http://",
        "http://x:99999",
        "https://x/y",
        "http://a,https://b",
        "http://a,",
        "http://a,qdrant:6334",
        "a\0b",
    ],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(BadInput, match=r"--to: got .*, expected "):
        endpoint_name("--to", text)
