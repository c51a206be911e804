"""What a router client is made of, before it asks anyone."""

from __future__ import annotations

from typing import get_args

import pytest
from knnmoe.fingerprint import ModelFingerprint

from model_runner.cli import options
from model_runner.router_client import OnError, RouterClient

FINGERPRINT = ModelFingerprint("tiny", 1, 2, 3, 1, "5eed" * 16)


@pytest.mark.parametrize("on_error", OnError)
def test_names_of_what_a_failure_does(on_error: OnError) -> None:
    with RouterClient("127.0.0.1:1", "law", FINGERPRINT, on_error=str(on_error)) as client:
        assert client.on_error is on_error


def test_the_option_has_the_same_names() -> None:
    assert get_args(options.OnError) == tuple(OnError)


@pytest.mark.parametrize("on_error", ["RAISE", "ignore", "", None, 1])
def test_other_names(on_error: object) -> None:
    expected = f"on_error: got {on_error!r}, expected 'fall_back' or 'raise'"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        RouterClient("127.0.0.1:1", "law", FINGERPRINT, on_error=on_error)
