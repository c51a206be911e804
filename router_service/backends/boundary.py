"""The one place where exceptions of the engine and of the file system become StorageErrors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from router_service.errors import (
    CorruptMemory,
    DirectoryInUse,
    DiskFull,
    RoutingServiceError,
    StorageError,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
# An open that fails on one of these says nothing about the files themselves.
_NOT_DAMAGE = (errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EROFS)


@contextmanager
def storage_call(action: str, *, opening: bool = False) -> Iterator[None]:
    """Maps whatever fails inside to a StorageError that says what was attempted, e.g. "open /data/x".

    The engine raises bare Exceptions, and panics that are BaseExceptions and would pass any `except Exception`.
    `opening`: a failure without another cause means that the files are damaged.
    """
    try:
        yield
    except (RoutingServiceError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise _storage_error(error, action, opening) from error


def _storage_error(error: BaseException, action: str, opening: bool) -> StorageError:
    text = f"cannot {action}: {type(error).__name__}: {error}"
    if "WouldBlock" in text:
        return DirectoryInUse(
            f"cannot {action}: another process has it open; stop it, or choose another directory"
        )
    if _has_errno(error, _FULL) or "No space left" in text or "StorageFull" in text:
        return DiskFull(text)
    if opening and not _has_errno(error, _NOT_DAMAGE):
        return CorruptMemory(f"{text}; restore the memory from a snapshot")
    return StorageError(text)


def _has_errno(error: BaseException, numbers: tuple[int, ...]) -> bool:
    """Whether an OSError, or the engine's text of one, carries one of these numbers."""
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"os error {number})" in str(error) for number in numbers)
