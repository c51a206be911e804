"""A replica's answers against the service's own arithmetic over the NumPy oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from knnmoe.client import ClientClosed, ExampleRef, MemoryNotFound, ServiceUnavailable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model_runner.architectures.families import Assignment
from model_runner.replica import native
from model_runner.replica.retriever import ReplicaRetriever
from model_runner.router_hooks import Logits
from model_runner.routing_policy import FellBack, Retrieved
from router_service.blending import Support, scatter_dense
from router_service.memories.settings import Kind, MemorySettings, Similarity
from tests.replicas import TwinMemory

D, EXPERTS, TOP_K = 24, 16, 3
DELTAS, ASSIGNMENTS = Kind.LOGIT_DELTA, Kind.ASSIGNMENT


@pytest.fixture(autouse=True, params=["torch", "compiled"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what lookups on the CPU are computed."""
    if request.param == "torch":
        monkeypatch.setattr(native, "ready", lambda: None)
    elif native.compiled() is None:
        pytest.skip("nothing is compiled for this CPU")


def settings_of(
    kind: Kind = DELTAS,
    similarity: Similarity = Similarity.RBF,
    neighbours: int = 3,
    **more: object,
) -> MemorySettings:
    named = {"gamma": (1.0, 0.05), "step_size": (9.0, 1.5), "null_weight": 0.5} | more
    return MemorySettings(kind=kind, similarity=similarity, neighbours=neighbours, **named)


def twin(settings: MemorySettings, entries: int = 150, **more: object) -> TwinMemory:
    return TwinMemory(settings, D, EXPERTS, TOP_K, entries, **more)


def dense(experts: Tensor, weights: Tensor) -> np.ndarray:
    return scatter_dense(experts.int().numpy(), weights.float().numpy(), EXPERTS)


def assert_same(
    found: Retrieved | FellBack, memory: TwinMemory, tokens: tuple, exclude=None
) -> None:
    """Within 1e-5 of the service's answer."""
    assert isinstance(found, Retrieved)
    expected, (_, logits, own) = memory.routed(*tokens, exclude=exclude), tokens
    np.testing.assert_allclose(found.lambdas.numpy(), expected.lambdas, rtol=0, atol=1e-5)
    assert found.abstained.numpy().tolist() == (expected.abstained != 0).tolist()
    if found.blended is None or expected.blended is None:
        assert expected.blended is None
        stands = found.blended or (Logits(logits) if memory.settings.kind.blends_logits else own)
    else:
        stands = found.blended
    if isinstance(stands, Logits):
        wanted = logits.numpy() if expected.blended is None else expected.blended
        np.testing.assert_allclose(stands.router_logits.numpy(), wanted, rtol=0, atol=1e-5)
    elif expected.blended is None:
        np.testing.assert_array_equal(
            dense(stands.experts, stands.weights), dense(own.experts, own.weights)
        )
    else:
        assert stands.experts.shape == expected.blended.experts.shape
        wanted = scatter_dense(expected.blended.experts, expected.blended.weights, EXPERTS)
        np.testing.assert_allclose(dense(stands.experts, stands.weights), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 37, 2048])
@pytest.mark.parametrize("neighbours", [1, 3, 32])
@pytest.mark.parametrize("similarity", Similarity)
@pytest.mark.parametrize("kind", Kind)
def test_as_the_service(kind: Kind, similarity: Similarity, neighbours: int, tokens: int) -> None:
    memory = twin(settings_of(kind, similarity, neighbours))
    asked = memory.tokens(tokens)
    assert_same(memory.retriever.lookup(1, *asked), memory, asked)


VARIANTS = {
    "union": settings_of(ASSIGNMENTS, neighbours=2),
    "union of all": settings_of(ASSIGNMENTS, neighbours=8),
    "top k": settings_of(ASSIGNMENTS, neighbours=2, support=Support.TOP_K),
    "some too far": settings_of(min_lambda=0.3),
    "some too far, assignments": settings_of(ASSIGNMENTS, min_lambda=0.2, support=Support.TOP_K),
    "no null neighbour": settings_of(null_weight=0.0, gamma=(3.0,)),
    "all too far": settings_of(ASSIGNMENTS, gamma=(1e6,), min_lambda=0.5),
    "wide gamma": settings_of(gamma=(1e300,)),
    "small gamma": settings_of(gamma=(1e-300,)),
    "some too far, logits": settings_of(Kind.LOGITS, min_lambda=0.2),
    "all too far, logits": settings_of(Kind.LOGITS, gamma=(1e6,), min_lambda=0.5),
    "layer off, logits": settings_of(Kind.LOGITS, layers=(0, 2)),
    "layer off": settings_of(layers=(0, 2)),
    "layer on": settings_of(layers=(0, 1)),
}


