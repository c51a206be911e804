"""The model runner against real services: what a memory changes, and what it must not."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from knnmoe.client import (
    AdminClient,
    ClientClosed,
    ExampleRef,
    MemoryNotFound,
    ModelMismatch,
    ServiceRefused,
)
from knnmoe.v1.types_pb2 import SUPPORT_TOP_K, MemorySettings

from model_runner.architectures import Assignment
from model_runner.architectures.discovery import find_router_sites
from model_runner.evaluation.nll import difference
from model_runner.fingerprint import model_fingerprint
from model_runner.memory_builder.builder import collect_router_inputs
from model_runner.memory_builder.recipes import PRESETS
from model_runner.router_client import CircuitBreaker, OnError, RouterClient
from model_runner.router_hooks import Logits, RouterCall, RouterHooks
from model_runner.routing_policy import RetrievalPolicy
from model_runner.scoring import score
from model_runner.wire import encode_by_layer
from router_service.memories.calibration import COPY_SHARE
from tests.integration.runner_parts import (
    LAYERS,
    PRESET_NAMES,
    QUIET,
    SENTENCES,
    Recorder,
    build,
    client_of,
    generate,
    loaded_model,
    prefill,
    scored,
    stored,
    windows_of,
)
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import byte_model

PRESET = pytest.mark.parametrize("preset", PRESET_NAMES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module", params=PRESET_NAMES)
def built(request: pytest.FixtureRequest, edge_sidecar: Sidecar) -> str:
    """A filled memory of each kind, calibrated inside itself."""
    name = f"built-{request.param}"
    build(edge_sidecar.target, name, request.param)
    with AdminClient(edge_sidecar.target) as client:
        client.calibrate(name, PRESETS[request.param].lambda0)
    return name


def create(sidecar: Sidecar, name: str, preset: str) -> None:
    with AdminClient(sidecar.target) as client:
        client.find_or_create(
            name, loaded_model().fingerprint.message(), PRESETS[preset].settings(LAYERS)
        )


def update(sidecar: Sidecar, name: str, **settings: object) -> None:
    with AdminClient(sidecar.target) as client:
        client.update_settings(name, MemorySettings(**settings))


def assert_as_plain(sidecar: Sidecar, name: str, dtype: torch.dtype) -> None:
    """Prefill and generation with the memory are those of the plain model, bit for bit."""
    model = loaded_model(dtype).model
    with client_of(sidecar.target, name) as client:
        policy = RetrievalPolicy(client)
        assert torch.equal(prefill(model, policy), prefill(model))
        for routed, plain in zip(generate(model, policy), generate(model), strict=True):
            assert torch.equal(routed, plain)
    assert all(use.tokens == use.abstained > 0 for use in policy.use.values())
    assert len(policy.use) == LAYERS


@DTYPE
@PRESET
def test_an_empty_memory_changes_nothing(
    edge_sidecar: Sidecar, name: str, preset: str, dtype: torch.dtype
) -> None:
    create(edge_sidecar, name, preset)
    assert_as_plain(edge_sidecar, name, dtype)


@DTYPE
@PRESET
def test_a_memory_with_nothing_close_changes_nothing(
    edge_sidecar: Sidecar, name: str, preset: str, dtype: torch.dtype
) -> None:
    build(edge_sidecar.target, name, preset, windows=windows_of(["Zeal for thine house."]))
    update(edge_sidecar, name, gamma=[1e9])
    assert_as_plain(edge_sidecar, name, dtype)


@DTYPE
def test_a_memory_that_speaks_changes_the_text(
    edge_sidecar: Sidecar, built: str, dtype: torch.dtype
) -> None:
    model = loaded_model(dtype).model
    plain = prefill(model)
    with client_of(edge_sidecar.target, built) as client:
        policy = RetrievalPolicy(client)
        assert not torch.equal(prefill(model, policy), plain)
        assert torch.isfinite(generate(model, policy)[1]).all()
    assert torch.equal(prefill(model), plain)
    assert all(0 < use.lambda_mean < 1 for use in policy.use.values())


def test_top_k_support_keeps_the_models_number_of_experts(edge_sidecar: Sidecar, name: str) -> None:
    build(edge_sidecar.target, name, settings=MemorySettings(support=SUPPORT_TOP_K, gamma=[0.01]))
    widths = set()
    with client_of(edge_sidecar.target, name) as client:
        policy = RetrievalPolicy(client)

        def watch(call: RouterCall) -> Assignment | None:
            reply = policy(call)
            widths.add(reply.experts.shape[1])
            return reply

        prefill(loaded_model().model, watch)
    assert widths == {loaded_model().fingerprint.top_k}


def test_stored_logits_keep_the_models_number_of_experts(edge_sidecar: Sidecar, name: str) -> None:
    wide = MemorySettings(neighbours=3, gamma=[0.01])
    build(edge_sidecar.target, name, "paper-v2", settings=wide)
    model, widths = loaded_model().model, set()
    plain = prefill(model)
    with client_of(edge_sidecar.target, name) as client, ExitStack() as watched:
        for site in find_router_sites(model):
            watched.callback(
                site.experts.register_forward_pre_hook(
                    lambda _, given: widths.update(each.shape[-1] for each in given[1:])
                ).remove
            )
        policy = RetrievalPolicy(client)
        assert not torch.equal(prefill(model, policy), plain)
    assert widths == {loaded_model().fingerprint.top_k}
    assert all(use.lambda_mean > 0.5 for use in policy.use.values())


def test_leave_one_out_reads_no_entry_of_the_own_example(edge_sidecar: Sidecar, built: str) -> None:
    refs = [ExampleRef("reference.jsonl", "1"), ExampleRef("reference.jsonl", "2")]
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    rows = [loaded_model().tokenizer(SENTENCES[n])["input_ids"][:20] for n in (0, 1)]
    with client_of(edge_sidecar.target, built) as client:

        def look(call: RouterCall) -> None:
            own = Assignment(call.weights, call.experts)
            for left_out in (True, False):
                response = client.route(
                    call.site.layer,
                    call.router_input[:20],
                    call.router_logits[:20],
                    Assignment(own.weights[:20], own.experts[:20]),
                    exclude=[refs[0]] * 20 if left_out else [],
                    with_neighbours=True,
                )
                found = response.neighbours.provenance.values()
                seen[left_out] |= {origin.example for origin in found}

        with torch.no_grad(), RouterHooks(loaded_model().model, look):
            loaded_model().model(input_ids=torch.tensor(rows))
    assert "1" in seen[False]
    assert "1" not in seen[True]
    assert len(seen[True]) > 1


def test_leave_one_out_takes_the_answers_away(edge_sidecar: Sidecar, built: str) -> None:
    with client_of(edge_sidecar.target, built) as client:
        policy = RetrievalPolicy(client)
        with_own = scored(policy)
        near = [policy.use[layer].lambda_mean for layer in range(LAYERS)]
        policy.use.clear()
        without = scored(policy, leave_one_out=True)
        far = [policy.use[layer].lambda_mean for layer in range(LAYERS)]
    assert (with_own != without).all()
    assert all(one > other for one, other in zip(near, far, strict=True))


def test_a_memory_of_one_example_says_nothing_of_it(edge_sidecar: Sidecar, name: str) -> None:
    only = windows_of(SENTENCES[:1])
    build(edge_sidecar.target, name, windows=only)
    model = loaded_model().model
    with client_of(edge_sidecar.target, name) as client:
        policy = RetrievalPolicy(client)
        left_out = score(model, only, policy, QUIET, what="", leave_one_out=True)
    plain = score(model, only, None, QUIET, what="")
    assert (left_out.nll_sums == plain.nll_sums).all()
    assert difference(left_out, plain).delta == 0


def test_calibration_on_text_and_inside_the_memory(edge_sidecar: Sidecar, built: str) -> None:
    held_out = windows_of(
        ["Know ye not that ye are the temple?", "Let not your heart be troubled."]
    )
    inputs = collect_router_inputs(loaded_model().model, held_out)
    with AdminClient(edge_sidecar.target) as client:
        before = list(client.describe(built).settings.gamma)
        dry = client.calibrate(built, 0.5, encode_by_layer(inputs), dry_run=True)
        assert list(client.describe(built).settings.gamma) == before
        on_text = client.calibrate(built, 0.5, encode_by_layer(inputs))
        assert [(c.layer, c.gamma) for c in on_text.layers] == [
            (c.layer, c.gamma) for c in dry.layers
        ]
        assert list(client.describe(built).settings.gamma) == [c.gamma for c in on_text.layers]
        assert {c.queries for c in on_text.layers} == {len(inputs[0])}
        inside = client.calibrate(built, PRESETS[built.removeprefix("built-")].lambda0)
        assert [c.layer for c in inside.layers] == list(range(LAYERS))
        assert list(client.describe(built).settings.gamma) == before
    for layer, calibration in enumerate(on_text.layers):
        keys = torch.tensor([key for key, _, _ in stored(edge_sidecar, built, layer).values()])
        distances = torch.cdist(inputs[layer].double(), keys.double()).numpy() ** 2
        typical = float(np.median(distances))
        assert calibration.typical_squared_distance == pytest.approx(typical, rel=1e-3)
        copies = distances <= COPY_SHARE * typical
        assert calibration.copies == copies.any(axis=1).sum()
        median = float(np.median(np.where(copies, np.inf, distances).min(axis=1)))
        assert calibration.squared_distance == pytest.approx(median, rel=1e-3)
        assert calibration.gamma == pytest.approx(np.log(2) / median, rel=1e-3)


def test_calibration_of_some_layers_leaves_the_others(edge_sidecar: Sidecar, name: str) -> None:
    build(edge_sidecar.target, name, settings=MemorySettings(gamma=[1.0, 2.0, 3.0, 4.0]))
    inputs = collect_router_inputs(loaded_model().model, windows_of(["Zeal."]))
    with AdminClient(edge_sidecar.target) as client:
        response = client.calibrate(name, 0.5, encode_by_layer({2: inputs[2]}))
        gamma = list(client.describe(name).settings.gamma)
    assert [c.layer for c in response.layers] == [2]
    assert gamma == [1.0, 2.0, response.layers[0].gamma, 4.0]


def test_indexing_changes_hardly_an_answer(edge_sidecar: Sidecar, built: str) -> None:
    with client_of(edge_sidecar.target, built) as client:
        before = scored(RetrievalPolicy(client))
        with AdminClient(edge_sidecar.target) as admin:
            admin.optimize(built, "int8")
            layers = admin.describe(built).layers
        after = scored(RetrievalPolicy(client))
    assert {layer.quantization for layer in layers} == {"int8"}
    np.testing.assert_allclose(after, before, rtol=1e-3)


@pytest.mark.parametrize("on_error", OnError)
def test_another_models_memory_is_refused(
    edge_sidecar: Sidecar, built: str, on_error: OnError
) -> None:
    """However failures are treated: naming what differs, on both sides."""
    other = byte_model(num_experts_per_tok=3, hidden_size=64)
    fingerprint = model_fingerprint(other)
    both = r"hidden_size: memory 32, .* 64; top_k: memory 2, .* 3; router_hash: memory '\w+', "
    with RouterClient(edge_sidecar.target, built, fingerprint, on_error=on_error) as client:
        with pytest.raises(ModelMismatch, match=both):
            client.describe()
        with pytest.raises(ModelMismatch, match=both):
            prefill(other, RetrievalPolicy(client))
    with AdminClient(edge_sidecar.target) as client, pytest.raises(ModelMismatch, match=both):
        client.find_or_create(built, fingerprint.message(), MemorySettings(preset="paper"))


@pytest.mark.parametrize("on_error", OnError)
def test_a_memory_that_is_not_there_is_refused(
    edge_sidecar: Sidecar, name: str, on_error: OnError
) -> None:
    with client_of(edge_sidecar.target, name, on_error) as client:
        with pytest.raises(ServiceRefused, match=f"memory '{name}' not found") as caught:
            prefill(loaded_model().model, RetrievalPolicy(client))
        assert caught.value.reason == "ERROR_REASON_MEMORY_NOT_FOUND"


def delete(sidecar: Sidecar, name: str) -> None:
    with AdminClient(sidecar.target) as admin:
        admin.delete(name)


def test_a_memory_that_goes_away_while_text_is_generated(
    edge_sidecar: Sidecar, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As a sidecar that is lost: from the deletion on the own router stands, until the memory is there again."""
    model, breaker = loaded_model().model, CircuitBreaker(first_pause_s=0.0)
    build(edge_sidecar.target, name, "paper")
    with RouterClient(
        edge_sidecar.target, name, loaded_model().fingerprint, timeout_s=30.0, breaker=breaker
    ) as client:
        policy = RetrievalPolicy(client)
        deleted_at = 2 * LAYERS + 1
        recorder = Recorder(policy, {deleted_at: lambda: delete(edge_sidecar, name)})
        generate(model, recorder)
        gone = [reply is None for reply in recorder.replies]
        assert gone == [False] * deleted_at + [True] * (6 * LAYERS - deleted_at)
        assert policy.lookups == client.lookups
        assert policy.lookups.total == 6 * LAYERS
        assert policy.lookups.fell_back == {"memory_not_found": 6 * LAYERS - deleted_at}
        assert f"own router stands: memory '{name}' not found" in caplog.text
        # Of the other kind: what the client knew of the old one does not matter any more.
        build(edge_sidecar.target, name, "recommended")
        replies = Recorder(policy)
        prefill(model, replies)
    assert [type(reply) for reply in replies.replies] == [Logits] * LAYERS


