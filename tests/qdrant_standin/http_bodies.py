"""Bodies of HTTP requests: with a length or in chunks, and the file of a form."""

from __future__ import annotations

import re
from email.message import Message
from typing import Protocol

_BOUNDARY = re.compile(r'boundary="?([^";]+)"?')
_FILE_NAME = re.compile(rb'filename="([^"]*)"')


class BadBody(Exception):
    """A body that is not what it should be."""


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


def read_body(headers: Message, stream: _Stream) -> bytes:
    """The whole body. Raises BadBody when its sender breaks off."""
    if headers.get("transfer-encoding", "").lower() != "chunked":
        length = int(headers.get("content-length", 0))
        if len(body := stream.read(length)) < length:
            raise BadBody("Multipart error: Error during field data handling: Incomplete stream")
        return body
    blocks = []
    while size := int(stream.readline().split(b";")[0], 16):
        blocks.append(stream.read(size))
        stream.readline()
    while stream.readline().strip():
        pass  # trailers, which an empty line ends
    return b"".join(blocks)


def uploaded_file(content_type: str, body: bytes, field: str) -> tuple[str, bytes]:
    """Name and content of the file in a form's field. Raises BadBody."""
    boundary = _BOUNDARY.search(content_type)
    if not content_type.startswith("multipart/form-data") or boundary is None:
        raise BadBody("Could not find Content-Type header")
    for part in body.split(b"--" + boundary[1].encode())[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        if f'name="{field}"'.encode() in head:
            name = _FILE_NAME.search(head)
            file_name = name[1].decode() if name else ""
            return file_name.rsplit("/", 1)[-1], content.removesuffix(b"\r\n")
    raise BadBody(f"Multipart error: Field with name '{field}' is required")