@pytest.mark.parametrize("entries", [0, 2, 150])
@pytest.mark.parametrize("name", VARIANTS)
def test_settings(name: str, entries: int) -> None:
    memory = twin(VARIANTS[name], entries)
    asked = memory.tokens(12)
    assert_same(memory.retriever.lookup(1, *asked), memory, asked)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_token_at_a_time_as_all_at_once(name: str) -> None:
    """Lambda, abstention, routing, counts and hits, also of what is padding or not finite."""
    memory = twin(VARIANTS[name])
    layer = memory.copy.layers.get(1)
    inputs, logits, own = memory.tokens(12)
    inputs[2, 5], logits[3, 1], inputs[4] = torch.nan, torch.inf, torch.nan
    valid = torch.arange(12) != 4
    whole = memory.retriever.lookup(1, inputs, logits, own, valid=valid)
    hits, counts = (None, None) if layer is None else (layer.take_hits(), layer.take_counts())
    policy_counts = torch.zeros(4, dtype=torch.float64)
    for token in range(12):
        one = slice(token, token + 1)
        mine = Assignment(own.weights[one], own.experts[one])
        found = memory.retriever.lookup(1, inputs[one], logits[one], mine, valid=valid[one])
        torch.testing.assert_close(found.lambdas, whole.lambdas[one], rtol=0, atol=1e-6)
        assert torch.equal(found.abstained, whole.abstained[one])
        assert_same_routing(found, whole, token, (logits[one], mine))
        policy_counts += found.counts
    torch.testing.assert_close(policy_counts, whole.counts)
    if layer is not None:
        one_by_one = layer.take_hits()
        assert dict(zip(*map(np.ndarray.tolist, one_by_one), strict=True)) == dict(
            zip(*map(np.ndarray.tolist, hits), strict=True)
        )
        assert layer.take_counts()[1:] == pytest.approx(counts[1:])


def assert_same_routing(
    found: Retrieved, whole: Retrieved, token: int, own: tuple[Tensor, Assignment]
) -> None:
    """Of one token, alone and among others; None: its own stands."""
    one = slice(token, token + 1)
    if whole.blended is None:
        assert found.blended is None
    elif isinstance(whole.blended, Logits):
        mine = own[0] if found.blended is None else found.blended.router_logits
        theirs = whole.blended.router_logits[one]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5, equal_nan=True)
    else:
        mine = own[1] if found.blended is None else found.blended
        theirs = Assignment(whole.blended.weights[one], whole.blended.experts[one])
        np.testing.assert_allclose(
            dense(mine.experts, mine.weights), dense(theirs.experts, theirs.weights), atol=1e-5
        )


