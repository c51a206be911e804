"""A follower against streams of real messages: what it asks for, when lookups may begin, what a cut leaves."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from knnmoe import tensors
from knnmoe.client import (
    ClientClosed,
    ExampleRef,
    MemoryNotFound,
    ModelMismatch,
    ReplicaBehind,
    ServiceError,
    ServiceRefused,
    ServiceUnavailable,
)
from knnmoe.v1 import replication_pb2 as pb
from knnmoe.v1 import types_pb2
from knnmoe.v1.routing_pb2 import ExampleRef as WireExample
from knnmoe.v1.routing_pb2 import LayerDescription, MemoryDescription

from model_runner.progress import Progress
from model_runner.replica import follower as follower_module
from model_runner.replica.budget import Budget, ReplicaTooLarge
from model_runner.replica.copy import FEW_EXAMPLES, ReplicaCopy
from model_runner.replica.follower import Follower

PATIENCE_S = 60.0
D, EXPERTS, TOP_K, LAYERS = 4, 6, 2, 2
DELTA, ASSIGNMENT = types_pb2.MEMORY_KIND_LOGIT_DELTA, types_pb2.MEMORY_KIND_ASSIGNMENT
CPU = torch.device("cpu")
QUIET = Progress(quiet=True)


class Stream(Iterator[pb.ReplicateResponse]):
    """What a test says, in order; an error ends it, and so does cancel()."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def say(self, *messages: pb.ReplicateResponse | ServiceError) -> None:
        for message in messages:
            self._said.put(message)

    def __next__(self) -> pb.ReplicateResponse:
        message = self._said.get(timeout=PATIENCE_S)
        if message is None:
            raise StopIteration
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        self._said.put(None)


class Service:
    """In the place of a ReplicationClient: streams by the test, and what was asked for."""

    target, memory = "unix:/nobody", "law"

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[dict[str, Any], Stream]] = queue.SimpleQueue()
        self.reports: list[tuple[int, list[pb.LayerHits]]] = []
        self.report_error: ServiceError | None = None
        self.closed = False

    def replicate(self, layers: Sequence[int], key_dtype: int, **options: Any) -> Stream:
        stream = Stream()
        self._asked.put(({"layers": list(layers), "key_dtype": key_dtype} | options, stream))
        return stream

    def asked(self) -> tuple[dict[str, Any], Stream]:
        """What is asked for next, and the stream that answers it."""
        return self._asked.get(timeout=PATIENCE_S)

    def report_hits(
        self, digest: str, layers: list[pb.LayerHits], number: int, *, timeout_s: float
    ) -> None:
        assert digest == "digest"
        self.reports.append((number, layers))
        if self.report_error is not None:
            raise self.report_error

    def close(self) -> None:
        self.closed = True


def described(
    entries: int = 3, layers: Sequence[int] = (), kind: int = DELTA, **settings: Any
) -> MemoryDescription:
    return MemoryDescription(
        name="law",
        model_digest="digest",
        fingerprint=types_pb2.ModelFingerprint(
            num_layers=LAYERS, hidden_size=D, num_experts=EXPERTS, top_k=TOP_K
        ),
        settings=types_pb2.MemorySettings(kind=kind, layers=layers, **settings),
        layers=[LayerDescription(layer=layer, entries=entries) for layer in range(LAYERS)],
    )


def start(memory: MemoryDescription | None = None, entries: int = 6) -> pb.ReplicateResponse:
    return pb.ReplicateResponse(
        start=pb.ReplicaStart(memory=memory or described(), entries=entries)
    )


