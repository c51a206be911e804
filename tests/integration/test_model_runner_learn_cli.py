"""`model-runner learn` and `generate --learn`: what they write and say, and what every mistake says."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from knnmoe.client import AdminClient
from knnmoe.v1.types_pb2 import MemorySettings

from model_runner.memory_builder.recipes import PRESETS
from tests.integration.command_runs import Run, in_process
from tests.integration.runner_parts import (
    FILE_NAME,
    LAYERS,
    LENGTH,
    PROMPT,
    SENTENCES,
    build,
    everything,
    loaded_model,
    stored,
    write_text,
)
from tests.message_gate import MessageGate
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import save_checkpoint

NOBODY = "127.0.0.1:1"
SOME = SENTENCES[:3]
# Everything is close: each token is routed by the nearest entry.
WIDE = MemorySettings(gamma=[1e-7])
LESSONS = (("Blessed are", " the meek"), ("Cast thy", " bread"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `loaded_model`."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / FILE_NAME, SOME)


@pytest.fixture
def memory(edge_sidecar: Sidecar, name: str) -> str:
    """An empty memory whose nearest entry always speaks."""
    with AdminClient(edge_sidecar.target) as client:
        client.find_or_create(
            name, loaded_model().fingerprint.message(), PRESETS["paper"].settings(LAYERS)
        )
        client.update_settings(name, WIDE)
    return name


@pytest.fixture
def where(edge_sidecar: Sidecar, memory: str, model: Path) -> list[object]:
    return ["--memory", memory, "--target", edge_sidecar.target, "--model", model]


def entries_of(sidecar: Sidecar, memory: str) -> int:
    with AdminClient(sidecar.target) as client:
        return client.count(memory)


def write_lessons(path: Path) -> Path:
    rows = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in LESSONS]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_learn_evaluate_and_learn_again(
    run: Run,
    edge_sidecar: Sidecar,
    memory: str,
    where: list[object],
    text: Path,
    tmp_path: Path,
) -> None:
    command = ["learn", text, *where, "--window", LENGTH]
    report = tmp_path / "report.json"
    first = run(*command, "--evaluate", "--json", report, "--durability", "fsync")
    assert first.code == 0
    lines = first.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["1", "2", "3", "all"]
    assert "0 of 3 examples were there already" in first.err
    examples = json.loads(report.read_text())["examples"]
    assert sum(e["entries"] for e in examples) == entries_of(edge_sidecar, memory)
    assert all(e["entries"] == LAYERS * e["tokens"] for e in examples)
    nll = [e["nll_sums"] for e in examples]
    assert nll[0]["before"] == pytest.approx(nll[0]["off"])  # the memory was empty
    assert nll[1]["before"] != pytest.approx(nll[1]["off"])
    assert all(sums["after"] < sums["off"] for sums in nll)
    assert f"{nll[0]['off'] / examples[0]['tokens']:.4f} off" in lines[0]

    before = everything(edge_sidecar, memory)
    second = run(*command)
    assert (second.code, second.out.count("was there already")) == (0, 3)
    assert everything(edge_sidecar, memory) == before
    again = run(*command, "--again")
    assert "0 of 3 examples were there already" in again.err
    assert everything(edge_sidecar, memory) == before
    printed = run(*command, "--json", "-")
    assert [e["was_there"] for e in json.loads(printed.out)["examples"]] == [True] * 3
    assert printed.err.count("was there already\n") == 3
    known = run(*command, "--again", "--skip-known", 0.5)
    assert "that are known" in known.out  # by the other examples' entries: WIDE


def test_learning_more_into_a_memory_that_was_built(
    run: Run, edge_sidecar: Sidecar, name: str, model: Path, tmp_path: Path
) -> None:
    build(edge_sidecar.target, name, "recommended")
    before = everything(edge_sidecar, name)
    more = write_text(tmp_path / "more.jsonl", SOME[:1])
    done = run("learn", more, "--memory", name, "--target", edge_sidecar.target, "--model", model)
    assert done.code == 0
    assert f"{name} was never calibrated" in done.err
    after = everything(edge_sidecar, name)
    assert all(new.items() > old.items() for new, old in zip(after, before, strict=True))


def test_what_cannot_be_learnt(
    run: Run,
    edge_sidecar: Sidecar,
    memory: str,
    where: list[object],
    text: Path,
    model: Path,
    tmp_path: Path,
) -> None:
    missing = run("learn", text, *where, "--memory", "lwa")
    assert missing.code == 1
    assert "memory 'lwa' not found; this service has: " in missing.err
    nobody = run("learn", text, *where, "--target", NOBODY)
    assert nobody.code == 3
    assert "Start one with: router-service serve" in nobody.err
    kind = run("learn", text, *where, "--preset", "recommended")
    assert kind.code == 2
    assert "holds values of kind assignment, this recipe makes logit_delta" in kind.err
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert f"{empty}: holds no text" in run("learn", empty, *where).err
    assert run("learn", text, *where, "--skip-known", 1.5).code == 2
    assert run("learn", text, *where, "--json", "/nowhere/x.json").code == 2
    assert run("learn", "/nowhere.jsonl", *where).code == 2
    other = save_checkpoint(tmp_path / "other", num_experts_per_tok=3)
    mismatch = run("learn", text, *where, "--model", other)
    assert mismatch.code == 1
    assert "made for another model (top_k: memory 2, " in mismatch.err
    assert entries_of(edge_sidecar, memory) == 0


def test_learning_that_is_interrupted_goes_on(
    run: Run, edge_sidecar: Sidecar, memory: str, where: list[object], tmp_path: Path
) -> None:
    text = write_text(tmp_path / FILE_NAME, [f"{n}: {s}" for n in range(3) for s in SENTENCES])
    # Its own patience with the upsert that waits for ever must not end it before the signal comes.
    patient = "import knnmoe.client.admin as admin; admin.DEFAULT_TIMEOUT_S = 600.0"
    script = f"import sys, model_runner.cli; {patient}; sys.exit(model_runner.cli.main())"
    command = [sys.executable, "-c", script, "learn", str(text), *map(str, where)]
    with MessageGate(edge_sidecar.target, "Upsert", passes=2 * LAYERS) as gate:
        words = [gate.target if word == edge_sidecar.target else word for word in command]
        with subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            gate.wait_until_stopped(process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
    assert process.returncode == 130, err
    assert "what the sidecar acknowledged is kept" in err
    assert "Traceback" not in err
    some = entries_of(edge_sidecar, memory)
    finished = run("learn", text, *where, "--quiet")
    assert finished.code == 0
    there = finished.out.count("was there already")
    assert 0 <= there < 24
    assert entries_of(edge_sidecar, memory) > some
    everyone = {o.example for _, _, o in stored(edge_sidecar, memory, 0).values()}
    assert len(everyone) == 24


def test_generate_learns_each_answer_before_the_next_prompt(
    run: Run, edge_sidecar: Sidecar, memory: str, where: list[object], tmp_path: Path
) -> None:
    lessons = write_lessons(tmp_path / "answers.jsonl")
    command = ["generate", "--learn", lessons, *where]
    done = run(*command, "--max-new-tokens", 4, "--timeout-s", 30)
    assert done.code == 0
    assert [done.out.count(prompt) for prompt, _ in LESSONS] == [1, 1]
    sizes = [LAYERS * len(answer) for _, answer in LESSONS]
    assert [f"learnt {size} entries" in done.err for size in sizes] == [True, True]
    assert entries_of(edge_sidecar, memory) == sum(sizes)
    assert "mean lambda per layer: 0.00" not in done.err
    assert "lookups that fell back: none" in done.err
    origins = [origin for _, _, origin in stored(edge_sidecar, memory, 0).values()]
    assert {origin.source for origin in origins} == {"answers.jsonl"}


def test_a_session(
    run: Run,
    edge_sidecar: Sidecar,
    memory: str,
    where: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = f"{PROMPT}\n/learn meek\n/learn poor in spirit\n{PROMPT}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    done = run("generate", "--interactive", *where, "--max-new-tokens", 4, "--timeout-s", 30)
    assert done.code == 0
    assert done.out.count(PROMPT) == 2
    origins = [origin for _, _, origin in stored(edge_sidecar, memory, 0).values()]
    assert {origin.source for origin in origins} == {"session"}
    assert len({origin.example for origin in origins}) == 1
    decoded = {o.position: o.token for o in origins}
    tokens = [decoded[position] for position in sorted(decoded)]
    assert loaded_model().tokenizer.decode(tokens) == (PROMPT[-1] + " poor in spiri")
    assert "mean lambda per layer: 0.00" not in done.err


def test_a_session_that_is_interrupted_keeps_what_was_learnt(
    run: Run,
    edge_sidecar: Sidecar,
    memory: str,
    where: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def typed() -> Iterator[str]:
        yield f"{PROMPT}\n"
        yield "/learn meek\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Typist(typed()))
    done = run("generate", "--interactive", *where, "--max-new-tokens", 1)
    assert done.code == 130, done.err
    assert "what the sidecar acknowledged is kept" in done.err
    assert entries_of(edge_sidecar, memory) == LAYERS * len(" meek")


class Typist:
    """Lines as they are typed."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def isatty(self) -> bool:
        return False


