"""The model that ships, and the example that serves it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from examples.vllm import serve_and_ask
from model_runner.models import load_model
from model_runner.small_moe import MODEL_DIR, data_file
from model_runner.texts import read_windows
from tests.vllm.ask import apart, ask, engine
from tests.vllm.models import Checkpoint, written

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

ROOT = Path(__file__).parents[2]
TOLERANCE = 2e-5


def test_the_shipped_model_is_what_it_is_in_transformers() -> None:
    loaded = load_model(str(MODEL_DIR), device="cpu", dtype="float32")
    windows = read_windows(data_file("shifted", "test"), loaded.tokenizer, 128)[:4]
    texts = [list(window.token_ids) for window in windows]
    model = Checkpoint("olmoe", MODEL_DIR, loaded.model, loaded.fingerprint)
    with engine(MODEL_DIR, None) as llm:
        served = ask(llm, texts)
    assert apart(served, written(model, texts)) < TOLERANCE


@pytest.mark.parametrize(
    ("body", "said"), [('{"knn_moe": {"hooked": 3}}', "does not serve"), ("{}", None)]
)
def test_a_503_of_the_plug_in_is_not_waited_for(body: str, said: str | None) -> None:
    """vLLM's own passes."""

    class Unwell(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(body.encode())

    with HTTPServer(("127.0.0.1", 0), Unwell) as server:
        Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}"
        if said is None:
            assert not serve_and_ask._answers_health(url)
        else:
            with pytest.raises(SystemExit, match=said):
                serve_and_ask._answers_health(url)


def test_the_example_serves_asks_and_ends_on_ctrl_c() -> None:
    command = [sys.executable, "-m", "examples.vllm.serve_and_ask", "--port", "0"]
    command += ["--windows", "24", "--texts", "4"]
    example = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT
    )
    assert example.stdout is not None
    said = ""
    while "Ctrl-C ends it" not in said:
        line = example.stdout.readline()
        assert line, said
        said += line
    os.killpg(example.pid, signal.SIGINT)
    rest, _ = example.communicate()
    assert (example.returncode, rest) == (0, "ended\n")
    assert "hooked 4 of 4 layers" in said
    plain, remembered = map(float, re.findall(r"held out +(-[\d.]+) +(-[\d.]+) +0/16", said)[0])
    assert remembered > plain
