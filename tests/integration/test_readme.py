"""Every shell and Python block of the README, as it stands there: in order, in one shell, with a real sidecar.

A block that cannot run here says why in the comment before it. The texts are cut after `sample-data` has written them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from model_runner.cli.options import DEFAULT_TARGET

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_BLOCK = re.compile(
    r"(?:^<!-- not run by the tests: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
# Reason -> blocks that are not run.
NOT_RUN = {
    "takes minutes": 1,
    "installs": 4,
    "needs a model hub": 1,
    "needs vLLM": 1,
    "needs a Qdrant server": 1,
}
# Documents of each sample file that are left: the shipped model takes seconds for them.
KEPT_DOCUMENTS = 2
TIMEOUT_S = 580


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason`: why it is not run here."""

    language: str
    text: str
    reason: str | None


BLOCKS = [
    Block(found["language"], found["text"], found["reason"]) for found in _BLOCK.finditer(README)
]


def test_what_is_not_run_says_why() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "python"}
    assert Counter(block.reason for block in BLOCKS if block.reason) == NOT_RUN


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "sh"], ids=lambda b: b.text[:20]
)
def test_every_block_is_a_shell_program(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)


def test_the_python_example_is_no_tour_of_the_package() -> None:
    [example] = [block.text for block in BLOCKS if block.language == "python"]
    assert len(re.findall(r"^(?:from|import) ", example, flags=re.MULTILINE)) <= 2


def test_the_messages_of_the_troubleshooting_table_are_those_of_the_commands() -> None:
    [table] = re.findall(r"^\| Symptom .*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    symptoms = [row.split(" | ")[0] for row in table.splitlines()[2:] if row]
    messages = [
        part
        for row in symptoms
        for text in re.findall("`(.+?)`", row)
        for part in text.split("...")
    ]
    sources = "".join(
        path.read_text()
        for room in ("router_service", "model_runner", "protos/knnmoe")
        for path in (ROOT / room).rglob("*.py")
    )
    missing = [part for part in map(str.strip, messages) if part not in sources]
    assert missing == ["No matching distribution found for knn-moe", "nvidia-"]  # pip's


def _pasted(block: Block, address: str) -> str:
    """A block in the script; Python's in an interpreter of its own."""
    if block.language == "python":
        assert block.text.count(DEFAULT_TARGET) == 1
        return f"python <<'END'\n{block.text.replace(DEFAULT_TARGET, address)}END\n"
    cut = f"sed -i '{KEPT_DOCUMENTS + 1},$d' samples/*.jsonl\n"
    return block.text + (cut if "sample-data" in block.text else "")


@pytest.mark.timeout(TIMEOUT_S + 10)
def test_every_block_runs_as_pasted(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'service.sock'}"
    run = [_pasted(block, address) for block in BLOCKS if not block.reason]
    script = tmp_path / "readme.sh"
    ended = "router-admin stats --json > stats.json\nkill $!\nwait\n"
    script.write_text("\n".join(["set -eu", "trap 'kill $(jobs -p)' ERR", *run, ended]))
    places = ("MODEL_RUNNER_TARGET", "ROUTER_ADMIN_TARGET", "ROUTER_SERVICE_LISTEN")
    environment = os.environ | dict.fromkeys(places, address)
    # Where the console scripts of this interpreter are, and `python` itself.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with subprocess.Popen(
        ["bash", str(script)],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the sidecar too
            raise
    assert process.returncode == 0, said
    assert "Traceback" not in said
    [memory] = json.loads((tmp_path / "stats.json").read_text())["memories"]
    assert memory["memory"] == "bible"
