"""A replica beside the model, of a memory that a real sidecar serves: the same answers, whatever happens to either."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from knnmoe.client import (
    AdminClient,
    MemoryNotFound,
    ReplicationClient,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.v1 import memory_admin_pb2 as admin_pb
from knnmoe.v1 import snapshots_pb2 as snapshots_pb
from knnmoe.v1.types_pb2 import MemorySettings

from model_runner.architectures import Assignment
from model_runner.evaluation.demo import Demo, DemoSettings
from model_runner.memory_builder.learner import KnownTokens, OnlineLearner
from model_runner.memory_builder.recipes import PRESETS
from model_runner.models import load_model
from model_runner.replica.budget import ReplicaTooLarge
from model_runner.retrieval import OpenMemory, Retrieval, Where, open_retriever
from model_runner.router_client import OnError
from model_runner.router_hooks import Logits, RouterCall
from model_runner.routing_policy import Lookups, RetrievalPolicy
from model_runner.small_moe import MODEL_DIR
from tests.integration.command_runs import Run, in_process
from tests.integration.replaced_memories import stats
from tests.integration.runner_parts import (
    FILE_NAME,
    LAYERS,
    LENGTH,
    PRESET_NAMES,
    PROMPT,
    QUIET,
    SENTENCES,
    Recorder,
    build,
    client_of,
    loaded_model,
    prefill,
    scored,
    windows_of,
    write_text,
)
from tests.sidecar import Sidecar
from tests.tiny_checkpoint import save_checkpoint

PATIENCE_S = 60.0
WINDOWS = [window for window in windows_of() if window.offset == 0]
PRESET = pytest.mark.parametrize("preset", PRESET_NAMES)
# Everything is close: each token is routed by the nearest entry.
WIDE = MemorySettings(gamma=[1e-7])
REPLICA = Retrieval(Where.REPLICA)


@contextmanager
def opened(
    target: str,
    name: str,
    how: Retrieval = REPLICA,
    on_error: OnError = OnError.RAISE,
) -> Iterator[OpenMemory]:
    loaded = loaded_model()
    where = (target, name, loaded.fingerprint, loaded.device, how, QUIET)
    with open_retriever(*where, timeout_s=30.0, on_error=on_error) as memory:
        yield memory


def until(come: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not come():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def call_of_layer_0() -> RouterCall:
    calls: list[RouterCall] = []
    prefill(loaded_model().model, lambda call: calls.append(call))
    return calls[0]


def assert_same(one: Assignment | Logits | None, other: Assignment | Logits | None) -> None:
    """Within 1e-5, whatever the order of experts."""
    assert type(one) is type(other)
    if isinstance(one, Logits) and isinstance(other, Logits):
        torch.testing.assert_close(one.router_logits, other.router_logits, rtol=0, atol=1e-5)
    elif isinstance(one, Assignment) and isinstance(other, Assignment):
        torch.testing.assert_close(dense(one), dense(other), rtol=0, atol=1e-5)


def dense(assignment: Assignment) -> torch.Tensor:
    zeros = torch.zeros(len(assignment.experts), 64)
    return zeros.scatter_add(1, assignment.experts.long(), assignment.weights.float())


@PRESET
def test_the_answers_are_the_sidecars(ram_sidecar: Sidecar, name: str, preset: str) -> None:
    """Of a padded batch, at every layer, with and without entries that are left out."""
    build(ram_sidecar.target, name, preset)
    model, ref = loaded_model().model, windows_of()[0].ref
    with (
        AdminClient(ram_sidecar.target) as admin,
        client_of(ram_sidecar.target, name) as client,
        opened(ram_sidecar.target, name) as memory,
    ):
        assert memory.where is Where.REPLICA
        remote, replica = RetrievalPolicy(client), RetrievalPolicy(memory.retriever)
        for neighbours in (1, 3, 32):
            admin.update_settings(name, MemorySettings(neighbours=neighbours))
            memory.catch_up()
            for exclude in ((), (ref, ref)):
                asked, answered = Recorder(remote), Recorder(replica)
                with remote.excluding(exclude), replica.excluding(exclude):
                    expected, found = prefill(model, asked), prefill(model, answered)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
                for one, other in zip(answered.replies, asked.replies, strict=True):
                    assert_same(one, other)
        for layer in range(LAYERS):
            ours, theirs = replica.use[layer], remote.use[layer]
            assert (ours.tokens, ours.abstained) == (theirs.tokens, theirs.abstained)
            assert ours.lambda_mean == pytest.approx(theirs.lambda_mean, abs=1e-5)


def test_keys_of_fewer_bytes_answer_about_the_same(ram_sidecar: Sidecar, name: str) -> None:
    build(ram_sidecar.target, name, "recommended")
    call = call_of_layer_0()
    with client_of(ram_sidecar.target, name) as client:
        exact = RetrievalPolicy(client)
        exact(call)
    for keys, tolerance in (("bf16", 0.02), ("f16", 0.005), ("int8", 0.02)):
        how = Retrieval(Where.REPLICA, keys=keys)  # type: ignore[arg-type]
        with opened(ram_sidecar.target, name, how) as memory:
            policy = RetrievalPolicy(memory.retriever)
            policy(call)
        assert policy.use[0].lambda_mean == pytest.approx(exact.use[0].lambda_mean, abs=tolerance)


@pytest.mark.parametrize("where", [Where.REPLICA, Where.REMOTE])
def test_what_is_learnt_is_read_at_once(ram_sidecar: Sidecar, name: str, where: Where) -> None:
    """Also by --skip-known, which leaves out what the example before has taught."""
    loaded = loaded_model()
    with AdminClient(ram_sidecar.target) as admin:
        settings = PRESETS["paper"].settings(LAYERS)
        admin.find_or_create(name, loaded.fingerprint.message(), settings)
        admin.update_settings(name, WIDE)
        one = [w for w in WINDOWS if w.ref.example == "1"]
        with opened(ram_sidecar.target, name, Retrieval(where)) as memory:
            keep = KnownTokens(memory.retriever, 0.99).keep
            learning = OnlineLearner(
                *(loaded.model, loaded.fingerprint, admin, name),
                keep=keep,
                catch_up=memory.catch_up,
            )
            policy = RetrievalPolicy(memory.retriever)
            scored(policy)
            assert all(use.lambda_mean == 0 for use in policy.use.values())
            with learning:
                learnt = learning.learn(one)
                assert (learnt.entries, learnt.known) == (admin.count(name), 0)
                policy = RetrievalPolicy(memory.retriever)
                scored(policy)
                assert all(use.lambda_mean > 0.99 for use in policy.use.values())
                others = [w for w in WINDOWS if w.ref.example == "2"]
                assert learning.learn(others).known > 0  # at this bandwidth everything is known


@pytest.fixture
def mortal(data: Path) -> Iterator[Sidecar]:
    """A service that a test may kill, with a filled memory."""
    with Sidecar(data, listen=f"unix:{data.parent}/s") as sidecar:
        build(sidecar.target, "law", "recommended", windows=WINDOWS)
        sidecar.close_channel()
        yield sidecar


@contextmanager
def looking_up(policy: RetrievalPolicy, call: RouterCall) -> Iterator[list[Any]]:
    """Lookups without pause in another thread; none may fail."""
    replies: list[Any] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            replies.append(policy(call))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield replies
    finally:
        done.set()
        thread.join()
    assert all(reply is not None for reply in replies)


def test_lookups_go_on_while_the_sidecar_is_killed_and_back(mortal: Sidecar) -> None:
    """What is written after its return is read then; until then all is as it was."""
    call = call_of_layer_0()
    with opened(mortal.target, "law", on_error=OnError.FALL_BACK) as memory, ExitStack() as stack:
        assert memory.follower is not None
        epoch = memory.follower.position.epoch
        policy = RetrievalPolicy(memory.retriever)
        before = policy(call)
        with looking_up(policy, call) as replies:
            mortal.kill()
            answered = len(replies)
            until(lambda: len(replies) > answered + 20)
            assert_same(policy(call), before)
            again = stack.enter_context(Sidecar(mortal.data, listen=mortal.target))
            until(lambda: memory.follower.position.epoch != epoch)
            build(again.target, "law", "recommended")  # more windows
            memory.catch_up()
            after = policy(call)
        assert not policy.lookups.fell_back
        with client_of(again.target, "law") as client:
            assert_same(after, RetrievalPolicy(client)(call))
        assert not torch.equal(after.router_logits, before.router_logits)


def test_a_sidecar_that_hangs_is_not_waited_for(mortal: Sidecar) -> None:
    call = call_of_layer_0()
    with opened(mortal.target, "law", on_error=OnError.FALL_BACK) as memory:
        assert memory.follower is not None
        policy = RetrievalPolicy(memory.retriever)
        before = policy(call)
        with mortal.paused():
            for _ in range(50):
                assert_same(policy(call), before)
        build(mortal.target, "law", "recommended")
        memory.catch_up()
        assert not torch.equal(policy(call).router_logits, before.router_logits)
    assert not policy.lookups.fell_back


def test_a_memory_that_is_replaced_and_restored(mortal: Sidecar) -> None:
    call = call_of_layer_0()
    create = snapshots_pb.CreateSnapshotRequest(memory="law", name="before")
    with AdminClient(mortal.target) as admin, opened(mortal.target, "law") as memory:
        policy = RetrievalPolicy(memory.retriever)
        before = policy(call)
        list(admin.replies(admin.snapshots.CreateSnapshot(create)))
        build(mortal.target, "law-2", "recommended", step_size=0.5)
        admin.unary(
            admin.admin.ReplaceMemory, admin_pb.ReplaceMemoryRequest(memory="law", by="law-2")
        )
        memory.catch_up()
        with client_of(mortal.target, "law") as client:
            replaced = RetrievalPolicy(client)(call)
        assert_same(policy(call), replaced)
        assert not torch.equal(replaced.router_logits, before.router_logits)
        where = snapshots_pb.SnapshotRef(memory="law", name="before")
        restore = snapshots_pb.RestoreSnapshotRequest(snapshot=where, as_memory="law", replace=True)
        list(admin.replies(admin.snapshots.RestoreSnapshot(restore)))
        memory.catch_up()
        assert_same(policy(call), before)


def test_a_memory_that_is_deleted_and_made_again(ram_sidecar: Sidecar, name: str) -> None:
    """As a lookup in the sidecar: an outage for text, an error for scores."""
    build(ram_sidecar.target, name, windows=WINDOWS)
    call = call_of_layer_0()
    with (
        AdminClient(ram_sidecar.target) as admin,
        opened(ram_sidecar.target, name, on_error=OnError.FALL_BACK) as speaking,
        opened(ram_sidecar.target, name) as scoring,
    ):
        text, scores = RetrievalPolicy(speaking.retriever), RetrievalPolicy(scoring.retriever)
        admin.delete(name)
        until(lambda: text(call) is None)
        assert text.lookups.fell_back == {"memory_not_found": 1}
        assert scoring.follower is not None
        until(lambda: scoring.follower.obstacle() is not None)
        with pytest.raises(MemoryNotFound, match=name):
            scores(call)
        build(ram_sidecar.target, name, "recommended", windows=WINDOWS)  # of the other kind
        until(lambda: text(call) is not None)
        assert isinstance(text(call), Logits)


def test_scores_are_closed_when_the_replica_may_be_stale(mortal: Sidecar) -> None:
    how = Retrieval(Where.REPLICA, max_staleness_s=3.0)
    call = call_of_layer_0()
    with opened(mortal.target, "law", how) as memory:
        policy = RetrievalPolicy(memory.retriever)
        assert policy(call) is not None
        mortal.kill()
        with pytest.raises(ServiceUnavailable, match=r"may be .* s old, expected at most 3 s"):
            until(lambda: policy(call) is None)


def test_text_goes_on_without_answers_that_are_too_old(mortal: Sidecar) -> None:
    how = Retrieval(Where.REPLICA, max_staleness_s=3.0)
    call = call_of_layer_0()
    with opened(mortal.target, "law", how, OnError.FALL_BACK) as memory:
        policy = RetrievalPolicy(memory.retriever)
        assert policy(call) is not None
        mortal.kill()
        until(lambda: policy(call) is None)
        assert policy.lookups.fell_back == {"replica_stale": 1}
        with Sidecar(mortal.data, listen=mortal.target):
            until(lambda: policy(call) is not None)


def test_a_replica_of_a_sidecar_that_comes_later(
    mortal: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is answered before the copy is complete."""
    monkeypatch.setattr("model_runner.retrieval.COPY_TIMEOUT_S", 1.0)
    call = call_of_layer_0()
    mortal.kill()
    with opened(mortal.target, "law", on_error=OnError.FALL_BACK) as memory:
        policy = RetrievalPolicy(memory.retriever)
        assert policy(call) is None
        assert policy.lookups == Lookups(1, {"replica_incomplete": 1})
        with Sidecar(mortal.data, listen=mortal.target):
            until(lambda: policy(call) is not None)


