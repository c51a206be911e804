"""Beside the OpenAI server of vLLM: what a request's body says of memories, and what is shown of them.

    {"model": "base", "prompt": ..., "knn_moe": {"memory": "law", "report": true}}     or     {"model": "base@law", ...}

`report`: the answer has a field `knn_moe` (in a stream an event before the last one) with its lookups, and those that
fell back. `strict`: an answer of which a lookup fell back becomes an error with status 503. `GET /knn_moe`, `/health`
and `/metrics` show what is hooked. The plug-in adds it by itself, and so does `--middleware` with this class's path.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from knnmoe.fingerprint import ModelFingerprint

from model_runner.errors import BadInput
from model_runner.vllm.admission import Admission
from model_runner.vllm.config import KEY, Config, checked, configured

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OBJECTS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat.completion.chunk"}
_FIELDS = ("memory", "report", "strict")
_DONE = b"data: [DONE]"


class Middleware:
    """ASGI middleware. Without a configured memory it refuses requests that name one, and nothing else changes."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._admission: Admission | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI."""
        handle = None
        # By itself and by --middleware it is there twice.
        if scope["type"] == "http" and KEY not in scope:
            scope[KEY] = True
            handle = self._handler(scope)
        await (handle or self._app)(scope, receive, send)

    def _handler(self, scope: Message) -> App | None:
        if scope["method"] == "POST":
            return self._completed if _is_json(scope) else None
        shown = {f"/{KEY}": self._status, "/health": self._health, "/metrics": self._metrics}
        return shown.get(scope["path"]) if _engine(scope).config is not None else None

    async def _completed(self, scope: Message, receive: Receive, send: Send) -> None:
        body, raw = await _body(receive)
        engine = _engine(scope)
        if not isinstance(body, dict) or (engine.config is None and KEY not in body):
            await self._app(scope, _replayed(raw, receive), send)
            return
        try:
            asked = _asked(body, scope["path"], engine)
            if asked is not None and asked.memory is not None:
                await self._admit(asked.memory, engine)
        except BadInput as error:
            await _answer(send, 400, _error(str(error), 400))
            return
        if asked is None:
            await self._app(scope, _replayed(raw, receive), send)
            return
        raw = json.dumps(body).encode()
        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        answer = send
        if asked.report or asked.strict:
            answer = _Reported(send, engine, asked).send
        await self._app(scope, _replayed(raw, receive), answer)

    async def _admit(self, memory: str, engine: _Engine) -> None:
        """Raises BadInput for a memory that was replaced or deleted since the server started."""
        if self._admission is None:
            model = (await engine.status()).get("model")
            if engine.config is None or model is None:  # /health says why
                return
            self._admission = Admission(engine.config, ModelFingerprint(**model))
        await asyncio.to_thread(self._admission.require, memory)

    async def _status(self, scope: Message, receive: Receive, send: Send) -> None:
        status = await _engine(scope).status()
        await _answer(send, 200 if _is_well(status) else 503, status)

    async def _health(self, scope: Message, receive: Receive, send: Send) -> None:
        status = await _engine(scope).status()
        if _is_well(status):
            await self._app(scope, receive, send)
        else:
            await _answer(send, 503, {KEY: status})

    async def _metrics(self, scope: Message, receive: Receive, send: Send) -> None:
        lines = "".join(
            f"{line}\n" for line in metric_lines(await _engine(scope).status())
        ).encode()

        async def more(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(k, v) for k, v in message["headers"] if k != b"content-length"]
                message = {**message, "headers": headers}
            elif not message.get("more_body"):
                message = {**message, "body": message.get("body", b"") + lines}
            await send(message)

        plain = [(k, v) for k, v in scope["headers"] if k != b"accept-encoding"]
        await self._app({**scope, "headers": plain}, receive, more)


@dataclass(frozen=True, slots=True)
class _Engine:
    """vLLM's engine as a front end reaches it. Attributes: names: of the model."""

    client: Any
    config: Config | None
    names: tuple[str, ...]

    async def status(self) -> dict[str, Any]:
        """Serving.status; with `error` when the plug-in is not at work in the worker."""
        return await self._called("knn_moe_status")

    async def report(self, tag: str) -> dict[str, Any]:
        """Serving.report."""
        return await self._called("knn_moe_report", tag)

    async def _called(self, method: str, *args: Any) -> dict[str, Any]:
        try:
            found: dict[str, Any] = (await self.client.collective_rpc(method, args=args))[0]
        except Exception as error:  # noqa: BLE001  # whatever it is, it is shown
            return {"error": f"{type(error).__name__}: {error}", "lookups": 0, "fell_back": 0}
        return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """Of one request.

    Attributes:
        memory: one that is served, or None; what is wrong with another one is said by the engine's front end.
        tag: its lookups are counted under it.
        frame: of an event in a stream.

    """

    memory: str | None
    tag: str
    report: bool
    strict: bool
    frame: dict[str, Any]


