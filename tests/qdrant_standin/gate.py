"""What every call passes before its handler: faults, the API key; and after it: refusals become statuses."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import grpc

from tests.qdrant_standin.errors import ApiError, unauthenticated, unimplemented
from tests.qdrant_standin.faults import Faults

_OPEN = ("/qdrant.Qdrant/HealthCheck", "/grpc.health.v1.Health/Check")


class Gate(grpc.ServerInterceptor):
    """Stands before all handlers of a server."""

    def __init__(self, api_key: str | None, faults: Faults) -> None:
        self._api_key, self._faults = api_key, faults

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
                self._check_key(method, dict(metadata))
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

    def _check_key(self, method: str, metadata: dict[str, Any]) -> None:
        if self._api_key is None or method in _OPEN:
            return
        key = metadata.get("api-key")
        if key is None and metadata.get("authorization", "").startswith("Bearer "):
            key = metadata["authorization"].removeprefix("Bearer ")
        if key is None:
            raise unauthenticated("Must provide an API key or an Authorization bearer token")
        if not hmac.compare_digest(key.encode(), self._api_key.encode()):
            raise unauthenticated("Invalid API key or JWT")