def test_a_session_without_a_sidecar(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/learn meek\n{PROMPT}\n"))
    command = ("generate", "--interactive", "--model", model, "--max-new-tokens", 2)
    done = run(*command, "--memory", "law", "--target", NOBODY)
    assert done.code == 0
    assert done.out.count(PROMPT) == 2
    assert f"model-runner: sidecar at {NOBODY}" in done.err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/learn meek\n"))
    plain = run(*command)
    assert "there is no memory to learn into: start with --memory NAME" in plain.err


def test_one_thing_to_generate_from(run: Run, model: Path, tmp_path: Path) -> None:
    lessons = write_lessons(tmp_path / "answers.jsonl")
    none = run("generate", "--model", model)
    assert none.code == 2
    assert "--prompt, --messages, --learn, --interactive: got 0 of them, expected one" in none.err
    both = run("generate", "--prompt", PROMPT, "--interactive", "--model", model)
    assert "got 2 of them" in both.err
    unnamed = run("generate", "--learn", lessons, "--model", model)
    assert unnamed.code == 2
    assert "--learn: needs --memory NAME" in unnamed.err
    text = run("generate", "--memory", "law", "--learn", write_text(tmp_path / "t.jsonl"))
    assert "example 1: expected `prompt` and `answer`" in text.err
