"""A TCP proxy before a server, stand-in or real, that breaks connections on purpose."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

_BLOCK = 1 << 16
_PIECES_PER_S = 20
_TIMEOUT_S = 10.0
# SO_LINGER of no seconds: closing sends RST.
_NO_LINGER = struct.pack("ii", 1, 0)


class TcpFaults:
    """Passes bytes on from `host` to `target_host`:`target_port` from __enter__ to __exit__, unless told otherwise.

    What one method switches on stays until heal(); reset() breaks what is open and nothing else. `listen`: how the
    socket is made, for one in another network namespace.
    """

    def __init__(
        self,
        target_port: int,
        target_host: str = "127.0.0.1",
        host: str = "127.0.0.1",
        port: int = 0,
        listen: Callable[[tuple[str, int]], socket.socket] = socket.create_server,
    ) -> None:
        self.host, self.port, self._make_listener = host, port, listen
        self._target = (target_host, target_port)
        self._bytes_per_s: float | None = None
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._listener: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="tcp-faults", daemon=True
        )

    def __enter__(self) -> TcpFaults:
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_S)
        self._loop.close()

    @property
    def url(self) -> str:
        """What clients are given."""
        return f"http://{self.host}:{self.port}"

    def reset(self) -> None:
        """Ends open connections with RST."""
        self._do(self._reset)

    def refuse(self) -> None:
        """New connections are refused; open ones go on."""
        self._do(self._stop_listening)

    def black_hole(self) -> None:
        """Connections stay open, new ones too, but no byte passes; heal() lets those on that wait."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def slow(self, bytes_per_s: float) -> None:
        """Each direction of a connection carries so many bytes a second."""
        self._bytes_per_s = bytes_per_s

    def heal(self) -> None:
        """Passes bytes on again, and takes connections on the same port."""
        self._bytes_per_s = None
        self._loop.call_soon_threadsafe(self._flowing.set)
        self._do(self._listen)

    def _do(self, action: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(action(), self._loop).result(_TIMEOUT_S)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = self._make_listener((self.host, self.port))
            self._listener.setblocking(False)
            self.port = self._listener.getsockname()[1]
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def _reset(self) -> None:
        for near in self._connections.values():
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        for task in tuple(self._connections):
            await _cancelled(task)

    def _accept(self, listener: socket.socket) -> None:
        try:
            near, _ = listener.accept()
        except OSError:
            return  # the other side has gone already
        near.setblocking(False)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._join(near))
        self._connections[task] = near
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).close()

    async def _join(self, near: socket.socket) -> None:
        with socket.socket() as far:
            far.setblocking(False)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._loop.sock_connect(far, self._target)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pump(near, far))
                    both.create_task(self._pump(far, near))
            except* OSError:
                pass  # one side ended the connection, and now the other sees its end

    async def _pump(self, source: socket.socket, target: socket.socket) -> None:
        while block := await self._loop.sock_recv(source, _BLOCK):
            await self._pass_on(block, target)
        target.shutdown(socket.SHUT_WR)

    async def _pass_on(self, block: bytes, target: socket.socket) -> None:
        while block:
            await self._flowing.wait()
            piece = block
            if self._bytes_per_s is not None:
                piece = block[: max(1, int(self._bytes_per_s / _PIECES_PER_S))]
                await asyncio.sleep(len(piece) / self._bytes_per_s)
            await self._loop.sock_sendall(target, piece)
            block = block[len(piece) :]


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Returns when the task has ended and its callbacks have run."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
