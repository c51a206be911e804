"""Tiny models compiled under RouterHooks with a replica: one graph, the logits of the model that is not compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from model_runner.architectures.families import Assignment
from model_runner.errors import BadInput
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.router_hooks import RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from router_service.blending import Support
from router_service.memories.settings import Kind, MemorySettings
from tests.families import tiny_model
from tests.replicas import TwinMemory, message, random_copy

LAYERS, HIDDEN, EXPERTS, TOP_K, ENTRIES = 2, 32, 8, 2, 40
DELTAS = MemorySettings(neighbours=4, gamma=(0.05,))
ASSIGNMENTS = MemorySettings(kind=Kind.ASSIGNMENT, neighbours=2, gamma=(0.05,))
LOGITS = MemorySettings(kind=Kind.LOGITS, neighbours=2, gamma=(0.05,))
TOP = MemorySettings(kind=Kind.ASSIGNMENT, neighbours=2, gamma=(0.05,), support=Support.TOP_K)
SETTINGS = pytest.mark.parametrize(
    "settings", [DELTAS, LOGITS, ASSIGNMENTS, TOP], ids=["deltas", "logits", "assignments", "top k"]
)


@functools.cache
def model_of(family: str) -> nn.Module:
    """Of two layers: what takes time here is the compiler."""
    return tiny_model(family, num_hidden_layers=LAYERS)


# Operations whose result the host waits for, or has to know the size of.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


def retriever_of(settings: MemorySettings) -> ReplicaRetriever:
    """Random entries in every layer."""
    copy = random_copy(settings, LAYERS, HIDDEN, EXPERTS, TOP_K, ENTRIES)
    return ReplicaRetriever(copy, EXPERTS)


IDS = torch.arange(1, 13).view(2, 6)


def logits_of(model: Callable[..., Any], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "settings", "backend"),
    [(family, DELTAS, "eager") for family in ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe")]
    + [("gpt_oss", ASSIGNMENTS, "eager")]
    + [("olmoe", DELTAS, "aot_eager"), ("olmoe", TOP, "aot_eager")],
)
def test_one_graph_and_the_same_logits(family: str, settings: MemorySettings, backend: str) -> None:
    """With fullgraph a break is an error."""
    model = model_of(family)
    plain = logits_of(model)
    policy, compiled_policy = (RetrievalPolicy(retriever_of(settings)) for _ in range(2))
    with RouterHooks(model, policy) as hooks:
        eager = logits_of(model)
        hooks.assert_complete()
    with RouterHooks(model, compiled_policy) as hooks:
        found = logits_of(torch.compile(model, backend=backend, fullgraph=True))
        hooks.assert_complete()
        assert hooks.hits == [1] * LAYERS
    assert not torch.allclose(eager, plain, atol=1e-3)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-5)
    for layer, use in policy.use.items():
        assert compiled_policy.use[layer].tokens == use.tokens == IDS.numel()
        assert compiled_policy.use[layer].lambda_sum == pytest.approx(use.lambda_sum, rel=1e-5)


def test_explain_finds_no_break() -> None:
    model = model_of("olmoe")
    with torch.no_grad(), RouterHooks(model, RetrievalPolicy(retriever_of(DELTAS))):
        explained = torch._dynamo.explain(model)(input_ids=IDS, use_cache=False)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_a_compiled_model_runs_within_other_hooks_and_without() -> None:
    model = model_of("olmoe")
    plain, policy = logits_of(model), RetrievalPolicy(retriever_of(ASSIGNMENTS))
    with RouterHooks(model, policy):
        compiled = torch.compile(model, backend="eager")
        first = logits_of(compiled)
    torch.testing.assert_close(logits_of(compiled), plain, rtol=0, atol=1e-5)
    other = retriever_of(ASSIGNMENTS)
    for layer in other.copy.layers.values():
        layer.stage_deletion(np.arange(ENTRIES // 2, dtype=np.uint64))
        layer.commit()
    with RouterHooks(model, RetrievalPolicy(other)):
        expected = logits_of(model)
        found = logits_of(compiled)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, first, atol=1e-4)
    with RouterHooks(model, policy):
        torch.testing.assert_close(logits_of(compiled), first, rtol=0, atol=1e-5)


def test_another_width_than_was_compiled_is_refused() -> None:
    model, retriever = model_of("olmoe"), retriever_of(ASSIGNMENTS)
    with RouterHooks(model, RetrievalPolicy(retriever)):
        compiled = torch.compile(model, backend="eager")
        logits_of(compiled)
        retriever.copy.settings = message(MemorySettings(kind=Kind.ASSIGNMENT, neighbours=1))
        with pytest.raises(BadInput, match=r"compiled for 6 experts .* have 4 now .*reset\(\)"):
            logits_of(compiled)


@SETTINGS
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_static_cache_gives_the_text_of_a_growing_one(
    family: str, settings: MemorySettings
) -> None:
    model, policy = model_of(family), RetrievalPolicy(retriever_of(settings))
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0}
    made = []
    for cache in ("dynamic", "static"):
        with torch.no_grad(), RouterHooks(model, policy) as hooks:
            made.append(model.generate(IDS, cache_implementation=cache, **options))
            hooks.assert_complete()
    assert torch.equal(made[0].sequences, made[1].sequences)
    torch.testing.assert_close(made[1].logits, made[0].logits, rtol=0, atol=1e-5)


@SETTINGS
def test_a_lookup_waits_for_nothing(
    settings: MemorySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, without what is for CPUs. It is traced with numbers that nobody has: what looks at one raises."""
    monkeypatch.setattr("model_runner.replica.search.faiss", lambda: None)
    monkeypatch.setattr("model_runner.replica.native.ready", lambda: None)
    layer, twin = 1, TwinMemory(settings, HIDDEN, EXPERTS, TOP_K, ENTRIES)
    inputs, logits, own = twin.tokens(5)

    def lookup(inputs: Tensor, logits: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        valid = inputs[:, 0] == inputs[:, 0]
        found = twin.retriever.lookup(
            layer, inputs, logits, Assignment(weights, experts), valid=valid
        )
        return found.counts

    traced = make_fx(lookup, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = traced(inputs, logits, own.weights, own.experts).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.index_add_.default" in called
    assert not {name for name in called if WAITING.intersection(name.split("."))}


def test_the_tensors_of_a_layer_stay_where_they_are() -> None:
    """Over lookups and commits: what a CUDA graph has captured."""
    twin = TwinMemory(DELTAS, HIDDEN, EXPERTS, TOP_K, ENTRIES)
    layer = twin.copy.layers[1]
    layer.reserve(ENTRIES)
    names = ["keys", "squared_norms", "values", "examples", "hits", "counts"]
    before = [getattr(layer, name).data_ptr() for name in names]
    for number in range(ENTRIES // 4):
        ids = np.arange(4 * number, 4 * number + 4, dtype=np.uint64)
        keys, values = torch.randn(4, HIDDEN), torch.randn(4, EXPERTS)
        layer.stage(ids, keys, None, values, ids.astype(np.int64), ids)
        layer.commit()
        twin.retriever.lookup(1, *twin.tokens(3))
    layer.take_hits(), layer.take_counts()
    assert [getattr(layer, name).data_ptr() for name in names] == before