def upserted(layer: int, ids: Sequence[int], *, kind: int = DELTA, of: float = 1.0) -> Any:
    n = len(ids)
    message = pb.ReplicaEntries(
        layer=layer,
        ids=tensors.to_tensor(np.array(ids, np.uint64)),
        keys=tensors.to_tensor(np.full((n, D), of, np.float32)),
        digests=tensors.to_tensor(np.array([10 * i + int(of) for i in ids], np.uint64)),
        examples=[WireExample(source="s", example="even"), WireExample(source="s", example="odd")],
        example_numbers=tensors.to_tensor(np.array([i % 2 for i in ids], np.int32)),
    )
    if kind == DELTA:
        message.logit_deltas.CopyFrom(tensors.to_tensor(np.full((n, EXPERTS), of, np.float32)))
    else:
        experts = tensors.to_tensor(np.tile(np.arange(TOP_K, dtype=np.int32), (n, 1)))
        weights = tensors.to_tensor(np.full((n, TOP_K), of, np.float32))
        message.assignments.CopyFrom(types_pb2.SparseAssignment(experts=experts, weights=weights))
    return pb.ReplicateResponse(upserted=message)


def deleted(layer: int, ids: Sequence[int]) -> pb.ReplicateResponse:
    gone = tensors.to_tensor(np.array(ids, np.uint64))
    return pb.ReplicateResponse(deleted=pb.ReplicaDeletion(layer=layer, ids=gone))


def synced(version: int, epoch: str = "one") -> pb.ReplicateResponse:
    at = pb.ReplicaPosition(epoch=epoch, version=version)
    return pb.ReplicateResponse(synced=pb.ReplicaSynced(position=at))


WHOLE = (start(), upserted(0, [1, 2, 3]), upserted(1, [4, 5, 6]), synced(7))
AWAY = ServiceUnavailable("away", code=grpc.StatusCode.UNAVAILABLE)


class Following:
    """A follower of a service that the test plays."""

    def __init__(self, budget: int = 1 << 20, **options: Any) -> None:
        self.service = Service()
        self.copy = ReplicaCopy(CPU, "f32", Budget(budget))
        self.follower = Follower(self.service, self.copy, **options)  # type: ignore[arg-type]

    def __enter__(self) -> Following:
        self.follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.follower.close()

    def whole(self) -> Stream:
        """The stream that made the copy complete."""
        _, stream = self.service.asked()
        stream.say(*WHOLE)
        self.follower.wait_until_complete(PATIENCE_S, QUIET)
        return stream

    def at(self, version: int, epoch: str = "one") -> None:
        assert self.follower.wait_for(epoch, version, PATIENCE_S)

    def found(self, layer: int) -> set[int]:
        """Ids that lookups find."""
        return set(self.copy.layers[layer].held()[0].tolist())


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks again without pauses, says at once what it would say after some seconds."""
    monkeypatch.setattr(follower_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(follower_module, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(follower_module, "SAID_AFTER_S", 0.0)
    monkeypatch.setattr(follower_module, "REPORT_EVERY_S", 3600.0)


@pytest.fixture
def following() -> Iterator[Following]:
    with Following() as one:
        yield one


def until(come: Callable[[], bool], follower: Follower) -> None:
    """Waits for what the follower's thread does."""
    with follower._changed:
        assert follower._changed.wait_for(come, PATIENCE_S)


def test_nothing_is_served_before_the_copy_is_complete(following: Following) -> None:
    follower = following.follower
    asked, stream = following.service.asked()
    assert (asked["layers"], asked["after"], asked["held"]) == ([], None, {})
    assert asked["heartbeat_ms"] == 1000
    stream.say(*WHOLE[:2])
    until(lambda: follower._received == 3, follower)
    obstacle = follower.obstacle()
    assert isinstance(obstacle, ServiceUnavailable)
    assert obstacle.cause == "replica_incomplete"
    assert "is not complete: 3 of 6 entries" in str(obstacle)
    assert (follower.complete, follower.position, follower.staleness_s) == (False, None, np.inf)
    stream.say(*WHOLE[2:])
    follower.wait_until_complete(PATIENCE_S, QUIET)
    assert follower.obstacle() is None
    assert (following.found(0), following.found(1)) == ({1, 2, 3}, {4, 5, 6})
    assert 0 <= follower.staleness_s < PATIENCE_S


