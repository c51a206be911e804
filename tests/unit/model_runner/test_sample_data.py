"""`model-runner sample-data` writes texts that the other commands read, and overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from model_runner.cli.app import app
from model_runner.cli.sample_data import FILES, NOTICE
from model_runner.errors import BadInput
from model_runner.text_files import read_examples


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    directory = tmp_path / "new" / "samples"
    done = CliRunner().invoke(app, ["sample-data", str(directory)])
    assert done.exit_code == 0
    for name in FILES:
        assert str(directory / name) in done.output
    return directory


def test_files_hold_different_documents_and_their_licences_lie_beside_them(samples: Path) -> None:
    texts = {name: [one.text for one in read_examples(samples / name)] for name in FILES}
    assert {name: len(found) for name, found in texts.items()} == {
        "reference.jsonl": 24,
        "new-cases.jsonl": 2,
        "held-out.jsonl": 12,
        "general.jsonl": 12,
    }
    every = [str(text) for found in texts.values() for text in found]
    assert len(set(every)) == len(every)
    # Each document of the manuals is named after a source that the notice is about.
    notice = (samples / NOTICE).read_text()
    sources = {one.name.split("/")[0] for one in read_examples(samples / "general.jsonl")}
    assert {source for source in sources if source not in notice} == set()


def test_what_is_there_is_not_overwritten(samples: Path) -> None:
    (samples / "held-out.jsonl").write_text("mine")
    failed = CliRunner().invoke(app, ["sample-data", str(samples)])
    assert isinstance(failed.exception, BadInput)
    assert "held-out.jsonl" in str(failed.exception)
    assert (samples / "held-out.jsonl").read_text() == "mine"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = CliRunner().invoke(app, ["sample-data", str(tmp_path / "file")])
    assert isinstance(failed.exception, BadInput)
