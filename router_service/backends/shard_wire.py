"""Messages between the service and an engine process: a JSON header and arrays, over a stream socket.

u64 bytes of what follows | u64 bytes of the header | header (JSON, padded to 8 bytes) | arrays, each padded to 8
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_service.arrays import Entries, Provenance

Array = NDArray[Any]
Header = dict[str, Any]

_SIZES = struct.Struct("<QQ")
_ALIGN = 8
_PROVENANCE = ("source", "example", "position", "token", "gain", "created_unix_ms")


class Connection:
    """One end of a socket; messages go out and come in whole."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, header: Header, arrays: Sequence[Array] = ()) -> None:
        """Sends a message. Raises OSError when the other end is gone."""
        packed = [np.ascontiguousarray(array) for array in arrays]
        shapes = [[array.dtype.str, array.shape] for array in packed]
        text = json.dumps(header | {"arrays": shapes}).encode()
        parts: list[Any] = [_padded(text)]
        for array in packed:
            parts += [array.reshape(-1).view(np.uint8).data, _padding(array.nbytes)]
        size = _SIZES.size - 8 + sum(map(len, parts))
        self._send_all([_SIZES.pack(size, len(text)), *parts])

    def receive(self) -> tuple[Header, list[Array]] | None:
        """The next message, its arrays writable views of one buffer; None when the other end is closed."""
        sizes = self._read(_SIZES.size)
        if sizes is None:
            return None
        size, header_bytes = _SIZES.unpack(sizes)
        body = self._read(size - 8)
        if body is None:
            return None
        header: Header = json.loads(bytes(body[:header_bytes]))
        return header, _arrays(body, header_bytes, header.pop("arrays"))

    def close(self) -> None:
        """Closing twice is allowed."""
        self._socket.close()

    def _send_all(self, parts: list[Any]) -> None:
        views = [memoryview(part) for part in parts if len(part)]
        while views:
            sent = self._socket.sendmsg(views[:512])
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def _read(self, size: int) -> bytearray | None:
        buffer = bytearray(size)
        view, got = memoryview(buffer), 0
        while got < size:
            count = self._socket.recv_into(view[got:])
            if not count:
                return None
            got += count
        return buffer


def _arrays(body: bytearray, header_bytes: int, shapes: list[Any]) -> list[Array]:
    start = header_bytes + len(_padding(header_bytes))
    arrays: list[Array] = []
    for dtype, shape in shapes:
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, np.dtype(dtype), count, start)
        arrays.append(array.reshape(shape))
        start += array.nbytes + len(_padding(array.nbytes))
    return arrays


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGN)


def _padded(text: bytes) -> bytes:
    return text + _padding(len(text))


def entries_message(entries: Entries) -> tuple[Header, list[Array]]:
    """Entries as header and arrays; provenance that says nothing is left out."""
    rows = [[getattr(each, name) for name in _PROVENANCE] for each in entries.provenance]
    return {"provenance": rows}, [entries.ids, entries.keys, entries.values]


def entries_of_message(header: Header, arrays: Sequence[Array]) -> Entries:
    """Inverse of entries_message."""
    ids, keys, values = arrays
    provenance = [
        Provenance(**dict(zip(_PROVENANCE, row, strict=True))) for row in header["provenance"]
    ]
    return Entries(ids, keys, values, provenance)
