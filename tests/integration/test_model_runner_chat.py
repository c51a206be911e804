"""Conversations at `model-runner`: answered, kept in a session, learnt; text that stays whole on a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from knnmoe.v1.types_pb2 import MemorySettings

from tests.integration.command_runs import Run, in_process
from tests.integration.runner_parts import LAYERS, build, stored, windows_of
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "Who led the people out?"}
MORE = {"role": "user", "content": "Who spoke?"}


def answered(content: str, **more: int) -> dict[str, object]:
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    directory = save_checkpoint(tmp_path_factory.mktemp("models") / "chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def tokens_of(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


def rows_of(path: Path, *conversations: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations))
    return path


def test_a_build_and_an_evaluation_count_the_assistants_turns(
    run: Run, edge_sidecar: Sidecar, model: Path, name: str, tmp_path: Path
) -> None:
    """Of several, with a system turn; not those whose weight is 0."""
    where = ("--memory", name, "--target", edge_sidecar.target, "--model", model)
    chats = rows_of(
        tmp_path / "chats.jsonl",
        [SYSTEM, ASKED, answered("Moses"), MORE, answered("Aaron")],
        [ASKED, answered("Nobody", weight=0), MORE, answered("Miriam", weight=1)],
    )
    assert run("build", "--reference", chats, *where, "--preset", "paper").code == 0
    entries = stored(edge_sidecar, name, 0)
    assert len(entries) == len(tokens_of("Moses<|end|>Aaron<|end|>Miriam<|end|>"))
    scored = run("evaluate", "--text", chats, *where, "--leave-one-out")
    assert (scored.code, "2 windows" in scored.out) == (0, True)
    rows_of(chats, [ASKED, answered("Moses", weight=2)])
    refused = run("build", "--reference", chats, *where)
    assert "message 2: `weight` is 2, expected 0 (no loss) or 1" in refused.err


def test_conversations_are_answered(
    run: Run, model: Path, plain_model: Path, tmp_path: Path
) -> None:
    """As the prompt of the rendered text is gone on from; without the prompt on stdout."""
    chats = rows_of(tmp_path / "c.jsonl", [SYSTEM, ASKED], [ASKED, answered("Moses")])
    options = ("--model", model, "--max-new-tokens", 4)
    done = run("generate", "--messages", chats, *options)
    assert done.code == 0
    rendered = ["[system]Be brief.<|end|>[user]", "[user]"]
    for before, answer in zip(rendered, done.out.splitlines(), strict=True):
        prompt = f"{before}Who led the people out?<|end|>[assistant]"
        plain = run("generate", "--prompt", prompt, *options)
        assert plain.out.splitlines()[-1].endswith(f"[assistant]{answer}")
    assert "conversation 1:\nconversation 2:\n" in done.err
    chat = ("generate", "--chat", "--system", "Be brief.", "--prompt", ASKED["content"])
    assert run(*chat, *options).out == done.out.splitlines()[0] + "\n"


def test_what_cannot_be_a_conversation(
    run: Run, model: Path, plain_model: Path, tmp_path: Path
) -> None:
    chats = rows_of(tmp_path / "c.jsonl", [ASKED])
    for words in (("--chat", "--prompt", "Who?"), ("--messages", chats)):
        done = run("generate", *words, "--model", plain_model)
        assert (done.code, done.out) == (2, "")
        assert "the model's tokenizer has no chat template to render them with; " in done.err
        assert "or a model with a chat template (often the one named Instruct or Chat)" in done.err
    assert "--system: needs --chat" in run("generate", "--prompt", "x", "--system", "y").err
    assert "--chat: needs --prompt or" in run("generate", "--messages", chats, "--chat").err
    chats.write_text('{"text": "no turns"}\n')
    assert "example 1: expected `messages`" in run("generate", "--messages", chats).err
    long = run("generate", "--prompt", "x" * 128, "--model", plain_model)
    assert "prompt: got 128 tokens, expected fewer than the 128 that the model" in long.err
    cut = run("generate", "--prompt", "x" * 120, "--model", plain_model)
    assert (cut.code, "the text ends here: the model was made for 128 tokens" in cut.err) == (
        0,
        "<|end|>" not in cut.out,
    )


def test_a_session_keeps_the_conversation_and_learns(
    run: Run,
    edge_sidecar: Sidecar,
    model: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = MemorySettings(gamma=[1e-7])
    build(edge_sidecar.target, name, windows=windows_of()[:1], settings=wide)
    with_options = ("--model", model, "--max-new-tokens", 3)
    lines = ("Who?", "/learn Moses", "/learn Aaron", "Why?", "/new", "/learn too early", "Who?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    done = run(
        *("generate", "--interactive", "--chat", *with_options),
        *("--memory", name, "--target", edge_sidecar.target, "--timeout-s", 30),
    )
    assert done.code == 0
    assert "Who?" not in done.out
    sizes = [LAYERS * len(tokens_of(f"{said}<|end|>")) for said in ("Moses", "Aaron")]
    lines = re.findall(
        r"learnt (\d+) entries; loss of this answer: (\S+) before, (\S+) after", done.err
    )
    assert [int(size) for size, _, _ in lines] == sizes
    assert all(before != after for _, before, after in lines)
    assert done.err.count("what to expect: the memory changes which experts run") == 1
    assert done.err.count("/learn: expected a prompt before it and an answer after it") == 1
    # The second answer took the first one's place, in the memory and in the conversation.
    session = {
        e: o for e, (_, _, o) in stored(edge_sidecar, name, 0).items() if o.source == "session"
    }
    assert len({o.example for o in session.values()}) == 1
    taken = {o.position: o.token for o in session.values()}
    spoken = byte_tokenizer().decode([taken[at] for at in sorted(taken)])
    assert spoken == "]Aaron"


def test_a_session_reads_the_turns_before(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--model", model, "--max-new-tokens", 3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\nWhy?\n/new\nWho?\n"))
    session = run("generate", "--interactive", "--chat", *options)
    first, second, again, _ = session.out.split("\n")
    assert first == again
    so_far = f"[user]Who?<|end|>[assistant]{first}<|end|>[user]Why?<|end|>[assistant]"
    plain = run("generate", "--prompt", so_far, *options)
    assert plain.out.splitlines()[-1].endswith(f"[user]Why?[assistant]{second}")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    lines = run("generate", "--interactive", *options)
    assert "with --chat it is a turn of a conversation" in lines.err


def on_a_terminal(script: str, *words: object) -> str:
    """What somebody sees who runs this script, stdout and stderr on one terminal."""
    screen, terminal = os.openpty()
    command = [sys.executable, "-c", script, *map(str, words)]
    # Under CI, transformers hands its records to the root logger too, and each would be there twice.
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        seen = b""
        try:
            while part := os.read(screen, 4096):
                seen += part
        except OSError:  # Linux's word for a terminal that nobody has open any more
            pass
    os.close(screen)
    assert process.returncode == 0, seen.decode()
    return seen.decode().replace("\r\n", "\n")


def test_no_warning_lands_in_generated_text(model: Path) -> None:
    """Of loggers, of libraries in C++ and of torch, each before a token is chosen."""
    noisy = (
        "import logging, os, warnings\n"
        "from transformers import TextStreamer\n"
        "put = TextStreamer.put\n"
        "def noisy(self, value):\n"
        "    warnings.warn('from Python')\n"
        "    logging.getLogger('transformers.x').warning('from a library')\n"
        "    os.write(2, b'from C++\\n')\n"
        "    put(self, value)\n"
        "TextStreamer.put = noisy\n"
        "from model_runner.cli import main\n"
        "main()\n"
    )
    quiet = "from model_runner.cli import main; main()"
    words = ("generate", "--prompt", "As the hart", "--model", model, "--max-new-tokens", 4)
    text = on_a_terminal(quiet, *words).splitlines()[-1]
    seen = on_a_terminal(noisy, *words)
    before, found, after = seen.partition(text + "\n")
    assert found
    assert [each in before for each in ("from Python", "from a library", "from C++")] == [False] * 3
    assert (after.count("from a library"), after.count("from C++")) == (5, 5)
    assert "from Python" in after
