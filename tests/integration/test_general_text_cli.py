"""General text in a memory, as `model-runner build` puts it there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from knnmoe import tensors
from knnmoe.client import AdminClient
from knnmoe.v1.retention_pb2 import DeleteRequest

from model_runner.memory_builder.recipes import PRESETS
from tests.integration.command_runs import Done, Run, in_process
from tests.integration.runner_parts import (
    FILE_NAME,
    LAYERS,
    LENGTH,
    everything,
    stored,
    write_text,
)
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import save_checkpoint

GENERAL = "general:news.jsonl"
NEWS = (
    "The council met on Tuesday to discuss the new bridge over the river.",
    "Shares fell in early trading, and the bank said that it would wait.",
    "A storm is expected to reach the coast by the end of the week.",
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `model-runner` in this process."""
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with reference and general text."""
    directory = tmp_path_factory.mktemp("texts")
    write_text(directory / FILE_NAME)
    write_text(directory / "news.jsonl", NEWS)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def arguments(edge_sidecar: Sidecar, texts: Path, model: Path, name: str) -> list[object]:
    """A build that works; not said: which general text."""
    return [
        *("build", "--reference", texts / FILE_NAME, "--memory", name, "--model", model),
        *("--target", edge_sidecar.target, "--window", LENGTH, "--batch-size", 4),
    ]


@pytest.fixture
def with_news(run: Run, arguments: list[object], texts: Path) -> Run:
    """Builds with general text."""

    def build(*more: object) -> Done:
        done = run(*arguments, "--general", texts / "news.jsonl", *more)
        assert done.code == 0, done.err
        return done

    return build


def null_entries(sidecar: Sidecar, name: str) -> list[set[int]]:
    """Ids of each layer's entries of general text, all of which change nothing."""
    found = []
    for layer in range(LAYERS):
        of_layer = {
            entry: value
            for entry, (_, value, origin) in stored(sidecar, name, layer).items()
            if origin.source == GENERAL
        }
        assert not np.any(list(of_layer.values()))
        found.append(set(of_layer))
    return found


def reference_entries(sidecar: Sidecar, name: str) -> int:
    return sum(
        origin.source == FILE_NAME for _, _, origin in stored(sidecar, name, LAYERS - 1).values()
    )


def test_as_many_entries_of_it_as_of_the_reference(
    run: Run, with_news: Run, arguments: list[object], edge_sidecar: Sidecar, name: str
) -> None:
    """Built again they stay; a build that was cut off chooses what it would have; without them steps are shorter."""
    first = with_news("--max-windows", 2)
    entries = reference_entries(edge_sidecar, name)
    assert f"{name}: wrote {entries} entries per layer of {GENERAL}, near which it" in first.err
    chosen, whole = null_entries(edge_sidecar, name), everything(edge_sidecar, name)
    assert [len(of_layer) for of_layer in chosen] == [entries] * LAYERS
    assert chosen[0] != chosen[1]  # where the memory speaks differs by layer

    again = with_news("--max-windows", 2)
    assert f"{entries} entries per layer of {GENERAL} were there already" in again.err
    assert everything(edge_sidecar, name) == whole

    some = tensors.to_tensor(np.array(sorted(chosen[-1])[:3], np.uint64))
    with AdminClient(edge_sidecar.target) as client:
        cut = DeleteRequest(memory=name, layer=LAYERS - 1, ids=some)
        assert client.unary(client.retention.Delete, cut).deleted == 3
        with_news("--max-windows", 2)
        assert everything(edge_sidecar, name) == whole

        silenced = client.describe(name).settings.step_size[-1]
        client.delete(name)
        assert run(*arguments, "--max-windows", 2, "--general-windows", 0).code == 0
        assert client.describe(name).settings.step_size[-1] < silenced
    assert null_entries(edge_sidecar, name) == [set()] * LAYERS


def test_chosen_anew_when_the_memory_has_grown_or_the_text_is_another(
    run: Run,
    with_news: Run,
    arguments: list[object],
    edge_sidecar: Sidecar,
    name: str,
    tmp_path: Path,
) -> None:
    with_news("--max-windows", 2)
    before = null_entries(edge_sidecar, name)
    with_news("--max-windows", 4)
    after = null_entries(edge_sidecar, name)
    assert [len(of_layer) for of_layer in after] == [reference_entries(edge_sidecar, name)] * LAYERS
    assert len(after[0]) > len(before[0])

    later = write_text(tmp_path / "news.jsonl", [text.upper() for text in NEWS])
    assert run(*arguments, "--general", later, "--max-windows", 4).code == 0
    last = null_entries(edge_sidecar, name)
    assert [len(of_layer) for of_layer in last] == [len(of_layer) for of_layer in after]
    assert not last[0] & after[0]


def test_few_windows_of_it(with_news: Run, edge_sidecar: Sidecar, name: str) -> None:
    """All that is looked at is stored when it holds no more tokens than the reference; steps are no longer then."""
    done = with_news("--general-windows", 1)
    stored_there = null_entries(edge_sidecar, name)
    assert 0 < len(stored_there[0]) < reference_entries(edge_sidecar, name)
    assert len(set(map(len, stored_there))) == 1
    assert f"wrote {len(stored_there[0])} entries per layer of {GENERAL}" in done.err
    assert "keeps the shorter step of a memory without general text" in done.err
    with AdminClient(edge_sidecar.target) as client:
        alone = PRESETS["recommended"].settings(LAYERS).step_size
        assert client.describe(name).settings.step_size == alone


def test_it_is_not_the_reference(
    run: Run, arguments: list[object], texts: Path, tmp_path: Path
) -> None:
    same = run(*arguments, "--general", texts / FILE_NAME)
    assert same.code == 2
    assert "all of it is in the reference" in same.err
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((texts / FILE_NAME).read_text() + (texts / "news.jsonl").read_text())
    some = run(*arguments, "--general", mixed, "--no-optimize")
    assert some.code == 0
    assert "24 windows of mixed.jsonl are in the reference, and are left out" in some.err


def test_it_is_for_changes_of_routing(run: Run, arguments: list[object]) -> None:
    refused = run(*arguments, "--general-windows", 3, "--preset", "paper")
    assert refused.code == 2
    assert "--general: preset paper stores routings and no changes of them" in refused.err