def test_a_change_takes_effect_when_it_is_whole(following: Following) -> None:
    stream = following.whole()
    stream.say(upserted(0, [3, 9], of=2.0), deleted(1, [4, 77]), deleted(0, []))
    until(lambda: following.follower._received == 8, following.follower)
    assert (following.found(0), following.found(1)) == ({1, 2, 3}, {4, 5, 6})
    stream.say(synced(8))
    following.at(8)
    assert (following.found(0), following.found(1)) == ({1, 2, 3, 9}, {5, 6})
    layer = following.copy.layers[0]
    row = layer._row_of[3]
    assert layer.keys[row].tolist() == [2.0] * D
    number = following.copy.number_of
    assert layer.examples[row] == number(ExampleRef("s", "odd")) != number(ExampleRef("s", "no"))


def test_examples_that_no_entry_came_from_are_forgotten() -> None:
    copy, ids, rounds = ReplicaCopy(CPU, "f32", Budget(2**28)), list(range(1000)), 12
    copy.begin(described())
    for number in range(rounds):
        message = upserted(0, ids, of=float(number))
        names = [WireExample(source="s", example=f"{number}-{n}") for n in ids]
        message.upserted.ClearField("examples")
        message.upserted.examples.extend(names)
        numbers = np.arange(len(ids), dtype=np.int32)
        message.upserted.example_numbers.CopyFrom(tensors.to_tensor(numbers))
        copy.stage(message)
        copy.commit()
        assert len(copy.examples) <= FEW_EXAMPLES + len(ids)
    layer = copy.layers[0]
    rows = [layer._row_of[n] for n in ids]
    last = [copy.examples[ExampleRef("s", f"{rounds - 1}-{n}")] for n in ids]
    assert layer.examples[rows].tolist() == last
    assert len(set(last)) == len(ids)
    assert ExampleRef("s", "0-0") not in copy.examples


def test_a_follower_that_is_paused_changes_nothing(following: Following) -> None:
    stream = following.whole()
    with following.follower.paused():
        stream.say(deleted(0, [1]), synced(8))
        while stream._said.qsize() > 1:
            pass  # the thread has taken the first one
        assert following.found(0) == {1, 2, 3}
    following.at(8)
    assert following.found(0) == {2, 3}


def test_settings_take_effect_with_the_rest(following: Following) -> None:
    stream = following.whole()
    stream.say(pb.ReplicateResponse(settings=described(neighbours=5).settings), deleted(0, [1]))
    stream.say(synced(8))
    following.at(8)
    assert following.copy.settings.neighbours == 5


def test_after_a_cut_it_goes_on_from_its_position(following: Following) -> None:
    stream = following.whole()
    stream.say(upserted(0, [9]), AWAY)
    asked, stream = following.service.asked()
    assert (asked["after"].version, asked["held"], asked["layers"]) == (7, None, [0, 1])
    assert following.follower.obstacle() is None
    stream.say(start(entries=1), deleted(0, [1]), synced(8))
    following.at(8)
    assert following.found(0) == {2, 3}  # 9 was half an update


def test_who_is_behind_asks_with_what_is_held(following: Following) -> None:
    stream = following.whole()
    stream.say(AWAY)
    _, stream = following.service.asked()
    stream.say(ReplicaBehind("of another time"))
    asked, stream = following.service.asked()
    assert asked["after"] is None
    ids, digests = asked["held"][0]
    assert (ids.tolist(), digests.tolist()) == ([1, 2, 3], [11, 21, 31])
    assert following.follower.obstacle() is None  # goes on with what it has
    stream.say(start(), deleted(0, [2]), upserted(0, [3], of=2.0), synced(1, "two"))
    following.at(1, "two")
    assert following.found(0) == {1, 3}


