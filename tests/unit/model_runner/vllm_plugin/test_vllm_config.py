"""What a server is configured with, and what a request says."""

from __future__ import annotations

from typing import Any

import pytest

from model_runner.errors import BadInput
from model_runner.vllm.config import ENVIRONMENT, Config, configured
from model_runner.vllm.request import Wanted, settled

TWO = Config(memories=("law", "code"))


def test_nothing_is_configured() -> None:
    assert configured({}) is None
    assert configured(None) is None


def test_the_default_memory_is_served_too() -> None:
    config = configured({"knn_moe": {"memory": "law", "memories": ["code", "law"]}})
    assert config is not None
    assert config.served == ("law", "code")


def test_the_environment_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, '{"memories": ["law"], "retrieval": "remote"}')
    assert configured({}) == Config(memories=("law",), retrieval="remote")
    assert configured({"knn_moe": {"memory": "code"}}) == Config(memory="code")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"memorys": ["law"]}, "unknown memorys"),
        ({}, "no memory is named"),
        ({"memories": "law"}, "'law'"),
        ({"memories": ["law", ""]}, "a list of names"),
        ({"memory": 3}, "3"),
        ({"memory": "law", "retrieval": "here"}, "'here'"),
        ({"memory": "law", "replica_memory": "many"}, "many"),
        ({"memory": "law", "replica_keys": "f8"}, "'f8'"),
        ({"memory": "law", "strict": "yes"}, "'yes'"),
        ({"memory": "law", "timeout_s": 0}, "0"),
        (["law"], r"\['law'\]"),
    ],
)
def test_what_cannot_be_is_named(given: Any, names: str) -> None:
    with pytest.raises(BadInput, match=names):
        configured({"knn_moe": given})


def test_a_request_reads_what_it_names() -> None:
    assert Wanted.of({"knn_moe": {"memory": "law", "tag": "a"}}, TWO) == Wanted("law", "a")
    assert Wanted.of({"knn_moe": '{"memory": "code"}'}, TWO) == Wanted("code")
    assert Wanted.of(None, TWO) == Wanted(None)
    assert Wanted.of({"other": 1}, None) == Wanted(None)


def test_a_default_memory_is_for_who_names_none() -> None:
    config = Config(memory="law")
    assert Wanted.of({}, config) == Wanted("law")
    assert Wanted.of({"knn_moe": {"memory": None}}, config) == Wanted(None)


def test_a_strict_server_takes_no_request_that_nobody_looks_after() -> None:
    config = Config(memory="law", strict=True)
    assert Wanted.of({"knn_moe": {"tag": "a"}}, config) == Wanted("law", "a")
    with pytest.raises(BadInput, match="the server is strict"):
        Wanted.of({}, config)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"memory": "medicine"}, "'medicine', and this server serves law, code"),
        ({"memory": ["law"]}, r"\['law'\]"),
        ({"memry": "law"}, "unknown memry"),
        ({"memory": "law", "tag": 1}, "tag: got 1"),
        ("law", "expected JSON"),
        ('["law"]', "expected an object"),
    ],
)
def test_a_request_for_what_is_not_served_names_both_sides(given: Any, names: str) -> None:
    with pytest.raises(BadInput, match=names):
        Wanted.of({"knn_moe": given}, TWO)


def test_a_server_without_memories_says_so() -> None:
    with pytest.raises(BadInput, match="serves no memory"):
        Wanted.of({"knn_moe": {"memory": "law"}}, None)


def test_a_worker_reads_what_was_checked() -> None:
    assert settled({"knn_moe": Wanted("law").settled("7")}) == ("law", "7")
    assert settled({"knn_moe": Wanted("law", "a").settled("7")}) == ("law", "a")
    assert settled(None) == (None, "")
    assert settled({"knn_moe": {"memory": "law"}}) == (None, "")
