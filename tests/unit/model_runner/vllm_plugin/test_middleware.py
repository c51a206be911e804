"""What the middleware makes of a request's body, in front of an application of its own."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from model_runner.vllm.http import Middleware

MODEL = SimpleNamespace(served_model_name="base")
ENGINE = SimpleNamespace(model_config=MODEL, additional_config={"knn_moe": {"memories": ["law"]}})


class Application:
    """Answers 200 and keeps the bodies that it got."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=ENGINE))
        self.got = list[dict[str, Any]]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.got.append(json.loads((await receive())["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def post(application: Application, times: int = 1, **body: Any) -> tuple[int, str]:
    """Status and body, through the middleware `times` over."""
    layered: Any = application
    for _ in range(times):
        layered = Middleware(layered)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "app": application,
        "headers": [(b"content-type", b"application/json")],
    }
    sent = list[Any]()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps({"model": "base", **body}).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(layered(scope, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


@pytest.mark.parametrize("times", [1, 2])
def test_a_memory_reaches_the_engine_however_often_it_is_added(times: int) -> None:
    application = Application()
    assert post(application, times, knn_moe={"memory": "law"}, vllm_xargs={"a": 1})[0] == 200
    [body] = application.got
    assert "knn_moe" not in body
    assert body["vllm_xargs"]["a"] == 1
    assert json.loads(body["vllm_xargs"]["knn_moe"])["memory"] == "law"


@pytest.mark.parametrize("xargs", [{"knn_moe": '{"memory": "code"}'}, "law"])
def test_a_memory_in_vllms_own_field_is_not_overwritten_without_a_word(xargs: Any) -> None:
    application = Application()
    status, text = post(application, vllm_xargs=xargs)
    assert (status, application.got) == (400, [])
    assert "vllm_xargs: got" in text
