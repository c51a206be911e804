"""The model runner: hooks a Mixture-of-Experts model's routers up with a routing memory.

    from model_runner import RoutingMemory, load_model

`RoutingMemory` is all that most programs need; the other names are what it is made of. They are the public ones, and
imported when they are first used: importing this package needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_runner.errors import RunnerError
    from model_runner.evaluation.explain import Explanation
    from model_runner.fingerprint import model_fingerprint
    from model_runner.memory import LayerReport, MemoryReport, RoutingMemory
    from model_runner.memory_builder.learner import ExampleReport
    from model_runner.metrics import MemoryMetrics
    from model_runner.models import LoadedModel, load_model
    from model_runner.retrieval import OpenMemory, Retrieval, open_retriever
    from model_runner.router_client import OnError, RouterClient
    from model_runner.router_hooks import RouterHooks
    from model_runner.routing_policy import (
        FellBack,
        Lookups,
        RetrievalPolicy,
        Retrieved,
        Retriever,
    )

__all__ = [
    "ExampleReport",
    "Explanation",
    "FellBack",
    "LayerReport",
    "LoadedModel",
    "Lookups",
    "MemoryMetrics",
    "MemoryReport",
    "OnError",
    "OpenMemory",
    "Retrieval",
    "RetrievalPolicy",
    "Retrieved",
    "Retriever",
    "RouterClient",
    "RouterHooks",
    "RoutingMemory",
    "RunnerError",
    "load_model",
    "model_fingerprint",
    "open_retriever",
]

_HOMES = {
    "ExampleReport": "memory_builder.learner",
    "Explanation": "evaluation.explain",
    "FellBack": "routing_policy",
    "LayerReport": "memory",
    "LoadedModel": "models",
    "Lookups": "routing_policy",
    "MemoryMetrics": "metrics",
    "MemoryReport": "memory",
    "OnError": "router_client",
    "OpenMemory": "retrieval",
    "Retrieval": "retrieval",
    "RetrievalPolicy": "routing_policy",
    "Retrieved": "routing_policy",
    "Retriever": "routing_policy",
    "RouterClient": "router_client",
    "RouterHooks": "router_hooks",
    "RoutingMemory": "memory",
    "RunnerError": "errors",
    "load_model": "models",
    "model_fingerprint": "fingerprint",
    "open_retriever": "retrieval",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
