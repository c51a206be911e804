"""Progress of loops: every item comes through, and a log file gets a line."""

from __future__ import annotations

import pytest

from model_runner import progress as progress_module
from model_runner.progress import Progress


@pytest.mark.parametrize("quiet", [True, False])
def test_every_item_comes_through_once_and_in_order(quiet: bool) -> None:
    assert list(Progress(quiet=quiet).track([3, 1, 2], "counting")) == [3, 1, 2]
    assert list(Progress(quiet=quiet).track([], "counting")) == []


def test_the_end_of_a_loop_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    list(progress.track([1, 2], "building", unit="batches"))
    long = "done: [b]100 %[/b] " + "and more " * 20
    progress.say(long)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["building: 2 batches in 0 s", long]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    list(progress.track([1, 2], "building"))
    progress.say("done")
    assert capsys.readouterr() == ("", "")


def test_work_that_is_no_loop(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    with Progress().counting(200, "copying", "entries") as done:
        done(0)
        done(50)
    assert capsys.readouterr().err.splitlines() == [
        "copying: 50/200 entries, 0 s left",
        "copying: 200 entries in 0 s",
    ]
    with Progress(quiet=True).counting(200, "copying") as done:
        done(50)
    assert capsys.readouterr() == ("", "")
