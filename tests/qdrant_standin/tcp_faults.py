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
    """Passes bytes on to 127.0.0.1:`target_port` from __enter__ to __exit__, unless told otherwise.

    What one method switches on stays until heal(); reset() breaks what is open and nothing else.
    """

    def __init__(self, target_port: int, target_host: str = "127.0.0.1") -> None:
        self.port = 0
        self._target = (target_host, target_port)
        self._bytes_per_s: float | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
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
        self._do(_end_tasks)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_TIMEOUT_S)
        self._loop.close()

    @property
    def url(self) -> str:
        """What clients are given."""
        return f"http://127.0.0.1:{self.port}"

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
            self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _reset(self) -> None:
        for writer in tuple(self._writers):
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            from_target, to_target = await asyncio.open_connection(*self._target)
        except OSError:
            self._close(writer)
            return
        self._writers.add(to_target)
        await asyncio.gather(self._pump(reader, to_target), self._pump(from_target, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while block := await reader.read(_BLOCK):
                await self._pass_on(block, writer)
        except OSError:
            pass  # the other side sees its own end of it
        finally:
            self._close(writer)

    async def _pass_on(self, block: bytes, writer: asyncio.StreamWriter) -> None:
        while block:
            await self._flowing.wait()
            piece = block
            if self._bytes_per_s is not None:
                piece = block[: max(1, int(self._bytes_per_s / _PIECES_PER_S))]
                await asyncio.sleep(len(piece) / self._bytes_per_s)
            writer.write(piece)
            await writer.drain()
            block = block[len(piece) :]

    def _close(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