class Operations(TorchDispatchMode):
    """Attributes: seen: torch's operations within it, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("neighbours", [1, 32])
def test_one_token_takes_few_operations(neighbours: int) -> None:
    """Each of them costs a decoding model 10 to 25 us, since nothing of it is in a cache."""
    memory = twin(settings_of(neighbours=neighbours))
    asked = memory.tokens(1)
    memory.retriever.lookup(1, *asked)
    with Operations() as operations:
        memory.retriever.lookup(1, *asked)
    assert len(operations.seen) <= 14, operations.seen


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("exclude", [["2"], ["0", "4"], ["0", "unknown", "3"]])
def test_examples_left_out(kind: Kind, exclude: list[str]) -> None:
    memory = twin(settings_of(kind))
    asked = memory.tokens(12)
    refs = [ExampleRef("text", name) for name in exclude]
    found = memory.retriever.lookup(1, *asked, exclude=refs)
    assert_same(found, memory, asked, exclude)
    assert not torch.equal(found.lambdas, memory.retriever.lookup(1, *asked).lambdas)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_or_padding_keeps_its_own_routing(
    kind: Kind, where: int, value: float
) -> None:
    memory = twin(settings_of(kind, support=Support.TOP_K))
    asked = inputs, logits, own = memory.tokens(6)
    whole = memory.retriever.lookup(1, *asked)
    asked[where][2, 5] = value
    inputs[4] = torch.nan  # padding may hold anything
    valid = torch.tensor([True, True, True, True, False, False])
    found = memory.retriever.lookup(1, *asked, valid=valid)
    left_out, stays = [2, 4, 5], [0, 1, 3]
    assert found.lambdas[left_out].tolist() == [0, 0, 0]
    assert found.abstained[left_out].tolist() == [False] * 3
    assert torch.equal(found.lambdas[stays], whole.lambdas[stays])
    if isinstance(found.blended, Logits):
        torch.testing.assert_close(
            found.blended.router_logits[left_out], logits[left_out], rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(found.blended.router_logits[stays], whole.blended.router_logits[stays])
    else:
        assert torch.equal(found.blended.experts[left_out], own.experts[left_out])
        assert torch.equal(found.blended.weights[left_out], own.weights[left_out])
        assert torch.equal(found.blended.weights[stays], whole.blended.weights[stays])
    abstained, lambda_sum = int(whole.abstained[stays].sum()), float(whole.lambdas[stays].sum())
    assert found.counts.tolist() == [3, abstained, 1, pytest.approx(lambda_sum)]


def test_a_router_input_without_direction() -> None:
    memory = twin(settings_of(similarity=Similarity.COSINE))
    inputs, logits, own = memory.tokens(2)
    inputs[0] = 0
    found = memory.retriever.lookup(1, inputs, logits, own)
    assert found.counts[:3].tolist() == [1, float(found.abstained[1]), 1]
    assert torch.equal(found.blended.router_logits[0], logits[0])


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(kind: Kind, dtype: torch.dtype) -> None:
    """Its numbers are exact in f32, so that the answer is too; logits come back in its dtype."""
    memory = twin(settings_of(kind))
    inputs, logits, own = memory.tokens(9)
    small = inputs.to(dtype), logits.to(dtype), Assignment(own.weights.to(dtype), own.experts)
    wide = small[0].float(), small[1].float(), Assignment(small[2].weights.float(), own.experts)
    found, exact = memory.retriever.lookup(1, *small), memory.retriever.lookup(1, *wide)
    assert torch.equal(found.lambdas, exact.lambdas)
    if isinstance(found.blended, Logits):
        assert torch.equal(found.blended.router_logits, exact.blended.router_logits.to(dtype))
    else:
        assert torch.equal(found.blended.weights, exact.blended.weights)


def test_hits_are_those_of_the_service() -> None:
    memory = twin(settings_of(neighbours=5, min_lambda=0.1))
    for seed in range(3):
        asked = memory.tokens(40, seed)
        memory.retriever.lookup(1, *asked)
        memory.routed(*asked)
    ids, hits = memory.copy.layers[1].take_hits()
    counted = memory.service.hits.counts()
    expected = dict(zip(counted.ids.tolist(), counted.hits.tolist(), strict=True))
    assert dict(zip(ids.tolist(), hits.tolist(), strict=True)) == expected
    lookups, tokens, abstained, lambda_sum = memory.copy.layers[1].take_counts()
    of_service = memory.service.counters.read()
    assert (lookups, tokens, abstained) == (3, of_service.tokens, sum(of_service.abstained))
    assert lambda_sum == pytest.approx(of_service.lambda_sum)


def test_other_settings_count_from_the_next_lookup_on() -> None:
    memory = twin(settings_of())
    asked = memory.tokens(5)
    before = memory.retriever.lookup(1, *asked)
    other = twin(settings_of(neighbours=1, null_weight=3.0))
    memory.copy.settings = other.copy.settings
    assert not torch.equal(memory.retriever.lookup(1, *asked).lambdas, before.lambdas)
    assert_same(memory.retriever.lookup(1, *asked), other, asked)


def test_what_cannot_be_used_falls_back_or_raises() -> None:
    memory = twin(settings_of())
    asked = memory.tokens(2)
    stale = ServiceUnavailable("old", reason="replica_stale")
    closed = ClientClosed("closed")
    obstacles: list[Exception | None] = [None]

    def retriever(on_error: str) -> ReplicaRetriever:
        return ReplicaRetriever(
            memory.copy, EXPERTS, obstacle=lambda: obstacles[0], on_error=on_error
        )

    lenient, strict = retriever("fall_back"), retriever("raise")
    assert isinstance(lenient.lookup(1, *asked), Retrieved)
    for obstacles[0], reason in ((stale, "replica_stale"), (MemoryNotFound("gone"), "unknown")):
        assert lenient.lookup(1, *asked) == FellBack(reason)
        with pytest.raises(type(obstacles[0])):
            strict.lookup(1, *asked)
    obstacles[0] = closed
    for either in (lenient, strict):
        with pytest.raises(ClientClosed):
            either.lookup(1, *asked)
    obstacles[0], memory.copy.complete = None, False
    assert lenient.lookup(1, *asked) == FellBack("replica_incomplete")
    with pytest.raises(ServiceUnavailable, match="copied anew"):
        strict.lookup(1, *asked)
    with pytest.raises(ServiceUnavailable, match="copied anew"):
        lenient.nearest_similarities(1, *asked, exclude=[])
    memory.copy.complete = True
    assert lenient.lookup(0, *asked) == FellBack("replica_incomplete")  # a layer that is not there


@pytest.mark.parametrize("variant", [settings_of(), settings_of(ASSIGNMENTS), VARIANTS["top k"]])
def test_the_width_of_an_answer_is_known_beforehand(variant: MemorySettings) -> None:
    memory = twin(variant)
    width = memory.retriever.width(TOP_K)
    blended = memory.retriever.lookup(1, *memory.tokens(2)).blended
    if isinstance(blended, Assignment):
        assert blended.experts.shape[1] == width
    else:
        assert width == TOP_K
    memory.copy.complete = False
    assert memory.retriever.width(TOP_K) is None


def test_gradients_do_not_flow_through_a_lookup() -> None:
    memory = twin(replace(settings_of(), neighbours=1))
    inputs, logits, own = memory.tokens(2)
    found = memory.retriever.lookup(1, inputs.requires_grad_(), logits.requires_grad_(), own)
    assert not found.blended.router_logits.requires_grad
