"""What every call passes before its handler: faults, the API key; and after it: refusals become statuses."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from tests.qdrant_standin.errors import ApiError, unauthenticated, unimplemented
from tests.qdrant_standin.faults import Faults

_OPEN = ("/qdrant.Qdrant/HealthCheck", "/grpc.health.v1.Health/Check")


class ApiKey:
    """The key that callers must have, if there is one."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def check(self, headers: Mapping[str, Any]) -> None:
        """Raises ApiError (UNAUTHENTICATED); names of headers in small letters."""
        if self._key is None:
            return
        key = headers.get("api-key")
        if key is None and headers.get("authorization", "").startswith("Bearer "):
            key = headers["authorization"].removeprefix("Bearer ")
        if key is None:
            raise unauthenticated("Must provide an API key or an Authorization bearer token")
        if not hmac.compare_digest(key.encode(), self._key.encode()):
            raise unauthenticated("Invalid API key or JWT")


class Gate(grpc.ServerInterceptor):
    """Stands before all handlers of a server."""

    def __init__(self, key: ApiKey, faults: Faults) -> None:
        self._key, self._faults = key, faults

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """Wraps the handler of a unary call; methods that nobody has are refused by gRPC itself."""
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                self._faults.before(method, context)
                if method not in _OPEN:
                    self._key.check(dict(metadata))
                return handler.unary_unary(request, context)
            except NotImplementedError:
                refusal = unimplemented(method)
            except ApiError as error:
                refusal = error
            context.set_trailing_metadata(refusal.trailing)
            return context.abort(refusal.code, refusal.text)

        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )
