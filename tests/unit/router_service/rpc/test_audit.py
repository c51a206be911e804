"""What the audit log has of calls that are refused again and again; the clock is the test's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from knnmoe.v1 import memory_admin_pb2 as admin_pb

from router_service.errors import InvalidField, PermissionDenied, Unauthenticated
from router_service.rpc.audit import FIRST_LINES, KINDS, OTHERS, WINDOW_S, AuditLog, Line
from router_service.rpc.authority import Authority
from tests.integration.identities import SECRETS, TOKENS, token_table, write

MIDNIGHT = 1_796_083_200.0  # 2026-12-01T00:00:00Z


class Watched:
    """An audit log, what it wrote, and what time it is."""

    def __init__(self) -> None:
        self.now = MIDNIGHT
        self.lines: list[dict[str, Any]] = []
        self.log = AuditLog(lambda line: self.lines.append(json.loads(line)), lambda: self.now)

    def refuse(self, times: int = 1, **line: Any) -> None:
        for _ in range(times):
            self.log.refused(line_of(**line))

    def counted(self) -> Counter[str]:
        """Refusals by result, of lines and of those that were left out."""
        found: Counter[str] = Counter()
        for each in self.lines:
            found[each["result"]] += each.get("left_out", 1)
        return found


def line_of(**given: Any) -> Line:
    usual: dict[str, Any] = {
        "who": "",
        "peer": "ipv4:10.0.0.7:41822",
        "call": "RoutingService/Route",
        "memories": (),
        "result": "Unauthenticated",
    }
    return Line(**(usual | given))


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_the_first_of_a_kind_have_lines_and_the_others_are_counted(watched: Watched) -> None:
    watched.refuse(FIRST_LINES)
    watched.now += 10
    watched.refuse(1000)
    watched.now += 20
    watched.refuse()
    assert len(watched.lines) == FIRST_LINES
    watched.log.look()
    assert len(watched.lines) == FIRST_LINES
    watched.now = MIDNIGHT + WINDOW_S
    watched.log.look()
    assert watched.lines[FIRST_LINES:] == [
        {
            "time": "2026-12-01T00:00:30Z",
            "who": "",
            "peer": "ipv4:10.0.0.7",
            "call": "RoutingService/Route",
            "memories": [],
            "result": "Unauthenticated",
            "left_out": 1001,
            "since": "2026-12-01T00:00:10Z",
        }
    ]
    watched.log.look()
    watched.log.close()
    assert len(watched.lines) == FIRST_LINES + 1


def test_the_next_window_begins_with_lines_and_the_summary_is_before_them(watched: Watched) -> None:
    watched.refuse(FIRST_LINES + 2)
    watched.now += WINDOW_S
    watched.refuse()
    assert [line.get("left_out") for line in watched.lines] == [*[None] * FIRST_LINES, 2, None]


def test_a_clock_that_is_set_back_loses_nothing(watched: Watched) -> None:
    watched.refuse(FIRST_LINES + 2)
    watched.now -= 3600
    watched.refuse()
    assert watched.counted() == {"Unauthenticated": FIRST_LINES + 3}


def test_calls_that_changed_something_are_always_written(watched: Watched) -> None:
    watched.refuse(100 * FIRST_LINES, result="PermissionDenied", who="admin")
    for _ in range(1000):
        watched.log.changed(line_of(who="admin", result="ok", memories=("law",)))
    assert watched.counted()["ok"] == 1000


def test_who_is_known_has_lines_of_his_own(watched: Watched) -> None:
    watched.refuse(100)
    watched.refuse(who="reader", result="PermissionDenied")
    watched.refuse(peer="ipv4:10.0.0.8:50000")
    watched.refuse(call="MemoryAdminService/Stats")
    assert len(watched.lines) == FIRST_LINES + 3


@pytest.mark.parametrize(
    "peers",
    [
        [f"ipv4:10.0.0.7:{port}" for port in range(40000, 41000)],
        [f"ipv6:%5B::1%5D:{port}" for port in range(40000, 41000)],
        [f".route socket {number}" for number in range(1000)],
    ],
)
def test_another_connection_is_no_other_caller(watched: Watched, peers: list[str]) -> None:
    for peer in peers:
        watched.refuse(peer=peer)
    assert len(watched.lines) == FIRST_LINES
    watched.log.close()
    assert watched.lines[-1]["peer"] == peers[0][: -len(peers[0].split(":")[-1].split()[-1]) - 1]
    assert watched.counted() == {"Unauthenticated": 1000}


def test_however_many_call_there_are_so_many_lines(watched: Watched) -> None:
    for caller in range(10_000):
        watched.refuse(10, peer=f"ipv4:10.0.{caller // 256}.{caller % 256}:1")
    watched.refuse(who="reader", result="PermissionDenied")
    assert watched.lines[-1]["who"] == "reader"
    watched.log.close()
    assert len(watched.lines) == (FIRST_LINES + 1) * KINDS + 2
    assert watched.counted() == {"Unauthenticated": 100_000, "PermissionDenied": 1}
    assert watched.lines[-1]["peer"] == OTHERS


def test_a_name_is_cut(watched: Watched) -> None:
    watched.refuse(memories=("x" * 10**6,), who="reader", result="PermissionDenied")
    [name] = watched.lines[0]["memories"]
    assert name == "x" * 200 + "... (1000000 characters)"


PACKAGE, TIMES = "/knnmoe.v1.", 3 * FIRST_LINES
UPSERT, DELETE = "MemoryAdminService/Upsert", "MemoryAdminService/DeleteMemory"


@pytest.fixture
def authority(tmp_path: Path, watched: Watched) -> Authority:
    """Whose tokens are those of TOKENS."""
    tokens = write(tmp_path / "tokens.toml", "\n".join(map(token_table, TOKENS)))
    made = Authority(tokens)
    made.audit = watched.log
    return made


def make(authority: Authority, call: str, name: str, memories: list[str]) -> None:
    """A call of messages on these memories, until one is refused, and then one that cannot be read."""
    with authority.call(PACKAGE + call, SECRETS[name], lambda: "unix:") as begun:
        begun.goes_on()
        for memory in memories:
            begun.require(admin_pb.UpsertRequest(memory=memory))
        raise InvalidField("request", "1 bytes", "a message of the method's type")


@pytest.mark.parametrize(
    ("call", "name", "memories", "result", "has_lines"),
    [
        (UPSERT, "learner", ["law", "medicine"], "PermissionDenied", True),  # the first is written
        (UPSERT, "learner", ["law"], "InvalidField", True),
        (UPSERT, "learner", ["medicine"], "PermissionDenied", False),
        (DELETE, "admin", ["law"], "InvalidField", True),
        (DELETE, "admin", [], "InvalidField", False),
        (DELETE, "reader", [], "InvalidField", False),
        ("RoutingService/RouteStream", "reader", ["law", "medicine"], "PermissionDenied", False),
    ],
)
def test_what_may_have_changed_something_has_its_line(
    authority: Authority,
    watched: Watched,
    call: str,
    name: str,
    memories: list[str],
    result: str,
    has_lines: bool,
) -> None:
    for _ in range(TIMES):
        with pytest.raises((InvalidField, PermissionDenied)):
            make(authority, call, name, memories)
    assert len(watched.lines) == (TIMES if has_lines else FIRST_LINES)
    watched.log.close()
    assert watched.counted() == {result: TIMES}
    assert {(each["who"], each["call"]) for each in watched.lines} == {(name, call)}


def test_a_stream_whose_token_was_withdrawn_has_its_line(
    authority: Authority, watched: Watched, tmp_path: Path
) -> None:
    watched.refuse(TIMES, who="learner", call=UPSERT, result="Unauthenticated")

    def withdraw() -> None:
        write(tmp_path / "tokens.toml", token_table("root"))
        with pytest.raises(Unauthenticated):
            authority.grant(b"unknown")  # the file is looked at when one comes

    def stream() -> None:
        with authority.call(PACKAGE + UPSERT, SECRETS["learner"], lambda: "unix:") as begun:
            begun.require(admin_pb.UpsertRequest(memory="law"))
            withdraw()
            begun.goes_on()

    with pytest.raises(Unauthenticated):
        stream()
    assert watched.lines[-1]["memories"] == ["law"]