def test_hits_come_back(ram_sidecar: Sidecar, name: str) -> None:
    build(ram_sidecar.target, name, windows=WINDOWS)
    with AdminClient(ram_sidecar.target) as admin:
        admin.update_settings(name, WIDE)
    with opened(ram_sidecar.target, name) as memory:
        scored(RetrievalPolicy(memory.retriever))
    by_replica = stats(ram_sidecar, name)
    with opened(ram_sidecar.target, name, Retrieval(Where.REMOTE)) as memory:
        scored(RetrievalPolicy(memory.retriever))
    assert stats(ram_sidecar, name) == [(n, 2 * asked, 2 * hits) for n, asked, hits in by_replica]
    assert all(hits > 0 for _, _, hits in by_replica)


def too_old(*_: object, **__: object) -> None:
    raise ServiceRefused("Method not found!", code=grpc.StatusCode.UNIMPLEMENTED)


def test_a_sidecar_that_is_older_than_replicas(
    ram_sidecar: Sidecar,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build(ram_sidecar.target, name, windows=WINDOWS)
    monkeypatch.setattr(ReplicationClient, "replicate", too_old)
    with opened(ram_sidecar.target, name, Retrieval()) as memory:
        assert memory.where is Where.REMOTE
        assert "serves no copies of its memories; update it" in caplog.text
    refused = pytest.raises(ServiceRefused, match="or take --retrieval remote")
    with refused, opened(ram_sidecar.target, name):
        pass


def test_what_does_not_fit(
    ram_sidecar: Sidecar, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(ram_sidecar.target, name, windows=WINDOWS)
    with opened(ram_sidecar.target, name, Retrieval(memory_bytes=1000)) as memory:
        assert memory.where is Where.REMOTE
        assert f"memory '{name}' is read in the sidecar: a replica of" in caplog.text
    refused = pytest.raises(ReplicaTooLarge, match="may take 1000 bytes")
    with refused, opened(ram_sidecar.target, name, Retrieval(Where.REPLICA, memory_bytes=1000)):
        pass


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return in_process(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `loaded_model`."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def test_commands(run: Run, ram_sidecar: Sidecar, name: str, model: Path, tmp_path: Path) -> None:
    """The same numbers and the same text, remote and as a replica."""
    build(ram_sidecar.target, name, "recommended", windows=WINDOWS)
    text, scores = write_text(tmp_path / FILE_NAME, SENTENCES[:3]), tmp_path / "scores.json"
    where = ("--memory", name, "--target", ram_sidecar.target, "--model", model)
    found: dict[str, Any] = {}
    for retrieval in ("remote", "replica", "auto"):
        how = (*where, "--retrieval", retrieval)
        done = run("evaluate", "--text", text, *how, "--json", scores, "--window", LENGTH)
        assert done.code == 0, done.err
        result = json.loads(scores.read_text())
        assert result["retrieval"] == ("remote" if retrieval == "remote" else "replica")
        said = run("generate", "--prompt", PROMPT, *how, "--max-new-tokens", 4, "--timeout-s", 30)
        assert said.code == 0, said.err
        assert f"; lookups that fell back: none of {4 * LAYERS}\n" in said.err
        assert ("copying memory" in said.err) == (retrieval != "remote")
        found[retrieval] = result["knn_moe"]["delta"], said.out
    assert found["auto"] == found["replica"]
    assert found["replica"][0] == pytest.approx(found["remote"][0], abs=1e-5)
    assert found["replica"][1] == found["remote"][1]

    taught = run("learn", text, *where, "--retrieval", "replica", "--evaluate", "--window", LENGTH)
    assert taught.code == 0, taught.err
    small = run("evaluate", "--text", text, *where, "--retrieval", "replica", "--replica-memory", 9)
    assert small.code == 2
    assert "--replica-keys" in small.err or "--retrieval remote" in small.err
    wrong = run("evaluate", "--text", text, *where, "--replica-memory", "lots")
    assert (wrong.code, "a size: got 'lots', expected a number" in wrong.err) == (2, True)


def test_the_demo_gives_the_same_table_remote_and_as_a_replica(tmp_path: Path) -> None:
    sizes = DemoSettings(
        length=32,
        reference_windows=4,
        dev_windows=2,
        shifted_test_windows=4,
        general_test_windows=4,
        control_reference_windows=2,
        batch_size=4,
    )
    loaded, tables = load_model(str(MODEL_DIR), device="cpu"), []
    for where in (Where.REPLICA, Where.REMOTE):
        demo = Demo(loaded, sizes, tmp_path / where, QUIET, how=Retrieval(where))
        results = demo.run()
        assert ("index" in results["timings"]) == (where is Where.REMOTE)
        tables.append(results["arms"])
    assert len(tables[0]) == 13
    for replica, remote in zip(*tables, strict=True):
        assert (replica["name"], replica["domain"]) == (remote["name"], remote["domain"])
        assert replica["nll"] == pytest.approx(remote["nll"], abs=1e-4)
        assert replica["lambda_mean"] == pytest.approx(remote["lambda_mean"], abs=1e-4)