def test_a_first_copy_that_is_cut_is_not_sent_again(following: Following) -> None:
    _, stream = following.service.asked()
    stream.say(*WHOLE[:2], AWAY)
    asked, stream = following.service.asked()
    assert asked["held"][0][0].tolist() == [1, 2, 3]
    assert not following.follower.complete
    stream.say(start(entries=3), *WHOLE[2:])
    following.follower.wait_until_complete(PATIENCE_S, QUIET)
    assert (following.found(0), following.found(1)) == ({1, 2, 3}, {4, 5, 6})


def test_a_memory_that_is_deleted_and_comes_back(
    following: Following, caplog: pytest.LogCaptureFixture
) -> None:
    stream = following.whole()
    stream.say(ReplicaBehind("deleted"))
    _, stream = following.service.asked()
    stream.say(MemoryNotFound("memory 'law' not found", reason="ERROR_REASON_MEMORY_NOT_FOUND"))
    _, stream = following.service.asked()
    assert isinstance(following.follower.obstacle(), MemoryNotFound)
    assert "memory 'law' not found" in caplog.text
    assert "the model's own router stands" in caplog.text
    stream.say(start(), deleted(0, [1, 2]), synced(1, "two"))
    following.at(1, "two")
    assert following.follower.obstacle() is None
    assert "is in step again" in caplog.text


def test_another_models_memory_of_the_same_name(following: Following) -> None:
    stream = following.whole()
    stream.say(ModelMismatch("another model"))
    following.service.asked()
    assert isinstance(following.follower.obstacle(), ModelMismatch)


def test_a_memory_of_the_other_kind_is_copied_anew(following: Following) -> None:
    stream = following.whole()
    stream.say(ReplicaBehind("replaced"))
    _, stream = following.service.asked()
    stream.say(start(described(kind=ASSIGNMENT)))
    asked, stream = following.service.asked()
    assert asked["held"] == {}
    obstacle = following.follower.obstacle()
    assert isinstance(obstacle, ServiceUnavailable)
    assert obstacle.cause == "replica_incomplete"
    other = [upserted(layer, [7], kind=ASSIGNMENT, of=0.5) for layer in range(LAYERS)]
    stream.say(start(described(kind=ASSIGNMENT)), *other, synced(1, "two"))
    following.at(1, "two")
    assert following.copy.layers[0].values[following.copy.layers[0]._row_of[7]].tolist() == [
        *(0.0, 1.0),
        *(0.5, 0.5),
    ]


def test_only_layers_that_the_memory_speaks_for_are_copied(following: Following) -> None:
    _, stream = following.service.asked()
    stream.say(start(described(layers=[1])))
    asked, stream = following.service.asked()
    assert asked["layers"] == [1]
    stream.say(start(described(layers=[1])), upserted(1, [4]), synced(7))
    following.at(7)
    stream.say(pb.ReplicateResponse(settings=described(layers=[0, 1]).settings))
    stream.say(synced(8))  # never read: the layer that is missing comes first
    _, stream = following.service.asked()
    assert following.copy.settings.layers == [1]
    stream.say(start(described(layers=[0, 1])))
    asked, stream = following.service.asked()
    assert (asked["layers"], list(asked["held"])) == ([0, 1], [1])
    stream.say(start(described(layers=[0, 1])), upserted(0, [1]), synced(8))
    following.at(8)
    assert (following.found(0), following.found(1)) == ({1}, {4})
    assert following.copy.settings.layers == [0, 1]


def test_a_service_that_knows_no_copies(following: Following) -> None:
    _, stream = following.service.asked()
    stream.say(ServiceRefused("Method not found!", code=grpc.StatusCode.UNIMPLEMENTED))
    with pytest.raises(ServiceRefused) as refused:
        following.follower.wait_until_complete(PATIENCE_S, QUIET)
    assert refused.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_a_service_that_is_not_there(following: Following) -> None:
    _, stream = following.service.asked()
    stream.say(AWAY)
    following.service.asked()
    with pytest.raises(ServiceUnavailable, match="away"):
        following.follower.wait_until_complete(0.0, QUIET)


def test_a_service_that_says_nothing(following: Following) -> None:
    with pytest.raises(ServiceUnavailable, match="is not complete"):
        following.follower.wait_until_complete(0.0, QUIET)