def test_a_memory_that_comes_back_for_another_model_is_refused(
    edge_sidecar: Sidecar, name: str
) -> None:
    model = loaded_model().model
    build(edge_sidecar.target, name)
    with client_of(edge_sidecar.target, name, OnError.FALL_BACK) as client:
        policy = RetrievalPolicy(client)
        prefill(model, policy)
        delete(edge_sidecar, name)
        prefill(model, policy)
        other = model_fingerprint(byte_model(num_experts_per_tok=3))
        with AdminClient(edge_sidecar.target) as admin:
            admin.find_or_create(name, other.message(), MemorySettings(preset="paper"))
        with pytest.raises(ModelMismatch, match="top_k: memory 3"):
            prefill(model, policy)


def test_a_memory_that_goes_away_while_text_is_scored(edge_sidecar: Sidecar, name: str) -> None:
    build(edge_sidecar.target, name)
    with client_of(edge_sidecar.target, name, OnError.RAISE) as client:
        policy = RetrievalPolicy(client)
        prefill(loaded_model().model, policy)
        delete(edge_sidecar, name)
        with pytest.raises(MemoryNotFound, match="not found"):
            prefill(loaded_model().model, policy)


@pytest.mark.parametrize("on_error", OnError)
def test_a_closed_client_says_so(edge_sidecar: Sidecar, built: str, on_error: OnError) -> None:
    """However failures are treated: it is the caller's mistake."""
    client = client_of(edge_sidecar.target, built, on_error)
    policy = RetrievalPolicy(client)
    prefill(loaded_model().model, policy)
    client.close()
    with pytest.raises(ClientClosed, match="was closed"):
        prefill(loaded_model().model, policy)


def test_one_layers_memory_leaves_the_others_alone(edge_sidecar: Sidecar, name: str) -> None:
    build(edge_sidecar.target, name, settings=MemorySettings(layers=[1], gamma=[0.01]))
    with client_of(edge_sidecar.target, name) as client:
        policy = RetrievalPolicy(client)
        prefill(loaded_model().model, policy)
    assert [policy.use[layer].lambda_mean > 0 for layer in range(LAYERS)] == [
        False,
        True,
        False,
        False,
    ]
