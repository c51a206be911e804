"""Starting and stopping the service within this process."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from knnmoe.client.direct import SUFFIX

from router_service.errors import StorageError
from router_service.rpc import server as server_module
from router_service.rpc.server import RoutingServer
from router_service.settings import EXACT, ServiceSettings


def _settings(tmp_path: Path, listen: str = "127.0.0.1:0") -> ServiceSettings:
    return ServiceSettings(data=tmp_path, listen=listen, backend=EXACT, drain_s=0)


class LateCall:
    """A gRPC server with a call that only the third cancellation reaches."""

    def __init__(self) -> None:
        self.graces: list[float | None] = []
        self._stopped = threading.Event()

    def stop(self, grace: float | None) -> threading.Event:
        self.graces.append(grace)
        if len(self.graces) == 3:
            self._stopped.set()
        return self._stopped


def test_a_call_that_misses_the_cancellation_is_cancelled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CANCEL_AGAIN_S", 0.001)
    server = RoutingServer(_settings(tmp_path))
    late = LateCall()
    monkeypatch.setattr(server, "_grpc", late)
    server.stop()
    assert late.graces == [0, 0, 0]


def test_stop_before_start_and_twice(tmp_path: Path) -> None:
    server = RoutingServer(_settings(tmp_path))
    server.stop()
    server.stop()


def test_a_start_that_fails_can_be_stopped(tmp_path: Path) -> None:
    first = RoutingServer(_settings(tmp_path))
    first.start()
    second = RoutingServer(_settings(tmp_path, first.address))
    with pytest.raises(StorageError, match="cannot listen on"):
        second.start()
    second.stop()
    first.stop()


@pytest.mark.parametrize("taken_by", ["a file", "a service", "a service that hangs"])
@pytest.mark.parametrize("suffix", ["", SUFFIX])
def test_a_socket_s_path_that_is_another_s_is_not_taken(
    tmp_path: Path, taken_by: str, suffix: str
) -> None:
    path = Path(f"{tmp_path}/s{suffix}")
    server = RoutingServer(_settings(tmp_path / "data", f"unix:{tmp_path}/s"))
    with ExitStack() as stack:
        if taken_by == "a file":
            path.write_text("precious")
        else:
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.bind(str(path))
            other.listen(0)
        while taken_by == "a service that hangs":  # until it takes no more connections
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(path)) != 0:
                break
        before = path.stat()
        with pytest.raises(StorageError, match=f"listen on unix:{path}: .*choose another --listen"):
            server.start()
        server.stop()
        assert path.stat().st_ino == before.st_ino