def test_a_bound_of_staleness() -> None:
    with Following(max_staleness_s=0.0) as one:
        stream = one.whole()
        until(lambda: one.follower.obstacle() is not None, one.follower)
        obstacle = one.follower.obstacle()
        assert isinstance(obstacle, ServiceUnavailable)
        assert obstacle.cause == "replica_stale"
        assert "expected at most 0 s: connected, and nothing comes" in str(obstacle)
        stream.say(AWAY)


def test_what_is_read_is_what_was_written(following: Following) -> None:
    stream = following.whole()
    answers = [described(), described()]
    answers[0].epoch, answers[0].version = "zero", 99  # of before a restart
    answers[1].epoch, answers[1].version = "one", 8
    stream.say(synced(8))
    following.follower.catch_up(lambda: answers.pop(0), PATIENCE_S)
    assert not answers
    memory = described()
    memory.epoch, memory.version = "one", 9
    with pytest.raises(ServiceUnavailable, match="has not come to version 9 within 0 s") as late:
        following.follower.catch_up(lambda: memory, 0.0)
    assert late.value.cause == "replica_behind"


def hit(copy: ReplicaCopy, layer: int, row: int) -> None:
    counts = torch.tensor([1.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    copy.layers[layer].count(torch.tensor([row]), torch.tensor([True]), counts)


def hits_of(service: Service) -> list[tuple[int, int, list[int], list[int]]]:
    return [
        (number, layer.layer, *(tensors.to_array(t).tolist() for t in (layer.ids, layer.hits)))
        for number, layers in service.reports
        for layer in layers
    ]


def test_hits_are_reported_once(following: Following, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is sent again under its number, before what came later."""
    stream = following.whole()
    following.service.report_error = AWAY
    hit(following.copy, 0, 0)
    monkeypatch.setattr(follower_module, "REPORT_EVERY_S", 0.0)
    stream.say(synced(7), synced(8))
    following.at(8)
    hit(following.copy, 0, 1)
    hit(following.copy, 1, 0)
    following.follower.wait_for("one", 8, PATIENCE_S)
    following.service.report_error = None
    stream.say(synced(9), synced(10), synced(11))
    following.at(11)
    stream.cancel()
    following.follower.close()
    assert following.service.closed
    found = list(dict.fromkeys(map(str, hits_of(following.service))))
    ids = [layer._row_ids.tolist() for layer in following.copy.layers.values()]
    assert found == [
        str((1, 0, [ids[0][0]], [1])),
        str((2, 0, [ids[0][1]], [1])),
        str((3, 1, [ids[1][0]], [1])),
    ]


def test_hits_are_reported_at_the_end(following: Following) -> None:
    following.whole()
    hit(following.copy, 1, 2)
    following.follower.close()
    assert [(layer, hits) for _, layer, _, hits in hits_of(following.service)] == [(1, [1])]
    ((_, (reported,)),) = following.service.reports
    assert (reported.lookups, reported.tokens, reported.tokens_abstained, reported.lambda_sum) == (
        1,
        1,
        0,
        0.5,
    )


def test_what_came_after_a_report_that_failed_is_reported_at_the_end(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = following.whole()
    following.service.report_error = AWAY
    hit(following.copy, 0, 0)
    with monkeypatch.context() as often:
        often.setattr(follower_module, "REPORT_EVERY_S", 0.0)
        stream.say(synced(7), synced(8))
        following.at(8)
    hit(following.copy, 0, 1)
    following.service.report_error = None
    following.follower.close()
    ids = following.copy.layers[0]._row_ids.tolist()
    assert hits_of(following.service)[-2:] == [(1, 0, ids[:1], [1]), (2, 0, ids[1:2], [1])]


def test_closing_while_it_copies(following: Following) -> None:
    _, stream = following.service.asked()
    stream.say(*WHOLE[:2])
    following.follower.close()
    following.follower.close()
    assert isinstance(following.follower.obstacle(), ClientClosed)
    assert not following.follower._thread.is_alive()


def test_a_forked_process_is_told(following: Following) -> None:
    following.whole()
    context = multiprocessing.get_context("fork")
    said = context.SimpleQueue()
    child = context.Process(target=lambda: said.put(str(following.follower.obstacle())))
    child.start()
    assert "does not work in process" in said.get()
    child.join()
    assert following.follower.obstacle() is None


def test_what_does_not_fit_is_not_loaded() -> None:
    with Following(budget=1000) as one:
        _, stream = one.service.asked()
        stream.say(start())
        with pytest.raises(ReplicaTooLarge):
            one.follower.wait_until_complete(PATIENCE_S, QUIET)
        assert not one.copy.layers


def just_enough() -> Following:
    """A follower whose budget is used up by a memory of 3 entries a layer and their headroom."""
    one = Following()
    one.copy.prepare(described())
    assert one.copy._size is not None
    rows = sum(layer.capacity for layer in one.copy.layers.values())
    one.copy._budget = Budget(rows * one.copy._size.row_bytes)
    return one


def test_a_memory_that_outgrows_its_replica(caplog: pytest.LogCaptureFixture) -> None:
    """It is older and older, which is said, until there is room again."""
    with just_enough() as one:
        stream = one.whole()
        one.copy._size = replace(one.copy._size, entries={0: 1000, 1: 3})
        stream.say(upserted(0, range(1000, 1300)))
        asked, stream = one.service.asked()
        assert asked["after"].version == 7
        assert one.follower.obstacle() is None
        assert "the replica of memory 'law' is full: layer 0 needs" in caplog.text
        stream.say(start(described()), deleted(0, [1]), synced(8))
        one.at(8)
        assert one.found(0) == {2, 3}


def test_a_replacement_that_does_not_fit_beside_the_old_entries() -> None:
    """Is copied in their place, and nothing is answered meanwhile."""
    with just_enough() as one:
        stream = one.whole()
        stream.say(upserted(0, range(1000, 1250)), upserted(0, range(2000, 2250)))
        asked, stream = one.service.asked()
        assert asked["held"] == {}
        obstacle = one.follower.obstacle()
        assert isinstance(obstacle, ServiceUnavailable)
        assert obstacle.cause == "replica_incomplete"
        stream.say(start(), upserted(0, range(1000, 1250)), synced(8))
        one.at(8)
        assert one.found(0) == set(range(1000, 1250))


def test_messages_that_contradict_themselves(following: Following) -> None:
    stream = following.whole()
    broken = upserted(0, [9])
    broken.upserted.keys.shape[:] = [2, D]
    stream.say(broken)
    asked, stream = following.service.asked()
    assert asked["after"].version == 7
    stream.say(start(), upserted(0, [9]), synced(8))
    following.at(8)
    assert following.found(0) == {1, 2, 3, 9}


def test_a_device_that_is_full(following: Following, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model took what was free when the budget was made: the copy grows old, and the next try may fit."""
    stream = following.whole()
    with monkeypatch.context() as full:

        def no_room(_: object) -> int:
            raise torch.OutOfMemoryError("CUDA out of memory")

        full.setattr(following.copy, "stage", no_room)
        stream.say(upserted(0, [9]))
        _, stream = following.service.asked()
        assert "does not fit on its device" in str(following.follower._failure)
        assert following.follower.obstacle() is None
    stream.say(start(), upserted(0, [9]), synced(8))
    following.at(8)
    assert following.found(0) == {1, 2, 3, 9}


def test_an_error_that_nobody_thought_of_is_not_lost(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(follower_module.threading, "excepthook", caught.append)
    stream = following.whole()
    monkeypatch.setattr(following.copy, "commit", lambda: 1 / 0)
    stream.say(synced(8))
    following.follower._thread.join(PATIENCE_S)
    assert [error.exc_type for error in caught] == [ZeroDivisionError]
    assert following.follower.obstacle() is not None