class _Reported:
    """Sends an answer with what its lookups came to."""

    def __init__(self, send: Send, engine: _Engine, asked: _Asked) -> None:
        self._send, self._engine, self._asked = send, engine, asked
        self._start: Message = {}
        self._body = b""

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self._start = message
            if self._streams or message["status"] != 200:
                await self._send(message)
        elif self._start["status"] != 200:
            await self._send(message)
        elif self._streams:
            if _DONE in message.get("body", b""):
                event = json.dumps(await self._event()).encode()
                await self._send(
                    {**message, "body": b"data: " + event + b"\n\n", "more_body": True}
                )
            await self._send(message)
        else:
            await self._whole(message)

    async def _whole(self, message: Message) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        report = await self._engine.report(self._asked.tag)
        if self._fails(report):
            await _answer(self._send, 503, _error(_why(report), 503))
            return
        answer = json.loads(self._body)
        await _answer(self._send, 200, {**answer, KEY: report} if self._asked.report else answer)

    async def _event(self) -> dict[str, Any]:
        report = await self._engine.report(self._asked.tag)
        if self._fails(report):
            return _error(_why(report), 503)
        shown = {KEY: report} if self._asked.report else {}
        return {**self._asked.frame, "choices": [], **shown}

    def _fails(self, report: dict[str, Any]) -> bool:
        return self._asked.strict and (report["fell_back"] > 0 or "error" in report)

    @property
    def _streams(self) -> bool:
        return any(
            k.lower() == b"content-type" and v.startswith(b"text/event-stream")
            for k, v in self._start["headers"]
        )


def _engine(scope: Message) -> _Engine:
    client = getattr(scope["app"].state, "engine_client", None)
    if client is None:  # a server that only renders
        return _Engine(None, None, ())
    vllm_config = client.vllm_config
    names = vllm_config.model_config.served_model_name
    return _Engine(
        client,
        configured(vllm_config.additional_config),
        (names,) if isinstance(names, str) else tuple(names or ()),
    )


def _asked(body: dict[str, Any], path: str, engine: _Engine) -> _Asked | None:
    """What a body asks for, which becomes one that vLLM knows; None: it says nothing of memories. Raises BadInput."""
    given = body.pop(KEY, None)
    if path not in _OBJECTS:
        if given is not None:
            raise BadInput(f"{KEY}: got it at {path}, expected at {' or '.join(_OBJECTS)}")
        return None
    if engine.config is None:
        raise BadInput(f"{KEY}: got {given!r}, and this server serves no memory")
    fields = _checked(given)
    named = _named(body, engine)
    if named is not None and fields.setdefault("memory", named) != named:
        raise BadInput(
            f"{KEY}: got memory {fields['memory']!r} and model {named!r} behind @, expected one"
        )
    report, strict = fields.pop("report", False), fields.pop("strict", engine.config.strict)
    tag = uuid.uuid4().hex
    xargs = body.get("vllm_xargs") or {}
    if not isinstance(xargs, dict) or KEY in xargs:
        raise BadInput(f"vllm_xargs: got {xargs!r}, expected an object, and {KEY} beside it")
    body["vllm_xargs"] = {**xargs, KEY: json.dumps({**fields, "tag": tag})}
    frame = {
        "id": tag,
        "object": _OBJECTS[path],
        "created": int(time.time()),
        "model": body.get("model"),
    }
    memory = fields.get("memory", engine.config.memory)
    return _Asked(memory if memory in engine.config.served else None, tag, report, strict, frame)


def _checked(given: Any) -> dict[str, Any]:
    fields = {} if given is None else checked(given, _FIELDS)
    for name in ("report", "strict"):
        if not isinstance(fields.get(name, False), bool):
            raise BadInput(f"{KEY}.{name}: got {fields[name]!r}, expected true or false")
    return fields


def _named(body: dict[str, Any], engine: _Engine) -> str | None:
    """The memory in the model's name, `base@law`, which becomes `base`."""
    model = body.get("model")
    base, at, memory = model.rpartition("@") if isinstance(model, str) else ("", "", "")
    if not at or model in engine.names or base not in engine.names:
        return None
    body["model"] = base
    return memory


def _is_json(scope: Message) -> bool:
    return any(
        k == b"content-type" and v.startswith(b"application/json") for k, v in scope["headers"]
    )


def _is_well(status: dict[str, Any]) -> bool:
    return "error" not in status and status["hooked"] == status["layers"] > 0


def _why(report: dict[str, Any]) -> str:
    reasons = report.get("error") or ", ".join(f"{n} {why}" for why, n in report["reasons"].items())
    return (
        f"{report['fell_back']} of {report['lookups']} lookups in the memory fell back: {reasons}"
    )


def metric_lines(status: dict[str, Any]) -> Iterator[str]:
    """Of Prometheus, from Serving.status."""
    yield f"knnmoe_model_layers {status.get('layers', 0)}"
    yield f"knnmoe_model_hooked_layers {status.get('hooked', 0)}"
    for name, memory in status.get("memories", {}).items():
        label = f'memory="{_escaped(name)}"'
        yield f"knnmoe_model_lookups_total{{{label}}} {memory['lookups']}"
        for reason, number in memory["fell_back"].items():
            yield f'knnmoe_fallback_total{{{label},reason="{reason}"}} {number}'
        if memory["staleness_s"] is not None:
            yield f"knnmoe_model_staleness_seconds{{{label}}} {memory['staleness_s']:g}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _error(message: str, code: int) -> dict[str, Any]:
    kind = "BadRequestError" if code == 400 else "ServiceUnavailableError"
    return {"error": {"message": message, "type": kind, "param": KEY, "code": code}}


async def _body(receive: Receive) -> tuple[Any, bytes]:
    """As JSON, None where it is none, and as it came."""
    raw, more = b"", True
    while more:
        message = await receive()
        raw += message.get("body", b"")
        more = message.get("more_body", False)
    try:
        return json.loads(raw), raw
    except ValueError:
        return None, raw


def _replayed(raw: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()  # that the client has left
        given = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return again


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    raw = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
