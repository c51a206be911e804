"""The log of changes: which ids changed since a version, or that this is not known any more."""

from __future__ import annotations

import numpy as np
import pytest

from router_service.arrays import U64
from router_service.backends.base import Versions
from router_service.errors import ReplicaBehind
from router_service.memories import changes
from router_service.memories.changes import SETTINGS, ChangeLog, Position


def ids(*numbers: int) -> U64:
    return np.array(numbers, np.uint64)


def write(log: ChangeLog, versions: Versions, layer: int, *numbers: int) -> None:
    with log.changing(layer, ids(*numbers)):
        versions.advance()


def since(log: ChangeLog, place: int) -> dict[int, list[int]]:
    return {layer: found.tolist() for layer, found in log.since(place)[0].items()}


@pytest.fixture
def versions() -> Versions:
    return Versions(5)


@pytest.fixture
def log(versions: Versions) -> ChangeLog:
    return ChangeLog(versions)


def test_what_changed_by_layer_each_id_once(log: ChangeLog, versions: Versions) -> None:
    place = log.end
    write(log, versions, 1, 3, 2)
    write(log, versions, 0, 9)
    write(log, versions, 1, 2, 4)
    assert since(log, place) == {0: [9], 1: [2, 3, 4]}
    assert since(log, place + 2) == {1: [2, 4]}
    assert since(log, log.end) == {}


def test_a_position_is_where_the_changes_of_later_versions_begin(
    log: ChangeLog, versions: Versions
) -> None:
    write(log, versions, 0, 1)
    position = log.settled(log.end, [0])
    assert position == Position(log.epoch, 6)
    write(log, versions, 0, 2)
    assert since(log, log.place_of(position)) == {0: [2]}
    assert since(log, log.place_of(Position(log.epoch, 5))) == {0: [1, 2]}
    for behind in (Position(log.epoch, 4), Position(log.epoch, 8), Position("another", 6)):
        with pytest.raises(ReplicaBehind):
            log.place_of(behind)


def test_a_copy_is_of_no_version_while_something_changes(
    log: ChangeLog, versions: Versions
) -> None:
    with log.changing(1, ids(1)):
        versions.advance()
        assert log.settled(log.end, [1]) is None
        assert log.settled(log.end, [0]) is not None  # another layer
    assert log.settled(log.end - 1, [0]) is None  # not read yet
    assert log.settled(log.end, [1]) == Position(log.epoch, 6)
    with log.changing(SETTINGS):
        assert log.settled(log.end, [0]) is None


def test_a_change_that_fails_may_have_been_made(log: ChangeLog) -> None:
    with pytest.raises(OSError, match="disk"), log.changing(0, ids(7)):
        raise OSError("disk")
    assert since(log, 1) == {0: [7]}
    assert log.settled(log.end, [0]) is not None


def test_it_remembers_so_much(
    log: ChangeLog, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "_MOST_IDS", 4)
    place = log.end
    for number in range(6):
        write(log, versions, 0, number)
    with pytest.raises(ReplicaBehind):
        log.since(place)
    assert since(log, log.place_of(Position(log.epoch, 7))) == {0: [2, 3, 4, 5]}
    with pytest.raises(ReplicaBehind):
        log.place_of(Position(log.epoch, 6))


def test_after_a_restart_nobody_goes_on(log: ChangeLog, versions: Versions) -> None:
    place, position = log.end, log.settled(log.end, [0])
    assert position is not None
    log.restart()
    with pytest.raises(ReplicaBehind):
        log.since(place)
    with pytest.raises(ReplicaBehind):
        log.place_of(position)
    assert log.settled(place, [0]) is None


def test_others_changes_make_another_version(log: ChangeLog, versions: Versions) -> None:
    position = log.settled(log.end, [0])
    assert position is not None
    log.found(0, ids(1))
    assert versions.now == position.version + 1
    assert since(log, log.place_of(position)) == {0: [1]}


def test_a_wait_ends_with_a_change_or_with_what_else_is_waited_for(log: ChangeLog) -> None:
    place = log.end
    assert not log.wait(place, lambda: False, 0.0)
    assert log.wait(place, lambda: True, 60.0)
    log.found(0, ids(1))
    assert log.wait(place, lambda: False, 60.0)
