"""Which text a memory holds: files of one name, changed text, memories of version 0.1; what commands read and say."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from knnmoe.client import AdminClient

from model_runner.memory_builder.builder import MemoryBuilder
from model_runner.memory_builder.entries import known_text
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import load_model
from model_runner.texts import read_windows
from tests.integration.command_runs import Done, Run, in_process
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
    windows_of,
    write_text,
)
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import byte_tokenizer, closing_tokenizer, save_checkpoint

HERE, THERE = SENTENCES[:4], SENTENCES[4:6]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `loaded_model`."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def where(edge_sidecar: Sidecar, name: str, model: Path) -> list[object]:
    return ["--memory", name, "--target", edge_sidecar.target, "--model", model]


@pytest.fixture
def building(where: list[object]) -> list[object]:
    return ["build", *where, "--preset", "paper", "--window", LENGTH, "--no-optimize", "--no-gain"]


@pytest.fixture
def memory(edge_sidecar: Sidecar, name: str) -> str:
    """An empty one."""
    with AdminClient(edge_sidecar.target) as client:
        client.find_or_create(
            name, loaded_model().fingerprint.message(), PRESETS["paper"].settings(LAYERS)
        )
    return name


@pytest.fixture
def same_name(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of one name with different texts, of which the second is shorter."""
    paths = [tmp_path / directory / "cases.jsonl" for directory in "ab"]
    for path, sentences in zip(paths, (HERE, THERE), strict=True):
        path.parent.mkdir()
        write_text(path, sentences)
    return paths[0], paths[1]


