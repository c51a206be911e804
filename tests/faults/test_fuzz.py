"""A few hundred messages; `make fuzz MESSAGES=100000 SEED=0` sends them all."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from tests.congruence.fast_dir import fast_dir
from tests.faults import fuzz
from tests.faults.fuzz_client import schedule_of
from tests.faults.messages import FORMS, METHODS, path_of, request_class, spoilt, valid

__all__ = ["fast_dir"]


def test_no_message_is_a_defect(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(fast_dir))
    result = fuzz.run(300, 4, fast_dir / "out", lambda _: None, threads=3)
    assert result["violations"] == []
    assert result["messages"] == 300
    assert "300 messages in" in (fast_dir / "out" / "fuzz.md").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_every_method_has_messages_of_every_form(form: str) -> None:
    for method in METHODS:
        request = valid(request_class(method), "m", "digest", np.random.default_rng(0))
        data = spoilt(request, form, random.Random(path_of(method)))
        assert isinstance(data, bytes)


def test_what_a_process_had_of_the_processors() -> None:
    ran, waited = schedule_of(os.getpid())
    sum(range(10**6))
    more, longer = schedule_of(os.getpid())
    assert more > ran > 0
    assert longer >= waited