def with_ids(path: Path, sentences: Sequence[str], names: str = "abcdefgh") -> Path:
    rows = [{"id": n, "text": text} for n, text in zip(names, sentences, strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokens_of(sentences: Sequence[str]) -> int:
    """Entries per layer."""
    return sum(window.targets for window in windows_of(sentences))


def texts_in(sidecar: Sidecar, memory: str, layer: int = LAYERS - 1) -> set[tuple[int, int]]:
    """Position and token of every entry."""
    origins = [origin for _, _, origin in stored(sidecar, memory, layer).values()]
    return {(origin.position, origin.token) for origin in origins}


def tokens_in(sentences: Sequence[str]) -> set[tuple[int, int]]:
    return {
        (w.offset + at - 1, w.token_ids[at - 1])
        for w in windows_of(sentences)
        for at in w.target_at
    }


@pytest.mark.parametrize("command", ["build", "learn"])
@pytest.mark.parametrize("longer_first", [True, False])
def test_another_file_of_the_same_name_is_added(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    building: list[object],
    where: list[object],
    same_name: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
    command: str,
    longer_first: bool,
) -> None:
    one, other = same_name if longer_first else same_name[::-1]
    assert run(*building, "--reference", one).code == 0
    before = everything(edge_sidecar, name)
    caplog.clear()

    def add() -> Done:
        if command == "build":
            return run(*building, "--reference", other)
        return run("learn", other, *where, "--window", LENGTH)

    first = add()
    assert first.code == 0
    assert "; 0 of " in first.err
    assert f"holds {len(before[0])} entries per layer of other text that is named" in caplog.text
    assert "--replace-source" in caplog.text
    after = everything(edge_sidecar, name)
    assert all(new.items() > old.items() for new, old in zip(after, before, strict=True))
    assert [len(layer) for layer in after] == [tokens_of(HERE) + tokens_of(THERE)] * LAYERS
    assert texts_in(edge_sidecar, name) == tokens_in(HERE) | tokens_in(THERE)

    caplog.clear()
    assert "0 entries" in add().err
    assert everything(edge_sidecar, name) == after
    assert caplog.text == ""


def test_a_row_that_moves_is_the_same(
    run: Run, edge_sidecar: Sidecar, name: str, building: list[object], tmp_path: Path
) -> None:
    path = write_text(tmp_path / FILE_NAME, HERE)
    run(*building, "--reference", path)
    before = everything(edge_sidecar, name)
    write_text(path, [THERE[0], *reversed(HERE), HERE[1]])
    again = run(*building, "--reference", path, "--batch-size", 1)
    repeated = len(windows_of([HERE[1]]))
    assert f"{repeated} windows repeat others of the file and were written once" in again.err
    assert f"{len(windows_of(HERE))} of {len(windows_of([*HERE, THERE[0]]))} windows" in again.err
    after = everything(edge_sidecar, name)
    assert all(new.items() > old.items() for new, old in zip(after, before, strict=True))
    assert len(after[0]) == tokens_of([*HERE, THERE[0]])


@pytest.mark.parametrize("write", [write_text, with_ids])
def test_other_windows_are_of_the_same_text(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    building: list[object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Path, Sequence[str]], Path],
) -> None:
    path = write(tmp_path / FILE_NAME, HERE)
    for length in (LENGTH, 40, 13):
        caplog.clear()
        assert run(*building, "--reference", path, "--window", length).code == 0
        assert caplog.text == ""
    before = everything(edge_sidecar, name)
    done = run(*building, "--reference", path, "--replace-source")
    assert f"0 entries of other text of {FILE_NAME} were deleted" in done.err
    assert [layer.keys() for layer in everything(edge_sidecar, name)] == [
        layer.keys() for layer in before
    ]


@pytest.mark.parametrize("command", ["build", "learn"])
def test_changed_text_of_a_known_id(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    building: list[object],
    where: list[object],
    tmp_path: Path,
    command: str,
) -> None:
    path = with_ids(tmp_path / FILE_NAME, HERE)
    run(*building, "--reference", path)
    before = everything(edge_sidecar, name)
    with_ids(path, [HERE[0], THERE[0]], "ab")
    again = ["learn", path, *where, "--window", LENGTH]
    if command == "build":
        again = [*building, "--reference", path]
    refused = run(*again)
    assert refused.code == 2
    assert f"memory {name!r} holds 1 of its examples with other text, e.g. `id` 'b'" in refused.err
    assert "--replace-source" in refused.err
    assert everything(edge_sidecar, name) == before

    done = run(*again, "--replace-source")
    assert done.code == 0
    gone = tokens_of(HERE[1:])
    assert f"{LAYERS * gone} entries of other text of {FILE_NAME} were deleted" in done.err
    for layer in range(LAYERS):
        assert texts_in(edge_sidecar, name, layer) == tokens_in([HERE[0], THERE[0]])
    origins = [origin for _, _, origin in stored(edge_sidecar, name, 0).values()]
    assert {origin.example for origin in origins} == {"a", "b"}
    assert run(*again).code == 0


def test_a_replacement_that_was_cut_off(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    building: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until all is written nothing is deleted; the next run finishes it."""
    path = with_ids(tmp_path / FILE_NAME, HERE)
    run(*building, "--reference", path)
    before = everything(edge_sidecar, name)
    with_ids(path, THERE)
    write, written = MemoryBuilder.write, list[int]()

    def write_once(self: MemoryBuilder, *arguments: object, **options: object) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(write(self, *arguments, **options))
        return written[-1]

    replacing = [*building, "--reference", path, "--batch-size", 1, "--replace-source"]
    with monkeypatch.context() as cutting:
        cutting.setattr(MemoryBuilder, "write", write_once)
        assert run(*replacing).code == 130
    some = everything(edge_sidecar, name)
    assert all(new.items() >= old.items() for new, old in zip(some, before, strict=True))
    assert run(*replacing).code == 0
    assert texts_in(edge_sidecar, name) == tokens_in(THERE)


def test_a_memory_of_an_earlier_version_goes_on(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    building: list[object],
    where: list[object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its examples are rows by number, without a digest."""
    some = [window for window in windows_of() if window.ref.example != "8"]
    build(edge_sidecar.target, name, windows=some)
    before = everything(edge_sidecar, name)
    path = write_text(tmp_path / FILE_NAME)
    done = run(*building, "--reference", path, "--batch-size", 1)
    assert done.code == 0
    assert f"{len(some)} windows are in memory {name!r} from version 0.1" in caplog.text
    assert f"{len(some)} of {len(windows_of())} windows were there already" in done.err
    after = everything(edge_sidecar, name)
    assert all(new.items() > old.items() for new, old in zip(after, before, strict=True))
    assert len(after[0]) == tokens_of(SENTENCES)

    # Another file of that name is another text, not what has its number.
    other = write_text(tmp_path / "other.jsonl", SENTENCES[4:6]).rename(tmp_path / FILE_NAME)
    with AdminClient(edge_sidecar.target) as client:
        windows = read_windows(other, loaded_model().tokenizer, LENGTH)
        known = known_text(client, name, windows)
    assert (known.by_tokens, known.changed) == (0, ())
    assert known.windows == windows
    assert run("learn", other, *where, "--window", LENGTH, "--replace-source").code == 0
    assert texts_in(edge_sidecar, name) == tokens_in(SENTENCES[4:6])
    origins = [origin for _, _, origin in stored(edge_sidecar, name, 0).values()]
    assert all(origin.example.startswith("#") for origin in origins)


def test_ids_of_an_earlier_version(
    run: Run, edge_sidecar: Sidecar, name: str, building: list[object], tmp_path: Path
) -> None:
    build(edge_sidecar.target, name, windows=windows_of(HERE))
    before = everything(edge_sidecar, name)
    path = with_ids(tmp_path / FILE_NAME, HERE, "1234")
    done = run(*building, "--reference", path)
    assert "wrote 0 entries" in done.err
    assert everything(edge_sidecar, name) == before
    changed = with_ids(path, [*HERE[:3], THERE[0]], "1234")
    refused = run(*building, "--reference", changed)
    assert refused.code == 2
    assert "with other text, e.g. `id` '4'" in refused.err


CONVERSATION = [
    {"role": "user", "content": "Who led the people out?"},
    {"role": "assistant", "content": "Moses did"},
]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def chat_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_checkpoint(tmp_path_factory.mktemp("models") / "chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def test_conversations_are_learnt(
    run: Run,
    edge_sidecar: Sidecar,
    memory: str,
    where: list[object],
    chat_model: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    refused = run("learn", path, *where)
    assert refused.code == 2
    assert (
        "example 1: has `messages`, and the model's tokenizer has no chat template" in refused.err
    )
    done = run("learn", path, *where, "--model", chat_model)
    assert done.code == 0
    before = "user: Who led the people out?<|end|>assistant: "
    first = len(byte_tokenizer()(before)["input_ids"])
    spoken = byte_tokenizer()("Moses did<|end|>")["input_ids"]
    origins = [origin for _, _, origin in stored(edge_sidecar, memory, 0).values()]
    found = {origin.position: origin.token for origin in origins}
    # An entry stands at the token before its target.
    assert found == dict(
        enumerate([byte_tokenizer()(" ")["input_ids"][0], *spoken[:-1]], first - 1)
    )
    said = run("generate", "--learn", path, *where, "--model", chat_model, "--max-new-tokens", 2)
    assert said.code == 0
    assert said.out.startswith("user: Who led the people out?assistant: ")
    assert "learnt" in said.err


def test_what_a_tokenizer_appends_is_nowhere(
    run: Run, edge_sidecar: Sidecar, memory: str, where: list[object], model: Path, tmp_path: Path
) -> None:
    closing = save_checkpoint(tmp_path / "closing")
    closing_tokenizer().save_pretrained(closing)
    assert load_model(str(closing)).tokenizer("a")["input_ids"] == [65, 0]
    path = tmp_path / "qa.jsonl"
    path.write_text(
        json.dumps({"prompt": "Who led the people out?", "answer": " Moses did"}) + "\n"
    )
    assert run("learn", path, *where, "--model", closing).code == 0
    before = everything(edge_sidecar, memory)
    assert 0 not in {token for _, token in texts_in(edge_sidecar, memory)}
    assert "was there already" in run("learn", path, *where).out
    assert everything(edge_sidecar, memory) == before
    arguments = ("generate", "--prompt", PROMPT, "--max-new-tokens", 6, "--model")
    assert run(*arguments, closing).out == run(*arguments, model).out


@pytest.mark.parametrize("kind", ["json", "JSONL", "jsonl.gz", "csv", "pipe", "stdin"])
def test_files_that_are_learnt(
    run: Run,
    edge_sidecar: Sidecar,
    memory: str,
    where: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    path = write_text(tmp_path / f"cases.{kind}", HERE)
    if kind == "json":
        path.write_text(json.dumps([{"text": text} for text in HERE]))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{text}"\n' for text in HERE))
    elif kind == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        path = Path("-")
    elif kind == "pipe":
        reader, end = os.pipe()
        os.write(end, path.read_bytes())
        os.close(end)
        path = Path(f"/dev/fd/{reader}")
    assert run("learn", path, *where, "--window", LENGTH).code == 0
    assert texts_in(edge_sidecar, memory) == tokens_in(HERE)
    if kind == "pipe":
        os.close(reader)


def test_every_command_counts_what_it_leaves_out(
    run: Run,
    edge_sidecar: Sidecar,
    name: str,
    building: list[object],
    where: list[object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "qa.jsonl"
    answers = {"Who?": "Moses", "What?": "", "Where?": "Egypt", "When?": None}
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        [*building, "--reference", path, "--quiet"],
        ["evaluate", *where, "--text", path, "--quiet"],
        ["calibrate", *where, "--text", path],
        ["learn", path, *where, "--quiet"],
        ["generate", "--learn", path, *where, "--max-new-tokens", 1],
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert run(*command).code == 0
        assert f"{path}: 2 of 4 examples left out: 2 without an answer" in caplog.text
    with AdminClient(edge_sidecar.target) as client:
        assert client.count(name, 0) == len("Moses") + len("Egypt")


def test_a_changed_lesson(
    run: Run, edge_sidecar: Sidecar, memory: str, where: list[object], tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    lesson = {"id": "who", "prompt": "Who?", "answer": " Moses"}
    path.write_text(json.dumps(lesson))
    teach = ["generate", "--learn", path, *where, "--max-new-tokens", 1]
    assert run(*teach).code == 0
    before = everything(edge_sidecar, memory)
    path.write_text(json.dumps(lesson | {"answer": " Aaron"}))
    refused = run(*teach)
    assert (refused.code, refused.out) == (2, "")
    assert "with other text, e.g. `id` 'who'" in refused.err
    assert everything(edge_sidecar, memory) == before


def from_shell(data: bytes, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import model_runner.cli as c; c.main()", "generate"]
    return subprocess.run(
        [*command, *map(str, arguments), "--max-new-tokens", "3"],
        input=data,
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{"LC_ALL": "C.UTF-8"}, PLAIN_C])
def test_a_prompt_that_is_not_utf8(model: Path, environment: dict[str, str]) -> None:
    from_stdin = from_shell(b"caf\xe9 au", "--model", model, "--prompt", "-", **environment)
    assert from_stdin.returncode == 2
    assert b"model-runner: prompt: not UTF-8" in from_stdin.stderr
    argument = os.fsdecode(b"caf\xe9 au")
    assert from_shell(b"", "--model", model, "--prompt", argument, **environment).returncode == 2
    said = f"{PROMPT}\n".encode()
    session = from_shell(b"caf\xe9 au\n" + said, "--model", model, "--interactive", **environment)
    assert session.returncode == 0
    assert b"model-runner: prompt: not UTF-8" in session.stderr
    assert session.stdout.startswith(PROMPT.encode())


def test_a_prompt_in_whatever_locale(model: Path) -> None:
    prompt = "Né à Zürich"
    for data, given in ((b"", prompt), (prompt.encode(), "-")):
        done = from_shell(data, "--model", model, "--prompt", given, **PLAIN_C)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().startswith(prompt)


def test_a_tokenizer_that_is_too_large(run: Run, tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "large")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(directory)
    done = run("generate", "--prompt", PROMPT, "--model", directory)
    assert done.code == 2
    assert "token ids up to 258 ('<newer>'), the model has embeddings for 257" in done.err
    assert "resize_token_embeddings" in done.err
